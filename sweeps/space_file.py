"""A sweep file: TOML, checked against the config before any work starts.

A file has two tables. ``[parameters]`` gives config keys, each with its possible values. ``[budget]`` gives the budget
of a trial::

    [parameters]
    synthesis.bn_weight = { loguniform = [0.1, 1e4] }
    barycenter.weights = { choice = ["uniform", "free"] }
    barycenter.rounds = { int = [5, 200], log = true, when = { barycenter.weights = ["free"] } }

    [budget]
    iterations = 0.5      # a share of the config's iterations, or a whole number
"""

import math
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sweeps.space import Budget, Choices, Parameter, Range, Space
from wmdd.config.loading import describe
from wmdd.config.schema import DECIDES, Config
from wmdd.distill.methods import registry
from wmdd.errors import InputError, nearest, reason
from wmdd.storage.files import read_toml

DOMAINS = ("loguniform", "uniform", "int", "choice", "grid")
_OPTIONS = ("when", "log", "points")

_ELSEWHERE = {
    "compute.device": "--gpus decides where trials run",
    "compute.threads": "--cpus decides the CPUs of a trial",
    "student.seeds": "budget.student_seeds decides it",
}
"""Keys that an option or the budget decides."""
_FIXED = {
    "nothing": "no result depends on it",
    "data": "all trials are judged on the same images",
    "selection": "all trials are judged by the same kind of student",
}
"""Reason why a sweep cannot vary a key, by what the key decides (``wmdd.config.Decides``)."""


def space_names() -> list[str]:
    """Return the names of the shipped spaces."""
    folder = resources.files("sweeps") / "spaces"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_space(name: str, config: Config, budget: Mapping[str, Any] | None = None) -> Space:
    """Read a shipped space (``regularization``) or a TOML file, and check it against the config it will vary.

    Args:
        name: name of the space, or path of a file.
        config: config to vary. It must allow every value of the space.
        budget: values that replace those of the file's ``[budget]``.

    Raises:
        InputError: the space does not exist or is empty, a key is unknown, or the config does not allow a value.
    """
    source = _read(name)
    if budget:
        source = {**source, "budget": {**source.get("budget", {}), **budget}}
    return parse_space(name, source, config)


def parse_space(name: str, source: dict[str, Any], config: Config) -> Space:
    """Check the tables of a sweep file against a config, as in ``load_space``."""
    for key in source.keys() - {"parameters", "budget"}:
        raise InputError(f"{name}: unknown table {key!r}: {nearest(key, ['parameters', 'budget'])}")
    if not source.get("parameters"):
        raise InputError(f"{name}: [parameters] is empty; name at least one key, such as synthesis.bn_weight")
    parameters = _ordered(name, list(_parameters(name, source)))
    space = Space(name, parameters, parse_budget(name, source.get("budget", {})), source)
    _check(space, config)
    return space


def _read(name: str) -> dict[str, Any]:
    if name.endswith(".toml") or "/" in name:
        path: Any = Path(name)
    elif name in space_names():
        path = resources.files("sweeps") / "spaces" / f"{name}.toml"
    else:
        raise InputError(f"--space {name}: no such space; {nearest(name, space_names())} (a file's name ends in .toml)")
    return read_toml(path, name)


def parse_budget(name: str, values: Mapping[str, Any]) -> Budget:
    """Return the budget of these values.

    Raises:
        InputError: a key or a value is wrong.
    """
    try:
        return Budget.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise InputError(f"{name}: unknown key budget.{key}: {nearest(key, list(Budget.model_fields))}") from None
        if key == "holdout_per_class":
            message = "must be at least 1: trials are judged on images held out of the training set"
        elif key.endswith(("iterations", "epochs")):
            message = "expected a whole number such as 10, or a share of the config's value such as 0.5 (at most 1.0)"
        else:
            message = reason(first)
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
    """Sort each key after those of its ``when``: TOML does not keep the order of keys from different sections."""
    domains = {parameter.key: parameter.domain for parameter in parameters}
    for parameter in parameters:
        for other, wanted in parameter.when.items():
            where = f"{name}: {parameter.key}: when {other}"
            domain = domains.get(other)
            if not isinstance(domain, Choices):
                valid = [key for key, known in domains.items() if isinstance(known, Choices)]
                raise InputError(f"{where}: is not a key of the space with a choice or a grid; {_near(other, valid)}")
            if missing := [value for value in wanted if value not in domain.values]:
                raise InputError(f"{where} = {missing[0]!r}: is not a value of that key; valid: {list(domain.values)}")
    placed: dict[str, Parameter] = {}
    while waiting := [parameter for parameter in parameters if parameter.key not in placed]:
        ready = next((parameter for parameter in waiting if parameter.when.keys() <= placed.keys()), None)
        if ready is None:
            raise InputError(f"{name}: {waiting[0].key}: its conditions (when) form a cycle")
        placed[ready.key] = ready
    return tuple(placed.values())


def _domain(where: str, kind: str, values: list[Any], entry: dict[str, Any]) -> Range | Choices:
    if kind in ("choice", "grid"):
        return Choices(tuple(tuple(value) if isinstance(value, list) else value for value in values), kind == "grid")
    log, points = kind == "loguniform" or entry.get("log", False), entry.get("points", 5)
    if len(values) != 2 or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise InputError(f"{where}: {kind} = {values!r}: expected two numbers, [low, high]")
    low, high = values
    if low >= high:
        raise InputError(f"{where}: {kind} = {values!r}: the first number must be below the second")
    if log and low <= 0:
        raise InputError(f"{where}: {kind} = {values!r}: a logarithmic range must start above 0")
    if kind == "int" and not all(type(value) is int for value in values):
        raise InputError(f"{where}: int = {values!r}: expected two whole numbers")
    if type(points) is not int or points < 2:
        raise InputError(f"{where}: points = {points!r}: expected a whole number from 2")
    return Range(low, high, bool(log), kind == "int", points)


def _leaves(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, entry). Keys may be written as ``a.b = {...}``, as ``"a.b" = {...}`` or as tables."""
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
    """Check every key and value against the config, so that no trial fails because of them."""
    known = [key for key, _, _ in describe(config)]
    for parameter in space.parameters:
        key, where = parameter.key, f"{space.name}: {parameter.key}"
        if key not in known:
            raise InputError(f"{space.name}: unknown key {key!r}: {_near(key, known)}")
        what = "data" if key.startswith("data.") else DECIDES[key]
        if why := _ELSEWHERE.get(key) or _FIXED.get(what):
            raise InputError(f"{where}: a sweep cannot vary it: {why}")
        under = {other: wanted[0] for other, wanted in parameter.when.items()}
        for value in parameter.domain.probes():
            registry.create(config.replace({**under, key: value}, space.name))
    swept = {parameter.key for parameter in space.parameters}
    for key, amount in {"synthesis.iterations": "iterations", "student.epochs": "student_epochs"}.items():
        if key in swept and isinstance(getattr(space.budget, amount), int):
            raise InputError(f"{space.name}: {key}: is fixed by budget.{amount}; set that to a share such as 0.5")


def _near(key: str, known: list[str]) -> str:
    """Return a hint: the nearest key, or the keys of the same section. All keys would fill the screen."""
    hint = nearest(key, known)
    section = [name for name in known if name.startswith(key.split(".")[0] + ".")]
    return hint if hint.startswith("did") or not section else f"valid: {', '.join(section)}"
