"""Runs survive: races, damage, full disks, file systems that misbehave, signals and kills."""

import errno
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill_runs
import pytest
import torch
from conftest import TINY, UNREPORTED, blocks_of
from PIL import Image

from wmdd import cli, pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.data import dataset, decoding
from wmdd.data.dataset import decode_all
from wmdd.errors import Interrupted, WmddError
from wmdd.records.files import read_records, write_records
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime import log as log_module
from wmdd.runtime.progress_bars import observed_by
from wmdd.runtime.signals import stop_on
from wmdd.storage import files

fork = multiprocessing.get_context("fork")
DISTIL = pipeline.Share(("teacher", "distill"))


@pytest.fixture
def blocked(tiny: Config) -> Config:
    """Return a run of 4 blocks of one class each."""
    synthesis = tiny.synthesis.model_copy(update={"classes_per_group": 1, "iterations": 60})
    return tiny.model_copy(update={"blocks": 4, "synthesis": synthesis})


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    """The small edition of ``tests/kill_runs.py``, which tells how to kill 50 times."""
    import random

    shorter = ["student.baseline_sets=1", "teacher.epochs=12", "synthesis.iterations=120", "student.epochs=12"]
    config = load_config("digits", [*kill_runs.SETTINGS, *shorter])
    rng, hits = random.Random(1), Counter[str]()
    pipeline.run(config, tmp_path / "whole")
    kills = kill_runs.kill(config, tmp_path / "killed", tmp_path / "killed-store", 5, rng, hits)
    found, expected = kill_runs.outcome(tmp_path / "killed"), kill_runs.outcome(tmp_path / "whole")
    assert kills >= 3 and found.differences(expected) == []


