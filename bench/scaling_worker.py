"""One rank of a scaling study: ``torchrun -m bench.scaling_worker``. It does its groups as a run would, and times them.

It writes ``FOLDER/rank-00000.json``:

- seconds of start-up (from the start of the process, imports included), warm-up, statistics and preparation;
- ``own``, the seconds of this rank's synthesis, and ``synthesis``, these with the wait until the last rank was done;
- ``decoded``, the seconds of the statistics on images decoded beforehand;
- the SHA-256 of each group's images, and the provenance of the process.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.timing import fresh_store
from bench.workloads import bench_session, groups_of
from wmdd import cli_options
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.data.dataset import ImageSet, load_dataset
from wmdd.data.pixels import quantize
from wmdd.distill import blocks, statistics
from wmdd.distill.groups import Prepared, prepare
from wmdd.distill.synthesis.engine import State, synthesize
from wmdd.errors import InputError
from wmdd.records.provenance import provenance
from wmdd.runs.class_partition import Group
from wmdd.runs.work_queue import WorkQueue
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.team import Team
from wmdd.session import Session
from wmdd.storage.files import write_json


def main(
    config: Annotated[str, typer.Argument(help="TOML file.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the results.")],
    groups: Annotated[int, typer.Option(help="Number of groups to synthesize, from the first.")],
) -> None:
    """Time this rank's share of the groups."""
    settings = load_config(config)
    with ranks(settings.compute) as job:
        write_json(folder / f"rank-{job.rank:05d}.json", _measure(settings, job, groups, folder))


def age() -> float:
    """Return the seconds since this process was started, its imports included."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def circumstances(config: Config, job: Ranks) -> dict[str, Any]:
    """Return the provenance of a measurement by this job, with the names of its nodes under SLURM."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    found = {"world_size": job.size, "cpus": os.cpu_count(), "nodes": nodes}
    return provenance(config.compute, job.arithmetic) | {key: value for key, value in found.items() if value}


@dataclass(frozen=True, eq=False, repr=False)
class _Decoded(ImageSet):
    """Training images with one class decoded in memory."""

    pixels: torch.Tensor | None = None
    """Images of the class: uint8 [n, channels, H, W]"""
    offset: int = 0
    """Position of the first image of the class"""

    def batches(self, batches: Sequence[Sequence[int]], workers: int) -> Iterator[torch.Tensor]:
        if self.pixels is None:
            raise ValueError("no class is decoded")
        for batch in batches:
            yield self.pixels[torch.tensor(batch) - self.offset]


def _seconds_decoded(session: Session, classes: Sequence[int]) -> float:
    """Return the seconds of the statistics of some classes, on images decoded beforehand, one class at a time."""
    train, size = session.dataset.train, session.config.statistics.batch_size
    seconds = 0.0
    with fresh_store():
        for index in classes:
            positions = train.of_class(index)
            plan = [list(positions[start : start + size]) for start in range(0, len(positions), size)]
            pixels = torch.cat(list(train.batches(plan, session.config.compute.workers)))
            held = _Decoded(**vars(train), pixels=pixels, offset=positions.start)
            clock = time.perf_counter()
            dict(statistics.measure(replace(session, dataset=replace(session.dataset, train=held)), [index]))
            seconds += time.perf_counter() - clock
    return seconds


def _measure(config: Config, job: Ranks, groups: int, folder: Path) -> dict[str, Any]:
    dataset = load_dataset(config.data, config.compute.workers, job)
    method = blocks.check(config, dataset)
    session = bench_session(config, dataset, job)
    team = job.team(config.synthesis.split_class, "synthesis.split_class")
    todo = groups_of(config, len(dataset.classes))[:groups]
    marks = {"startup": age(), "statistics": 0.0, "preparation": 0.0, "own": 0.0}
    finished: dict[Group, State] = {}

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        clock = time.perf_counter()
        yield
        marks[phase] += time.perf_counter() - clock

    def prepared(group: Group) -> tuple[Group, Prepared]:
        with timed("statistics"):
            found = dict(statistics.measure(session, group.classes)) if method.uses_statistics else {}
        with timed("preparation"):
            return group, prepare(session, method, group, found)

    def synthesized(group: Prepared, iterations: int) -> State:
        if group.problem is None:
            raise InputError(f"method = {config.method!r} optimizes no images: there is no synthesis to time")
        settings = group.problem.settings.replace({"iterations": iterations})
        return synthesize(replace(group.problem, settings=settings), State(group.images), job, team)

    def work(ready: tuple[Group, Prepared]) -> None:
        with timed("own"):
            finished[ready[0]] = synthesized(ready[1], method.synthesis().iterations)

    clock = time.perf_counter()
    with fresh_store():
        synthesized(prepared(todo[0])[1], 2)  # compiles, and fills caches
    marks |= {"warmup": time.perf_counter() - clock, "statistics": 0.0, "preparation": 0.0}

    def lock_file(group: Group) -> Path:
        return folder / "locks" / f"group-{group.index:05d}"

    queue = WorkQueue("groups", job, team, todo, lock_file, lambda _: False, session.stop)
    job.barrier()
    clock = time.perf_counter()
    with fresh_store():
        for position in queue.worked(prepared, work):
            queue.release(position)
    job.barrier()
    marks["synthesis"] = time.perf_counter() - clock - marks["statistics"] - marks["preparation"]
    classes = [index for group in finished for index in group.classes]
    marks["decoded"] = _seconds_decoded(session, classes) if method.uses_statistics else 0.0
    images = {str(group.index): _sha256(state, config) for group, state in finished.items()}
    facts = {"device": str(job.device), "precision": job.precision, "provenance": circumstances(config, job)}
    return {**marks, **facts, "images": images if _speaks(team) else {}}


def _speaks(team: Team) -> bool:
    return team.rank == 0


def _sha256(state: State, config: Config) -> str:
    return hashlib.sha256(quantize(state.images, config.data).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    cli_options.answer(lambda: typer.run(main))
