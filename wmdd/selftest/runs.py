"""Whole runs on the device: compared with the CPU, repeated, stopped, killed and resumed."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wmdd import pipeline
from wmdd.config.loading import load_config, to_toml
from wmdd.config.schema import Config
from wmdd.errors import EXIT_RESUMABLE, WmddError
from wmdd.launchers import Local, gpu_of, last_words, rankless
from wmdd.records.files import read_records
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime.progress_bars import observed_by
from wmdd.runtime.ranks import ranks
from wmdd.selftest.rows import Precision, RowResult, Workplace, result, section
from wmdd.storage import cache
from wmdd.storage.files import read_json, read_metadata, write_bytes

SHARE = pipeline.Share(("teacher", "distill", "students"))
"""Stages of the runs; ``report`` would print its tables"""
_WAIT_SECONDS = 120.0
"""Longest wait for a process of a row"""
_RESUMED_ITERATIONS = 300

RUN_TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}
"""Largest relative differences of a run's losses (teacher, synthesis, students) from those of fp32 on the CPU."""

_TINY = {
    "name": "selftest",
    "ipc": 1,
    "data.resolution": 8,
    "data.classes": 4,
    "teacher.network": "convnet2x8",
    "teacher.epochs": 2,
    "synthesis.iterations": 20,
    "synthesis.start": "noise",
    "synthesis.classes_per_group": 2,
    "labels.regimes": ("hard", "soft", "stored"),
    "student.networks": ("convnet2x8",),
    "student.epochs": 3,
    "student.seeds": 1,
    "student.baselines": (),
}


def config_of(compute: dict[str, Any], **keys: Any) -> Config:
    """Return the config of a run of seconds, with the keys of ``compute`` and further ones (``a__b`` is ``a.b``)."""
    return load_config("digits").replace(
        _TINY | compute | {key.replace("__", "."): value for key, value in keys.items()}
    )


def teacher_file(place: Workplace) -> Path:
    """Return the weights of the teacher of the reference run, which other runs import."""

    def find() -> Path:
        sha = (RunFolder(reference(place)).bound_teacher() or {})["sha256"]
        folders = (entry.path for entry in cache.entries("teachers"))
        return next(one / "teacher.safetensors" for one in folders if read_json(one / "teacher.json")["sha256"] == sha)

    found: Path = place.once("teacher", find)
    return found


def reference(place: Workplace) -> Path:
    """Return the folder of the run in fp32 on the CPU, which trains the teacher."""
    config = config_of(place.compute(device="cpu"))
    found: Path = place.once("reference", lambda: pipeline.run(config, place.folder / "reference", share=SHARE))
    return found


def losses_of(run: Path) -> dict[str, list[float]]:
    """Return the losses of a run: of the teacher's epochs, of the synthesis of each group, of the students."""
    groups = (RunFolder(run).sidecar(0) or {"groups": []})["groups"]
    return {
        "teacher": teacher_losses(run),
        "synthesis": [value for group in groups for value in group["curve"]["total"]],
        "students": [record.metrics["loss"] for record in read_records(run / "records")[0]],
    }


def teacher_losses(run: Path) -> list[float]:
    """Return the loss of each epoch of the teacher; none for an imported teacher."""
    log = RunFolder(run).epoch_log("teacher")
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line["loss"] for line in lines if "loss" in line]


def difference(found: list[float], expected: list[float]) -> float:
    """Return the largest difference, relative to the largest expected value; infinite for lists that do not fit."""
    if len(found) != len(expected) or not expected or not all(map(math.isfinite, found)):
        return math.inf
    return max(abs(one - other) for one, other in zip(found, expected, strict=True)) / max(map(abs, expected))


def whole_run(place: Workplace, precision: Precision, compiled: bool = False) -> RowResult:
    """Do every stage on the device, and compare the losses of each with those of fp32 on the CPU.

    One run trains its teacher.  The images and students of another one use the teacher of the CPU, so that their losses
    can be compared.
    """
    expected = losses_of(reference(place))
    keys, name = place.compute(precision, compiled), f"{precision}{'-compiled' * compiled}"
    taught = pipeline.run(config_of(keys), place.folder / f"taught-{name}", share=pipeline.Share(("teacher",)))
    done = pipeline.run(
        config_of(keys, teacher__weights=str(teacher_file(place))), place.folder / f"run-{name}", share=SHARE
    )
    found = losses_of(done) | {"teacher": teacher_losses(taught)}
    gaps = {stage: difference(found[stage], expected[stage]) for stage in expected}
    allowed = RUN_TOLERANCES[precision]
    told = ", ".join(f"{stage} {gap:.0e}" for stage, gap in gaps.items())
    return result(max(gaps.values()) <= allowed, f"losses from fp32 on the CPU: {told} (at most {allowed:.0e})", **gaps)


def report(place: Workplace) -> RowResult:
    """Write the report of the reference run."""
    from wmdd.report.collect import collect
    from wmdd.report.html import write_html

    page = place.folder / "report.html"
    write_html(collect([reference(place)]), page)
    return result(page.stat().st_size > 0, f"one page of {page.stat().st_size:,} bytes")


def pair(place: Workplace, device: str | None = None) -> Config:
    """Return the config of the runs whose bytes are compared: two images a class, one class a group, fp32."""
    compute, weights = place.compute(device=device), str(teacher_file(place))
    return config_of(compute, ipc=2, synthesis__classes_per_group=1, teacher__weights=weights)