@pytest.mark.slow
def test_two_processes_on_one_run_do_each_block_once(blocked: Config, tmp_path: Path) -> None:
    def work(number: int) -> None:
        with open(tmp_path / f"log-{number}", "w") as log:
            log_module.console.file = log
            pipeline.run(blocked, tmp_path / "run", share=UNREPORTED)

    processes = [fork.Process(target=work, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    lines = [line for number in range(2) for line in (tmp_path / f"log-{number}").read_text().splitlines()]
    done = [int(line.split()[1]) for line in lines if re.match(r"wmdd: \d+ iterations in ", line)]
    assert sum(done) == 4 * 60, "no group was synthesized twice"
    pipeline.run(blocked, tmp_path / "alone", share=DISTIL)
    assert blocks_of(tmp_path / "run") == blocks_of(tmp_path / "alone")


def test_a_folder_that_another_process_binds_at_this_moment_is_a_run(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, listed = RunFolder(tmp_path / "run"), Path.iterdir
    run.path.mkdir()

    def meanwhile(path: Path) -> Iterator[Path]:
        monkeypatch.setattr(Path, "iterdir", listed)
        RunFolder(run.path).bind(tiny, "images")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", meanwhile)
    run.check(tiny, "images")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [True, False])
def test_students_of_a_changed_recipe_are_trained_by_several_processes_at_once(
    tiny: Config, tmp_path: Path, parts: bool
) -> None:
    config = with_student(tiny, seeds=4, baselines=())
    config = config.model_copy(update={"labels": config.labels.model_copy(update={"regimes": ("hard",)})})
    run = RunFolder(pipeline.run(config, tmp_path / "run", share=UNREPORTED))
    ((first, *_), _) = read_records(run.path / "records")
    for seed in range(100, 200):
        earlier = first.model_copy(update={"student_seed": seed})
        write_records(run.path / "records" / f"student-convnet2x8-hard-{seed}.jsonl", [earlier])
    changed = with_student(config, lr=0.0005)

    def work(number: int) -> None:
        share = pipeline.Share(("students",), (), (number,)) if parts else pipeline.Share(("students",))
        pipeline.run(changed, run.path, share=share)

    processes = [fork.Process(target=work, args=(number,)) for number in range(4)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * 4
    trained = [record for record in read_records(run.path / "records")[0] if record.recipe["lr"] == 0.0005]
    assert sorted(record.student_seed or 0 for record in trained) == [0, 1, 2, 3]
    aside = sum(len(read_records(file)[0]) for file in (run.path / "superseded").glob("*.jsonl"))
    assert aside == (4 if parts else 104), "a record was lost, or one of another process's students was moved"


def with_student(config: Config, **changes: object) -> Config:
    """Return the config with changed students."""
    return config.model_copy(update={"student": config.student.model_copy(update=changes)})


@pytest.mark.slow
def test_a_truncated_sidecar_or_manifest_is_named_and_rebuilt(
    blocked: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(blocked, tmp_path / "run", share=DISTIL)
    before, folder = blocks_of(tmp_path / "run"), RunFolder(tmp_path / "run")
    folder.merge(folder.manifest())
    for path in (folder.sidecar_file(2), tmp_path / "run" / "manifest.json"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WmddError, match="these are missing: 2"):
        DistilledSet.load(tmp_path / "run")
    pipeline.run(blocked, tmp_path / "run", share=DISTIL)
    assert f"{folder.sidecar_file(2)}: is damaged" in capfd.readouterr().err
    assert blocks_of(tmp_path / "run") == before


def test_a_stop_that_came_too_late_for_a_run_is_known_to_whoever_does_many() -> None:
    with stop_on(signal.SIGTERM) as outer:
        with stop_on(signal.SIGTERM, signal.SIGINT) as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner() and outer()
    with stop_on(signal.SIGTERM) as later:
        assert not later()


def failing(call: Callable[..., Any], code: int, when: Callable[..., bool], times: int = 10**6) -> Callable[..., Any]:
    """Return ``call`` with an injected operating-system error."""
    left = iter(range(times))

    def called(*arguments: Any, **options: Any) -> Any:
        if when(*arguments) and next(left, None) is not None:
            raise OSError(code, os.strerror(code))
        return call(*arguments, **options)

    return called


@pytest.mark.slow
def test_a_file_system_without_locks_still_runs(
    blocked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, errno.ENOSYS, lambda *_: True))
    pipeline.run(blocked, tmp_path / "run", share=DISTIL)
    assert len(DistilledSet.load(tmp_path / "run")) == 8


@pytest.mark.slow
def test_a_stale_file_handle_is_read_again_and_a_lasting_one_is_named(
    blocked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(blocked, tmp_path / "run", share=DISTIL)
    sidecars = RunFolder(tmp_path / "run").sidecar_file(0)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", failing(read, errno.ESTALE, lambda path: path == sidecars, times=2))
    assert len(DistilledSet.load(tmp_path / "run")) == 8
    monkeypatch.setattr(Path, "read_bytes", failing(read, errno.ESTALE, lambda path: path == sidecars))
    with pytest.raises(WmddError, match="these are missing: 0"):
        DistilledSet.load(tmp_path / "run")
    with pytest.raises(WmddError, match="cannot be read: Stale file handle"):
        files.read_json(sidecars)


@pytest.mark.slow
def test_what_killed_writers_left_is_swept_once_nobody_can_be_writing_it(
    blocked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, writing = RunFolder(pipeline.run(blocked, tmp_path / "run", share=DISTIL)), fork.Event()

    def write() -> None:
        os.fsync = lambda number: writing.set() or time.sleep(3600)
        files.write_bytes(run.block_file(0), b"half of a block")

    writer = fork.Process(target=write)
    writer.start()
    try:
        assert writing.wait(60)
    finally:
        writer.kill()
        writer.join()
    (left,) = run.path.rglob("*.tmp")
    pipeline.run(blocked, run.path, share=DISTIL)
    assert left.exists(), "another process may still be writing it"
    then = time.time() - 2 * 3600
    os.utime(left, (then, then))
    pipeline.run(blocked, run.path, share=DISTIL)
    assert not left.exists() and len(DistilledSet.load(run.path)) == 8


@pytest.mark.slow
def test_a_used_up_quota_is_told_and_costs_no_finished_block(
    blocked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = tmp_path / "run" / "blocks"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, errno.EDQUOT, lambda *_: len(list(blocks.glob("*.json"))) == 2))
        with pytest.raises(WmddError, match="the disk quota is used up; earlier results are kept"):
            pipeline.run(blocked, tmp_path / "run", share=DISTIL)
    assert not list(tmp_path.rglob("*.tmp"))
    finished = sorted(blocks.glob("*.safetensors"))
    assert len(finished) == 2
    times = [path.stat().st_mtime_ns for path in finished]
    pipeline.run(blocked, tmp_path / "run", share=DISTIL)
    assert times == [path.stat().st_mtime_ns for path in finished]
    assert len(DistilledSet.load(tmp_path / "run")) == 8


@pytest.mark.slow
def test_slow_reads_lose_nothing(blocked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def slowly(path: Path) -> bytes:
        time.sleep(0.02)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", slowly)
    pipeline.run(blocked, tmp_path / "run", share=DISTIL)
    assert len(DistilledSet.load(tmp_path / "run")) == 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], check=False)  # noqa: S607
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here: needs root")
    yield place
    subprocess.run(["umount", place], check=True)  # noqa: S607


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    blocked: Config, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"data.resolution": 128, "teacher.epochs": 1, "synthesis.iterations": 3}
    changes |= {"compute.checkpoint_seconds": 1e6}
    big = blocked.replace(changes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))  # else it is refused at once
    with pytest.raises(WmddError, match="no space left on the device"):
        pipeline.run(big, small_disk / "run", share=DISTIL)
    finished = {path: path.read_bytes() for path in (small_disk / "run" / "blocks").glob("*.safetensors")}
    assert 0 < len(finished) < 4
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)  # noqa: S607
    pipeline.run(big, small_disk / "run", share=DISTIL)
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert len(DistilledSet.load(small_disk / "run")) == 8


