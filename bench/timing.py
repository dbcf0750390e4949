"""Measurement of speed: steps by the device's clock, contestants in turns, memory, FLOPs, energy, profiles."""

import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from wmdd.errors import WmddError
from wmdd.records.data_sheets import data_sheet_value
from wmdd.runtime.meter import energy_joules
from wmdd.storage.files import write_bytes

MIN_STEPS = 2
"""Fewest steps of a repeat."""
MAX_STEPS = 2000
"""Most steps of a repeat."""


class Stopwatch:
    """Records the end of each step. On CUDA it uses events, so that no step waits for the previous one.

    Args:
        device: device of the work.
        warm: number of steps at the beginning that do not count.
    """

    def __init__(self, device: torch.device, warm: int = 0) -> None:
        self._cuda = device.type == "cuda"
        self._device, self._warm = device, warm
        self._marks: list[Any] = []
        if not warm:
            self._mark()

    def __call__(self, steps: int = 1) -> None:
        """Record the end of a step. The argument is ignored; with it, a stopwatch fits as progress callback."""
        self._warm -= 1
        if self._warm <= 0:
            self._mark()

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """Return the seconds of each step that counts."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
            return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]
        return [after - before for before, after in pairwise(self._marks)]


Run = Callable[[int, Stopwatch], None]
"""Does a number of steps, and calls the stopwatch at the end of each, including warm-up steps."""


@dataclass(frozen=True)
class TimedRun:
    """One repeat of one contestant."""

    asked: int
    """Number of requested steps. A contestant with two passes reports twice as many"""
    steps: list[float]
    """Seconds of each step"""
    peak: int | None
    """Peak bytes of the device's allocator; on a CPU of the whole process; None if unknown"""
    joules: float | None = None
    """Energy of the device or CPU package, including warm-up and other processes; None without a readable counter"""

    @property
    def seconds(self) -> float:
        """Seconds of all steps together."""
        return sum(self.steps)


def once(run: Run, steps: int, device: torch.device, warm: int) -> TimedRun:
    """Do ``steps`` steps after ``warm`` ones that do not count."""
    _forget_peak(device)
    watch = Stopwatch(device, warm)
    before = energy_joules(device)
    run(steps + warm, watch)
    taken = watch.read()
    after = energy_joules(device)
    if not taken:
        raise WmddError("the stopwatch recorded no step")
    known = before is not None and after is not None and after >= before  # counters of CPUs wrap
    return TimedRun(steps, taken, _peak(device), after - before if known else None)  # type: ignore[operator]


