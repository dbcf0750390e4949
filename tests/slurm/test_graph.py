"""Whole graphs on a real cluster: what they write, in which order they run, and how they end."""

import re
from pathlib import Path

import pytest
import safetensors
from conftest import TINY, blocks_of
from typer.testing import CliRunner

from slurm import submissions
from slurm.cli import app
from slurm.estimate import measured
from slurm.local_cluster import LocalCluster
from slurm.status import log_files, status
from slurm.submit import prepare
from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config

from .conftest import ask, finish, log, node_down, profile, rows, step_of, submit, wait

LONG = ["data.classes=2", "ipc=1", "synthesis.iterations=1000000", "compute.checkpoint_seconds=0.3"]
"""A single group whose synthesis outlasts every test; a test that needs its end sets the iterations."""

THREE_BLOCKS = [*TINY, "data.classes=6", "student.seeds=1", "labels.regimes=['hard']", "synthesis.iterations=150"]
"""A run whose three blocks take some seconds each, so that there is time to kill them."""


pytestmark = pytest.mark.xdist_group("graphs")  # on a cluster of their own, beside that of the other files


def contained(place: Path, *lines: str) -> tuple[str, ...]:
    """Return the words of a container: in it there are no SLURM clients, and these lines run before the interpreter."""
    script = place / "container"
    script.write_text("\n".join(["#!/bin/bash", "export PATH=/nowhere", *lines, 'exec "$@"', ""]))
    script.chmod(0o755)
    return (str(script),)


def waiting(place: Path, seconds: float) -> str:
    """Return a line of a container: every iteration waits so long, so that synthesis lasts and needs no CPU."""
    (place / "waiting").mkdir()
    observer = f"lambda title, done, total, unit: time.sleep({seconds} if unit == 'iterations' else 0)"
    code = f"import time\nfrom wmdd.runtime import progress_bars\nprogress_bars._observers.append({observer})\n"
    (place / "waiting" / "sitecustomize.py").write_text(code)
    return f"export PYTHONPATH={place / 'waiting'}"


def local_blocks(config: Config, place: Path) -> dict[str, bytes]:
    """Return the images of a run that this process does."""
    return blocks_of(pipeline.run(config, place / "local", share=pipeline.Share(("teacher", "distill"))))


def iteration(run: Path) -> int:
    """Return how far the checkpoint of the only group is; 0 when there is none."""
    try:
        with safetensors.safe_open(run / "groups" / "group-00000.checkpoint.safetensors", "pt") as file:
            return int(file.metadata()["iteration"])
    except FileNotFoundError:
        return 0


def test_an_array_writes_what_a_local_run_writes_and_reports_last(cluster: LocalCluster, tmp_path: Path) -> None:
    settings = ["data.classes=6", "teacher.seed=1", "student.seeds=1", "labels.regimes=['hard']"]
    config = load_config("digits", [*TINY, *settings])
    local, run = tmp_path / "local", tmp_path / "run"
    # A task takes all CPUs of a node, so that two tasks at a time are two nodes.
    launched = submit(config, run, blocks=3, using=profile(cpus_per_rank=8, parallel=2))
    assert [len(one.tasks) for one in launched.values()] == [1, 3, 1, 1]
    busiest = 0

    def watch() -> bool:
        nonlocal busiest
        busiest = max(busiest, sum(row.state == "running" for row in rows(run)))
        return not status(run).active

    pipeline.run(config, local, share=pipeline.Share(("teacher", "distill")))
    wait(watch, 400, "the graph ends")
    assert blocks_of(run) == blocks_of(local), "the distilled set depends on where it was made"
    assert blocks_of(run / "baselines" / "random") == blocks_of(local / "baselines" / "random")
    assert {row.state for row in status(run).rows} == {"done"}
    assert busiest == 2
    assert len({row.node for row in rows(run)}) > 1
    assert (run / "report.html").exists() and (run / "records").exists()
    ends = [ask("squeue", "-h", "-t", "all", "-j", one.job, "-o", "%e") for one in list(launched.values())[:-1]]
    begun = ask("squeue", "-h", "-t", "all", "-j", launched["report"].job, "-o", "%S")
    assert max("\n".join(ends).splitlines()) <= begun, "the report did not run last"

    # The same command finds everything done, and knows how fast it went.
    assert prepare(config, run, profile()).arrays == []
    speed = measured(run)
    assert speed.rate and speed.update_seconds
    told = CliRunner().invoke(app, ["logs", str(run), "2"]).output
    assert "iterations" in told and log_files(run, "distill", 2)[0].name in told
    shown = CliRunner().invoke(app, ["status", str(run), "--all"])
    assert shown.exit_code == 0 and shown.output.count("100%") == 10 and "no accounting" in shown.output


