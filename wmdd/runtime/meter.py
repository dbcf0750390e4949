"""Cost of a piece of work: time, device time, peak memory, and energy where the driver measures it."""

import resource
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch

_RAPL = Path("/sys/class/powercap")


class Meter:
    """Measures the cost of the work from its creation on.

    Args:
        device: device of the work.
        devices: number of devices that share the work.
    """

    def __init__(self, device: torch.device, devices: int = 1) -> None:
        self._device, self._devices = device, devices
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._energy = energy_joules(device)
        self._begun = time.perf_counter()
        self._before: dict[str, float] = {}

    def add_previous(self, spent: Mapping[str, float]) -> None:
        """Add the cost of earlier, interrupted attempts, as returned by their ``read``."""
        self._before = dict(spent)

    def read(self) -> dict[str, float]:
        """Return ``seconds``, ``device_seconds``, ``peak_bytes`` and, where counters are readable, ``joules``.

        ``peak_bytes``: peak of the device's allocator; on a CPU, of the process since its start.  ``joules``: energy of
        the whole device or CPU package, including other processes, times the number of devices.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = time.perf_counter() - self._begun
        found = {"seconds": seconds, "device_seconds": seconds * self._devices}
        now = energy_joules(self._device)
        if self._energy is not None and now is not None and now >= self._energy:  # energy counters of CPUs wrap around
            found["joules"] = (now - self._energy) * self._devices
        if self._before and "joules" not in self._before:
            found.pop("joules", None)  # would cover only the last attempt
        found = {key: round(value + self._before.get(key, 0.0), 3) for key, value in found.items()}
        return found | {"peak_bytes": max(float(peak), self._before.get("peak_bytes", 0.0))}


def energy_joules(device: torch.device) -> float | None:
    """Return the energy counter of the device, or None where it cannot be read (no pynvml, no rights)."""
    try:
        if device.type == "cuda":
            driver = import_module("pynvml")
            driver.nvmlInit()
            handle = driver.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            return float(driver.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        counters = [path / "energy_uj" for path in _RAPL.glob("intel-rapl:?")]
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except Exception:
        # The counter is optional and its driver is not ours: after any error there is no value.
        return None
