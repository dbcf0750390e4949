"""Sweeps through Ray: they finish, go on after an interrupt or a kill, and leave nothing behind."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from filelock import FileLock

from sweeps import best, confirm, page, ray_cluster, run, search, trial, trial_log
from sweeps.ray_cluster import TrialResources
from sweeps.trial_log import Log, savings
from wmdd.config.loading import load_config
from wmdd.errors import InputError, WmddError
from wmdd.storage import cache

SPACE = """
[parameters]
synthesis.bn_weight = { loguniform = [0.1, 1000.0] }
synthesis.start = { choice = ["real", "noise"] }
"""
ONE = TrialResources(cpus=1, gpus=0, concurrent=1)
SECONDS = 300
"""Longest wait for a process, on a machine that is busy with other things."""


def processes(home: Path) -> list[int]:
    """Return the living processes that were started with this TMPDIR, whoever their parent is now."""
    wanted = f"TMPDIR={home / 'tmp'}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def working(home: Path) -> list[int]:
    """Return Ray's processes that run trials."""
    found = []
    for pid in processes(home):
        with suppress(OSError):
            if b"ray::ImplicitFunc" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def listening(pids: list[int]) -> set[str]:
    """Return the addresses, in the kernel's hexadecimal, on which these processes listen."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(link))
            except OSError:
                continue
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                addresses.add(fields[1].partition(":")[0])
    return addresses


def nothing_is_left(home: Path) -> bool:
    """Return whether no process of Ray lives on, and no socket, session or token lies about."""
    until = time.monotonic() + 30
    while processes(home) and time.monotonic() < until:
        time.sleep(0.2)
    lies = [path for path in (home / "home").rglob("*") if "ray" in str(path.relative_to(home))]
    return not processes(home) and not list((home / "tmp").glob("wmdd-*")) and not lies


def outcome(out: Path) -> list[tuple[object, ...]]:
    """Return what the trials of a sweep were and reached, without the times."""
    return [
        (known.number, known.values, known.state, [report["top1"] for report in known.reports])
        for known in Log.load(out).trials
    ]


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.1)


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Wait for a sweep and return what it said."""
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == code, said
    return said


def written(path: Path, text: str) -> str:
    """Write a space and return its name."""
    path.write_text(text)
    return str(path)


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_runs_grows_and_gives_its_best_recipe(make, tmp_path):
    import ray  # noqa: F401 - a process may have imported Ray before, without a token

    sweep = make(SPACE, scheduler="asha", kind="optuna")
    out = tmp_path / "sweep"
    log = run.run(sweep, out, 3, ONE)
    assert [known.state for known in log.trials if known.number == 0] == ["done"]
    assert all(known.state in ("done", "stopped") for known in log.trials)
    first = outcome(out)
    # The statistics were there before the first trial, and no trial wrote any.
    began = (out / "trials" / "trial-00000.json").stat().st_mtime_ns
    kept = [file for kind in ("teachers", "statistics") for file in (cache.cache_root() / kind).rglob("*.safetensors")]
    assert kept and all(file.stat().st_mtime_ns < began for file in kept)

    log = run.run(sweep, out, 4, ONE)  # more trials for a finished sweep
    assert outcome(out)[:3] == first and len(log.trials) == 4
    before = {file: file.stat().st_mtime_ns for file in (out / "trials").iterdir()}
    run.run(sweep, out, 4, ONE)  # nothing to do: nothing is done
    assert before == {file: file.stat().st_mtime_ns for file in (out / "trials").iterdir()}

    page.write_html(sweep, log, out / "sweep.html")
    content = (out / "sweep.html").read_text()
    assert "http" not in content.replace("http://www.w3.org", "") and content.count("<svg") == 3

    assert "# Unconfirmed: the best of many trials" in best.best(out, measure=False)
    confirmed = confirm.confirm(out, 1, 3, {"student_epochs": 1}, ONE)
    assert confirmed.complete and confirmed.total == 6
    repeats = {(one.of, one.repeat): one.last for one in Log.load(out / "confirm").trials}
    assert {repeat for _, repeat in repeats} == {1, 2, 3} and len(repeats) == 6
    assert confirm.confirm(out, 1, 3, {"student_epochs": 1}, ONE) == confirmed  # nothing to do
    with pytest.raises(InputError, match=r"differs in budget.iterations\); use the same budget, or delete"):
        confirm.confirm(out, 1, 3, {"student_epochs": 1, "iterations": 1}, ONE)

    found = best.best(out)
    (tmp_path / "best.toml").write_text(found)
    config = load_config(tmp_path / "best.toml")
    chosen = log.trials[confirmed.winner]
    assert config.synthesis.bn_weight == chosen.values["synthesis.bn_weight"]
    assert config.data.holdout_per_class == 0 and config.synthesis.iterations == 8
    first = "Confirmed on fresh seeds" if confirmed.winner else "Nothing of 4 trials beats the config"
    assert found.startswith(f"# {first}: trial {chosen.number}")
    assert "# Test set, soft labels, this config in full: top-1" in found
    runs = sorted((out / "best").glob("*/records/*"))
    times = [file.stat().st_mtime_ns for file in runs]
    assert best.best(out) == found  # the test set is not looked at again
    assert times == [file.stat().st_mtime_ns for file in runs]

    with pytest.raises(InputError, match=r"belongs to another sweep \(differs in config.synthesis.lr, seed\)"):
        run.run(make(SPACE, ("synthesis.lr=0.1",), scheduler="asha", kind="optuna", seed=1), out, 4, ONE)


