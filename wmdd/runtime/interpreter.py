"""How Python starts and ends in a process of wmdd itself, where torch brings a million objects."""

import atexit
import gc
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

_THRESHOLD = 10_000
"""Number of new container objects between two collections.  Python's default of 700 slows down the import of torch."""


def expect_many_objects() -> None:
    """Collect garbage less often.  Call this before torch is imported, and only in a process of wmdd itself."""
    gc.set_threshold(_THRESHOLD)


def end(code: int) -> NoReturn:
    """End this process: threads finish, exit handlers run, output is written, and no object is taken apart.

    Python takes all modules apart, which lasts more than a second once torch is imported.  The processes of
    multiprocessing end as here.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)
