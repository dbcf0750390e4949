"""The system that a measurement was taken on: what a benchmark's reader asks for, without the host's name."""

import functools
import hashlib
import os
import platform
import re
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

_DRIVER = Path("/proc/driver/nvidia/version")
_PAGE = "SC_PHYS_PAGES", "SC_PAGE_SIZE"


@functools.lru_cache(maxsize=2)
def system(cuda: bool) -> dict[str, Any]:
    """Return kernel, cores, memory and lock file; with CUDA also driver, libraries and every visible GPU.

    What cannot be read is None.

    Args:
        cuda: whether the work runs on GPUs.
    """
    found: dict[str, Any] = {
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "ram_bytes": _ram(),
        "lock_sha256": _lock(Path(__file__).parents[2]),
    }
    return found | (_gpus() if cuda else {})


def _ram() -> int | None:
    with suppress(ValueError, OSError):
        pages, size = (os.sysconf(name) for name in _PAGE)
        return pages * size
    return None


def _lock(root: Path) -> str | None:
    """Return the SHA-256 of the lock file of the checkout, which names every package; None for an installed package."""
    lock = root / "uv.lock"
    return (
        hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() and (root / "pyproject.toml").exists() else None
    )


def _gpus() -> dict[str, Any]:
    import torch

    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "driver": driver_version(_DRIVER.read_text()) if _DRIVER.exists() else None,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "gpus": [
            {"name": one.name, "memory_bytes": one.total_memory, "power_limit_watts": _power_limit(str(one.uuid))}
            for one in devices
        ],
    }


def driver_version(text: str) -> str | None:
    """Return the version of the NVIDIA driver from ``/proc/driver/nvidia/version``."""
    found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", text, flags=re.MULTILINE)
    return found[1] if found else None


def _power_limit(uuid: str) -> float | None:
    """Return the power that a GPU may draw; None without pynvml or the right to ask."""
    try:
        driver = import_module("pynvml")
        driver.nvmlInit()
        handle = driver.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return float(driver.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1e3
    except Exception:
        # An optional reading of a driver we do not control: whatever is wrong with it, there is no figure.
        return None
