"""Turns out-of-memory errors into one line that names the config key to change."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wmdd.errors import WmddError


@contextmanager
def within_memory(device: torch.device, remedy: str = "use smaller batches or groups") -> Iterator[None]:
    """Turn an out-of-memory error of the block into one line with the peak memory and the remedy.

    Args:
        device: device of the work.
        remedy: remedy for the message, with the config key to change.

    Raises:
        WmddError: an allocation failed on the device or on the CPU.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        where = _short_of_memory(error, device)
        if where is None:
            raise
        raise WmddError(f"out of memory on {where}, with a peak of {_peak(where)}; {remedy}") from error


def _short_of_memory(error: BaseException, device: torch.device) -> torch.device | None:
    """Return the device that an error reports as out of memory; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return device
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return torch.device("cpu")
    return None


def _peak(device: torch.device) -> str:
    """Return the peak memory of this process on a device, and the device's total memory."""
    if device.type == "cuda":
        peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{peak / 1e9:.1f} GB of {whole / 1e9:.1f} GB"