def pair_run(place: Workplace, device: str | None = None) -> Path:
    """Return the folder of a run of ``pair``, done by one rank."""
    name = f"pair-{device or place.machine.device}"
    found: Path = place.once(name, lambda: pipeline.run(pair(place, device), place.folder / name, share=SHARE))
    return found


def content(run: Path) -> dict[str, Any]:
    """Return what must be equal in two runs of the same config: the digest of the images, and the students' metrics."""
    records = read_records(run / "records")[0]
    metrics = {f"{one.regime} {one.student_seed}": one.metrics for one in records}
    return {"images": DistilledSet.load(run).sha256, "students": metrics}


def equal(found: dict[str, Any], expected: dict[str, Any], what: str) -> RowResult:
    """Return the verdict of two contents that must be equal."""
    unlike = [name for name in expected if found.get(name) != expected[name]]
    return result(not unlike, f"{what}: " + (f"{' and '.join(unlike)} differ" if unlike else "equal bytes"))


def repeated(place: Workplace) -> RowResult:
    """Do the same run again, in another folder."""
    again = pipeline.run(pair(place), place.folder / "again", share=SHARE)
    return equal(content(again), content(pair_run(place)), "the same run twice")


def resumed(place: Workplace) -> RowResult:
    """Stop a run with SIGTERM, kill its second start, resume it, and compare it with an uninterrupted run."""
    config = pair(place).replace({"synthesis.iterations": _RESUMED_ITERATIONS, "synthesis.classes_per_group": 4})
    whole = pipeline.run(config, place.folder / "whole", share=SHARE)
    broken = RunFolder(place.folder / "broken")
    file = place.folder / "broken.toml"
    write_bytes(file, to_toml(config.replace({"compute.checkpoint_seconds": 0.0})).encode())
    checkpoint = broken.checkpoint_file(0)

    def reached() -> int:
        return int(read_metadata(checkpoint).get("iteration", 0)) if checkpoint.exists() else 0

    code = _interrupted(file, broken.path, lambda: reached() > 0, subprocess.Popen.terminate)
    if code != EXIT_RESUMABLE:
        return result(False, f"SIGTERM during the synthesis: exit code {code}, expected {EXIT_RESUMABLE}")
    stopped = reached()
    _interrupted(file, broken.path, lambda: reached() > stopped, subprocess.Popen.kill)
    killed = reached()
    begun: list[int] = []

    def watch(title: str, steps: int, total: int, unit: str) -> None:
        if unit == "iterations" and steps and not begun:
            begun.append(steps)

    with observed_by(watch):
        pipeline.run(config, broken.path, share=SHARE)
    if begun != [killed] or not 0 < stopped < killed:
        return result(False, f"killed at iteration {killed}, resumed at iteration {begun[0] if begun else 'none'}")
    return equal(content(broken.path), content(whole), f"stopped at iteration {stopped}, killed at {killed}, resumed")


def _interrupted(
    file: Path, out: Path, ready: Callable[[], bool], end: Callable[["subprocess.Popen[Any]"], None]
) -> int | None:
    """Start ``wmdd run`` in a process, end it once it is ready, and return its exit code.

    Raises:
        WmddError: the run ended before, or did not become ready in time.
    """
    command = [sys.executable, "-m", "wmdd", "run", str(file), "--out", str(out)]
    said = out.with_suffix(".said")
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=rankless())  # noqa: S603
        try:
            deadline = time.monotonic() + _WAIT_SECONDS
            while not ready():
                if process.poll() is not None:
                    raise WmddError(f"the run ended before its interruption: {last_words(said.read_text())}")
                if time.monotonic() > deadline:
                    raise WmddError(f"the run wrote no checkpoint within {_WAIT_SECONDS:.0f} s")
                time.sleep(0.005)
            end(process)
            return process.wait(_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise WmddError(f"the run did not end within {_WAIT_SECONDS:.0f} s of the signal") from None
        finally:
            process.kill()
            process.wait()


def several_jobs(place: Workplace) -> RowResult:
    """Do runs at the same time, one for each GPU, and compare them with the same run done alone."""
    jobs = max(2, place.machine.gpus)
    folders = [place.folder / f"job-{index}" for index in range(jobs)]
    Local(jobs).launch([(pair(place), folder) for folder in folders], "runs")
    names = [gpu_of(os.environ.get("CUDA_VISIBLE_DEVICES"), place.machine.gpus, index) for index in range(jobs)]
    seen = [_visible_gpus(folder) for folder in folders]
    if place.machine.gpus > 1 and (len(set(names)) < jobs or set(seen) != {1}):
        return result(False, f"each of {jobs} runs must see one GPU of its own; they saw {seen}, namely {names}")
    expected = content(pair_run(place))
    found = [equal(content(folder), expected, f"{jobs} runs at the same time") for folder in folders]
    return next((one for one in found if one.state == "fail"), found[0])


def _visible_gpus(run: Path) -> int:
    sidecar = RunFolder(run).sidecar(0) or {}
    return len(sidecar.get("provenance", {}).get("system", {}).get("gpus", []))


def out_of_memory(place: Workplace) -> RowResult:
    """Ask for more memory than any device has: the error must be one line, and the device must work afterwards."""
    said = ""
    try:
        with ranks(section(place)) as job:
            torch.empty(1 << 50, dtype=torch.uint8, device=job.device)
    except WmddError as error:
        said = str(error)
    with ranks(section(place)) as job:
        works = float(torch.ones(8, device=job.device).sum()) == 8
    one_line = said.startswith("out of memory on ") and "\n" not in said
    return result(one_line and works, said or "no error")
