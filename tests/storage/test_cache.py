"""The store: finished entries are only read, use and pins keep them, and one process of many makes what is missing."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from filelock import FileLock
from forked import python
from PIL import Image
from typer.testing import CliRunner

from wmdd import cli, pipeline
from wmdd.config.schema import Config, DataConfig
from wmdd.data import decode_checks
from wmdd.data.dataset import load_dataset
from wmdd.errors import InputError, Interrupted
from wmdd.runs.folder import RunFolder
from wmdd.storage import cache
from wmdd.storage.files import expect

fork = multiprocessing.get_context("fork")
DISTIL = pipeline.Share(("teacher", "distill"))
DAY = 86400


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a store that no other test uses."""
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


def age(paths: Iterator[Path], days: float) -> None:
    """Make files and folders look as if nobody had touched them for some days."""
    then = time.time() - days * DAY
    for path in list(paths):
        os.utime(path, (then, then))


WATCHED = """
import os, sys, wmdd

seen, root = [], os.environ["WMDD_CACHE"]

def hook(event, args):
    changes = event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "os.chmod", "os.link"}
    changes |= event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes and str(args[0]).startswith(root):
        seen.append(f"{event} {os.path.basename(str(args[0]))}")

sys.addaudithook(hook)
wmdd.run("digits", sys.argv[1], sys.argv[2:], wmdd.pipeline.Share(("teacher", "distill")))
print("\\n".join(seen))
"""


@pytest.mark.slow
def test_a_finished_entry_is_read_without_a_lock_and_without_a_write(own: Path, tmp_path: Path) -> None:
    def changes(out: str) -> list[str]:
        done = python("-c", WATCHED, str(tmp_path / out), *TINY)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:-1] if done.stdout.strip() else []

    assert "open .lock" in changes("first")
    assert changes("second") == []
    age(own.rglob("*"), days=3)
    assert changes("third") == ["os.utime " + folder.name for kind in cache.KINDS for folder in (own / kind).glob("*")]
    assert changes("fourth") == []


@pytest.mark.slow
def test_a_finished_teacher_is_read_while_another_process_holds_its_lock(
    own: Path, tiny: Config, tmp_path: Path
) -> None:
    pipeline.run(tiny, tmp_path / "first", share=DISTIL)
    (folder,) = (own / "teachers").iterdir()
    process = fork.Process(target=pipeline.run, args=(tiny, tmp_path / "second"), kwargs={"share": DISTIL})
    with FileLock(folder / ".lock"):
        try:
            process.start()
            process.join(120)
            assert process.exitcode == 0
        finally:
            process.kill()


@pytest.fixture
def mounted(own: Path) -> Iterator[Callable[[], None]]:
    """Return a function that makes the test's store read-only, for root too."""
    own.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(own)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("a file system cannot be mounted here: needs root")
    yield lambda: subprocess.run(["mount", "-o", "remount,ro", own], check=True) and None  # noqa: S607
    subprocess.run(["umount", own], check=True)  # noqa: S607


@pytest.mark.slow
def test_a_read_only_store_serves_what_it_has_and_names_the_remedy_for_the_rest(
    mounted: Callable[[], None], own: Path, tiny: Config, tmp_path: Path
) -> None:
    pipeline.run(tiny, tmp_path / "first", share=DISTIL)
    age(own.rglob("*"), days=3)
    mounted()
    pipeline.run(tiny, tmp_path / "second", share=DISTIL)
    cache.pin([own / "teachers" / "key"])
    other = tiny.model_copy(update={"teacher": tiny.teacher.model_copy(update={"seed": 1})})
    with pytest.raises(InputError, match="Read-only file system; set WMDD_CACHE to a writable folder"):
        pipeline.run(other, tmp_path / "third", share=DISTIL)


@pytest.mark.slow
def test_prune_keeps_what_is_in_use_and_what_a_submission_of_the_last_30_days_names(
    own: Path, tiny: Config, tmp_path: Path
) -> None:
    pipeline.run(tiny, tmp_path / "run", share=DISTIL)
    kinds = ["statistics", "teachers"]
    age(own.rglob("*"), days=60)
    pipeline.run(tiny, tmp_path / "again", share=DISTIL)
    assert cache.prune(30) == [], "what a run has just read was deleted"

    age(own.rglob("*"), days=60)
    cache.pin(pipeline.entries_of(tiny, load_dataset(tiny.data)))
    assert cache.prune(30) == [] and [entry.pinned for entry in cache.entries()] == [True, True]
    assert "needed by a submitted job" in CliRunner().invoke(cli.app, ["cache", "list"]).output
    age((own / "pins").iterdir(), days=31)
    assert sorted(entry.kind for entry in cache.prune(30)) == kinds
    assert cache.entries() == [] and list((own / "pins").iterdir()) == []


def test_of_many_processes_one_decodes_to_find_what_cannot_be_read(own: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split / "ant").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (9, 9)).save(tmp_path / "data" / split / "ant" / f"{number}.png")
    config = DataConfig(source="folder", root=str(tmp_path / "data"), on_error="skip", resolution=8)
    age((tmp_path / "data").rglob("*"), days=1)  # the listing of a folder that has just been changed is made again
    together, decode, decoded = fork.Barrier(4), decode_checks.decoding_faults, fork.SimpleQueue()

    def counted(*arguments: object) -> dict[str, str]:
        decoded.put(os.getpid())
        return decode(*arguments)  # type: ignore[arg-type]

    def work() -> None:
        decode_checks.decoding_faults = counted  # type: ignore[assignment]
        together.wait(60)
        load_dataset(config)

    processes = [fork.Process(target=work) for _ in range(4)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * 4
    makers = set()
    while not decoded.empty():
        makers.add(decoded.get())
    assert len(makers) == 1, "two processes decoded all images"


@pytest.mark.slow
def test_students_wait_for_a_block_that_another_machine_has_just_finished(tiny: Config, tmp_path: Path) -> None:
    alone = tiny.model_copy(update={"student": tiny.student.model_copy(update={"baselines": (), "seeds": 1})})
    run = RunFolder(pipeline.run(alone, tmp_path / "run", share=DISTIL))
    hidden = run.path / "hidden"
    run.sidecar_file(0).rename(hidden)
    looks = threading.Event()

    def finish() -> None:
        assert looks.wait(60)
        hidden.rename(run.sidecar_file(0))

    def heed(event: str, args: tuple[object, ...]) -> None:
        if event == "os.listdir" and args[:1] == (str(run.sidecar_file(0).parent),):
            looks.set()

    sys.addaudithook(heed)
    thread = threading.Thread(target=finish)
    thread.start()
    pipeline.run(alone, run.path, share=pipeline.Share(("students",)))
    thread.join()
    assert len(list((run.path / "records").iterdir())) == 2


def test_waiting_for_a_file_ends_with_a_stop_or_in_time(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped while waiting for"):
        expect([tmp_path / "none"], lambda: True)
    expect([tmp_path / "none"], seconds=0.1)
    (tmp_path / "there").write_text(json.dumps(1))
    expect([tmp_path / "there"], lambda: True)
