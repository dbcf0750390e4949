"""A fault of the machine is not the recipe's; trials share GPUs and nodes; the cost is stated: decisions, on paper."""

import errno
import pickle

import pytest
import torch

from sweeps import fit, ray_adapters, ray_cluster
from sweeps.ray_cluster import TrialResources
from sweeps.trial_log import Log
from wmdd.errors import InputError, WmddError

GIB = 2**30


def test_a_fault_of_the_machine_is_no_error_of_the_recipe():
    full = WmddError("cannot be written")
    full.__cause__ = OSError(errno.ENOSPC, "no space left")
    for error in (OSError(errno.EIO, "input/output error"), MemoryError(), torch.AcceleratorError("ECC"), full):
        assert ray_adapters.is_fault_of_machine(error)
    for error in (
        InputError("ipc = 99999: too many"),
        WmddError("out of memory: set ..."),
        ValueError("nan"),
        KeyError(1),
    ):
        assert not ray_adapters.is_fault_of_machine(error)


def test_trials_that_share_a_gpu_share_its_memory_with_room_for_their_contexts():
    for gpus, trials in ((0.5, 2), (0.25, 4), (0.1, 10)):
        share = ray_adapters.memory_share(gpus, 80 * GIB)
        assert share is not None and trials * (share * 80 * GIB + 0.5 * GIB) <= 80 * GIB
    assert ray_adapters.memory_share(1.0, 80 * GIB) is ray_adapters.memory_share(0.0, 80 * GIB) is None
    assert ray_adapters.memory_share(0.1, 4 * GIB) > 0


@pytest.mark.slow
def test_a_node_that_joins_later_is_used(monkeypatch):
    nodes, now = [{"CPU": 2.0}], [0.0]
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: now[0])
    room = ray_cluster._current_room(lambda: nodes, TrialResources(cpus=1, gpus=0))
    given = []
    queue = ray_adapters.searcher(range(9), lambda number: given.append(number) or {"number": number}, room)
    assert [queue.suggest(f"t{index}") is not None for index in range(3)] == [True, True, False]
    nodes.append({"CPU": 2.0})
    now[0] += 60
    assert [queue.suggest(f"t{index}") is not None for index in range(2, 5)] == [True, True, False]
    queue.on_trial_complete("t0")
    assert queue.suggest("t5") == {"number": 4} and given == [0, 1, 2, 3, 4]
    alone = ray_cluster._current_room(lambda: nodes, TrialResources(cpus=1, gpus=0, concurrent=1))
    assert alone() == 1  # --concurrent stays a limit


@pytest.mark.parametrize(
    ("known", "resources", "text"),
    [
        (
            (90.0, "mean of 3 complete trials"),
            TrialResources(1, 0.5),
            "20 trials to do, 4 at a time; 90 s each (mean of 3 complete trials): at most 0.12 h and 0.25 GPU-hours",
        ),
        (
            (90.0, "estimated from a few steps"),
            TrialResources(2, 0),
            "20 trials to do, 4 at a time; 90 s each (estimated from a few steps): at most 0.12 h and 1 CPU-hours",
        ),
        (None, TrialResources(1, 1), "20 trials to do, 4 at a time; the hours are known after the first trial"),
    ],
)
def test_trials_hours_and_cost_are_stated_before_the_start(known, resources, text):
    assert fit.cost_text(20, known, 4, resources) == text


def test_a_terminal_shows_the_table_while_trials_run_and_ray_can_save_its_callbacks(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(fit, "shows_progress", lambda: True)
    job = fit.Job(None, Log(tmp_path), [], lambda number: None, "none", 0, lambda log: shown.append(log) or "table")
    with fit._live_table(job) as refresh:
        refresh()
        # Ray saves callbacks, and a terminal cannot be saved.  What is saved is a call that shows nothing.
        assert pickle.dumps(refresh) == pickle.dumps(fit._Unsaved())
        fit._Unsaved()()
    assert shown == [job.log, job.log]  # at the start and at the refresh
