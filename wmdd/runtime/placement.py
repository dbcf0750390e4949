"""The rank and the device of this process.  Its environment decides both; this module does not import torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from wmdd.errors import InputError

SECRET_VARIABLE = "WMDD_JOB_SECRET"  # noqa: S105
"""Environment variable with a random word that only the processes of a job know.  It signs what the ranks agree on."""
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_FIRST_PORT, _PORTS = 16384, 16384
"""Ports of jobs started by srun: below the ephemeral ports of Linux, which begin at 32768."""


@dataclass(frozen=True)
class Placement:
    """Position of a process in its job; by default it is the only process."""

    rank: int = 0
    size: int = 1
    """Number of ranks of the job"""
    local: int = 0
    """Position of this process among the processes of its node"""
    meeting: str = "env://"
    """Address where the ranks meet, for ``torch.distributed.rendezvous``"""
    own_gpu: bool = False
    """Whether the launcher shows each process only its own GPU"""

    @property
    def by_srun(self) -> bool:
        """Whether srun started the ranks directly, without torchrun."""
        return self.meeting != "env://"


def placement_of(environment: Mapping[str, str]) -> Placement:
    """Return the placement of a process with this environment.

    torchrun and ``wmdd slurm`` set RANK.  Plain ``srun -n 8`` sets SLURM_STEP_NUM_TASKS; sbatch and salloc do not.  A
    shell on a terminal (``srun --pty``) is one process, for any number of tasks.
    """
    visible = next((environment[name] for name in _VISIBLE if environment.get(name)), "")
    # Under torchrun all ranks have the same environment: a single visible GPU is then shared by all ranks.
    own_gpu = bool(visible) and "," not in visible and "TORCHELASTIC_RUN_ID" not in environment
    if "RANK" in environment:
        rank, size, local = (int(environment.get(key, value)) for key, value in _TORCHRUN)
        return Placement(rank, size, local, own_gpu=own_gpu)
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or "SLURM_PTY_PORT" in environment:
        return Placement(own_gpu=own_gpu)
    rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return Placement(rank, size, local, _meeting(environment), own_gpu)


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _meeting(environment: Mapping[str, str]) -> str:
    """Return the address of rank 0, which runs on the first node of the step, and a port.

    The port depends on the step and on the number of restarts, so that a restart does not retry an occupied port.
    """
    one_node = environment.get("SLURM_STEP_NUM_NODES") == "1"
    host = "127.0.0.1" if one_node else _first_host(environment["SLURM_STEP_NODELIST"])
    step = 31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    port = str(_FIRST_PORT + (step + 7919 * int(environment.get("SLURM_RESTART_COUNT", "0"))) % _PORTS)
    return f"tcp://{environment.get('MASTER_ADDR', host)}:{environment.get('MASTER_PORT', port)}"


def _first_host(nodes: str) -> str:
    """Return the first node of a SLURM node list, such as ``rack[1-2]n[03,05-07],login``."""
    matched = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", matched[0] if matched else nodes)


def choose_device(name: str, here: Placement, visible: int) -> str:
    """Return the device of a rank, such as ``cpu`` or ``cuda:3``.

    Args:
        name: value of ``compute.device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        here: placement of this process.
        visible: number of GPUs that torch sees.

    Raises:
        InputError: the GPU does not exist, or there is no GPU for this rank.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"compute.device = {name!r}: expected auto, cpu, cuda or cuda:N")
    if name == "cpu" or (name == "auto" and visible == 0):
        return "cpu"
    node = os.uname().nodename
    if visible == 0:
        raise InputError(
            f"compute.device = {name!r}: torch sees no GPU on {node}; check with nvidia-smi and wmdd doctor there,"
            " or set compute.device=cpu"
        )
    if name in ("auto", "cuda"):
        if here.local < visible:
            return f"cuda:{here.local}"
        if here.own_gpu:
            return "cuda:0"
        raise InputError(
            f"compute.device = {name!r}: rank {here.rank} is number {here.local + 1} on {node}, where torch sees"
            f" {visible} GPUs; start one rank per GPU, or set compute.device=cpu"
        )
    if int(name.partition(":")[2]) >= visible:
        raise InputError(f"compute.device = {name!r}: torch sees {visible} GPUs on {node}, numbered from 0")
    return name