@pytest.mark.slow
def test_a_signal_in_mid_synthesis_checkpoints_and_exits_75(tmp_path: Path) -> None:
    settings = [*TINY, "synthesis.iterations=100", "student.baselines=[]"]
    words = ["wmdd", "run", "digits", "--out", str(tmp_path / "run")]
    words += [word for value in settings for word in ("--set", value)]

    here, there = multiprocessing.Pipe()

    def wait_at_the_middle(title: str, steps: int, total: int, unit: str) -> None:
        if unit == "iterations" and steps == 50:
            there.send(steps)
            there.recv()

    def command() -> None:
        sys.argv = words
        sys.stderr = open(tmp_path / "errors", "w")  # noqa: SIM115 - for the life of this process
        with observed_by(wait_at_the_middle):
            cli.main()

    process = fork.Process(target=command)
    process.start()
    try:
        assert here.poll(120)
        os.kill(process.pid or 0, signal.SIGUSR2)
        here.send("signalled")
        process.join(60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == 75
    assert "checkpointed at iteration" in (tmp_path / "run" / "progress" / "run.json").read_text()
    pipeline.run("digits", tmp_path / "run", settings)
    pipeline.run("digits", tmp_path / "whole", settings)
    assert blocks_of(tmp_path / "run") == blocks_of(tmp_path / "whole")
    assert not list((tmp_path / "run" / "progress").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_all_processes_ends_no_decoder(number: signal.Signals) -> None:
    found = fork.SimpleQueue()

    def work() -> None:
        os.setsid()
        with stop_on(number) as stop:
            results = decoding.in_order(abs, list(range(-40, 0)), workers=2)
            begun = [next(results), next(results)]  # one of each decoder
            os.killpg(0, number)
            while not stop():
                time.sleep(0.01)
            time.sleep(0.5)
            found.put([*begun, *results] == list(range(40, 0, -1)))

    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0 and found.get()


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_looks_at_the_stop_request_between_few_images(tiny: Config, workers: int) -> None:
    images = dataset.load_dataset(tiny.data).train
    config = tiny.model_copy(update={"compute": tiny.compute.model_copy(update={"workers": workers})})
    looks = itertools.count()
    with pytest.raises(Interrupted, match="stopped while decoding"):
        decode_all(images, config, "decoding", lambda: next(looks) == 2)
    assert next(looks) == 3 and len(images) > 3 * 100
    assert torch.equal(decode_all(images, config, "decoding"), images.decode(range(len(images))))


def test_checking_files_looks_at_the_stop_request(tiny: Config) -> None:
    with stop_on(signal.SIGUSR2):
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(Interrupted, match="stopped while images were checked"):
            dataset.check_files(tiny.data, 0)


@pytest.mark.slow
def test_decoders_are_forked_whatever_python_starts_by_default_and_end_with_a_program_that_ends_by_an_error() -> None:
    code = """
import multiprocessing
from wmdd.data import decoding
multiprocessing.set_start_method("forkserver")
factor = 2
print(list(decoding.in_order(lambda number: factor * number, list(range(4)), workers=2)))
decoding._DECODER_GRACE_SECONDS = 3600
stream = decoding.in_order(abs, list(range(40)), workers=2)
next(stream), next(stream)
raise RuntimeError("the cause")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "[0, 2, 4, 6]\n", done.stderr
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "RuntimeError: the cause"


@pytest.mark.parametrize(
    ("asked", "told"), [(True, "stopped while images were decoded"), (False, "for lack of memory")]
)
def test_the_death_of_a_decoder_is_a_stop_if_somebody_asked_for_one(asked: bool, told: str) -> None:
    said = fork.SimpleQueue()

    def slow(number: int) -> int:
        time.sleep(0.2)
        return number

    def work() -> None:
        with stop_on(signal.SIGUSR2):
            results = decoding.in_order(slow, list(range(20)), workers=2)
            try:
                next(results)
                if asked:
                    os.kill(os.getpid(), signal.SIGUSR2)
                for decoder in multiprocessing.active_children():
                    decoder.kill()
                said.put(str(list(results)))
            except BaseException as reason:
                said.put(f"{type(reason).__name__}: {reason}")

    process = fork.Process(target=work)
    process.start()
    assert told in said.get()
    process.join()


def peak_of(work: Callable[[], object]) -> float:
    """Return the peak memory of a process that does ``work``, in MB."""
    results = fork.SimpleQueue()

    def member() -> None:
        work()
        results.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    process = fork.Process(target=member)
    process.start()
    process.join()
    assert process.exitcode == 0
    return float(results.get())


@pytest.mark.slow
def test_memory_is_bounded_by_a_group_and_not_by_the_number_of_classes(tmp_path: Path) -> None:
    for index in range(300):
        for split, count in (("train", 3), ("val", 1)):
            place = tmp_path / "data" / split / f"class-{index:04d}"
            place.mkdir(parents=True)
            for number in range(count):
                colour = (index % 256, 40 * number, index // 2)
                Image.new("RGB", (64, 64), colour).save(place / f"{number}.jpg")
    settings = [
        "data.source=folder",
        f"data.root={tmp_path / 'data'}",
        "data.resolution=64",
        "teacher.network=convnet4x16",
        "teacher.epochs=1",
        "teacher.batch_size=100",
        "statistics.batch_size=3",
        "synthesis.iterations=1",
        "synthesis.classes_per_group=10",
        "barycenter.starts=1",
        "compute.workers=0",
        "student.baselines=[]",
        "ipc=2",
    ]

    def distilling(classes: int, blocks: int) -> float:
        config = load_config("tiny-imagenet", [*settings, f"data.classes={classes}", f"blocks={blocks}"])
        run = tmp_path / f"run-{classes}"
        # The teacher is trained by a process of its own: it may hold the decoded images of all classes.
        peak_of(lambda: pipeline.run(config, run, share=pipeline.Share(("teacher",))))
        peak = peak_of(lambda: pipeline.run(config, run, share=DISTIL))
        assert len(DistilledSet.load(run)) == 2 * classes
        return peak

    few, many = distilling(50, 5), distilling(300, 30)
    print(f"peak memory: {few:.0f} MB for 50 classes in 5 blocks, {many:.0f} MB for 300 in 30")
    assert many - few < 11
