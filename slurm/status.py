"""Where a submitted run stands: from the names of its files and one question to the controller."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from slurm import attempts, scheduler, submissions
from slurm.attempts import History
from slurm.profile import STAGES, Stage
from slurm.scheduler import Accounted, Queued
from slurm.submissions import JOBS, FileNames, Item, Submitted
from wmdd.errors import InputError

_OVER = {
    "CANCELLED": "cancelled",
    "NODE_FAIL": "node failed",
    "TIMEOUT": "time limit",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "DEADLINE": "deadline",
    "BOOT_FAIL": "node failed",
}
_ENDS = {
    "failed": "failed",
    "killed": "killed",
    "device": "bad node",
    "refused": "wrong input",
    "stuck": "stuck",
    "stopped": "stopped",
}
"""Outcomes of a last start that left work to do, and how a task is called that ended so."""
_REMEDIES = {
    "out of memory": "raise memory_gb in the profile",
    "killed": "raise memory_gb in the profile if memory was short",
    "time limit": "raise signal_seconds in the profile: the task did not checkpoint in time",
    "stuck": "raise minutes in the profile: a start takes longer than the time limit",
    "wrong input": "mend what the message says",
    "bad node": "set exclude in the profile to the nodes that failed the device check",
}
"""What to do before the next submission, by the state of a task."""
_CAUSES = 20
"""Number of tasks whose logs are read for the cause."""


@dataclass(frozen=True)
class Row:
    """A task and where it stands."""

    stage: Stage
    task: str
    """SLURM's name of it"""
    items: tuple[int, ...]
    state: str
    """done, running, pending, requeued, or why it is over: failed, killed, cancelled, node failed, ..."""
    why: str
    """SLURM's reason, where it says more"""
    node: str
    progress: float
    """Share of the finished parts, 0 to 1"""
    restarts: int
    seconds: int
    """All starts together; a start whose node was lost counts only where there is accounting"""
    bad_nodes: tuple[str, ...] = ()
    """Nodes that failed the device check of this task"""

    @property
    def over(self) -> bool:
        """Whether the task has ended without its result."""
        return self.state not in ("done", "running", "pending", "requeued", "ending")


