"""What one student of many opens: every block once, and little else."""

import shutil
from pathlib import Path

import pytest
from open_files import files_opened

from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.records.files import record_files
from wmdd.runs import progress as progress_files
from wmdd.runs.folder import RunFolder
from wmdd.runtime import progress_bars
from wmdd.storage.cache import cache_root
from wmdd.storage.files import read_json, write_json


@pytest.mark.slow
def test_a_student_task_opens_each_block_once_and_few_other_files(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "store"))
    changes = {"blocks": 4, "ipc": 1, "synthesis.classes_per_group": 1, "labels.regimes": ("hard",)}
    config = tiny.replace(changes | {"student.baselines": (), "student.epochs": 1})
    pipeline.run(config, tmp_path / "run", share=pipeline.Share(("teacher", "distill")))
    run = RunFolder(tmp_path / "run")
    pipeline.run(config, run.path, share=pipeline.Share(("students",), students=(0,)))
    before = (run.path / "manifest.json").stat().st_ino
    (first,) = (run.path / "records").glob("*.jsonl")
    (teacher,) = (cache_root() / "teachers").iterdir()
    for number in range(60):  # the task must not look at them
        shutil.copytree(teacher, other := teacher.with_stem(f"{number:064d}"))
        write_json(other / "teacher.json", read_json(other / "teacher.json") | {"sha256": f"{number:064d}"})
    with files_opened(run.path, cache_root()) as found:
        pipeline.run(config, run.path, share=pipeline.Share(("students",), students=(1,)))
    expected = {file for block in range(4) for file in (run.block_file(block), run.sidecar_file(block))}
    assert {path: number for path, number in found.items() if path in expected} == dict.fromkeys(expected, 1)
    others = {str(path): number for path, number in found.items() if path not in expected}
    assert sum(others.values()) <= 50, others
    assert first not in found, "the record of another student was read"
    assert (run.path / "manifest.json").stat().st_ino == before, "an unchanged manifest was written again"


def test_tasks_on_slurm_report_once_a_minute(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = []
    for job in (None, "17"):
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        run = RunFolder(tmp_path / str(job))
        run.bind(tiny, "data")
        with progress_files.reported(run, "run"), progress_bars.progress("work", 2, "updates") as advance:
            advance(1)
            (state,) = progress_files.read(run)
            found.append(state.interval)
    assert found == [5.0, 60.0]


def test_a_run_is_bound_and_its_records_are_found_without_listing_the_files_of_students(
    tiny: Config, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    run.bind(tiny, "data")
    for name in ("students", "labels/0123", "slurm/jobs", "records", "baselines/random/records"):
        (run.path / name).mkdir(parents=True)
    for name in ("records", "baselines/random/records"):
        (run.path / name / "student-0.jsonl").touch()
    with files_opened(tmp_path) as found:
        run.bind(tiny, "data")
        records = sorted(record_files(tmp_path))
    assert records == [run.path / "baselines/random/records/student-0.jsonl", run.path / "records/student-0.jsonl"]
    assert not [path for path in found if path.name in ("students", "labels", "0123", "slurm", "jobs")]
