"""What a sweep varies and what a trial may cost: a TOML file, checked against the config before any work starts.

A file has two tables.  ``[parameters]`` names config keys, each with one domain; ``[budget]`` says what a trial costs::

    [parameters]
    synthesis.bn_weight = { loguniform = [0.1, 1e4] }
    barycenter.weights = { choice = ["uniform", "free"] }
    barycenter.rounds = { int = [5, 200], log = true, when = { barycenter.weights = ["free"] } }

    [budget]
    iterations = 0.5      # a share of the config's, or a whole number of them
"""

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StrictFloat, StrictInt, ValidationError

from sweeps.values import Values
from wmdd import methods
from wmdd.config import Config, Positive, Section, describe
from wmdd.errors import InputError, nearest

if TYPE_CHECKING:
    import optuna

DOMAINS = ("loguniform", "uniform", "int", "choice", "grid")
_OPTIONS = ("when", "log", "points")

_MOST = 100_000
"""Combinations of a grid."""

_FIXED = {
    "name": "it decides no result",
    "blocks": "it decides no result",
    "data.": "trials are judged on images of one data set",
    "compute.device": "--gpus decides where trials run",
    "compute.threads": "--cpus decides what a trial gets",
    "compute.workers": "it decides no result",
    "compute.checkpoint_seconds": "it decides no result",
    "student.networks": "trials are judged by one kind of student",
    "student.seeds": "budget.student_seeds decides it",
    "student.baselines": "it decides no result of a trial",
    "labels.regimes": "trials are judged under one kind of label",
    "labels.stored": "it decides no result",
}
"""Keys that no sweep may vary, and why."""

Amount = Annotated[StrictInt, Field(ge=1)] | Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)]
"""A whole number, or a share of what the config says."""


class Budget(Section):
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
class Listed:
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
    domain: Range | Listed
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
            if len(found) > _MOST:
                raise InputError(
                    f"{self.name}: a grid of more than {_MOST:,} combinations; name fewer values or use --search random"
                )
        return found

    def of(self, config: Config) -> Values:
        """Return what the config itself says for the keys of the space that matter under it."""
        known = {key: value for key, value, _ in describe(config)}
        values: Values = {}
        for parameter in self.parameters:
            if parameter.active(values):
                values[parameter.key] = known[parameter.key]
        return values


def space_names() -> list[str]:
    """Return the names of the shipped spaces."""
    folder = resources.files("sweeps") / "spaces"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_space(name: str, config: Config, budget: Mapping[str, Any] | None = None) -> Space:
    """Read a shipped space (``regularization``) or a TOML file, and check it against the config it will vary.

    Args:
        name: name or path.
        config: every value of the space must be one that it could have.
        budget: replaces values of the file's ``[budget]``.

    Raises:
        InputError: no such space, unknown key, a bound the config forbids, an empty space.
    """
    source = _read(name)
    if budget:
        source = {**source, "budget": {**source.get("budget", {}), **budget}}
    return parse_space(name, source, config)


def parse_space(name: str, source: dict[str, Any], config: Config) -> Space:
    """Check the tables of a sweep file against a config, as ``load_space``."""
    for key in source.keys() - {"parameters", "budget"}:
        raise InputError(f"{name}: unknown table {key!r}: {nearest(key, ['parameters', 'budget'])}")
    if not source.get("parameters"):
        raise InputError(f"{name}: the space is empty: [parameters] names no key; such as synthesis.bn_weight")
    parameters = _ordered(name, list(_parameters(name, source)))
    space = Space(name, parameters, _budget(name, source), source)
    _check(space, config)
    return space