def without_ray(sweep: run.Sweep, count: int) -> list[tuple[object, ...]]:
    """Return what the first trials of a random search reach in this process, as ``outcome`` does."""
    plan = trial.prepare(trial.SweepSetup(sweep.config, sweep.space.budget, sweep.objective), lambda: False)
    found = []
    for number in range(count):
        suggested = search.suggest(sweep.space, "random", sweep.seed, sweep.objective, number, []) if number else None
        values = suggested or sweep.space.values_in(sweep.config)
        reports = []
        trial.run(plan, values, reports.append)
        found.append((number, values, "done", [report["top1"] for report in reports]))
    return found


def test_a_sweep_that_was_interrupted_and_killed_ends_with_the_trials_of_one_process(make, start, home, tmp_path):
    space, out = written(tmp_path / "space.toml", SPACE), tmp_path / "sweep"
    options = ["--trials", "5", "--concurrent", "1", "--scheduler", "none", "--search", "random"]

    process = start(space, out, *options)
    wait_for(out / "trials" / "trial-00000.json")
    addresses = listening(processes(home))
    loopback = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
    assert addresses and addresses <= loopback
    os.killpg(process.pid, signal.SIGINT)
    said = finish(process, 75)
    assert "stopped with 5 of 5 trials to do" in said.splitlines()[-1]
    assert nothing_is_left(home)

    process = start(space, out, *options)
    wait_for(out / "trials" / "trial-00002.json")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished = [known.number for known in Log.load(out).trials if known.finished]
    assert finished[:2] == [0, 1] and len(finished) < 5
    files = {number: (out / "trials" / f"trial-{number:05d}.json").read_bytes() for number in finished}

    process = start(space, out, *options)
    wait_for(out / "trials" / f"trial-{len(finished) + 1:05d}.json")
    workers = working(home)
    assert workers
    for pid in workers:  # a dead worker is no failed recipe: its trial runs again, in the same command
        os.kill(pid, signal.SIGKILL)
    said = finish(process)
    assert f"{len(finished)} are done" in said and "trial 4: top1" in said and "failed" not in said
    for number, content in files.items():  # no finished trial ran again
        assert (out / "trials" / f"trial-{number:05d}.json").read_bytes() == content
    assert outcome(out) == without_ray(make(SPACE, ("compute.device=cpu",)), 5)
    assert nothing_is_left(home)  # not even what the kill left


@contextmanager
def cluster(home, monkeypatch, *options):
    """Start a Ray cluster of one CPU, as another user's; yields its address."""
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    for key, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}.items():
        monkeypatch.setenv(key, value)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    environment = {**os.environ, "HOME": str(home / "home"), "TMPDIR": str(home / "tmp")}
    head = ["start", "--head", "--port=0", "--include-dashboard=false", "--num-cpus=1", f"--temp-dir={home / 'r'}"]
    try:
        began = subprocess.run(
            [*ray, *head, *options, "--disable-usage-stats"], env=environment, capture_output=True, text=True
        )
        assert began.returncode == 0, began.stdout + began.stderr
        yield (home / "r" / "ray_current_cluster").read_text().strip()
    finally:
        for pid in processes(home):
            os.kill(pid, signal.SIGKILL)


