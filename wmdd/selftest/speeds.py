"""Small measurements of the machine, with the values of the data sheet where it is known."""

import io
import os
import time
from collections.abc import Callable

import torch
from PIL import Image

from wmdd.config.schema import DataConfig
from wmdd.data.pixels import fit
from wmdd.data.synthetic import draw
from wmdd.records.data_sheets import data_sheet_value
from wmdd.runtime.device_check import wrong_products
from wmdd.runtime.ranks import ranks
from wmdd.selftest.rows import Precision, RowResult, Workplace, result, section
from wmdd.storage.files import write_bytes

LEAST_SHARE = 0.2
"""Least share of the data sheet's value; below it the device is throttled, shared or not the one it seems to be"""
_SECONDS = 0.3
"""Duration of a measurement"""
_SIDE = {"cpu": 512, "cuda": 8192}
_COPIED_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
_IMAGES = 8
_DISK_BYTES = 1 << 25


def least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of ``work`` over repeats of together ``_SECONDS``, after one that warms up."""
    taken: list[float] = []
    for index in range(10_000):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
        if index >= 2 and sum(taken[1:]) > _SECONDS:
            break
    return min(taken[1:])


def beside_sheet(device: torch.device, quantity: str, rate: float, text: str) -> RowResult:
    """Return the verdict of a rate: beside the data sheet's value if it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return of_sheet(rate, text, sheet_of(name, quantity))


def sheet_of(name: str, quantity: str) -> float | None:
    """Return the data sheet's value of a whole GPU; None for a part of one (MIG), an unknown one or a CPU."""
    return None if " MIG " in f"{name} " else data_sheet_value(name, quantity)


def of_sheet(rate: float, text: str, sheet: float | None) -> RowResult:
    """Return the verdict of a rate and the data sheet's value; None for an unknown one."""
    if sheet is None:
        return result(rate > 0, f"{text}, no data sheet", rate=rate)
    share = rate / sheet
    return result(
        share >= LEAST_SHARE,
        f"{text}, {share:.0%} of the data sheet (at least {LEAST_SHARE:.0%})",
        rate=rate,
        data_sheet=sheet,
    )


def devices(place: Workplace) -> RowResult:
    """Multiply matrices of small integers on every device in use, and compare with exact values."""
    kind, used = place.machine.kind, place.machine.device
    names = [used] if kind == "cpu" or ":" in used else [f"cuda:{index}" for index in range(place.machine.gpus)]
    wrong = {name: rows for name in names if (rows := wrong_products(torch.device(name)))}
    told = ", ".join(f"{name}: {rows} rows are wrong" for name, rows in wrong.items())
    return result(not wrong, told or f"exact products on {', '.join(names)}")


def product(place: Workplace, precision: Precision) -> RowResult:
    """Measure the FLOP/s of a matrix product."""
    with ranks(section(place, precision)) as job:
        side = _SIDE[job.device.type]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        left, right, out = (torch.randn(side, side, device=job.device).to(dtype) for _ in range(3))
        rate = 2 * side**3 / least_seconds(lambda: torch.mm(left, right, out=out), job.device)
        return beside_sheet(job.device, precision, rate, f"{rate / 1e12:,.2f} TFLOP/s")


def copy(place: Workplace) -> RowResult:
    """Measure the bandwidth of a copy within the device's memory: bytes read and written."""
    with ranks(section(place)) as job:
        size = _COPIED_BYTES[job.device.type]
        source = torch.zeros(size, dtype=torch.uint8, device=job.device)
        target = torch.empty_like(source)
        rate = 2 * size / least_seconds(lambda: target.copy_(source), job.device)
        return beside_sheet(job.device, "memory", rate, f"{rate / 1e9:,.1f} GB/s")


def upload(place: Workplace) -> RowResult:
    """Measure the bandwidth of a copy from pinned memory to the device."""
    with ranks(section(place)) as job:
        size = _COPIED_BYTES["cuda"]
        source = torch.zeros(size, dtype=torch.uint8).pin_memory()
        target = torch.empty(size, dtype=torch.uint8, device=job.device)
        rate = size / least_seconds(lambda: target.copy_(source, non_blocking=True), job.device)
        return result(rate > 0, f"{rate / 1e9:,.1f} GB/s from pinned memory", rate=rate)


def launch(place: Workplace) -> RowResult:
    """Measure the time that one small operation costs."""
    with ranks(section(place)) as job:
        value, count = torch.zeros(8, device=job.device), 200

        def work() -> None:
            for _ in range(count):
                value.add_(1)

        seconds = least_seconds(work, job.device) / count
        return result(seconds > 0, f"{seconds * 1e6:.1f} µs an operation", seconds=seconds)


def decode(place: Workplace) -> RowResult:
    """Measure how many JPEG images of ImageNet's shape one core decodes and crops to 224 px in a second."""
    files = []
    for number in range(_IMAGES):
        encoded = io.BytesIO()
        draw("train", 0, number, 375, 0).save(encoded, "JPEG", quality=90)
        files.append(encoded.getvalue())
    settings = DataConfig()

    def work() -> None:
        for content in files:
            fit(Image.open(io.BytesIO(content)), settings)

    rate = _IMAGES / least_seconds(work, torch.device("cpu"))
    return result(rate > 0, f"{rate:,.0f} images/s on one core", rate=rate)


def disk(place: Workplace) -> RowResult:
    """Measure how fast the disk of the cache takes one file, until the file is safe there."""
    writable = os.access(place.disk, os.W_OK)
    folder = place.disk if writable else place.folder
    path = folder / f".wmdd-selftest-{os.getpid()}"
    content = os.urandom(_DISK_BYTES)
    begun = time.perf_counter()
    try:
        write_bytes(path, content)
        rate = _DISK_BYTES / (time.perf_counter() - begun)
    finally:
        path.unlink(missing_ok=True)
    where = "the cache" if writable else "temporary files (the cache is not writable)"
    return result(rate > 0, f"{rate / 1e6:,.0f} MB/s on the disk of {where}", rate=rate)