def apply(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """Return the config with the values of some dotted keys replaced, all checked anew.

    Raises:
        InputError: a value the config forbids; the message names ``source``, key and value.
    """
    changed: dict[str, Any] = config.model_dump()
    for key, value in values.items():
        *sections, last = key.split(".")
        place = changed
        for section in sections:
            place = place[section]
        place[last] = value
    try:
        return Config.model_validate(changed)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or ", ".join(values)
        raise InputError(f"{source}: {where} = {first['input']!r}: {_message(first)}") from None


def _message(error: Any) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _read(name: str) -> dict[str, Any]:
    if name.endswith(".toml") or "/" in name:
        path: Any = Path(name)
    elif name in space_names():
        path = resources.files("sweeps") / "spaces" / f"{name}.toml"
    else:
        raise InputError(f"--space {name}: no such space; {nearest(name, space_names())} (a file's name ends in .toml)")
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: is not TOML: {error}") from None


def _budget(name: str, source: dict[str, Any]) -> Budget:
    try:
        return Budget.model_validate(source.get("budget", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise InputError(f"{name}: unknown key budget.{key}: {nearest(key, list(Budget.model_fields))}") from None
        if key == "holdout_per_class":
            message = "at least 1: a sweep is judged on images held out of the training set, never on the test set"
        elif key.endswith(("iterations", "epochs")):
            message = "expected a whole number from 1 (10), or a share of the config's up to 1.0 (0.5)"
        else:
            message = _message(first)
        raise InputError(f"{name}: budget.{key} = {first['input']!r}: {message}") from None


def _parameters(name: str, source: dict[str, Any]) -> Iterator[Parameter]:
    for key, entry in _leaves(source.get("parameters", {})):
        where = f"{name}: {key}"
        kinds = [kind for kind in DOMAINS if isinstance(entry, dict) and kind in entry]
        if len(kinds) != 1:
            raise InputError(f"{where}: expected one of {', '.join(DOMAINS)}, such as {{ choice = [1, 2] }}")
        for option in entry.keys() - {kinds[0], *_OPTIONS}:
            raise InputError(f"{where}: unknown option {option!r}: {nearest(option, [*DOMAINS, *_OPTIONS])}")
        values = entry[kinds[0]]
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: {kinds[0]} = {values!r}: expected a list that is not empty")
        when = {other: tuple(_listed(wanted)) for other, wanted in _flat(entry.get("when", {}))}
        yield Parameter(key, _domain(where, kinds[0], values, entry), when)


def _ordered(name: str, parameters: list[Parameter]) -> tuple[Parameter, ...]:
    """Put each key behind those that its ``when`` names: TOML does not keep the order of keys of different sections."""
    domains = {parameter.key: parameter.domain for parameter in parameters}
    for parameter in parameters:
        for other, wanted in parameter.when.items():
            where = f"{name}: {parameter.key}: when {other}"
            domain = domains.get(other)
            if not isinstance(domain, Listed):
                valid = [key for key, known in domains.items() if isinstance(known, Listed)]
                raise InputError(f"{where}: names no key of the space with a choice or a grid; {_near(other, valid)}")
            if missing := [value for value in wanted if value not in domain.values]:
                raise InputError(f"{where} = {missing[0]!r}: never takes that value, only {list(domain.values)}")
    placed: dict[str, Parameter] = {}
    while waiting := [parameter for parameter in parameters if parameter.key not in placed]:
        ready = next((parameter for parameter in waiting if parameter.when.keys() <= placed.keys()), None)
        if ready is None:
            raise InputError(f"{name}: {waiting[0].key}: its conditions lead back to itself")
        placed[ready.key] = ready
    return tuple(placed.values())


def _domain(where: str, kind: str, values: list[Any], entry: dict[str, Any]) -> Range | Listed:
    if kind in ("choice", "grid"):
        return Listed(tuple(tuple(value) if isinstance(value, list) else value for value in values), kind == "grid")
    log, points = kind == "loguniform" or entry.get("log", False), entry.get("points", 5)
    if len(values) != 2 or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise InputError(f"{where}: {kind} = {values!r}: expected two numbers, [low, high]")
    low, high = values
    if low >= high:
        raise InputError(f"{where}: {kind} = {values!r}: is empty; the first number must be below the second")
    if log and low <= 0:
        raise InputError(f"{where}: {kind} = {values!r}: a logarithmic range must begin above 0")
    if kind == "int" and not all(type(value) is int for value in values):
        raise InputError(f"{where}: int = {values!r}: expected two whole numbers")
    if type(points) is not int or points < 2:
        raise InputError(f"{where}: points = {points!r}: expected a whole number from 2")
    return Range(low, high, bool(log), kind == "int", points)


def _leaves(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, entry) whether keys are written as ``a.b = {...}``, ``"a.b" = {...}`` or as tables."""
    for key, value in table.items():
        nested = isinstance(value, dict) and value and not value.keys() & {*DOMAINS, *_OPTIONS}
        if nested and all(isinstance(inner, dict) for inner in value.values()):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check(space: Space, config: Config) -> None:
    """Refuse keys and values that the config does not know, so that no trial can fail for them."""
    known = [key for key, _, _ in describe(config)]
    for parameter in space.parameters:
        key, where = parameter.key, f"{space.name}: {parameter.key}"
        if key not in known:
            raise InputError(f"{space.name}: unknown key {key!r}: {_near(key, known)}")
        for fixed, why in _FIXED.items():
            if key == fixed or (fixed.endswith(".") and key.startswith(fixed)):
                raise InputError(f"{where}: cannot be swept: {why}")
        for value in parameter.domain.probes():
            methods.create(apply(config, {key: value}, space.name))
    swept = {parameter.key for parameter in space.parameters}
    for key, amount in {"synthesis.iterations": "iterations", "student.epochs": "student_epochs"}.items():
        if key in swept and isinstance(getattr(space.budget, amount), int):
            raise InputError(f"{space.name}: {key}: is fixed by budget.{amount}; make that a share such as 0.5")


def _near(key: str, known: list[str]) -> str:
    """Return the nearest key, or the keys of its section: all keys would fill the screen."""
    hint = nearest(key, known)
    section = [name for name in known if name.startswith(key.split(".")[0] + ".")]
    return hint if hint.startswith("did") or not section else f"valid: {', '.join(section)}"
