"""The baselines of a run: their methods, folders and configs."""

from collections.abc import Mapping
from typing import Any

from wmdd.config.schema import Config, ExternalConfig

RANDOM = "random"
"""The baseline that is drawn several times: a draw costs nothing, and one draw has no interval."""


def baseline_folders(student: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Return method and number of each baseline set, by the name of its folder in ``RUN/baselines``.

    Args:
        student: section ``student`` of a config, as JSON. An old config without ``baseline_sets`` draws random images
            once.
    """
    sets = {RANDOM: student.get("baseline_sets", 1)}
    return {
        f"{method}-{number}" if number else method: (method, number)
        for method in student.get("baselines", ())
        for number in range(sets.get(method, 1))
    }


def baselines_of(config: Config) -> dict[str, Config]:
    """Return the config of each baseline set, by the name of its folder in ``RUN/baselines``."""
    return {
        name: _baseline(config, method, number)
        for name, (method, number) in baseline_folders(config.student.model_dump()).items()
    }


def _baseline(config: Config, method: str, number: int) -> Config:
    """Return the same config with another method, and without baselines.

    Each of several random sets has its own seed and one student. The section ``external`` is dropped unless the
    baseline is the external set: it decides no image of another method.
    """
    changes: dict[str, Any] = {"name": f"{config.name}/{method}", "method": method, "seed": config.seed + number}
    changes["student.baselines"] = ()
    if method == RANDOM and config.student.baseline_sets > 1:
        changes |= {"student.seeds": 1, "student.first_seed": config.student.first_seed + number}
    if method != "external":
        changes["external"] = ExternalConfig()
    return config.replace(changes)
