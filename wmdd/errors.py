"""Errors that users see, and their exit codes."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75
"""Exit code after a signal and a checkpoint: the same command resumes (EX_TEMPFAIL of sysexits.h)."""


class WmddError(Exception):
    """A failure whose reason fits on one line."""

    exit_code = EXIT_FAILED
    told = False
    """Whether the error was printed"""


class InputError(WmddError):
    """Wrong input from the user.  The message names the place of the mistake and the remedy."""

    exit_code = EXIT_BAD_INPUT


class Interrupted(WmddError):
    """A stop request ended the work after a checkpoint.  The same command resumes it."""

    exit_code = EXIT_RESUMABLE


_EXPECTED = {
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "{le:g} or less",
    "literal_error": "{expected}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length} values",
    "too_long": "a list of at most {max_length} values",
    "missing": "a value: the key is missing",
}
"""Plain words for the errors of pydantic that users meet, by type."""


def tell(error: WmddError) -> None:
    """Print an error on standard error, as the command line does; further calls with the same error print nothing."""
    if not error.told:
        error.told = True
        remedy = (
            "; the same command resumes" if isinstance(error, Interrupted) and "same command" not in str(error) else ""
        )
        print(f"wmdd: {error}{remedy}", file=sys.stderr, flush=True)


def complaint(item: "ErrorDetails", valid: list[str], section: str = "", elsewhere: Sequence[str] = ()) -> str:
    """Return one validation error of pydantic as a line; for an unknown key, with the nearest valid name.

    Args:
        item: one item of ``ValidationError.errors()``.
        valid: valid keys of the section.
        section: name of the section, written before the key.
        elsewhere: dotted names of all keys, to find a key that is missing only its section.
    """
    key = ".".join(str(part) for part in ([section] if section else []) + list(item["loc"]))
    if item["type"] == "extra_forbidden":
        last = str(item["loc"][-1])
        homes = [name for name in elsewhere if name.endswith(f".{last}")]
        hint = f"did you mean {' or '.join(map(repr, homes))}?" if homes else nearest(last, valid)
        return f"unknown key {key!r}: {hint}"
    message = reason(item)
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"{key}: {message}{given}" if key else message


def reason(item: "ErrorDetails") -> str:
    """Return the message of one validation error of pydantic, in plain words."""
    if item["type"] in _EXPECTED:
        return "expected " + _EXPECTED[item["type"]].format(**item.get("ctx", {}))
    return str(item["msg"]).removeprefix("Value error, ")


def nearest(name: str, valid: list[str]) -> str:
    """Return a hint such as ``did you mean 'ipc'?``, or the list of valid names when none is close."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
