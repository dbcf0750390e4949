"""One student task on the tree of a run that was never made: ``python -m bench.rehearse_task CONFIG.toml FOLDER``.

The tree has every block of the run, with its sidecar, and a record of every other student. Blocks are sparse files of
zeros with the shapes of the run. The task is the product's own, from the manifest to the last batch of images, without
dataset, teacher and training. It prints the files that it opened below the run folder, and its memory, as JSON.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from bench.projection import size_of
from wmdd.config.loading import load_config, to_toml
from wmdd.config.schema import Config
from wmdd.errors import WmddError
from wmdd.launchers import last_words
from wmdd.runs import class_partition
from wmdd.runs.distilled_set import MappedSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime import interpreter
from wmdd.runtime.ranks import ranks
from wmdd.runtime.team import Team
from wmdd.storage.files import FORMAT, sha256, write_bytes, write_json
from wmdd.students import evaluate
from wmdd.students.tasks import StudentTask, student_tasks


@dataclass(frozen=True)
class TaskCost:
    """Files and memory of one student task."""

    blocks: int
    students: int
    set_gb: float
    """Size of the distilled set in 10⁹ bytes"""
    block_opens: int
    """Largest number of times that one block file was opened"""
    sidecar_opens: int
    """The same for the sidecars of the blocks"""
    other_files: int
    """Number of other files below run folder and cache that were opened"""
    peak_gb: float
    """Peak of the resident memory during the task beyond that before it, mapped files included, in 10⁹ bytes"""
    private_gb: float
    """Growth of the memory beyond mapped files, at the end of the task, in 10⁹ bytes"""

    def __str__(self) -> str:
        return (
            f"One of {self.students} students on {self.blocks} blocks ({self.set_gb:.3f} GB), without dataset, teacher"
            f" and training: it opens each block {self.block_opens}x, each sidecar {self.sidecar_opens}x, and"
            f" {self.other_files} other files; its memory grows by {self.peak_gb:.3f} GB at most, mapped files"
            f" included, and by {self.private_gb:.3f} GB beyond these"
        )


def run(config: Config) -> TaskCost:
    """Rehearse one student task of a run, in a process of its own.

    Raises:
        InputError: the config is wrong.
        WmddError: the task failed. The message has its last line.
    """
    import subprocess

    class_partition.plan(config, size_of(config)[0])
    with TemporaryDirectory(prefix="wmdd-rehearse-") as place:
        file = Path(place) / "config.toml"
        write_bytes(file, to_toml(config).encode())
        command = [sys.executable, "-m", __name__, str(file), str(Path(place) / "run")]
        environment = os.environ | {"WMDD_CACHE": str(Path(place) / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603
        if done.returncode:
            raise WmddError(f"the rehearsed task failed: {last_words(done.stderr)}")
        return TaskCost(**json.loads(done.stdout.splitlines()[-1]))


def main(file: str, place: str) -> None:
    """Write the tree, do the task, and print its cost as JSON."""
    config, folder = load_config(file), RunFolder(Path(place))
    classes, _ = size_of(config)
    tasks = student_tasks(config.student, config.labels.regimes)
    with ranks(config.compute) as job:
        size = _write_tree(config, folder, classes, tasks[1:], job.arithmetic.facts)
        teacher = SimpleNamespace(sha256="0" * 64)
        session: Any = SimpleNamespace(config=config, ranks=job, teacher=teacher, stop=lambda: False)
        before = _memory("VmRSS"), _memory("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present size
        with _opened(folder.path, Path(os.environ["WMDD_CACHE"])) as opened:
            whole = evaluate.SetOfStudents.open(session, folder, tasks[:1])
            evaluate.evaluate([UntrainedStudents(**vars(whole))])
        blocks = [opened[folder.block_file(block)] for block in range(config.blocks)]
        sidecars = [opened[folder.sidecar_file(block)] for block in range(config.blocks)]
        cost = TaskCost(
            blocks=config.blocks,
            students=len(tasks),
            set_gb=size / 1e9,
            block_opens=max(blocks),
            sidecar_opens=max(sidecars),
            other_files=len(opened) - sum(map(bool, blocks)) - sum(map(bool, sidecars)),
            peak_gb=(_memory("VmHWM") - before[0]) / 1e9,
            private_gb=(_memory("RssAnon") - before[1]) / 1e9,
        )
    sys.stdout.write(json.dumps(vars(cost)) + "\n")


class UntrainedStudents(evaluate.SetOfStudents):
    """Students that see each batch of images once, and are not trained."""

    def train(self, task: StudentTask, distilled: MappedSet, team: Team, advance: Callable[[int], None]) -> None:
        """Read all images in batches, in random order."""
        order = torch.randperm(len(distilled), generator=torch.Generator().manual_seed(0))
        for batch in order.split(self.session.config.student.batch_size):
            distilled.images[batch]


def _write_tree(
    config: Config, folder: RunFolder, classes: int, others: Sequence[StudentTask], arithmetic: dict[str, Any]
) -> int:
    """Write a run folder with all blocks, and a record of the other students. Return the size of the blocks."""
    size = 0
    folder.bind(config, "rehearsed")
    for block in class_partition.plan(config, classes):
        file, names = folder.block_file(block.index), [f"class-{index:05d}" for index in block.classes]
        _write_sparse(file, config, block.classes)
        size += file.stat().st_size
        sidecar = {
            "format": FORMAT,
            "block": block.index,
            "seeded": True,
            "classes": names,
            "sha256": sha256(file),
            "class_sha256": {name: f"{index:064x}" for name, index in zip(names, block.classes, strict=True)},
            "teacher": "0" * 64,
            "arithmetic": arithmetic,
        }
        write_json(folder.sidecar_file(block.index), sidecar)
    first = folder.path / "records" / "rehearsed"
    write_json(first, {})
    for task in others:
        os.link(first, evaluate.record_file(folder, task))
    return size


def _write_sparse(file: Path, config: Config, classes: Sequence[int]) -> None:
    """Write a safetensors file of black images, which takes no room on disk."""
    count, data = len(classes) * config.ipc, config.data
    labels = torch.tensor(list(classes)).repeat_interleave(config.ipc).numpy().tobytes()
    weights = torch.full((count,), 1 / config.ipc).numpy().tobytes()
    ends = [len(labels), len(labels) + len(weights)]
    ends.append(ends[-1] + count * data.channels * data.resolution**2)
    header = {
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, ends[0]]},
        "weights": {"dtype": "F32", "shape": [count], "data_offsets": ends[:2]},
        "images": {
            "dtype": "U8",
            "shape": [count, data.channels, data.resolution, data.resolution],
            "data_offsets": ends[1:],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(file, len(text).to_bytes(8, "little") + text + labels + weights)
    os.truncate(file, 8 + len(text) + ends[-1])


@contextmanager
def _opened(*roots: Path) -> Iterator[Counter[Path]]:
    """Count how often each file below some folders is opened. Call it once in a process: a hook stays for ever."""
    found: Counter[Path] = Counter()
    watching = True

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | Path):
            path = Path(os.path.abspath(arguments[0]))
            if any(path.is_relative_to(root) for root in roots):
                found[path] += 1

    sys.addaudithook(note)
    try:
        yield found
    finally:
        watching = False


def _memory(name: str) -> int:
    """Return an entry of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    interpreter.expect_many_objects()
    main(*sys.argv[1:])
    interpreter.end(0)
