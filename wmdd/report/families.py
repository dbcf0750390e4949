"""Families of methods: each has one colour on every page, whatever else is measured beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from wmdd.report.comparison import REFERENCE

FAMILIES = {
    "barycenter": ("wmdd", "barycenter-global"),
    "statistics": ("ce-pcbn", "ce-global", "sre2l", "cda"),
    "real": ("medoids", "herding", "k-center", "rded", "start"),
    "chance": ("random", "noise", "teacher"),
}
"""Methods by what their images come from; methods of other packages are ``other``."""
TITLES = {
    "barycenter": "barycenters",
    "statistics": "cross-entropy and statistics",
    "real": "selected real images",
    "chance": "random images and noise",
    "other": "other methods",
}
DASHES = ("-", "--", ":", "-.")
"""Lines of one family, told apart."""
MOST = 6
"""Methods that a plot shows in colour; the others are grey until the reader asks for them."""


def bare(method: str) -> str:
    """Return the name of a method without that of its run."""
    return method.partition(" ")[0]


def is_random(row: Mapping[str, Any]) -> bool:
    """Return whether a row of ``aggregate.accuracy`` is of random images, which others are compared with."""
    return bare(row["method"]) == REFERENCE


def family(method: str) -> str:
    """Return the family of a method, by its name with or without that of its run."""
    return next((name for name, own in FAMILIES.items() if bare(method) in own), "other")


def dashes(methods: Sequence[str]) -> dict[str, str]:
    """Return the line style of each method: those of one family differ, and the first of each is solid."""
    seen: dict[str, int] = {}
    styles = {}
    known = [name for own in FAMILIES.values() for name in own]
    for method in sorted(methods, key=lambda one: (known.index(bare(one)) if bare(one) in known else len(known), one)):
        number = seen.get(family(method), 0)
        styles[method] = DASHES[number % len(DASHES)]
        seen[family(method)] = number + 1
    return styles


def foremost(methods: Sequence[str]) -> list[str]:
    """Return the methods to colour: those of this package first, random images always, then the first of the others.

    Args:
        methods: the best first.
    """
    order = sorted(methods, key=lambda one: (bare(one) != "random", bare(one) != "wmdd"))
    return order[:MOST]
