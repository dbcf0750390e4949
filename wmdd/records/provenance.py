"""Provenance: code, versions, hardware and job of a measurement."""

import functools
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from wmdd.config.schema import ComputeConfig
from wmdd.records.system import system
from wmdd.runtime.arithmetic import Arithmetic
from wmdd.runtime.placement import placement_of


def provenance(compute: ComputeConfig, arithmetic: Arithmetic | None = None) -> dict[str, Any]:
    """Return the circumstances of a measurement taken now in this process; the host's name is left out.

    ``precision`` is what was resolved if ``arithmetic`` is given, else what the config requests.

    ``revision`` is the commit of the checkout that the package runs from and ``dirty`` whether tracked files differ
    from it; both are None for an installed package.
    """
    import torch

    cuda = torch.cuda.is_available() and compute.device != "cpu"
    revision, dirty = _checkout()
    job = {
        "job": os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID")),
        "task": os.environ.get("SLURM_ARRAY_TASK_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT"),
    }
    return {
        "revision": revision,
        "dirty": dirty,
        "wmdd": metadata.version("wmdd"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(compute.device if ":" in compute.device else None) if cuda else "cpu",
        "cpu": _cpu(),
        "world_size": placement_of(os.environ).size,
        "threads": compute.threads,
        "precision": arithmetic.precision if arithmetic else compute.precision,
        "slurm": {key: value for key, value in job.items() if value is not None} or None,
        "system": system(cuda),
    }


@functools.lru_cache(maxsize=1)
def _checkout() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that holds this package, and whether its tracked files were changed."""
    git = shutil.which("git")
    here = Path(__file__).parents[1]  # the package's own folder

    def ask(*arguments: str) -> str:
        # No optional locks: hundreds of tasks may ask the same checkout at once.  Without GIT_*: inside a hook these
        # name another repository.
        command = [str(git), "--no-optional-locks", "-C", str(here), *arguments]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=clean)  # noqa: S603
        return done.stdout.strip()

    if git is None:
        return None, None
    try:
        # A package installed below another project's checkout is in its folder, but not in its index.
        ask("ls-files", "--error-unmatch", "__init__.py")
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (subprocess.SubprocessError, OSError):
        return None, None


@functools.lru_cache(maxsize=1)
def _cpu() -> str:
    from torch.utils import collect_env

    for line in (collect_env.get_cpu_info(collect_env.run) or "").splitlines():
        if line.lower().startswith("model name:"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