def test_sweeps_join_a_running_cluster_and_leave_it_running_whatever_becomes_of_their_trials(
    start, home, tmp_path, monkeypatch
):
    # Ray believes that the node has a GPU, as SLURM does of one that has fallen off; torch sees none.  The step's
    # variables are those of a Ray that srun started on three nodes: a trial is no rank of it.
    step = "JOB_ID=7 STEP_ID=1 STEP_NUM_TASKS=3 STEP_TASKS_PER_NODE=1(x3) STEP_NUM_NODES=1"
    step += " STEP_NODELIST=n1 PROCID=1 LOCALID=0"
    for setting in step.split():
        monkeypatch.setenv(*f"SLURM_{setting}".split("="))
    with cluster(home, monkeypatch, "--num-gpus=1") as address:
        out = tmp_path / "sweep"
        failing = written(tmp_path / "failing.toml", "[parameters]\nipc = { grid = [1, 99999] }")
        options = ["--search", "grid", "--scheduler", "none", "--address", address]
        said = finish(start(failing, out, *options, "--trials", "3"))
        log = Log.load(out)
        states = {known.values["ipc"]: known for known in log.trials}
        assert states[1].state == states[2].state == "done"
        # A failed trial is recorded and does not stop the sweep.
        assert states[99999].state == "failed"
        assert states[99999].error.startswith("InputError: ipc = 99999: class '0' has")
        assert "1 failed; trial" in said
        assert len(page.rows(run.Sweep.from_identity(log.identity), log)) == 3

        said = finish(start("regularization", tmp_path / "two", *options, "--gpus", "2"), 2)
        assert "--gpus 2: a trial uses one GPU; use 1, or a share such as 0.5" in said

        # A trial that was given a GPU never works on the CPU.
        said = finish(start("regularization", tmp_path / "one", *options, "--trials", "1", "--gpus", "1"), 1)
        assert "1 of 1 trials lost their worker; trial 0: WmddError: torch sees no GPU on" in said
        assert not Log.load(tmp_path / "one").trials[0].finished  # the recipe is not to blame


def test_the_wrong_folder_and_too_many_gpus_get_one_clear_line(make, tmp_path):
    sweep = make(SPACE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no sweep"):
        run.run(sweep, tmp_path / "full", 2, ONE)
    with pytest.raises(InputError, match="--gpus 64: a trial uses one GPU; use 1, or a share"):
        run.run(sweep, tmp_path / "new", 2, TrialResources(cpus=1, gpus=64))
    with pytest.raises(InputError, match="--cpus 9999"):
        run.run(sweep, tmp_path / "new", 2, TrialResources(cpus=9999, gpus=0))
    with pytest.raises(InputError, match="the largest node of the cluster has none: leave --gpus out"):
        ray_cluster._check({"CPU": 1.0}, TrialResources(cpus=1, gpus=1), "the largest node of the cluster has")
    with pytest.raises(InputError, match="no cluster answers"):
        run.run(sweep, tmp_path / "new", 2, ONE, "127.0.0.1:1")
    with pytest.raises(InputError, match="expected HOST:PORT"):
        run.run(sweep, tmp_path / "new", 2, ONE, "cluster")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match=r"holds no sweep \(no sweep.json\)"):
        Log.load(tmp_path / "full")


@pytest.mark.slow
def test_two_processes_cannot_run_one_sweep(make, tmp_path):
    sweep = make(SPACE)
    (tmp_path / "sweep").mkdir()
    with FileLock(tmp_path / "sweep" / ".lock"), pytest.raises(InputError, match="another process is running"):
        run.run(sweep, tmp_path / "sweep", 2, ONE)


def test_unknown_choices_offer_the_nearest(make):
    for options, message in (
        ({"objective": "topl"}, "did you mean 'top1'"),
        ({"kind": "optun"}, "did you mean 'optuna'"),
        ({"scheduler": "ahsa"}, "did you mean 'asha'"),
    ):
        with pytest.raises(InputError, match=message):
            make(SPACE, **options)


def test_asha_is_refused_where_it_would_compare_seconds_alone(make):
    with pytest.raises(InputError, match=r"--objective time: ASHA .*; use --scheduler none") as raised:
        make(SPACE, objective="time", scheduler="asha")
    assert "\n" not in str(raised.value)
    assert make(SPACE, objective="time", scheduler="none").objective.name == "time"


def test_a_sweep_goes_on_after_its_external_set_has_moved(make, tmp_path):
    log = Log(tmp_path / "sweep")
    with log.held(make(SPACE, ("external.folder=here",)).identity()):
        pass
    with log.held(make(SPACE, ("external.folder=there",)).identity()):
        pass


def test_a_damaged_trial_is_named(make, tmp_path):
    log = Log(tmp_path / "sweep")
    with log.held(make(SPACE).identity()):
        log.write(trial_log.Trial(0, {}))
    (log.path / "trials" / "trial-00000.json").write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(WmddError, match=r"trial-00000.json: is not a trial of this version; delete it"):
        Log.load(log.path)


def test_savings_are_told_only_where_there_are_some():
    done = trial_log.Trial(0, {}, "done", [{"seconds": 10.0}])
    stopped = trial_log.Trial(1, {}, "stopped", [{"seconds": 2.0}])
    assert savings([done]) is None
    assert savings([done, stopped, stopped]) == (2, 14.0, 30.0)
