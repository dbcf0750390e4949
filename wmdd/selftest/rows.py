"""What a row of the self-test is, what it needs of the machine, and how rows are run."""

import importlib.util
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from wmdd.config.schema import ComputeConfig
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.runtime import log
from wmdd.runtime.arithmetic import hardware_of
from wmdd.runtime.placement import Placement, choose_device, placement_of
from wmdd.runtime.progress_bars import progress
from wmdd.storage import cache

logger = logging.getLogger(__name__)

State = Literal["pass", "fail", "not available"]
Precision = Literal["fp32", "tf32", "bf16"]
Need = Literal["full", "cuda", "gpus", "bf16", "tf32", "compiler"]

REASONS: dict[Need, str] = {
    "full": "left out by --quick",
    "cuda": "no CUDA device in use",
    "gpus": "fewer than two GPUs",
    "bf16": "the device has no bf16 instructions",
    "tf32": "the device has no TF32",
    "compiler": "torch.compile needs a C++ compiler, and Triton on a GPU",
}
"""Why a row is not available, by what it needs."""


@dataclass(frozen=True)
class Machine:
    """What the machine offers to the rows."""

    device: str
    """Device of the rows of one process: ``cpu``, ``cuda`` or ``cuda:N``"""
    gpus: int
    """Number of GPUs in use"""
    bf16: bool
    tf32: bool
    compiler: bool

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]

    def lacks(self, needs: Sequence[Need], quick: bool) -> str | None:
        """Return why a row with these needs is not available; None if it is."""
        there: dict[Need, bool] = {
            "full": not quick,
            "cuda": self.kind == "cuda",
            "gpus": self.gpus > 1,
            "bf16": self.bf16,
            "tf32": self.tf32,
            "compiler": self.compiler,
        }
        return next((REASONS[need] for need in needs if not there[need]), None)


@dataclass(frozen=True)
class RowResult:
    """The result of a row."""

    state: State
    detail: str
    """What was compared, or the reason"""
    figures: dict[str, float] = field(default_factory=dict)
    """Measured values, by name"""
    trace: str | None = None
    """Traceback of an unexpected error, for a bug report"""
    seconds: float = 0.0


@dataclass(frozen=True)
class Workplace:
    """What the rows share: the machine, a folder, and runs that several rows compare with."""

    machine: Machine
    folder: Path
    """Temporary folder of the self-test; its cache is empty at the start"""
    disk: Path
    """Existing folder whose disk holds the user's cache"""
    quick: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned when it was first called under this name.

        Raises:
            WmddError: ``make`` failed, now or at an earlier row.
        """
        if name not in self.memory:
            try:
                self.memory[name] = make()
            except Interrupted:
                raise
            except WmddError as error:
                self.memory[name] = error
        found = self.memory[name]
        if isinstance(found, WmddError):
            raise WmddError(str(found))
        return found

    def compute(
        self, precision: Precision = "fp32", compiled: bool = False, device: str | None = None
    ) -> dict[str, Any]:
        """Return the keys of a config's section ``compute``, by their dotted names."""
        chosen = {"device": device or self.machine.device, "precision": precision, "compile": compiled}
        return {f"compute.{key}": value for key, value in (chosen | {"threads": 1, "workers": 0}).items()}


@dataclass(frozen=True)
class Check:
    """A row of the self-test: a check, and what it needs."""

    name: str
    work: Callable[[Workplace], RowResult]
    needs: tuple[Need, ...] = ()


def result(passed: bool, detail: str, **figures: float) -> RowResult:
    """Return a verdict that passes or fails."""
    return RowResult("pass" if passed else "fail", detail, figures)


def machine_of(device: str) -> Machine:
    """Return what this machine offers.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, as in ``compute.device``.

    Raises:
        InputError: the device does not exist, or this process is one of several ranks.
    """
    if (here := placement_of(os.environ)).size > 1:
        raise InputError(
            f"the self-test starts its own ranks, and this is rank {here.rank} of {here.size}; start it once on each"
            " node, without torchrun and with srun -n 1"
        )
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = torch.device(choose_device(device, Placement(), visible))
    cuda = chosen.type == "cuda"
    if cuda:
        with torch.cuda.device(chosen):
            hardware = hardware_of(chosen)
    else:
        hardware = hardware_of(chosen)
    return Machine(
        device=device if ":" in device else chosen.type,
        gpus=0 if not cuda else 1 if ":" in device else visible,
        bf16=hardware.bf16,
        tf32=hardware.tf32,
        compiler=has_compiler(cuda, os.environ),
    )


def has_compiler(cuda: bool, environment: Mapping[str, str]) -> bool:
    """Return whether torch.compile finds a compiler for this kind of device."""
    names = [environment.get("CXX"), environment.get("CC"), "g++", "clang++", "gcc"]
    found = any(name and shutil.which(name) for name in names)
    return found and (not cuda or importlib.util.find_spec("triton") is not None)


def judge(row: Check, place: Workplace) -> RowResult:
    """Return the verdict of a row.  An error of the row is its failure, and ends nothing else."""
    if reason := place.machine.lacks(row.needs, place.quick):
        return RowResult("not available", reason)
    begun = time.monotonic()
    try:
        with log.on_screen(logging.CRITICAL):
            found = row.work(place)
    except Interrupted:
        raise
    except WmddError as error:
        found = RowResult("fail", str(error))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        found = RowResult("fail", f"{type(error).__name__}: {first}", trace=traceback.format_exc())
    return replace(found, seconds=round(time.monotonic() - begun, 2))


def run_rows(rows: Sequence[Check], place: Workplace) -> dict[str, RowResult]:
    """Judge the rows in order; report each when it is done."""
    found: dict[str, RowResult] = {}
    with progress("selftest", len(rows), "rows") as advance:
        for row in rows:
            found[row.name] = one = judge(row, place)
            reason = f": {one.detail}" if one.state == "fail" else ""
            lasted = "" if one.state == "not available" else f" ({one.seconds:.1f} s)"
            logger.info(f"{one.state:13}  {row.name}{lasted}{reason}")
            advance(1)
    return found


@contextmanager
def workplace(machine: Machine, quick: bool) -> Iterator[Workplace]:
    """Yield a workplace with an empty cache; restore the environment and delete its folder afterwards."""
    root = cache.cache_root()
    disk = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    before = os.environ.get("WMDD_CACHE")
    with TemporaryDirectory(prefix="wmdd-selftest-", ignore_cleanup_errors=True) as folder:
        os.environ["WMDD_CACHE"] = str(Path(folder) / "cache")
        try:
            yield Workplace(machine, Path(folder), disk, quick)
        finally:
            os.environ.pop("WMDD_CACHE")
            if before is not None:
                os.environ["WMDD_CACHE"] = before


def section(place: Workplace, precision: Precision = "fp32", compiled: bool = False) -> ComputeConfig:
    """Return the section ``compute`` of a row that works without a run."""
    keys = place.compute(precision, compiled)
    return ComputeConfig(**{key.partition(".")[2]: value for key, value in keys.items()})