def in_turns(
    contestants: Mapping[str, Run],
    repeats: int,
    seconds: float,
    most: int,
    device: torch.device,
    warm: int,
    advance: Callable[[int], None] = lambda repeats: None,
) -> dict[str, list[TimedRun]]:
    """Time the contestants in turns, so that changes of the machine's load affect all of them.

    A first, short repeat of each warms up and does not count. The first contestant's short repeat also decides the
    number of steps that take ``seconds``. All contestants do this number of steps.

    Args:
        contestants: name -> function to time.
        repeats: number of repeats of each contestant.
        seconds: target duration of a repeat of the first contestant.
        most: limit on the number of steps.
        device: device of the work.
        warm: number of steps at the beginning of every repeat that do not count.
        advance: called after each repeat.

    Returns:
        Name -> one sample for each repeat, in order.
    """
    pace = []
    for run in contestants.values():
        once(run, 1, device, warm)  # compiles and fills caches
        trial = once(run, min(MIN_STEPS, most), device, warm)
        pace.append(trial.seconds / trial.asked)
        advance(1)
    steps = max(1, min(most, MAX_STEPS, max(MIN_STEPS, round(seconds / max(pace[0], 1e-9)))))
    samples: dict[str, list[TimedRun]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            samples[name].append(once(run, steps, device, warm))
            advance(1)
    return samples


def spread(values: list[float], prefix: str) -> dict[str, float]:
    """Return the median as ``prefix``, the least value as ``prefix_low``, and the largest as ``prefix_high``."""
    return {prefix: statistics.median(values), f"{prefix}_low": min(values), f"{prefix}_high": max(values)}


def figures(samples: list[TimedRun], work: Callable[[int], float]) -> dict[str, float]:
    """Return ``rate`` with its spread, ``seconds``, ``repeats``, ``steps``, ``p50``, ``p90``, ``peak_bytes``, energy.

    ``joules`` is the median over the repeats; it is missing without a readable counter.

    Args:
        samples: repeats of one contestant.
        work: returns the work in a number of steps, in units of the rate.
    """
    steps = [seconds for sample in samples for seconds in sample.steps]
    found = spread([work(sample.asked) / sample.seconds for sample in samples], "rate")
    found |= {"repeats": float(len(samples)), "steps": float(samples[0].asked)}
    found |= {"seconds": statistics.median(sample.seconds for sample in samples)}
    p50, p90 = torch.tensor(steps).quantile(torch.tensor([0.5, 0.9])).tolist()
    peaks = [sample.peak for sample in samples if sample.peak is not None]
    joules = [sample.joules for sample in samples if sample.joules is not None]
    found |= {"p50": p50, "p90": p90} | ({"peak_bytes": float(max(peaks))} if peaks else {})
    return found | ({"joules": statistics.median(joules)} if joules else {})


def ratio(samples: list[TimedRun], baseline: list[TimedRun]) -> dict[str, float]:
    """Return the speed-up over the baseline: median, least and largest value over the pairs of repeats.

    Both must have done the same number of steps.
    """
    pairs = zip(samples, baseline, strict=True)
    return spread([slow.seconds / fast.seconds for fast, slow in pairs], "ratio")


def flops(work: Callable[[], object]) -> float:
    """Return the floating-point operations of the matrix products and convolutions of ``work``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def data_sheet_peak(device: torch.device, precision: str, name: str | None = None) -> float | None:
    """Return the FLOP/s that a GPU's data sheet states for dense products; None on CPUs and for unknown GPUs.

    Args:
        device: where the work runs.
        precision: fp32, tf32 or bf16.
        name: of the GPU; None asks the driver.
    """
    if device.type != "cuda":
        return None
    return data_sheet_value(name or torch.cuda.get_device_name(device), precision)


def matmul_peak(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """Return the largest FLOP/s of a square matrix product on this device, the denominator of ``product_share``.

    On CUDA, fp32 products use TF32 if convolutions do, so that the peak has the arithmetic of the networks.

    Args:
        device: device to measure.
        precision: fp32 or bf16.
        seconds: time to spend on each size.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
        return max(2 * size**3 / _product_seconds(size, dtype, device, seconds) for size in sizes)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Return the least time of a product of two square matrices, in seconds."""
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))

    def run(steps: int, watch: Stopwatch) -> None:
        for _ in range(steps):
            torch.mm(left, right, out=out)
            watch()

    pace = min(once(run, 2, device, 1).steps)
    return min(once(run, max(3, min(200, int(seconds / pace))), device, 1).steps)


def profile(run: Run, device: torch.device, warm: int, folder: Path, name: str, steps: int = 3) -> str:
    """Write ``NAME.trace.json`` (chrome://tracing) and ``NAME.txt`` (table of the longest kernels); return the table.

    Raises:
        WmddError: the folder cannot be written.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profiler(activities=activities, profile_memory=True) as recorded:
        once(run, steps, device, warm)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    table: str = recorded.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)
    write_bytes(folder / f"{name}.txt", table.encode())
    recorded.export_chrome_trace(str(folder / f"{name}.trace.json"))
    return table


@contextmanager
def fresh_store() -> Iterator[None]:
    """Give this process an empty cache during the ``with`` block, so that all work is done again."""
    before = os.environ.get("WMDD_CACHE")
    with tempfile.TemporaryDirectory(prefix="wmdd-bench-") as folder:
        os.environ["WMDD_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["WMDD_CACHE"]
            else:
                os.environ["WMDD_CACHE"] = before


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # Linux: 5 resets the high-water mark of this process's resident memory (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
