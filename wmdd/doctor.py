"""Checks of this machine: packages, devices, SLURM and the cache folder."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """The result of one check: ``good``, ``absent`` (an optional part is missing) or ``broken``."""

    name: str
    state: Literal["good", "absent", "broken"]
    detail: str


def examine() -> list[Finding]:
    """Check package versions, devices, bf16, SLURM and the cache folder."""
    return [*_packages(), *_devices(), _slurm(), _cache()]


def _packages() -> list[Finding]:
    found = []
    needed = ("torch", "torchvision", "pot", "submitit", "ray", "optuna", "scikit-learn")
    for name, optional in [*((name, False) for name in needed), ("timm", True)]:
        try:
            found.append(Finding(name, "good", metadata.version(name)))
        except metadata.PackageNotFoundError:
            remedy = f"pip install 'wmdd[{name}]'" if optional else f"pip install {name}"
            found.append(Finding(name, "absent" if optional else "broken", remedy))
    try:
        import torchvision  # noqa: F401 - the import fails if it was built for another torch
    except Exception as error:
        found.append(Finding("torchvision", "broken", f"cannot be imported with the installed torch: {error}"))
    return found


def _devices() -> list[Finding]:
    import torch

    from wmdd.runtime.arithmetic import native_bf16

    cores = len(os.sched_getaffinity(0))
    found = [
        Finding("CPU", "good", f"{cores} cores"),
        Finding(
            "CPU bf16",
            "good" if native_bf16() else "absent",
            "native" if native_bf16() else "emulated, slow: keep compute.precision=fp32",
        ),
    ]
    if not torch.cuda.is_available():
        return [*found, Finding("GPU", "absent", "CUDA finds no GPU; runs use the CPU")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        found.append(
            Finding(f"GPU {index}", "good", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}")
        )
    return found


def _slurm() -> Finding:
    if not shutil.which("sinfo"):
        return Finding("SLURM", "absent", "sinfo is not on the PATH; wmdd run works without SLURM")
    command = ["sinfo", "--noheader", "--format=%P %D"]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (subprocess.SubprocessError, OSError):
        return Finding("SLURM", "absent", "installed, but no cluster answers; wmdd run works without SLURM")
    return Finding("SLURM", "good", "partitions (nodes): " + ", ".join(reply.stdout.splitlines()))


def _cache() -> Finding:
    from wmdd.storage.cache import cache_root

    root = cache_root()
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return Finding("cache", "broken", f"{root} is not writable; set WMDD_CACHE to a writable folder")
    return Finding("cache", "good", f"{root}, {shutil.disk_usage(existing).free / 1e9:,.0f} GB free")


def table(findings: list[Finding]) -> "Table":
    """Return the findings as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("", "", "", show_header=False, box=None)
    marks = {"good": "[green]ok[/]", "absent": "[yellow]--[/]", "broken": "[red]!![/]"}
    for finding in findings:
        shown.add_row(marks[finding.state], finding.name, Text(finding.detail))
    return shown