@dataclass(frozen=True)
class Status:
    """A run as it was submitted."""

    rows: list[Row]
    hours: float
    """GPU-hours so far; of ranks where the tasks have no GPU"""
    unit: str
    accounting: bool

    @property
    def active(self) -> bool:
        """Whether a task may still do something."""
        return any(row.state in ("running", "pending", "requeued", "ending") for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        totals = {"hours": round(self.hours, 4), "unit": self.unit, "accounting": self.accounting}
        return totals | {"active": self.active, "tasks": [asdict(row) for row in self.rows]}


def status(run: Path) -> Status:
    """Find out where a submitted run stands.

    Opens one file per submission, and the logs of a few tasks that failed.  Asks SLURM at most twice, however many
    tasks there are.

    Raises:
        InputError: nothing was submitted from the folder, or SLURM is missing.
        WmddError: the controller does not answer.
    """
    launched = submissions.read(run)
    jobs = [one.job for one in launched]
    queue, accounts = scheduler.queue(jobs), scheduler.accounted(jobs)
    histories, tree = attempts.histories(run, jobs), FileNames(run)
    rows: list[Row] = []
    spent = 0.0
    for number, one in enumerate(launched):
        again = {
            item.index
            for later in launched[number + 1 :]
            if later.stage == one.stage
            for task in later.tasks
            for item in task
        }
        for name, items in zip(one.names(), one.tasks, strict=True):
            account = accounts.get(name, accounts.get(one.job)) if accounts else None
            row = _row(one, name, items, queue.get(name), account, attempts.of_task(histories, name), tree)
            spent += row.seconds * max(1, one.gpus or one.ranks)
            if not again.issuperset(row.items):
                rows.append(row)
    for position in [position for position, row in enumerate(rows) if row.over][:_CAUSES]:
        rows[position] = _with_cause(run, rows[position])
    unit = "GPU-hours" if any(one.gpus for one in launched) else "rank-hours"
    rows.sort(key=lambda row: STAGES.index(row.stage))
    return Status(rows, spent / 3600, unit, accounts is not None)


def _row(
    one: Submitted,
    name: str,
    items: Sequence[Item],
    queued: Queued | None,
    account: Accounted | None,
    marks: History,
    tree: FileNames,
) -> Row:
    whole = [all(tree.has(proof) for proof in item.proof) for item in items]
    state, why = _state(one.stage, all(whole), queued, account, marks)
    parts = [part for item, done in zip(items, whole, strict=True) if not done for part in item.parts]
    share = sum(tree.has(part) for part in parts) / len(parts) if parts else 0.0
    done = sum(whole) / len(whole)
    progress = 1.0 if state == "done" else (done + (1 - done) * share if one.stage in ("distill", "students") else 0.0)
    running = queued.seconds if queued and state in ("running", "ending") else 0
    seconds = account.seconds if account else marks.seconds + running
    restarts = max(queued.restarts if queued else 0, marks.restarts)
    node = (queued.node if queued else "") or (account.node if account else "") or marks.node
    indices = tuple(item.index for item in items)
    return Row(one.stage, name, indices, state, why, node, progress, restarts, seconds, marks.bad_nodes)


def _state(
    stage: Stage, whole: bool, queued: Queued | None, account: Accounted | None, marks: History
) -> tuple[str, str]:
    """Return the state of a task and the reason that SLURM gives.

    A block is done when its files are there, whatever SLURM says; other stages leave files that may be of an earlier
    submission, so that their task must not have failed either.
    """
    told = queued.state if queued else account.state if account else ""
    reason = queued.reason if queued and queued.reason not in ("None", "") else ""
    if queued and queued.active:
        if whole and stage == "distill":
            return "done", ""
        if told == "PENDING":
            return ("requeued" if queued.restarts else "pending"), reason
        return ("running" if told == "RUNNING" else "ending"), ""
    failed = marks.last in _ENDS or told in scheduler.ENDED - {"COMPLETED"}
    if whole and (stage == "distill" or not failed):
        return "done", ""
    if reason == "DependencyNeverSatisfied" or (told == "CANCELLED" and not marks.starts and reason == "Dependency"):
        return "cancelled", "what it waited for failed"
    if told in _OVER:
        return _OVER[told], reason
    if marks.last in _ENDS:
        return _ENDS[marks.last], ""
    if marks.starts and marks.last is None:
        return "killed", "it ended without a word"
    return "failed", "" if marks.starts else "it never started"


def _with_cause(run: Path, row: Row) -> Row:
    """Return a row with the last message of its task, where its log has one."""
    for file in _logs(run, row.task)[:1]:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        told = [line.removeprefix("wmdd: ") for line in lines if line.startswith("wmdd: ")]
        told = [line for line in told if not line.startswith(_AFTERWARDS)] or lines[-1:]
        return replace(row, why=row.why or told[-1] if told else row.why)
    return row


_AFTERWARDS = ("back into the queue", "not requeued", "excluded from")
"""How the lines begin that ``teardown.sh`` writes below the cause."""
_TAIL_BYTES = 20_000
"""Part of a log that is read for the cause."""


def mending(run: Path, found: Status) -> list[str]:
    """Return what to do about tasks that are held, or over without their result, and the command; else nothing."""
    lost = [row for row in found.rows if row.over]
    # After a failed launch, for example.  Nothing more happens to such a task by itself.
    held = [row for row in found.rows if row.state in ("pending", "requeued") and "held" in row.why.lower()]
    lines = []
    if held:
        tasks = ",".join(row.task for row in held)
        lines += [f"{len(held)} tasks are held ({held[0].why}); release them with:", f"scontrol release {tasks}"]
    if not lost:
        return lines
    lines.append(f"{len(lost)} tasks are over without their result")
    for state in dict.fromkeys(row.state for row in lost):
        if state in _REMEDIES:
            nodes = sorted({node for row in lost if row.state == state for node in row.bad_nodes})
            lines.append(f"{state}: {_REMEDIES[state]}{': ' if nodes else ''}{','.join(nodes)}")
    if found.active:
        lines.append("the other tasks are still in the queue; this command submits only what is not:")
    profile = submissions.profile_of(run)
    return [*lines, shlex.join(["wmdd", "slurm", "submit", str(run), "--profile", profile])]


def render(found: Status, everything: bool = False) -> Table:
    """Return the table for a terminal: a line per stage, and one per task that is not done (or all of them)."""
    title = f"{found.hours:.2f} {found.unit} so far{'' if found.accounting else ' (no accounting)'}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for heading in ("task", "items", "state", "done", "node", "restarts", "time"):
        number = heading in ("done", "restarts", "time")
        table.add_column(heading, justify="right" if number else "left", no_wrap=heading != "state")
    for stage in STAGES:
        rows = [row for row in found.rows if row.stage == stage]
        if not rows:
            continue
        states = Counter(row.state for row in rows).items()
        counts = ", ".join(f"{count} {state}" for state, count in states) if len(rows) > 1 else rows[0].state
        share = sum(row.progress for row in rows) / len(rows)
        table.add_row(stage, "", counts, f"{share:.0%}", "", *_spent(rows), style="bold")
        for row in rows:
            if everything or row.state != "done":
                state = f"{row.state} ({row.why})" if row.why else row.state
                items = ranges(row.items) if stage in ("distill", "students") else ""
                table.add_row(f"  {row.task}", items, state, f"{row.progress:.0%}", row.node, *_spent([row]))
    return table


def _spent(rows: Sequence[Row]) -> tuple[str, str]:
    """Return the number of restarts of some tasks, and their time as H:MM:SS."""
    total = sum(row.seconds for row in rows)
    clock = f"{total // 3600}:{total % 3600 // 60:02}:{total % 60:02}"
    return str(sum(row.restarts for row in rows) or ""), clock


def log_files(run: Path, stage: Stage, item: int) -> list[Path]:
    """Return the logs of the task that last did an item, one a rank, rank 0 first.

    Raises:
        InputError: no task was submitted for it, or it has not started yet.
    """
    known = submissions.read(run)
    for one in reversed(known):
        for name, items in zip(one.names(), one.tasks, strict=True):
            if one.stage == stage and item in [found.index for found in items]:
                files = _logs(run, name)
                if not files:
                    raise InputError(f"{stage} {item}: task {name} has not started, so that it has no log yet")
                return files
    valid = sorted({found.index for one in known if one.stage == stage for task in one.tasks for found in task})
    there = f"submitted: {ranges(valid)}" if valid else f"nothing was submitted for stage {stage}"
    raise InputError(f"{stage} {item}: no task was submitted for it; {there}")


def _logs(run: Path, task: str) -> list[Path]:
    """Return the logs of a task, one a rank, rank 0 first."""
    place = run / JOBS / task.partition("_")[0] / task
    return sorted(place.glob("*_log.out"), key=lambda file: int(file.name.split("_")[-2]))


def ranges(numbers: Sequence[int]) -> str:
    """Return ``0-3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
