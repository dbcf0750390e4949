"""Ranks, devices and random numbers that do not depend on how the work is spread."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from wmdd.config import Compute
from wmdd.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job: ``rank`` of ``size``, with its device and arithmetic."""

    rank: int
    size: int
    device: torch.device
    precision: str
    """``fp32`` or ``bf16``, resolved for this device."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes what is shared."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's items: every ``size``-th one."""
        return list(items[self.rank :: self.size])

    def barrier(self) -> None:
        """Wait for all ranks; free when there is one."""
        if self.size > 1:
            dist.barrier()

    def autocast(self) -> torch.autocast:
        """Return the context under which networks run: bf16 autocast, or nothing at fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


@contextmanager
def ranks(compute: Compute) -> Iterator[Ranks]:
    """Join the job that torchrun or srun started (or stand alone), with threads and precision from the config.

    Raises:
        InputError: the device does not exist here.
    """
    rank, size, local = (int(os.environ.get(key, default)) for key, default in _JOB)
    device = _device(compute.device, local)
    torch.set_num_threads(compute.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, size, device, _precision(compute.precision, device))
    finally:
        if size > 1:
            dist.destroy_process_group()


_JOB = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def native_bf16() -> bool:
    """Return whether this CPU has bf16 instructions; without them bf16 is 2 to 4 times slower than fp32."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("avx512_bf16", False)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"compute.device = {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"compute.device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if native_bf16() else "fp32"


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed from names and numbers, such as ``seed_of(config.seed, "start", class_name)``.

    Seeds hang on what is computed (a class, a group, an iteration), never on who computes it.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by ``seed_of``: the same numbers whatever device uses them."""
    return torch.Generator().manual_seed(seed_of(*parts))