def test_what_is_lost_for_good_is_reported_and_the_command_that_status_prints_sends_only_that(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    config = load_config("digits", THREE_BLOCKS)
    expected = local_blocks(config, tmp_path)  # the teacher is in the cache from here on
    # One task at a time on a node; SLURM must not help by requeueing the one whose node dies, nor wmdd the other.
    launched = submit(config, tmp_path / "run", blocks=3, using=profile(cpus_per_rank=8, requeue=False))
    run, job = tmp_path / "run", launched["distill"].job
    wait(lambda: [row.state for row in rows(run)] == ["running"] * 3, 120, "three blocks run")
    wait(lambda: "images ..." in log(run, f"{job}_0_"), 120, "block 0 is at work")
    ask("scancel", "--signal=KILL", step_of(f"{job}_0"))
    node = next(row.node for row in rows(run) if row.items == (1,))
    with node_down(node):
        wait(lambda: [row.over for row in rows(run)][:2] == [True, True], 20, "status says which tasks were lost")
        assert [row.state for row in rows(run)][:2] == ["killed", "node failed"]
        finish(run, 120)
        assert [(row.state, row.why) for row in rows(run, "students")] == [("cancelled", "what it waited for failed")]
        assert rows(run, "report")[0].state == "done"
        said = log(run, launched["report"].job)
        assert re.search(r"missing\s+block 0.1\b", said), f"the report does not say what is missing: {said}"
        assert ask("squeue", "-h") == "", "a job waits for ever"
        (tmp_path / "other.toml").write_text(OTHER)
        result = CliRunner().invoke(app, ["status", str(run)], env={"COLUMNS": "200"})
        told = result.output.splitlines()
        assert result.exit_code == 1 and "killed by signal 9" in result.output
        assert told[-1] == f"wmdd slurm submit {run} --profile test"
        whole = run / "blocks" / "block-00002.safetensors"
        before = whole.stat().st_mtime_ns
        command = ["submit", str(run), "--profile", str(tmp_path / "other.toml"), "--stages", "teacher,distill"]
        CliRunner().invoke(app, command, catch_exceptions=False)
        again = submissions.read(run)[-1]
        assert [item.index for task in again.tasks for item in task] == [0, 1]
        finish(run, 200)
    assert [row.state for row in rows(run)] == ["done"] * 3
    assert whole.stat().st_mtime_ns == before
    assert blocks_of(run) == expected


OTHER = "gpus_per_rank = 0\ncpus_per_rank = 2\nmemory_gb = 1\nminutes = 10\n"


def test_a_killed_task_one_that_fails_twice_and_a_bad_node_cost_starts_and_no_block(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """One submission, and what the guide says of each of these."""
    config = load_config("digits", THREE_BLOCKS)
    run, bad = tmp_path / "run", cluster.node_names[1]
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    container = contained(
        tmp_path,
        f'[ "$SLURMD_NODENAME" != {bad} ] || export PYTHONPATH={broken.parent}',
        '[ "$SLURM_ARRAY_TASK_ID" != 2 ] || [ "${SLURM_RESTART_COUNT:-0}" -ge 2 ] || exit 3',
    )
    expected = local_blocks(config, tmp_path)
    launched = submit(config, run, blocks=3, using=profile(cpus_per_rank=8, container=container))
    job = launched["distill"].job
    wait(lambda: "images ..." in log(run, f"{job}_0_"), 200, "block 0 is at work")
    ask("scancel", "--signal=KILL", step_of(f"{job}_0"))
    finish(run)
    assert {row.state for row in status(run).rows} == {"done"}, log(run, "")
    assert [row.restarts for row in rows(run)] == [1, 1, 2]
    said = log(run, job)
    assert f"killed by signal 9 on {cluster.node_names[0]}" in said and "retry 2 of 2" in said
    assert f"device check failed on {bad}: libcuda.so.1" in said
    assert f"excluded from the rest of this array: {bad}" in said
    assert rows(run)[1].bad_nodes == (bad,)
    assert blocks_of(run) == expected
    ends = [ask("squeue", "-h", "-t", "all", "-j", one.job, "-o", "%e") for one in list(launched.values())[:-1]]
    begun = ask("squeue", "-h", "-t", "all", "-j", launched["report"].job, "-o", "%S")
    assert max("\n".join(ends).splitlines()) <= begun, "the report did not run last"


def test_a_task_that_loses_its_node_and_is_requeued_goes_on_from_its_checkpoints(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    # Decoders and solvers get the signals too.
    settings = ["synthesis.iterations=600", "student.baselines=[]", "compute.workers=2"]
    config = load_config("digits", [*TINY, *LONG, *settings])
    run = tmp_path / "run"
    expected = local_blocks(config, tmp_path)
    using = profile(container=contained(tmp_path, waiting(tmp_path, 0.02)))
    job = submit(config, run, ("teacher", "distill"), using=using)["distill"].job
    wait(lambda: iteration(run) > 0, 200, "synthesis begins")
    node = rows(run)[0].node
    with node_down(node):
        wait(lambda: rows(run)[0].state == "requeued", 30, "SLURM has requeued the task")
        # A virtual node comes back at once, perhaps while the task still ends there; a dead one would not.
        ask("scontrol", "update", f"jobid={job}", f"excnodelist={node}")
        wait(lambda: rows(run)[0].state == "running", 60, "the task runs elsewhere")
        lost = iteration(run)
        wait(lambda: iteration(run) > lost, 200, "synthesis goes on elsewhere")
    ask("scontrol", "requeue", job)
    wait(lambda: ask("squeue", "-h", "-j", job, "-o", "%T") == "PENDING", 30, "the task has stopped")
    first = iteration(run)
    finish(run)
    assert [row.state for row in rows(run)] == ["done"] and rows(run)[0].restarts == 2
    said = [int(line.split()[-1]) for line in log(run, job).splitlines() if "resumes at iteration" in line]
    assert 0 < said[0] <= lost < said[1] == first < 600, "it did not go on from its checkpoints"
    assert "stop requested: checkpointed at iteration" in log(run, job)
    assert blocks_of(run) == expected


def test_a_time_limit_requeues_a_task_in_a_container_and_a_cancelled_one_does_not_come_back(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    using = profile(container=contained(tmp_path, waiting(tmp_path, 0.05)))
    launched = submit(load_config("digits", [*TINY, *LONG]), run, using=using)
    job = launched["distill"].job
    wait(lambda: iteration(run) > 0, 200, "synthesis begins")
    ask("scontrol", "update", f"jobid={job}", "timelimit=1")
    # SLURM looks at time limits every half minute.
    wait(lambda: rows(run)[0].state == "requeued", 90, "the task puts itself back into the queue")
    # A start may take as long as this limit leaves on a busy machine; a second warning is not what is tested.
    ask("scontrol", "update", f"jobid={job}", "timelimit=10")
    reached = iteration(run)
    wait(lambda: iteration(run) > reached, 200, "synthesis goes on")
    # A cancelled task gets the signals of a preempted one: it must not requeue itself.
    result = CliRunner().invoke(app, ["cancel", str(run)])
    assert result.exit_code == 0 and "3 tasks were cancelled" in result.output
    assert ask("squeue", "-h") == ""
    assert [row.state for row in status(run).rows if row.stage != "teacher"] == ["cancelled"] * 3
    assert log(run, job).count("back into the queue") == 1


def test_a_block_under_torch_distributed_is_that_of_one_rank(
    cluster: LocalCluster, digits: Config, tmp_path: Path
) -> None:
    """Two nodes of one rank; the scaling study of ``test_launcher.py`` has two ranks on one node."""
    run = tmp_path / "run"
    pipeline.run(digits, tmp_path / "local", share=pipeline.Share(("teacher", "distill")))
    job = submit(digits, run, ("teacher", "distill"), 1, profile(nodes=2, ranks_per_node=1))["distill"].job
    assert ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%D %C") == "2 2"
    finish(run)
    assert [row.state for row in rows(run)] == ["done"], log(run, "")
    assert len(log_files(run, "distill", 0)) == 2
    assert blocks_of(run) == blocks_of(tmp_path / "local")
