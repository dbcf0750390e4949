"""Errors that users see, and their exit codes."""

import sys
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


def tell(error: WmddError) -> None:
    """Print an error on standard error, as the command line does; further calls with the same error print nothing."""
    if not error.told:
        error.told = True
        print(f"wmdd: {error}", file=sys.stderr, flush=True)


def complaint(item: "ErrorDetails", valid: list[str], section: str = "") -> str:
    """Return one validation error of pydantic as a line; for an unknown key, with the nearest valid name.

    Args:
        item: one item of ``ValidationError.errors()``.
        valid: valid keys of the section.
        section: name of the section, written before the key.
    """
    key = ".".join(str(part) for part in ([section] if section else []) + list(item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {nearest(str(item['loc'][-1]), valid)}"
    message = reason(item)
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"{key}: {message}{given}" if key else message


def reason(item: "ErrorDetails") -> str:
    """Return the message of one validation error of pydantic."""
    return str(item["msg"]).removeprefix("Value error, ")


def nearest(name: str, valid: list[str]) -> str:
    """Return a hint such as ``did you mean 'ipc'?``, or the list of valid names when none is close."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
