"""One rank of a scaling study: ``torchrun -m bench.scaling_worker``; does its groups as a run would, and says when.

Writes ``FOLDER/rank-00000.json``: seconds of start-up, statistics, preparation and warm-up; ``own``, the seconds of
this rank's synthesis, and ``synthesis``, those until the last rank was done; the SHA-256 of each group's images.
"""

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer

from bench.timing import fresh_store
from bench.workloads import bench_session, groups_of
from wmdd import cli_options
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.data.dataset import load_dataset
from wmdd.data.pixels import quantize
from wmdd.distill import blocks, statistics
from wmdd.distill.groups import Prepared, prepare
from wmdd.distill.synthesis.engine import State, synthesize
from wmdd.errors import InputError
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.team import Team
from wmdd.storage.files import write_json


def main(
    config: Annotated[str, typer.Argument(help="TOML file.")],
    folder: Annotated[Path, typer.Argument(help="Where the rank writes what it measured.")],
    groups: Annotated[int, typer.Option(help="The first so many groups are synthesised.")],
    launched: Annotated[float | None, typer.Option(help="When the job was started, in seconds since 1970.")] = None,
) -> None:
    """Time this rank's share of the groups."""
    begun = time.time() if launched is None else launched
    settings = load_config(config)
    with ranks(settings.compute) as job:
        write_json(folder / f"rank-{job.rank:05d}.json", _measure(settings, job, groups, begun))


def _measure(config: Config, job: Ranks, groups: int, begun: float) -> dict[str, Any]:
    dataset = load_dataset(config.data, config.compute.workers, job)
    method = blocks.check(config, dataset)
    session = bench_session(config, dataset, job)
    team = job.team(config.synthesis.split_class, "synthesis.split_class")
    own = team.deal(groups_of(config, len(dataset.classes))[:groups])
    marks = {"startup": time.time() - begun}

    clock = time.perf_counter()
    classes = [index for group in own for index in group.classes]
    with fresh_store():
        found = dict(statistics.measure(session, classes)) if method.uses_statistics else {}
    marks["statistics"] = time.perf_counter() - clock

    clock = time.perf_counter()
    prepared = [prepare(session, method, group, found) for group in own]
    marks["preparation"] = time.perf_counter() - clock

    def synthesized(group: Prepared, iterations: int) -> State:
        if group.problem is None:
            raise InputError(f"method = {config.method!r} optimizes no images: there is no synthesis to time")
        settings = group.problem.settings.replace({"iterations": iterations})
        return synthesize(replace(group.problem, settings=settings), State(group.images), job, team)

    clock = time.perf_counter()
    for group in prepared[:1]:
        synthesized(group, 2)  # compiles, and fills caches
    marks["warmup"] = time.perf_counter() - clock

    job.barrier()  # names a rank that is gone
    _line_up(job)
    clock = time.perf_counter()
    finished = [synthesized(group, method.synthesis().iterations) for group in prepared]
    marks["own"] = time.perf_counter() - clock
    _line_up(job)
    marks["synthesis"] = time.perf_counter() - clock
    images = {group.index: _sha256(state, config) for group, state in zip(own, finished, strict=True)}
    return {**marks, "images": images if _speaks(team) else {}, "device": str(job.device), "precision": job.precision}


def _line_up(job: Ranks) -> None:
    # The barrier of a run looks for lost ranks and may return a tenth of a second late: too coarse for a clock.
    if job.size > 1:
        dist.barrier()


def _speaks(team: Team) -> bool:
    return team.rank == 0


def _sha256(state: State, config: Config) -> str:
    return hashlib.sha256(quantize(state.images, config.data).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    cli_options.answer(lambda: typer.run(main))
