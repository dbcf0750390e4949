"""``wmdd bench protocol --plan``: finished and remaining work of protocols. No run is started."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.projection import size_of
from bench.protocol import ProtocolRun, students_left
from wmdd.distill.methods import registry
from wmdd.runs.folder import RunFolder
from wmdd.students import tasks


@dataclass(frozen=True)
class Remaining:
    """Total and remaining work of some runs."""

    sets: int = 0
    """Total number of distilled sets"""
    sets_left: int = 0
    iterations_left: int = 0
    """Images times iterations of the missing sets, without regard to checkpoints"""
    students: int = 0
    """Total number of students"""
    students_left: int = 0
    updates_left: int = 0
    """Optimizer steps of the missing students"""

    def __add__(self, other: "Remaining") -> "Remaining":
        return Remaining(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def remaining_of(cell: ProtocolRun) -> Remaining:
    """Return the work of one run.

    A set whose students are all measured counts as done: its images are no longer needed.

    Raises:
        InputError: the number of classes depends on the images, and these are missing.
    """
    config, folder = cell.config, RunFolder(cell.folder)
    classes, _ = size_of(config)
    method = registry.create(config)
    images = classes * config.ipc
    left = students_left(cell, classes)
    blocks = range(config.blocks)
    made = not left or all(folder.sidecar(block) and folder.block_file(block).exists() for block in blocks)
    iterations = method.synthesis().iterations if method.objective() else 0
    return Remaining(
        sets=1,
        sets_left=int(not made),
        iterations_left=0 if made else images * iterations,
        students=len(tasks.student_tasks(config.student, config.labels.regimes)),
        students_left=len(left),
        updates_left=sum(tasks.update_count(config, task.view, images) for task in left),
    )


def tell(table: Sequence[ProtocolRun], console: Console) -> None:
    """Print a line for each method at each IPC, in the order of the work."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("Runs", overflow="fold")  # a long name is folded, so that the figures keep their room
    for column in ("Sets done", "Students done", "img·iter left", "Updates left"):
        shown.add_column(column, justify="right", no_wrap=True)
    rows: dict[Path, Remaining] = {}
    for cell in table:
        rows[cell.folder.parent] = rows.get(cell.folder.parent, Remaining()) + remaining_of(cell)
    for folder, found in rows.items():
        shown.add_row(str(folder), *_figures(found))
    shown.add_section()
    shown.add_row("all", *_figures(sum(rows.values(), Remaining())))
    console.print(shown)


def _figures(found: Remaining) -> tuple[str, ...]:
    sets, students = found.sets - found.sets_left, found.students - found.students_left
    return (
        f"{sets} / {found.sets}",
        f"{students} / {found.students}",
        f"{found.iterations_left:,}",
        f"{found.updates_left:,}",
    )
