"""Values of config keys as people write them."""

from typing import Any

Values = dict[str, Any]
"""Config keys, dotted, and their values in one trial."""


def show(value: Any) -> str:
    """Return a value in three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-".join(show(part) for part in value) if isinstance(value, tuple) else str(value)
