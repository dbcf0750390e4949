"""The errors a user meets, and the exit codes that go with them."""

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75
"""Checkpointed after a signal: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class WmddError(Exception):
    """Something failed for a reason that one line can state."""

    exit_code = EXIT_FAILED


class InputError(WmddError):
    """What the user gave is wrong; the message names where and what would be right."""

    exit_code = EXIT_BAD_INPUT


class Interrupted(WmddError):
    """A signal asked the run to stop; it has checkpointed and the same command resumes it."""

    exit_code = EXIT_RESUMABLE


def nearest(name: str, valid: list[str]) -> str:
    """Return a hint such as ``did you mean 'ipc'?``, or the list of valid names when none is close."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
