"""A rank starts no more processes than it has CPUs, so that they do not wait for each other and torch does not warn."""

import multiprocessing
import os
from collections.abc import Iterator

import pytest
import torch
from forked import python

from wmdd.config.schema import BarycenterConfig
from wmdd.distill.barycenter.processes import solvers
from wmdd.runtime import cpus


@pytest.mark.parametrize(
    ("usable", "environment", "own"),
    [
        (16, {}, 16),
        (16, {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, 4),
        (2, {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, 0),
        # srun binds each rank to its CPUs, and if it does not, says how many are meant for one.
        (6, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "6"}, 6),
        (24, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "6"}, 6),
        # One task of a job that starts torchrun: its ranks share the task's CPUs.
        (64, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "64", "TORCHELASTIC_RUN_ID": "none"}, 8),
    ],
)
def test_the_ranks_of_a_node_share_its_cpus(usable: int, environment: dict[str, str], own: int) -> None:
    assert cpus.cpus_of_rank(usable, environment) == own


@pytest.fixture
def one_cpu() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_none_is_started_unasked_and_one_for_each_cpu_at_most(one_cpu: None) -> None:
    assert [cpus.processes(wanted) for wanted in (0, 1, 16)] == [0, 1, 1]


def test_presets_for_large_machines_decode_on_one_cpu_without_a_warning_and_in_the_same_order() -> None:
    code = """
import os, multiprocessing, warnings
warnings.filterwarnings("error", "This DataLoader will create")
from wmdd.data import decoding
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
stream = decoding.in_order(abs, list(range(-40, 0)), workers=16)
first = next(stream)
assert len(multiprocessing.active_children()) == 1
assert [first, *stream] == list(range(40, 0, -1))
"""
    done = python("-c", code)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_presets_for_large_machines_solve_in_one_process_on_one_cpu(one_cpu: None) -> None:
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    with solvers(16) as submit:
        waiting = [submit(features, 2, BarycenterConfig(), seed) for seed in range(4)]
        assert len(multiprocessing.active_children()) == 1
        parallel = [pending() for pending in waiting]
    with solvers(0) as submit:
        alone = [submit(features, 2, BarycenterConfig(), seed)() for seed in range(4)]
    assert all(torch.equal(one.positions, other.positions) for one, other in zip(parallel, alone, strict=True))
