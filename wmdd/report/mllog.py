"""Students as event lines of MLPerf's logging (``:::MLLOG`` and JSON), for tools that read such logs."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wmdd.records.schema import Record

if TYPE_CHECKING:
    from wmdd.report.collect import Report

Event = tuple[str, str, Any]
"""(type, key, value)."""


def mllog(report: "Report") -> str:
    """Return the event lines of every student that counts: one run each, from ``run_start`` to ``run_stop``.

    Keys are those of mlcommons/logging (``mlperf_logging/mllog/constants.py``). ``eval_accuracy`` is a fraction, of the
    last epoch. What MLPerf has no key for (method, IPC, label regime, images) stands in the metadata of each line, as
    does the place of the record. The division is ``open``: these are no submissions.
    """
    lines = []
    students = report.students.sort_values("time", kind="stable")
    for number, (run, record) in enumerate(zip(students["run"], students["record"], strict=True), start=1):
        about = {"file": run.label, "lineno": number, **_about(record)}
        stop = round(1000 * record.time.timestamp())
        start = stop - round(1000 * record.cost.get("seconds", 0.0))
        for kind, key, value in _events(record):
            ending = key in ("eval_accuracy", "run_stop")
            extra = {"status": "success"} if key == "run_stop" else {}
            event = {"namespace": "", "time_ms": stop if ending else start, "event_type": kind, "key": key}
            event |= {"value": value, "metadata": about | extra}
            lines.append(f":::MLLOG {json.dumps(event)}\n")
    return "".join(lines)


def _events(record: Record) -> Iterator[Event]:
    point = "POINT_IN_TIME"
    yield point, "submission_benchmark", f"dataset_distillation_{record.dataset}"
    yield point, "submission_division", "open"
    yield point, "submission_platform", str(record.provenance.get("device") or "cpu")
    yield "INTERVAL_START", "run_start", None
    recipe = record.recipe
    known = {
        "seed": record.student_seed,
        "global_batch_size": recipe.get("batch_size"),
        "opt_name": recipe.get("optimizer"),
        "opt_base_learning_rate": recipe.get("lr"),
        "opt_weight_decay": recipe.get("weight_decay"),
        "train_samples": record.classes * record.ipc if record.ipc else None,
        "eval_samples": sum(record.test_images) if record.test_images else None,
        "max_steps": recipe.get("updates"),
    }
    yield from ((point, key, value) for key, value in known.items() if value is not None)
    yield point, "eval_accuracy", record.metrics["top1"]
    yield "INTERVAL_END", "run_stop", None


def _about(record: Record) -> dict[str, Any]:
    keys = ("method", "run", "resolution", "ipc", "network", "regime", "view", "distillation_seed", "evaluated_on")
    about = {key: getattr(record, key) for key in keys} | {"artefact": record.artefact}
    return about | {"epoch_num": record.recipe["epochs"]} if "epochs" in record.recipe else about
