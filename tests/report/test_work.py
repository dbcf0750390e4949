"""The grid of a protocol's runs: what is done, at work, requeued, failed and missing."""

import time
from pathlib import Path

from report_runs import PROVENANCE, make_run

from wmdd.report.collect import collect
from wmdd.report.work import WorkCell, work
from wmdd.storage.files import write_json

STUDENTS = {"networks": ["convnet3x32"], "seeds": 2, "baselines": []}


def cell(folder: Path, seed: int) -> WorkCell:
    """Return the cell of a seed of WMDD."""
    found = work(collect([folder]))
    assert found
    ((_, columns, ((_, cells),)),) = found.grids
    one = cells[columns.index(f"seed {seed}")]
    assert one
    return one


def report_progress(run: Path, stage: str, message: str = "", age: float = 0.0) -> None:
    state = {"stage": stage, "done": 5, "total": 10, "unit": "epochs", "rate": 1.0, "message": message}
    write_json(run / "progress" / "0.json", state | {"time": time.time() - age, "process": "node:1"})


def test_the_grid_has_the_state_and_the_time_of_every_run_of_a_protocol(tmp_path: Path) -> None:
    slurm = {"provenance": PROVENANCE | {"slurm": {"job": "77", "restarts": "2"}}}
    for seed in range(5):
        students = [0.9, 0.9] if seed == 0 else [0.9]
        make_run(tmp_path / f"wmdd/seed-{seed}", students, seed=seed, student=STUDENTS, record=slurm)
    plan = [{"folder": f"wmdd/seed-{n}", "method": "wmdd", "name": "wmdd", "ipc": 2, "seed": n} for n in range(5)]
    write_json(tmp_path / "protocol.json", {"name": "p", "cells": plan})
    report_progress(tmp_path / "wmdd/seed-1", "training students")
    report_progress(tmp_path / "wmdd/seed-2", "interrupted", "SIGTERM: checkpointed")
    report_progress(tmp_path / "wmdd/seed-3", "failed", "out of memory")

    cells = [cell(tmp_path, seed) for seed in range(5)]

    assert [one.state for one in cells] == ["done", "running", "requeued", "failed", "partial"]
    assert cells[0].text == "0:00:51", "30 of the teacher, 13 of the images, 4 of each student"
    assert "job 77, restarted 2 times" in cells[0].title and "out of memory (node:1)" in cells[3].title
    assert cells[4].text == "66 %", "two of three parts"


def test_a_process_that_has_long_been_silent_does_not_run(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path / f"wmdd/seed-{seed}", [0.9], seed=seed, student=STUDENTS)
    report_progress(tmp_path / "wmdd/seed-1", "training students", age=3600.0)

    assert cell(tmp_path, 1).state == "partial"


def test_a_run_that_has_not_begun_is_missing(tmp_path: Path) -> None:
    make_run(tmp_path / "ipc-002/wmdd/seed-0", [0.9, 0.9], student=STUDENTS, name="wmdd")
    plan = [{"folder": f"ipc-002/wmdd/seed-{n}", "method": "wmdd", "name": "wmdd", "seed": n} for n in range(2)]
    write_json(tmp_path / "protocol.json", {"name": "p", "cells": plan})

    assert cell(tmp_path, 1).state == "missing"
