"""The errors a user meets, and the exit codes that go with them."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75
"""Checkpointed after a signal: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class WmddError(Exception):
    """Something failed for a reason that one line can state."""

    exit_code = EXIT_FAILED
    told = False
    """Whether it was printed"""


class InputError(WmddError):
    """What the user gave is wrong; the message names where and what would be right."""

    exit_code = EXIT_BAD_INPUT


class Interrupted(WmddError):
    """A signal asked the run to stop; it has checkpointed and the same command resumes it."""

    exit_code = EXIT_RESUMABLE


def tell(error: WmddError) -> None:
    """Print an error on standard error as the command line does, once however often this is called."""
    if not error.told:
        error.told = True
        print(f"wmdd: {error}", file=sys.stderr, flush=True)


def complaint(item: "ErrorDetails", valid: list[str], section: str = "") -> str:
    """Return one of pydantic's complaints as a line, with the nearest valid name for an unknown key.

    Args:
        item: of ``ValidationError.errors()``.
        valid: the keys that there are at that place.
        section: what the place is called, put before the key.
    """
    key = ".".join(str(part) for part in ([section] if section else []) + list(item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {nearest(str(item['loc'][-1]), valid)}"
    message = reason(item)
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"{key}: {message}{given}" if key else message


def reason(item: "ErrorDetails") -> str:
    """Return the message of one of pydantic's complaints."""
    return str(item["msg"]).removeprefix("Value error, ")


def nearest(name: str, valid: list[str]) -> str:
    """Return a hint such as ``did you mean 'ipc'?``, or the list of valid names when none is close."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
