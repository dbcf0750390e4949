"""Teachers and students leave one line an epoch, for which nothing waits and on which nothing depends."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNREPORTED
from rank_processes import in_ranks

from wmdd import pipeline
from wmdd.config.schema import ComputeConfig, Config
from wmdd.networks.epoch_log import EpochLog
from wmdd.records.files import read_records
from wmdd.report import collect, text
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime.ranks import ranks
from wmdd.runtime.team import SINGLE

CPU = torch.device("cpu")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_teacher_and_every_student_leave_one_line_an_epoch(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "store"))
    run = pipeline.run(tiny, tmp_path / "run", share=UNREPORTED)
    teacher = lines_of(run / "logs" / "teacher.jsonl")
    assert [(line["epoch"], line["updates"]) for line in teacher] == [(1, 10), (2, 20)]
    assert teacher[0]["loss"] > teacher[1]["loss"] > 0 and teacher[0]["lr"] == tiny.teacher.lr
    for folder in (run, run / "baselines" / "random"):
        logs = sorted((folder / "logs").glob("student-*.jsonl"))
        records = sorted((folder / "records").glob("student-*.jsonl"))
        assert [path.name for path in logs] == [path.name for path in records] and len(logs) == 4
        for log, record in zip(logs, records, strict=True):
            first, last = lines_of(log)
            ((found,), _) = read_records(record)
            assert set(last) - set(first) == {"validation_top1", "validation_top5", "validation_loss"}
            assert last["validation_top1"] == found.metrics["top1"] and found.best_epoch is None
    again = pipeline.run(tiny, tmp_path / "again", share=pipeline.Share(("teacher", "distill")))
    assert lines_of(again / "logs" / "teacher.jsonl") == teacher, "a run that trains no teacher copies its log"


@pytest.mark.slow
def test_the_best_epoch_is_recorded_and_compared_nowhere(tiny: Config, tmp_path: Path) -> None:
    tiny = tiny.replace({"student.baselines": ()})
    watched = tiny.replace({"student.validate_every": 1})
    assert watched.fingerprint("students") == tiny.fingerprint("students")
    plain = pipeline.run(tiny, tmp_path / "a" / "run", share=UNREPORTED)
    other = pipeline.run(watched, tmp_path / "b" / "run", share=UNREPORTED)
    tables = []
    for run in (plain, other):
        found, _ = read_records(run / "records")
        tables.append(text.csv(collect.collect([run])))
        measured = {(one.regime, one.student_seed): (one.metrics, one.protocol) for one in found}
        if run == plain:
            expected = measured
            continue
        assert measured == expected
        for record in found:
            assert record.best_epoch in (1, 2) and record.best_top1 is not None
            assert record.best_top1 >= record.metrics["top1"]
    assert comparable(tables[0]) == comparable(tables[1])
    assert DistilledSet.load(plain).sha256 == DistilledSet.load(other).sha256


def comparable(table: str) -> list[list[str]]:
    """Return the columns that one recipe must fill with the same values: neither costs nor the best epoch."""
    rows = [line.split(",") for line in table.splitlines()]
    kept = [place for place, name in enumerate(rows[0]) if not re.search("second|bytes|best_top1", name)]
    return [[row[place] for place in kept] for row in rows]


def test_counting_a_loss_never_reads_it() -> None:
    meta = torch.device("meta")  # whose values cannot be read
    log = EpochLog(None, SINGLE, meta)
    log.count(torch.ones((), device=meta), 10)
    log.end_epoch(1, 1, 0.1)
    log.write_if_due()


def test_the_loss_is_the_mean_over_the_images_of_all_ranks_also_after_a_checkpoint(tmp_path: Path) -> None:
    def work() -> None:
        with ranks(ComputeConfig(device="cpu", threads=1)) as job:
            team = job.team(2, "student.ranks")
            log = EpochLog(tmp_path / "logs" / "student.jsonl", team, CPU)
            log.restore({})
            for loss in (2.0, 4.0):
                log.count(torch.tensor(loss * (1 + job.rank)), 3)
                state = log.state()
                log = EpochLog(tmp_path / "logs" / "student.jsonl", team, CPU)
                log.restore(state)
            log.end_epoch(1, 2, 0.1)
            log.write()

    in_ranks(2, work)
    ((line),) = lines_of(tmp_path / "logs" / "student.jsonl")
    assert (line["loss"], line["updates"], line["lr"]) == (3.0, 2, 0.1)


def test_a_loss_that_diverged_is_still_json_and_a_disk_that_takes_nothing_stops_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "logs" / "student.jsonl", tmp_path / "no" / "such" / "folder.jsonl"):
        log = EpochLog(path, SINGLE, CPU)
        log.restore({})
        log.count(torch.tensor(float("nan")), 1)
        log.end_epoch(1, 1, 0.1)
        log.write()
    text = (tmp_path / "logs" / "student.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
