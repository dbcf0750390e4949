"""``wmdd bench protocol --plan``: what of protocols is done, and how much work is left; nothing is started."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import groupby

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
    """What of some cells is done, and what is left."""

    sets: int = 0
    """Distilled sets in all"""
    sets_left: int = 0
    iterations_left: int = 0
    """Images times iterations of the sets that are left, whole: checkpoints are not read"""
    students: int = 0
    """Students in all"""
    students_left: int = 0
    updates_left: int = 0
    """Optimiser steps of the students that are left"""

    def __add__(self, other: "Remaining") -> "Remaining":
        return Remaining(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def remaining_of(cell: ProtocolRun) -> Remaining:
    """Count what is left of a cell.

    A set whose students are all measured is not needed any more, wherever its images are.

    Raises:
        InputError: the number of classes is not known without the images, and they are not there.
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
    """Print a line for each method at each IPC, in the order in which they will be done."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("Runs", overflow="fold")  # a long folder takes more lines, and no room from the figures
    for column in ("Sets done", "Students done", "img·iter left", "Updates left"):
        shown.add_column(column, justify="right", no_wrap=True)
    total = Remaining()
    for folder, group in groupby(table, lambda cell: cell.folder.parent):
        found = sum((remaining_of(cell) for cell in group), Remaining())
        shown.add_row(str(folder), *_figures(found))
        total += found
    shown.add_section()
    shown.add_row("all", *_figures(total))
    console.print(shown)


def _figures(found: Remaining) -> tuple[str, ...]:
    sets, students = found.sets - found.sets_left, found.students - found.students_left
    return (
        f"{sets} / {found.sets}",
        f"{students} / {found.students}",
        f"{found.iterations_left:,}",
        f"{found.updates_left:,}",
    )
