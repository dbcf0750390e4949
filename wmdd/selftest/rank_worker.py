"""One rank of the self-test, under torchrun: ``python -m wmdd.selftest.rank_worker FOLDER``.

It reads ``FOLDER/job.json``, does its parts one after the other, and writes ``FOLDER/rank-00000.json``: its device, its
all-reduce, and the error of each part that failed.  Each part is a job of its own, whose ranks meet at a port of its
own.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from wmdd import pipeline
from wmdd.cli_options import answer
from wmdd.config.loading import load_config
from wmdd.config.schema import ComputeConfig
from wmdd.errors import WmddError
from wmdd.runtime.placement import placement_of
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.seeding import generator
from wmdd.runtime.team import Team
from wmdd.selftest.losses import split_gaps
from wmdd.selftest.runs import SHARE
from wmdd.storage.files import read_json, write_json

_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Size of the large all-reduce, by type of device"""
_REPEATS = 5


def main(folder: Path) -> None:
    """Do the parts of a job, and write this rank's file."""
    job = read_json(folder / "job.json")
    here = placement_of(os.environ)
    # Under torchrun all jobs of a process would share the store of its agent.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    found: dict[str, Any] = {"rank": here.rank, "local": here.local}
    for part, port in job["ports"].items():
        os.environ["MASTER_PORT"] = str(port)
        if part == "meeting":
            with ranks(ComputeConfig(device=job["device"])) as own:
                found |= meet(own)
            continue
        try:
            pipeline.run(load_config(folder / f"{part}.toml"), folder / part, share=SHARE)
        except WmddError as error:
            found[part] = str(error)
            break  # the ranks may no longer agree on what comes next
    write_json(folder / f"rank-{here.rank:05d}.json", found)


def meet(job: Ranks) -> dict[str, Any]:
    """Return this rank's device, the results and seconds of all-reduces, and the differences of a split synthesis."""
    device, team = job.device, job.team(job.size, "the self-test")
    value = team.sum(torch.full((8,), float(job.rank + 1), device=device))
    used = torch.ones(1, device=device).device  # where tensors really are
    return {
        "device": str(device),
        "used": str(used),
        "gpu": str(torch.cuda.get_device_properties(used).uuid) if used.type == "cuda" else None,
        "backend": "gloo" if device.type == "cpu" else "NCCL",
        "sum": value.tolist(),
        "bytes": _BYTES[device.type],
        "split_gaps": split_gaps(job),
        "parallel_gap": _parallel_gap(job),
        "seconds": {str(size): _all_reduce_seconds(team, device, size) for size in (4, _BYTES[device.type])},
    }


def _parallel_gap(job: Ranks) -> float:
    """Return the relative difference of a DDP gradient from float64 on the CPU, for a network without BatchNorm."""
    source = generator("selftest", "parallel")
    rows, goal = (torch.randn(4 * job.size, width, generator=source) for width in (12, 5))
    weights = torch.randn(5, 12, generator=source)
    exact = weights.double().requires_grad_(True)
    functional.mse_loss(functional.linear(rows.double(), exact), goal.double(), reduction="sum").backward()
    network = torch.nn.Linear(12, 5, bias=False).to(job.device)
    with torch.no_grad():
        network.weight.copy_(weights)
    team = job.team(job.size, "student.ranks")
    parallel = team.wrap(network.train(), rows[:2].to(job.device))
    seen, wanted = (team.shard(part).to(job.device) for part in (rows, goal))
    # DDP averages over the ranks.
    (job.size * functional.mse_loss(parallel(seen), wanted, reduction="sum")).backward()
    if network.weight.grad is None or exact.grad is None:
        raise WmddError("DDP returned no gradient")
    return float((network.weight.grad.double().cpu() - exact.grad).norm() / exact.grad.norm())


def _all_reduce_seconds(team: Team, device: torch.device, size: int) -> float:
    """Return the least seconds of an all-reduce of ``size`` bytes."""
    values = torch.zeros(size // 4, device=device)
    taken = []
    for _ in range(_REPEATS):
        dist.all_reduce(values, group=team.group)
        _finish(device)
        begun = time.perf_counter()
        dist.all_reduce(values, group=team.group)
        _finish(device)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    answer(lambda: main(Path(sys.argv[1])))
