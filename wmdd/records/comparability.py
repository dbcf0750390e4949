"""Likeness: which records may be compared."""

from collections.abc import Iterable, Mapping
from typing import Any

from wmdd.config.schema import DEFAULTS, decides
from wmdd.errors import InputError
from wmdd.storage.files import digest, flatten


def refuse_unlike(what: str, measured: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Refuse to average or compare what was measured under unlike conditions.

    Args:
        what: the subject of the message.
        measured: (run or file, conditions) of each; conditions may be nested.

    Raises:
        InputError: two differ; the message names the keys, both values and both places.
    """
    first: tuple[str, dict[str, Any]] | None = None
    for place, conditions in measured:
        if first is None or conditions == first[1]:
            first = first or (place, conditions)
            continue
        one, other = flatten(first[1]), flatten(conditions)
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        differ = "; ".join(
            f"{key} is {shorten(one.get(key))} in {first[0]} and {shorten(other.get(key))} in {place}" for key in keys
        )
        raise InputError(f"{what} are unlike and are neither averaged nor compared: {differ}")


_RECIPE_DEFAULTS = {
    key.partition(".")[2]: value
    for key, value in DEFAULTS.items()
    if decides(key, "students") and not decides(key, "images")
}


def complete(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with every key of the config that decides students: one from before a key was at its default."""
    return {**_RECIPE_DEFAULTS, **recipe}


def protocol_of(recipe: Mapping[str, Any]) -> str:
    """Return the fingerprint of a recipe; keys at their defaults are left out, so that it outlasts new keys."""
    return digest({key: value for key, value in recipe.items() if value != _RECIPE_DEFAULTS.get(key)})


def shorten(value: Any) -> str:
    """Return a value as text, a SHA-256 by its first 12 digits."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text[:12] if len(text) == 64 and not set(text) - set("0123456789abcdef") else text
