"""Free memory of this machine, and out-of-memory errors as one line that names the config key to change."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still allocate: those of the machine, or of its control groups if less.

    SLURM and containers limit the memory of a job by control groups. Cached files count as free.

    Args:
        root: folder with ``proc`` and ``sys``.
    """
    meminfo = (root / "proc/meminfo").read_text()
    found = [1024 * int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(base):
                with suppress(OSError, ValueError):  # no such level, or no limit
                    found.append(_free_in(folder, *names))
    return min(found)


def _free_in(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    """Return the free bytes of a control group."""
    cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get(reclaimable, "0")
    used = int((folder / usage).read_text()) - int(cached)
    return int((folder / limit).read_text()) - used
