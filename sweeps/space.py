"""The space of a sweep: the keys that it varies, and the budget of a trial."""

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
"""Limit on the combinations of a grid."""

Amount = Annotated[StrictInt, Field(ge=1)] | Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)]
"""A whole number, or a share of the config's value."""


class Budget(Strict):
    """Budget of a trial, which is a short version of a run (the proxy)."""

    holdout_per_class: Positive = 40
    """Training images per class that are held out. The objective is measured on these, never on the test set."""
    classes: Positive | None = None
    """Number of classes: the first N of the config's; all by default."""
    iterations: Amount = 0.5
    """Iterations of synthesis: a whole number, or a share of the config's."""
    student_epochs: Amount = 0.5
    """Epochs of the students that judge a complete trial: a whole number, or a share of the config's."""
    student_seeds: Positive = 3
    """Students per network and label regime that judge a complete trial."""
    probe_epochs: Amount = 0.25
    """Epochs of the students that judge intermediate images: a whole number, or a share of ``student_epochs``."""
    probe_seeds: Positive = 1
    """Students per network and label regime that judge intermediate images."""
    rungs: Positive = 3
    """Number of reports of a trial, including the last. Three reports with a reduction of 2 come after a quarter, half
    and all of the iterations."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """Factor between the iterations of two reports. ASHA continues the best 1/reduction of the trials at a report."""


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    points: int = 5
    """Number of values in a grid search"""

    def suggest(self, trial: "optuna.trial.BaseTrial", key: str) -> Any:
        """Return a value of the searcher's choice."""
        if self.integer:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """Return the searcher's distribution of the values."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def encode(self, value: Any) -> Any:
        """Return the searcher's code of a value: the value itself.

        Raises:
            ValueError: the value is outside the range.
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
        """Return values that test the config's limits and type: the bounds and one value between."""
        between = self.low + (self.high - self.low) * 0.381966
        return [int(self.low), int(self.high)] if self.integer else [self.low, between, self.high]


@dataclass(frozen=True)
class Choices:
    """A list of values."""

    values: tuple[Any, ...]
    ordered: bool
    """Whether neighboring values are similar (``grid``), so that the searcher can learn from neighbors"""

    def suggest(self, trial: "optuna.trial.BaseTrial", key: str) -> Any:
        """Return a value of the searcher's choice."""
        if self.ordered:
            return self.values[trial.suggest_int(key, 0, len(self.values) - 1)]
        return self.values[trial.suggest_categorical(key, range(len(self.values)))]

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """Return the searcher's distribution of positions in the list."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        last = len(self.values) - 1
        return IntDistribution(0, last) if self.ordered else CategoricalDistribution(range(last + 1))

    def encode(self, value: Any) -> Any:
        """Return the searcher's code of a value: its position in the list.

        Raises:
            ValueError: the list does not contain the value.
        """
        return self.values.index(value)

    def grid(self) -> list[Any]:
        """Return all values."""
        return list(self.values)

    probes = grid


@dataclass(frozen=True)
class Parameter:
    """A config key, its possible values, and the values of other keys under which it is active."""

    key: str
    domain: Range | Choices
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def active(self, values: Values) -> bool:
        """Return whether the key is active, given the values of the keys before it."""
        return all(key in values and values[key] in wanted for key, wanted in self.when.items())


@dataclass(frozen=True)
class Space:
    """A sweep file: parameters in the order of the file, and the budget of a trial."""

    name: str
    parameters: tuple[Parameter, ...]
    budget: Budget
    source: dict[str, Any]
    """Content of the file; part of the sweep's identity"""

    def suggest(self, trial: "optuna.trial.BaseTrial") -> Values:
        """Return the values of one trial: the searcher's choice for each active key."""
        values: Values = {}
        for parameter in self.parameters:
            if parameter.active(values):
                values[parameter.key] = parameter.domain.suggest(trial, parameter.key)
        return values

    def grid(self) -> list[Values]:
        """Return every combination of the grid values of active keys.

        Raises:
            InputError: there are more than 100,000 combinations.
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
                    f"{self.name}: the grid has more than {_MAX_GRID_POINTS:,} combinations; name fewer values or use"
                    " --search random"
                )
        return found

    def values_in(self, config: Config) -> Values:
        """Return the config's own values of the keys that are active under it."""
        known = {key: value for key, value, _ in describe(config)}
        values: Values = {}
        for parameter in self.parameters:
            if parameter.active(values):
                values[parameter.key] = known[parameter.key]
        return values
