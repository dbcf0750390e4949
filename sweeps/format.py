"""Values of config keys, formatted for people."""

from typing import Any

Values = dict[str, Any]
"""Values of one trial, by dotted config key."""


def show(value: Any) -> str:
    """Return a value as text, a float with three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-".join(show(part) for part in value) if isinstance(value, tuple) else str(value)
