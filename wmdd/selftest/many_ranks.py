"""Several ranks of this machine: their devices, their sums, and the runs that they share."""

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from wmdd import pipeline
from wmdd.config.loading import to_toml
from wmdd.errors import Interrupted, WmddError
from wmdd.launchers import Local
from wmdd.runtime.signals import STOPS, stop_after, stop_on
from wmdd.selftest import losses, runs
from wmdd.selftest.rows import RowResult, Workplace, result
from wmdd.storage.files import read_json, write_bytes, write_json

Kind = Literal["cpu", "cuda"]

PARTS = ("same", "parallel", "split")
"""Runs that the ranks do together: groups dealt to ranks, DDP teacher and student, classes split among ranks"""
SPLIT_TOLERANCE = 1e-4
"""Largest relative difference of the losses of split classes from those of whole classes, in fp32"""
PARALLEL_TOLERANCE = 0.1
"""The same of a DDP teacher and student from those of one rank: each rank normalizes its own part of a batch"""
_JOB_SECONDS = 240.0


def device_of_rank(kind: Kind, local: int) -> str:
    """Return the device that a rank of this machine must have."""
    return "cpu" if kind == "cpu" else f"cuda:{local}"


def misplaced(kind: Kind, reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the devices of the ranks, one sentence each.

    Args:
        kind: type of device that the job asked for.
        reports: report of each rank, with ``rank``, ``local``, ``device``, ``used`` and ``gpu``.
    """
    found = []
    owners: dict[str, int] = {}
    for one in reports:
        wanted = device_of_rank(kind, one["local"])
        wrong = [name for name in (one["device"], one["used"]) if name != wanted]
        if wrong:
            found.append(f"rank {one['rank']} is on {wrong[0]} instead of {wanted}")
        if one["gpu"] is not None and owners.setdefault(one["gpu"], one["rank"]) != one["rank"]:
            found.append(f"ranks {owners[one['gpu']]} and {one['rank']} share one GPU")
    return found


def size_of(place: Workplace, kind: Kind) -> int:
    """Return the number of ranks: one for each GPU, or two on the CPU."""
    return place.machine.gpus if kind == "cuda" else 2


def job_folder(place: Workplace, kind: Kind) -> Path:
    """Return the folder of the job, with a report of each rank.  The first call runs the job.

    Raises:
        WmddError: the job failed, now or at an earlier row.
    """
    found: Path = place.once(f"job {kind}", lambda: _job(place, kind))
    return found


def _job(place: Workplace, kind: Kind) -> Path:
    folder, size = place.folder / f"ranks-{kind}", size_of(place, kind)
    folder.mkdir()
    for part, config in configs(place, kind).items():
        write_bytes(folder / f"{part}.toml", to_toml(config).encode())
    ports = dict(zip(("meeting", *PARTS), _free_ports(1 + len(PARTS)), strict=True))
    write_json(folder / "job.json", {"device": kind, "ports": ports})
    with stop_on(*STOPS) as stop, stop_after(_JOB_SECONDS, stop):
        try:
            Local().job(size, "wmdd.selftest.rank_worker", [str(folder)])
        except Interrupted as error:
            raise WmddError(f"the job of {size} ranks was stopped; it may last {_JOB_SECONDS:.0f} s") from error
    return folder


def configs(place: Workplace, kind: Kind) -> dict[str, Any]:
    """Return the config of each part; ``whole`` and ``alone`` are what one rank does for comparison."""
    size, device = size_of(place, kind), _device_of_one(kind)
    compute, weights = place.compute(device=device), str(runs.teacher_file(place))
    whole = runs.config_of(compute, ipc=size, synthesis__classes_per_group=2, teacher__weights=weights)
    alone = runs.config_of(compute, ipc=size)
    return {
        "same": runs.pair(place, device),
        "parallel": alone.replace({"teacher.ranks": size, "student.ranks": size}),
        "split": whole.replace({"synthesis.split_class": size}),
        "whole": whole,
        "alone": alone,
    }


def _device_of_one(kind: Kind) -> str | None:
    """Return the device of a run by one rank; None for that of the machine."""
    return "cpu" if kind == "cpu" else None


def _alone(place: Workplace, kind: Kind, part: str) -> Path:
    """Return the folder of a run by one rank, in this process."""
    name = f"{part}-{kind}"
    config = configs(place, kind)[part]
    found: Path = place.once(name, lambda: pipeline.run(config, place.folder / name, share=runs.SHARE))
    return found


def _done(place: Workplace, kind: Kind, part: str) -> Path:
    """Return the run folder of a part that the ranks have done.

    Raises:
        WmddError: a rank could not do it; the message is the rank's.
    """
    folder = job_folder(place, kind)
    for one in reports_of(folder, size_of(place, kind)):
        for failed in PARTS:
            if failed in one:
                raise WmddError(f"rank {one['rank']}: {one[failed]}")
    return folder / part


def reports_of(folder: Path, size: int) -> list[dict[str, Any]]:
    """Return the report of each rank."""
    return [read_json(folder / f"rank-{rank:05d}.json") for rank in range(size)]


def placement(place: Workplace, kind: Kind) -> RowResult:
    """Compare the device of each rank with what it should be."""
    reports = reports_of(job_folder(place, kind), size_of(place, kind))
    wrong = misplaced(kind, reports)
    told = ", ".join(f"rank {one['rank']} on {one['used']}" for one in reports)
    return result(not wrong, "; ".join(wrong) or told)


def all_reduce(place: Workplace, kind: Kind) -> RowResult:
    """Check a sum over the ranks, and report the speed of the slowest rank."""
    size = size_of(place, kind)
    reports = reports_of(job_folder(place, kind), size)
    expected = [size * (size + 1) / 2] * 8
    wrong = [one["rank"] for one in reports if one["sum"] != expected]
    large = str(reports[0]["bytes"])
    latency, seconds = (max(one["seconds"][key] for one in reports) for key in ("4", large))
    rate = int(large) / seconds
    told = f"{reports[0]['backend']}: 4 bytes in {latency * 1e6:,.0f} µs, {int(large):,} bytes at {rate / 1e9:.2f} GB/s"
    return result(
        not wrong,
        f"wrong sum on rank {wrong[0]}" if wrong else told,
        seconds_of_4_bytes=latency,
        bytes_per_second=rate,
    )


def same_bytes(place: Workplace, kind: Kind) -> RowResult:
    """Compare the run that the ranks share with the run of one rank."""
    done, alone = _done(place, kind, "same"), runs.pair_run(place, _device_of_one(kind))
    return runs.equal(runs.content(done), runs.content(alone), f"1 rank and {size_of(place, kind)}")


def parallel(place: Workplace, kind: Kind) -> RowResult:
    """Compare a DDP gradient with float64, and a DDP teacher and student with those of one rank."""
    allowed = losses.TOLERANCES["fp32"].gradient
    gradient = max(one["parallel_gap"] for one in reports_of(job_folder(place, kind), size_of(place, kind)))
    if not gradient <= allowed:  # NaN fails
        return result(False, f"DDP gradient from float64: {gradient:.0e} (at most {allowed:.0e})", gradient=gradient)
    found, expected = (runs.losses_of(one) for one in (_done(place, kind, "parallel"), _alone(place, kind, "alone")))
    gaps = {stage: runs.difference(found[stage], expected[stage]) for stage in ("teacher", "students")}
    told = ", ".join(f"{stage} {gap:.0e}" for stage, gap in gaps.items())
    return result(
        max(gaps.values()) <= PARALLEL_TOLERANCE,
        f"DDP gradient from float64: {gradient:.0e} (at most {allowed:.0e}); losses from those of one rank: {told} (at"
        f" most {PARALLEL_TOLERANCE:.0e})",
        gradient=gradient,
        **gaps,
    )


def split(place: Workplace, kind: Kind) -> RowResult:
    """Compare a synthesis whose classes are split among the ranks: with float64, and a run with whole classes.

    Adam hides a factor of the gradient from the losses, so the gradient is compared by itself.
    """
    size, allowed = size_of(place, kind), losses.TOLERANCES["fp32"]
    for one in reports_of(job_folder(place, kind), size):
        gaps = one["split_gaps"]
        if not losses.within(gaps, allowed):
            return result(False, f"rank {one['rank']} from float64: {losses.told(gaps, allowed)}", **gaps)
    found, expected = (runs.losses_of(one) for one in (_done(place, kind, "split"), _alone(place, kind, "whole")))
    gap = runs.difference(found["synthesis"], expected["synthesis"])
    text = f"losses of a run from whole classes: {gap:.0e} (at most {SPLIT_TOLERANCE:.0e})"
    return result(gap <= SPLIT_TOLERANCE, f"from float64: {losses.told(gaps, allowed)}; {text}", **gaps, synthesis=gap)


def _free_ports(count: int) -> list[int]:
    """Return free ports of this machine."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
