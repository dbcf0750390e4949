"""Settings of Python's garbage collector for a large program."""

import gc

_THRESHOLD = 10_000
"""Number of new container objects between two collections.  Python's default of 700 slows down the import of torch."""


def expect_many_objects() -> None:
    """Collect garbage less often.  Call this before torch is imported, and only in a process of wmdd itself."""
    gc.set_threshold(_THRESHOLD)
