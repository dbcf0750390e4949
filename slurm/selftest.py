"""``wmdd slurm submit --selftest``: the self-test on every node of a partition, one job a node, and its summary.

``OUT/nodes/NODE.json`` is the result of a node, ``OUT/jobs.json`` names the job of each node, and ``OUT/jobs/`` holds
the logs.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from slurm import scheduler, submit
from slurm.launcher import environment_lines
from slurm.profile import Profile, Resources
from wmdd.errors import InputError, WmddError
from wmdd.storage.files import read_json, write_json

_MINUTES = 20
"""Longest time limit of a job"""
_UNAVAILABLE = ("down", "drain", "fail", "maint", "unknown", "reboot", "power", "future", "planned_down")
"""States of nodes, by their beginning, that take no job now"""


@dataclass(frozen=True)
class NodeResult:
    """The self-test of one node."""

    node: str
    state: str
    """``passed``, ``failed``, ``waiting`` (in the queue or running), ``lost`` (ended without a result) or ``absent``"""
    detail: str

    @property
    def bad(self) -> bool:
        """Whether the node must not be used before a person has looked at it."""
        return self.state in ("failed", "lost")


def on_every_node(profile: Profile, out: Path) -> list[NodeResult]:
    """Submit the self-test to every node that has no result and no job; return where each node stands.

    Raises:
        InputError: the partition does not exist, or SLURM refuses a job.
    """
    scheduler.require("sbatch", "sinfo", "squeue")
    out = out.absolute()
    states = nodes_of_partition(scheduler.call("sinfo", "--noheader", "--Node", "--format=%P|%N|%T"), profile)
    ledger = out / "jobs.json"
    jobs: dict[str, str] = read_json(ledger) if ledger.exists() else {}
    for node, state in states.items():
        if node not in jobs and _result(out, node) is None and not _is_unavailable(state):
            submit.private(out / "jobs")
            (out / "nodes").mkdir(exist_ok=True)
            jobs[node] = _submitted(script(profile, node, out))
            write_json(ledger, jobs)
    known = scheduler.queue(jobs.values())
    active = {job: task.state.lower() for job, task in known.items() if task.active}
    return [
        standing(node, _result(out, node), active.get(jobs.get(node, "")), state, _log(out, jobs.get(node)))
        for node, state in sorted((dict.fromkeys(jobs, "") | states).items())
    ]


def _submitted(text: str) -> str:
    try:
        return submit.send(text)
    except WmddError as error:
        raise InputError(f"{error}; adapt the profile, the same command submits the other nodes") from None


def nodes_of_partition(listing: str, profile: Profile) -> dict[str, str]:
    """Return the nodes of the profile's partition with their states.

    Args:
        listing: lines ``PARTITION|NODE|STATE`` of sinfo; a star marks the default partition.
        profile: profile whose partition is meant; without one it is the default.

    Raises:
        InputError: the partition has no node.
    """
    wanted = profile.stages["distill"].partition
    found = {}
    for line in listing.splitlines():
        partition, node, state = line.strip().split("|")
        if partition.rstrip("*") == wanted or (wanted is None and partition.endswith("*")):
            found[node] = state.lower()
    if not found:
        raise InputError(f"partition {wanted or '(default)'}: sinfo lists no node; set partition in the profile")
    return found


def _is_unavailable(state: str) -> bool:
    return state.startswith(_UNAVAILABLE) or state.endswith("*")  # a star: the node does not answer


def standing(node: str, result: Mapping[str, Any] | None, job: str | None, state: str, log: Path | None) -> NodeResult:
    """Return where a node stands.

    Args:
        node: name of the node.
        result: its JSON file; None without one.
        job: state of its job in the queue; None if no job is there.
        state: state of the node, as sinfo names it.
        log: log of its job; None if it had no job.
    """
    if result is not None:
        rows = [row["name"] for row in result["rows"] if row["state"] == "fail"]
        if rows:
            return NodeResult(node, "failed", ", ".join(rows))
        done = sum(row["state"] == "pass" for row in result["rows"])
        return NodeResult(node, "passed", f"{done} rows in {result['seconds']:.0f} s")
    if job is not None:
        return NodeResult(node, "waiting", job)
    if log is not None:
        return NodeResult(node, "lost", f"its job ended without a result: {log}")
    return NodeResult(node, "absent", f"the node is {state}")


def resources(profile: Profile) -> Resources:
    """Return what the job of a node asks for: all its GPUs, in one task."""
    one = profile.stages["distill"]
    ranks = profile.node_ranks or one.ranks_per_node
    return one.model_copy(
        update={
            "nodes": 1,
            "ranks_per_node": 1,
            "gpus_per_rank": one.gpus_per_rank * ranks,
            "cpus_per_rank": one.cpus_per_rank * ranks,
            "memory_gb": one.memory_gb * ranks / one.ranks_per_node,
            "minutes": min(one.minutes, _MINUTES),
        }
    )


def script(profile: Profile, node: str, out: Path) -> str:
    """Return the script of the job of one node."""
    wanted = resources(profile)
    device = "cuda" if wanted.gpus_per_rank else "cpu"
    words = ["-u", "-m", "wmdd", "selftest", "--device", device, "--json", str(out / "nodes" / f"{node}.json")]
    command = shlex.join(["srun", "--ntasks=1", f"--cpus-per-task={wanted.cpus_per_rank}", *wanted.srun_args])
    lines = [*environment_lines(wanted), f"{command} {submit.python(wanted)} {shlex.join(words)}"]
    options = {"nodelist": node, "no-requeue": True}
    return submit.job_script("wmdd-selftest", wanted, lines, out / "jobs", **options)


def table(found: list[NodeResult]) -> Table:
    """Return the nodes as a table for the terminal, failed ones first."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("Node", "State", "Detail"):
        shown.add_column(column)
    for one in sorted(found, key=lambda one: (not one.bad, one.node)):
        colour = "red" if one.bad else "green" if one.state == "passed" else "yellow"
        shown.add_row(Text(one.node), f"[{colour}]{one.state}[/]", Text(one.detail))
    return shown


def summary(found: list[NodeResult], out: Path) -> str:
    """Return the number of nodes by state, the names of bad nodes, and what to do next."""
    states = [one.state for one in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    bad = ",".join(one.node for one in found if one.bad)
    lines = [f"{out}: {len(found)} nodes: {counts}"]
    lines += ["the same command shows the results"] if "waiting" in states else []
    lines += [f'keep jobs away from the bad nodes with this line in the profile: exclude = "{bad}"'] if bad else []
    return "\n".join(lines)


def _result(out: Path, node: str) -> dict[str, Any] | None:
    path = out / "nodes" / f"{node}.json"
    found: dict[str, Any] | None = read_json(path) if path.exists() else None
    return found


def _log(out: Path, job: str | None) -> Path | None:
    return None if job is None else out / "jobs" / f"{job}_0_log.out"
