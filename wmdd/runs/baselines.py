"""The baselines of a run: which there are, where they lie, and how each is configured."""

from collections.abc import Mapping
from typing import Any

from wmdd.config.schema import Config, ExternalConfig

RANDOM = "random"
"""The baseline that is drawn several times: its sets cost nothing, and one draw says nothing about the others."""


def baseline_folders(student: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Return method and number of each baseline set by the name of its folder below ``RUN/baselines``.

    Args:
        student: the section ``student`` of a config, as JSON holds it; an older one draws random images once.
    """
    sets = {RANDOM: student.get("baseline_sets", 1)}
    return {
        f"{method}-{number}" if number else method: (method, number)
        for method in student.get("baselines", ())
        for number in range(sets.get(method, 1))
    }


def baselines_of(config: Config) -> dict[str, Config]:
    """Return the config of each baseline set, by the name of its folder below ``RUN/baselines``."""
    return {
        name: _baseline(config, method, number)
        for name, (method, number) in baseline_folders(config.student.model_dump()).items()
    }


def _baseline(config: Config, method: str, number: int) -> Config:
    """Return the same run with another method, and no baselines of its own.

    Of several random sets, each has a seed and one student of its own. An external set is left out unless it is the
    baseline: it decides no image of another method.
    """
    changes: dict[str, Any] = {"name": f"{config.name}/{method}", "method": method, "seed": config.seed + number}
    changes["student.baselines"] = ()
    if method == RANDOM and config.student.baseline_sets > 1:
        changes |= {"student.seeds": 1, "student.first_seed": config.student.first_seed + number}
    if method != "external":
        changes["external"] = ExternalConfig()
    return config.replace(changes)
