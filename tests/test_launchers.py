"""Several processes do runs: a stop, a death or a hang of any of them ends all within a bounded time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TINY, members, wait_until
from rank_processes import fork

from wmdd import launchers
from wmdd import worker as runtime_worker
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.errors import Interrupted, WmddError
from wmdd.launchers import Local, Worker, gpu_of
from wmdd.runtime import signals
from wmdd.runtime.log import on_screen
from wmdd.runtime.signals import STOPS, stop_on
from wmdd.storage.files import read_json

LONG = [*TINY, "method=random", "student.epochs=100000", "student.baselines=[]", "compute.checkpoint_seconds=0"]


def last_words(out: Path) -> list[str]:
    return [str(read_json(path)["message"]) for path in out.glob("*/progress/*.json")]


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


class Parent:
    """A process that does two long runs in two others, in a session of its own.

    Args:
        out: folder of the runs and of what the parent says.
        grace: ``worker.GRACE_SECONDS`` of the parent.
    """

    def __init__(self, out: Path, grace: float) -> None:
        self._said = out / "said"
        self._process = fork.Process(target=self._launch, args=(out, grace))
        self._process.start()
        self.pid = self._process.pid or 0

    def _launch(self, out: Path, grace: float) -> None:
        os.setsid()
        sys.stderr = self._said.open("w", buffering=1)
        runtime_worker.GRACE_SECONDS = grace
        runs = [(load_config("digits", LONG), out / str(number)) for number in range(2)]
        try:
            with on_screen():
                Local(2).launch(runs, "tiny")
        except WmddError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)

    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self, seconds: float = 60) -> tuple[int | None, str]:
        """Wait for its end; return its exit code, None if it lives on, and what it said."""
        self._process.join(seconds)
        return self._process.exitcode, self._said.read_text()


@contextmanager
def launched(out: Path, grace: float = 20) -> Iterator[tuple[Parent, list[int]]]:
    """Start two long runs in two processes; yields the parent, and their process numbers, once both train students."""
    parent = Parent(out, grace)

    def at_work() -> bool:
        assert parent.alive(), parent.end()
        return len(list(out.glob("*/students/*.checkpoint.safetensors"))) == 2

    try:
        wait_until(at_work)
        yield parent, children(parent.pid)
    finally:
        for pid in members(parent.pid):
            os.kill(pid, signal.SIGKILL)
        parent.end()


@pytest.mark.slow
def test_a_stop_to_the_parent_alone_checkpoints_every_run(tmp_path: Path) -> None:
    with launched(tmp_path) as (parent, _):
        os.kill(parent.pid, signal.SIGTERM)
        code, said = parent.end()
        assert code == 75 and "stopped with 2 of 2 runs left" in said
        wait_until(lambda: not members(parent.pid), seconds=30)
    assert sum("student checkpointed" in said for said in last_words(tmp_path)) == 2


@pytest.mark.slow
def test_a_process_that_does_not_stop_at_ctrl_c_is_killed_and_the_parent_says_so(tmp_path: Path) -> None:
    with launched(tmp_path, grace=3) as (parent, workers):
        os.kill(workers[0], signal.SIGSTOP)
        os.killpg(parent.pid, signal.SIGINT)  # to all processes, as terminals do
        code, said = parent.end()
        assert code == 75 and "of 2 worker processes did not stop within 3 s and were killed" in said
        wait_until(lambda: not members(parent.pid), seconds=30)


@pytest.mark.slow
def test_a_killed_process_is_reported_and_the_other_is_stopped(tmp_path: Path) -> None:
    with launched(tmp_path) as (parent, workers):
        os.kill(workers[1], signal.SIGKILL)
        code, said = parent.end()
        assert code == 1 and "perhaps for lack of memory; try fewer --jobs" in said
        wait_until(lambda: not members(parent.pid), seconds=30)


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path) as (parent, _):
        os.kill(parent.pid, signal.SIGKILL)
        wait_until(lambda: not members(parent.pid), seconds=60)
    assert sum("student checkpointed" in said for said in last_words(tmp_path)) == 2


@pytest.fixture
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.process.kill()
    one.process.wait()
    one.pipe.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_process_that_still_starts_is_a_stop(
    worker: Worker, tiny: Config, tmp_path: Path, number: int
) -> None:
    worker.process.send_signal(number)
    worker.give((tiny, tmp_path / "run"))
    with pytest.raises(Interrupted, match="stopped before the run began"):
        worker.take()
    assert worker.process.wait(60) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_a_run_is_the_parents_error_and_no_signal_kills_a_process_that_has_sent_it(
    worker: Worker, tmp_path: Path
) -> None:
    worker.give((load_config("digits", [*TINY, "ipc=1000"]), tmp_path / "run"))
    with pytest.raises(WmddError, match="ipc = 1000: class") as caught:
        worker.take()
    assert caught.value.exit_code == 2
    while worker.process.poll() is None:
        for number in STOPS:
            worker.process.send_signal(number)
        time.sleep(0.001)
    assert worker.process.returncode == 0


COMMANDS = {
    "run": ["run", "digits", "--out", "out"],
    "protocol": ["bench", "protocol", "digits", "--jobs", "2", "--out", "out", "--set", "student.epochs=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number"), [("run", signal.SIGTERM), ("run", signal.SIGUSR2), ("protocol", signal.SIGINT)]
)
def test_a_stop_while_torch_is_imported_ends_in_order(command: str, number: int, tmp_path: Path) -> None:
    code = f"""
