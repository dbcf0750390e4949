"""Python's garbage collector, told that the program will be large."""

import gc

_THRESHOLD = 10_000
"""New container objects between two collections; Python's own 700 makes the import of torch an eighth slower."""


def expect_many_objects() -> None:
    """Collect garbage less often.  Call it before torch is imported, in a process that belongs to wmdd alone."""
    gc.set_threshold(_THRESHOLD)
