"""What a sweep varies and what a trial may cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StrictFloat, StrictInt

from sweeps.format import Values
from wmdd.config.loading import describe
from wmdd.config.schema import Config, Positive
from wmdd.config.section import Strict
from wmdd.errors import InputError

if TYPE_CHECKING:
    import optuna

_MAX_GRID_POINTS = 100_000
"""Combinations of a grid."""

Amount = Annotated[StrictInt, Field(ge=1)] | Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)]
"""A whole number, or a share of what the config says."""


class Budget(Strict):
    """The proxy: what a trial does instead of a whole run."""

    holdout_per_class: Positive = 40
    """Images of each training class kept apart; the objective is measured on these, never on the test set."""
    classes: Positive | None = None
    """The first N of the config's classes; all by default."""
    iterations: Amount = 0.5
    """Of synthesis."""
    student_epochs: Amount = 0.5
    """Of the students that judge a finished trial."""
    student_seeds: Positive = 3
    """Students of each network and label regime that judge a finished trial."""
    probe_epochs: Amount = 0.25
    """Of the students that judge intermediate images."""
    probe_seeds: Positive = 1
    """Students of each network and label regime that judge intermediate images."""
    rungs: Positive = 3
    """Times that a trial reports, the end included: with 3 and a reduction of 2 after a quarter, half and all of its
    iterations."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """Factor between the iterations of two reports; ASHA lets the best 1/reduction of a rung go on."""


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    points: int = 5
    """Values that a grid search takes from it"""

    def suggest(self, trial: "optuna.trial.BaseTrial", key: str) -> Any:
        """Return a value of the searcher's choice."""
        if self.integer:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """Return what the searcher draws from."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def encode(self, value: Any) -> Any:
        """Return what the searcher calls a value.

        Raises:
            ValueError: the value is not of this domain.
        """
        if isinstance(value, int | float) and self.low <= value <= self.high:
            return value
        raise ValueError(value)

    def grid(self) -> list[Any]:
        """Return evenly spaced values, the bounds included."""
        shares = [index / (self.points - 1) for index in range(self.points)]
        if self.log:
            values = [math.exp((1 - share) * math.log(self.low) + share * math.log(self.high)) for share in shares]
        else:
            values = [(1 - share) * self.low + share * self.high for share in shares]
        values = [self.low, *values[1:-1], self.high]
        return list(dict.fromkeys(round(value) for value in values)) if self.integer else values

    def probes(self) -> list[Any]:
        """Return values by which the config's limits and type can be checked: the bounds and one between."""
        between = self.low + (self.high - self.low) * 0.381966
        return [int(self.low), int(self.high)] if self.integer else [self.low, between, self.high]


@dataclass(frozen=True)
class Choices:
    """Values named one by one."""

    values: tuple[Any, ...]
    ordered: bool
    """Whether neighbours are alike (``grid``): the searcher then learns from them"""

    def suggest(self, trial: "optuna.trial.BaseTrial", key: str) -> Any:
        """Return a value of the searcher's choice."""
        if self.ordered:
            return self.values[trial.suggest_int(key, 0, len(self.values) - 1)]
        return self.values[trial.suggest_categorical(key, range(len(self.values)))]

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """Return what the searcher draws from: positions."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        last = len(self.values) - 1
        return IntDistribution(0, last) if self.ordered else CategoricalDistribution(range(last + 1))

    def encode(self, value: Any) -> Any:
        """Return what the searcher calls a value: its position.

        Raises:
            ValueError: the value is not of this domain.
        """
        return self.values.index(value)

    def grid(self) -> list[Any]:
        """Return all values."""
        return list(self.values)

    probes = grid


@dataclass(frozen=True)
class Parameter:
    """A config key, the values it takes, and under which values of other keys it matters."""

    key: str
    domain: Range | Choices
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def active(self, values: Values) -> bool:
        """Return whether the key matters beside these values of the keys above it."""
        return all(key in values and values[key] in wanted for key, wanted in self.when.items())


@dataclass(frozen=True)
class Space:
    """A sweep file: parameters in the order of the file, and the budget of a trial."""

    name: str
    parameters: tuple[Parameter, ...]
    budget: Budget
    source: dict[str, Any]
    """The file as it was read; names the sweep"""

    def suggest(self, trial: "optuna.trial.BaseTrial") -> Values:
        """Return the values of one trial, each active key by the searcher's choice."""
        values: Values = {}
        for parameter in self.parameters:
            if parameter.active(values):
                values[parameter.key] = parameter.domain.suggest(trial, parameter.key)
        return values

    def grid(self) -> list[Values]:
        """Return every combination of the grid values of active keys.

        Raises:
            InputError: there are more than any sweep could try.
        """
        found: list[Values] = [{}]
        for parameter in self.parameters:
            longer = []
            for values in found:
                options = parameter.domain.grid() if parameter.active(values) else None
                longer += [values] if options is None else [{**values, parameter.key: value} for value in options]
            found = longer
            if len(found) > _MAX_GRID_POINTS:
                raise InputError(
                    f"{self.name}: a grid of more than {_MAX_GRID_POINTS:,} combinations; name fewer values or use"
                    " --search random"
                )
        return found

    def values_in(self, config: Config) -> Values:
        """Return what the config itself says for the keys of the space that matter under it."""
        known = {key: value for key, value, _ in describe(config)}
        values: Values = {}
        for parameter in self.parameters:
            if parameter.active(values):
                values[parameter.key] = known[parameter.key]
        return values