import os, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Stop())
sys.argv[0] = "wmdd"
from wmdd import cli
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS[command]], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 75 and "stopped" in done.stderr.splitlines()[-1], done.stderr
    assert "the same command resumes" in done.stderr.splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "protocol.json"]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_delivered_several_times_is_one_request(number: signal.Signals) -> None:
    with stop_on(number) as stop:
        for _ in range(3):
            signal.raise_signal(number)
        assert stop()
        with stop_on(*STOPS) as later:
            assert later(), "a run that begins after the request knows of it"
    with stop_on(number) as other:
        assert not other()


def test_a_later_signal_of_the_same_kind_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
    code = """
import signal, time
from wmdd.runtime import signals
signals.SAME_REQUEST_SECONDS = 0.0
with signals.stop_on(signal.SIGTERM):
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.01)
    signal.raise_signal(signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM
    with stop_on(signal.SIGINT):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("visible", "count", "given"),
    [
        (None, 0, [None, None, None]),
        (None, 2, ["0", "1", "0"]),
        ("4,6", 2, ["4", "6", "4"]),
        ("GPU-8932f937, GPU-5ba566d4", 2, ["GPU-8932f937", "GPU-5ba566d4", "GPU-8932f937"]),
        ("3", 1, ["3", "3", "3"]),
        ("1,-1,0", 1, ["1", "1", "1"]),  # CUDA sees no GPU behind a wrong one
        ("", 0, [None, None, None]),
        ("0,1", 0, [None, None, None]),
    ],
)
def test_processes_take_gpus_in_turn(visible: str | None, count: int, given: list[str | None]) -> None:
    assert [gpu_of(visible, count, index) for index in range(3)] == given


@pytest.mark.slow
@pytest.mark.parametrize(("device", "given"), [("cpu", ["5", "7"]), ("cuda:1", ["5,7", "5,7"])])
def test_each_process_sees_its_own_gpu_unless_the_config_names_one(
    device: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    begun: list[Worker] = []

    class Seen(Worker):
        def __init__(self, gpu: str | None = None) -> None:
            super().__init__(gpu)
            begun.append(self)
            place = Path(f"/proc/{self.process.pid}/environ")
            said = wait_until(place.read_text)  # nothing, until the process has its own program
            found.append(dict(one.split("=", 1) for one in said.split("\0") if one)["CUDA_VISIBLE_DEVICES"])
            if len(found) == 2:
                raise WmddError("both have begun")  # what they would do is not looked at

    monkeypatch.setattr(launchers, "Worker", Seen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    configs = [load_config("digits", [*TINY, f"compute.device={device}"]) for _ in range(2)]
    try:
        with pytest.raises(WmddError, match="both have begun"):
            Local(2).launch([(config, tmp_path / str(number)) for number, config in enumerate(configs)], "tiny")
    finally:
        for one in begun:
            one.process.kill()
            one.process.wait()
            one.pipe.close()
    assert found == given


@pytest.mark.slow
def test_a_stop_ends_a_job_and_its_ranks() -> None:
    code = """
from wmdd.launchers import Local
Local().job(2, "http.server", ["0"])
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)

    def started() -> list[int]:
        assert parent.poll() is None
        found = [rank for torchrun in children(parent.pid) for rank in children(torchrun)]
        return found if len(found) == 2 else []

    ranks: list[int] = []
    try:
        ranks += wait_until(started)
        parent.terminate()
        _, said = parent.communicate(timeout=120)
        assert "Interrupted: stopped during a job of 2 ranks" in said
        assert not [rank for rank in ranks if members(rank)], "torchrun gives each rank a session of its own"
    finally:
        for pid in [living for first in (parent.pid, *ranks) for living in members(first)]:
            os.kill(pid, signal.SIGKILL)
        parent.communicate()
