"""Run folders as the pipeline leaves them, written in milliseconds."""

import math
from pathlib import Path
from typing import Any

import torch

from wmdd.config.schema import Config
from wmdd.records.comparability import protocol_of
from wmdd.records.files import write_records
from wmdd.records.schema import Record, SpeedRecord
from wmdd.storage.files import FORMAT, digest, write_json, write_tensors

RECIPE = {"epochs": 150, "updates": 300, "batch_size": 50, "checkpoint": "last", "lr": 0.001, "teacher": "7" * 64}
NETWORKS = ["convnet3x32", "convnet3x16"]
PROVENANCE = {"revision": "8" * 40, "dirty": True, "wmdd": "0.1.0", "torch": "2.15.0", "device": "cpu", "cpu": "Xeon"}
SETTINGS: dict[str, Any] = {
    "name": "digits",
    "ipc": 2,
    "data": {"source": "digits", "resolution": 16, "channels": 1, "mean": [0.3], "std": [0.4]},
    "labels": {"regimes": ["soft"]},
    "student": {"networks": ["convnet3x32"], "seeds": 3, "baseline_sets": 1},
}


def make_run(
    folder: Path,
    top1: list[float] | None = None,
    *,
    recipe: dict[str, Any] | None = None,
    classes: tuple[str, ...] = ("0", "1"),
    missing: tuple[int, ...] = (),
    channels: int = 1,
    record: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a run folder: a block for every two classes, and a student for each accuracy."""
    config = Config.model_validate({**SETTINGS, "blocks": len(classes) // 2, **changes})
    teacher = {"sha256": "7" * 64, "network": "convnet3x32", "top1": 0.985, "seconds": 30.0, "evaluated_on": "test"}
    bound = {"format": FORMAT, "config": config.model_dump(mode="json"), "fingerprint": config.fingerprint("images")}
    write_json(folder / "config.json", bound)
    write_json(folder / "teacher.json", teacher)
    for block in range(config.blocks):
        if block not in missing:
            make_block(folder, block, classes, channels, config.method != "random")
    recipe = recipe or RECIPE
    measured = [
        {
            "kind": "student",
            "run": config.name,
            "dataset": "digits",
            "classes": 10,
            "resolution": config.data.resolution,
            "method": config.method,
            "ipc": config.ipc,
            "network": "convnet3x32",
            "regime": "soft",
            "view": "epochs",
            "distillation_seed": config.seed,
            "student_seed": seed,
            "evaluated_on": "test",
            "metrics": {"top1": value, "top5": 1.0},
            "recipe": recipe,
            "protocol": protocol_of(recipe),
            "config": config.fingerprint("images"),
            "artefact": digest([config.method, config.seed]),
            "cost": {"seconds": 4.0, "peak_bytes": 2.0**30},
            "provenance": PROVENANCE,
        }
        for seed, value in enumerate(top1 or [])
    ]
    if measured:
        write_records(folder / "records" / "students.jsonl", [Record(**one | (record or {})) for one in measured])
    return folder


def make_block(folder: Path, block: int, classes: tuple[str, ...], channels: int, optimised: bool) -> None:
    indices = [2 * block, 2 * block + 1]
    names = [classes[index] for index in indices]
    steps = list(range(0, 200, 4))
    loss = [100 * math.exp(-step / 50) + block + 1 for step in steps]
    curve = {"iteration": steps, "total": loss, "feature": [0.3 * x for x in loss], "bn": [0.7 * x for x in loss]}
    curve["ce"] = [0.0 for _ in steps]
    labels = torch.tensor(indices).repeat_interleave(2)
    ramp = torch.arange(16 * 16).reshape(1, 1, 16, 16).expand(4, channels, 16, 16)
    tensors = {"images": ((ramp + 40 * labels[:, None, None, None]) % 256).to(torch.uint8), "labels": labels}
    sha = write_tensors(folder / "blocks" / f"block-{block:05d}.safetensors", tensors)
    groups = [{"classes": names, "seconds": 12.5, "statistics_seconds": 0.5, "curve": curve if optimised else None}]
    sidecar = {"block": block, "classes": names, "class_indices": indices, "sha256": sha, "groups": groups}
    write_json(folder / "blocks" / f"block-{block:05d}.json", sidecar | {"provenance": PROVENANCE})


def make_pair(tmp_path: Path) -> Path:
    """Write a run of one set and three students, and three random sets of one student each, 2 points lower."""
    run = make_run(tmp_path / "digits", [0.97, 0.96, 0.98])
    make_random(run, [0.95, 0.96, 0.94])
    return run


def make_random(run: Path, top1: list[float], **changes: Any) -> None:
    """Write the random baseline of a run: a set and a student for each accuracy."""
    student = SETTINGS["student"] | {"seeds": 1}
    for number, value in enumerate(top1):
        place = run / "baselines" / ("random" + f"-{number}" * bool(number))
        make_run(place, [value], method="random", name="digits/random", seed=number, student=student, **changes)


def make_students(method: str, sets: dict[str, list[float]], **changes: Any) -> list[Record]:
    """Return the students of each distilled set, by the set's name; the set's position is its seed."""
    recipe = RECIPE | changes.pop("recipe", {})
    made = []
    for seed, (artefact, values) in enumerate(sets.items()):
        for student, top1 in enumerate(values):
            one = {**_student(method, 10, seed, 100 * seed + student), "artefact": artefact, "network": "convnet3x32"}
            one |= {"regime": "soft", "recipe": recipe, "protocol": protocol_of(recipe), "metrics": {"top1": top1}}
            made.append(Record(**one | changes))
    return made


def make_everything(folder: Path) -> Path:
    """Write a protocol with all that a report can show: methods, IPCs, networks, regimes, views, λ, speeds, gaps."""
    gains = {"wmdd": 0.10, "ce-pcbn": 0.08, "barycenter-global": 0.05, "ce-global": 0.03, "random": 0.0}
    digits = tuple("0123456789")
    labels = {"regimes": ["hard", "soft", "stored"]}
    cells = []
    for method, gain in gains.items():
        for ipc in (1, 10):
            for seed in range(2):
                place = f"{method}/ipc-{ipc:03d}/seed-{seed}"
                cells.append({"folder": place, "method": method, "name": method, "ipc": ipc, "seed": seed})
                student = {"networks": NETWORKS, "views": ["epochs", "plain"], "seeds": 2, "first_seed": 2 * seed}
                about: dict[str, Any] = {"method": method, "ipc": ipc, "seed": seed, "name": method, "labels": labels}
                make_run(folder / place, classes=digits, student=student | {"baselines": []}, **about)
                write_records(folder / place / "records" / "students.jsonl", _students(method, ipc, seed, gain))
    cells.append({"folder": "wmdd/ipc-050/seed-0", "method": "wmdd", "name": "wmdd", "ipc": 50, "seed": 0})
    write_json(folder / "protocol.json", {"name": "everything", "cells": cells})
    for weight in (10, 100, 1000):
        top1 = 0.9 - abs(math.log10(weight) - 2.2) / 20
        student = {"networks": NETWORKS[:1], "seeds": 3, "baselines": []}
        settings: dict[str, Any] = {"ipc": 5, "name": f"lambda-{weight}", "synthesis": {"bn_weight": weight}}
        settings["student"] = student
        record = {"artefact": digest(weight)}
        make_run(folder / "lambda" / str(weight), [top1, top1 + 0.01, top1 - 0.01], record=record, **settings)
    write_records(folder / "speed" / "records" / "speed.jsonl", _speeds())
    return folder


def _students(method: str, ipc: int, seed: int, gain: float) -> list[Record]:
    """Return hard, soft and stored students of two networks, with and without augmentation."""
    labels = {"hard": (0.0, 0.0, 0.0), "soft": (0.06, 0.0, 4.5e5), "stored": (0.05, 3e4 * ipc, 0.0)}
    records = []
    for network, width in zip(NETWORKS, (0.0, -0.04), strict=True):
        for regime, (lift, stored, teacher) in labels.items():
            for view, loss in (("epochs", 0.0), ("plain", -0.05)):
                for student in (2 * seed, 2 * seed + 1):
                    value = 0.62 + 0.09 * math.log(ipc) + gain / (1 + 20 * lift) + lift + width + loss
                    value += 0.004 * math.sin(7 * student + 3 * seed + len(method))
                    recipe = RECIPE | {"epochs": 150 * ipc, "mix": "none" if view == "plain" else "cutmix"}
                    one = {**_student(method, ipc, seed, student), "network": network, "regime": regime, "view": view}
                    one |= {"recipe": recipe, "protocol": protocol_of(recipe)}
                    one["cost"] |= {"label_bytes": stored, "teacher_bytes": teacher, "labelling_flops": 1e9 * teacher}
                    records.append(Record(**one, metrics={"top1": value, "top5": min(1.0, value + 0.1)}))
    return records


def _student(method: str, ipc: int, seed: int, student: int) -> dict[str, Any]:
    about = {"kind": "student", "run": method, "dataset": "digits", "classes": 10, "resolution": 16, "method": method}
    about |= {"ipc": ipc, "distillation_seed": seed, "student_seed": student, "evaluated_on": "test"}
    about |= {"config": digest([method, ipc]), "artefact": digest([method, ipc, seed]), "provenance": PROVENANCE}
    cost = {"seconds": 4.0, "device_seconds": 4.0, "peak_bytes": 2.0**30, "joules": 90.0, "image_bytes": 2400.0 * ipc}
    return about | {"cost": cost}


def _speeds() -> list[SpeedRecord]:
    about: dict[str, Any] = {"dataset": "synthetic", "network": "resnet18", "resolution": 64, "unit": "img·iter/s"}
    about |= {"stage": "synthesis", "provenance": PROVENANCE}
    setup = {"batch": 100, "precision": "bf16", "threads": 1, "compile": False}
    rates = {"reference": 210.0, "wmdd": 640.0}
    spread = {"ratio": 3.05, "ratio_low": 2.9, "ratio_high": 3.2, "p50": 0.156, "p90": 0.171, "mfu": 0.41}
    made = []
    for engine, rate in rates.items():
        metrics = {"rate": rate, "rate_low": 0.95 * rate, "rate_high": 1.04 * rate, "repeats": 5.0}
        metrics |= {"peak_bytes": 2.1e9} | (spread if engine == "wmdd" else {})
        made.append(SpeedRecord(kind="throughput", engine=engine, metrics=metrics, setup=setup, **about))
    for mode in ("strong", "weak"):
        for ranks, efficiency in ((1, 1.0), (2, 0.97), (4, 0.91), (8, 0.83)):
            rate = 640.0 * ranks * efficiency
            metrics = {"rate": rate, "rate_low": 0.97 * rate, "rate_high": 1.02 * rate, "efficiency": efficiency}
            metrics |= {"seconds": 100 / (ranks * efficiency), "repeats": 3.0}
            setting = about | {"ranks": ranks, "mode": mode}
            made.append(SpeedRecord(kind="scaling", engine="wmdd", metrics=metrics, setup=setup, **setting))
    return made
