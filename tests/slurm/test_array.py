"""An array of many tiny tasks: what the machinery itself costs.

``WMDD_SLURM_TASKS=256 pytest -s tests/slurm/test_array.py`` gives the figures of docs/guides/slurm.md; by default the
array is smaller, since a task costs half a second of a core.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from slurm import scheduler
from slurm.local_cluster import LocalCluster
from slurm.plan import Selection
from slurm.status import status
from slurm.submit import prepare, submit
from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config

from .conftest import ask, profile, rows, wait

TASKS = int(os.environ.get("WMDD_SLURM_TASKS", "24"))
_opened: list[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def opened() -> Iterator[list[str]]:
    """Collect the paths of all files that this process opens."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture
def many(tmp_path: Path) -> Config:
    """Return the config of as many one-class blocks as there are tasks, of images picked at random."""
    for number in range(TASKS):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / f"class{number:03}"
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), number).save(folder / "0.png")
    return load_config(
        "digits",
        [
            "data.source=folder",
            f"data.root={tmp_path / 'data'}",
            "data.resolution=8",
            "method=random",
            "ipc=1",
            "synthesis.classes_per_group=1",
            f"blocks={TASKS}",
            "teacher.network=convnet2x8",
            "teacher.epochs=1",
            "compute.threads=1",
            "student.baselines=[]",
        ],
    )


def test_many_tiny_tasks_cost_little_and_status_opens_no_file_of_theirs(
    cluster: LocalCluster, many: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    pipeline.run(many, run, share=pipeline.Share(("teacher", "distill")))
    aside.mkdir()
    for sidecar in (run / "blocks").glob("*.json"):
        shutil.move(sidecar, aside)
    request = prepare(many, run, profile(parallel=8), TASKS, selection=Selection(("teacher", "distill")))
    assert [len(array.tasks) for array in request.arrays] == [TASKS]

    def release(jobs: list[str]) -> None:
        # While the array was held, somebody else finished its blocks: each task finds its own whole and ends.
        for sidecar in aside.iterdir():
            shutil.move(sidecar, run / "blocks")
        ask("scontrol", "release", *jobs)

    monkeypatch.setattr(scheduler, "release", release)
    begun = time.perf_counter()
    [launched] = submit(request)
    submitting = time.perf_counter() - begun
    begun = time.perf_counter()
    with opened() as files:
        status(run)
    asking = time.perf_counter() - begun
    assert asking < 2
    assert [Path(file).name for file in files if file.startswith(str(run))] == ["submission-0001.json"]
    wait(lambda: not ask("squeue", "-h"), 60 + 2 * TASKS, "every task has ended")
    lasting = time.perf_counter() - begun
    assert {row.state for row in rows(run)} == {"done"}
    marks = sorted((run / "slurm" / "attempts" / launched.job).glob("*/*"))
    assert len(marks) == TASKS and all(".0.done." in mark.name for mark in marks)
    folders = [folder for folder in (run / "slurm").rglob("*") if folder.is_dir()]
    assert max(len(list(folder.iterdir())) for folder in folders) <= TASKS + 1, "a folder has a file a task and more"
    layout = ("squeue", "-h", "-t", "all", "-r", "-j", launched.job, "-o", "%S %e")
    times = [line.split() for line in ask(*layout).splitlines()]
    print(
        f"\n{TASKS} tasks: submitted in {submitting:.1f} s, status in {asking:.2f} s, done in {lasting:.0f} s;"
        f" first start {min(times)[0]}, last start {max(times)[0]}, last end {max(end for _, end in times)}"
    )
