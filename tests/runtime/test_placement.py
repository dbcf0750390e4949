"""Who a process is, and which device it takes, by its environment: torchrun, srun, tasks of SLURM, or alone."""

import pytest

from wmdd.errors import InputError
from wmdd.runtime.placement import Placement, choose_device, placement_of

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_torchrun_decides_also_inside_a_step_of_srun() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert placement_of(torchrun | SRUN) == Placement(3, 4, 1, "env://")


def test_tasks_of_one_srun_are_the_ranks_of_one_job() -> None:
    here = placement_of(SRUN)
    assert (here.rank, here.size, here.local, here.by_srun) == (5, 8, 1, True)
    others = [placement_of(SRUN | {"SLURM_PROCID": str(rank)}).meeting for rank in range(8)]
    assert {here.meeting} == set(others) and here.meeting.startswith("tcp://gpu03:")
    port = int(here.meeting.rpartition(":")[2])
    assert 1024 < port < 32768, "outside the ephemeral ports"
    assert placement_of(SRUN | {"SLURM_STEP_ID": "3"}).meeting != here.meeting


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[3,5-9],login", "gpu3"),
        ("rack[1-2]n[07,09]", "rack1n07"),
        ("127.0.0.[11-12]", "127.0.0.11"),
    ],
)
def test_ranks_of_several_nodes_meet_on_the_first(nodes: str, first: str) -> None:
    assert placement_of(SRUN | {"SLURM_STEP_NODELIST": nodes}).meeting.startswith(f"tcp://{first}:")


def test_ranks_of_one_node_meet_on_loopback_and_a_given_address_is_kept() -> None:
    assert placement_of(SRUN | {"SLURM_STEP_NUM_NODES": "1"}).meeting.startswith("tcp://127.0.0.1:")
    assert placement_of(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "9"}).meeting == "tcp://head:9"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the script of sbatch -n 8
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        SRUN | {"SLURM_PTY_PORT": "4242"},  # a shell on a terminal
    ],
)
def test_a_single_process_stands_alone(environment: dict[str, str]) -> None:
    assert placement_of(environment) == Placement()


def own(**environment: str) -> Placement:
    return placement_of(SRUN | environment)


@pytest.mark.parametrize(
    "name, here, visible, device",
    [
        ("auto", Placement(), 0, "cpu"),
        ("cpu", Placement(), 4, "cpu"),
        ("auto", Placement(), 1, "cuda:0"),
        ("auto", placement_of({"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}), 4, "cuda:2"),
        ("cuda", own(SLURM_LOCALID="3"), 4, "cuda:3"),  # nothing says which are visible: exclusive nodes
        ("cuda", own(SLURM_LOCALID="3", CUDA_VISIBLE_DEVICES=""), 4, "cuda:3"),
        ("cuda", own(SLURM_LOCALID="3", CUDA_VISIBLE_DEVICES="4,5,6,7"), 4, "cuda:3"),
        ("auto", own(SLURM_LOCALID="3", CUDA_VISIBLE_DEVICES="3"), 1, "cuda:0"),  # one GPU a task
        ("auto", own(SLURM_LOCALID="3", ROCR_VISIBLE_DEVICES="3"), 1, "cuda:0"),
        ("cuda:1", own(SLURM_LOCALID="3"), 4, "cuda:1"),
    ],
)
def test_each_rank_takes_its_own_device(name: str, here: Placement, visible: int, device: str) -> None:
    assert choose_device(name, here, visible) == device


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    "name, here, visible, message",
    [
        ("cuda", Placement(), 0, r"'cuda': torch sees no GPU on .*nvidia-smi"),
        ("cuda:1", Placement(), 1, r"'cuda:1': torch sees 1 GPUs on .*, numbered from 0"),
        ("tpu", Placement(), 0, r"'tpu': expected auto, cpu, cuda or cuda:N"),
        (
            "auto",
            own(SLURM_LOCALID="1"),
            1,
            r"rank 5 is number 2 on .*, where torch sees 1 GPUs; start one rank per GPU",
        ),
        ("auto", placement_of(TORCHRUN), 2, r"rank 3 is number 4 on"),
        # One environment for all ranks of torchrun: they would share this GPU.
        ("auto", placement_of(TORCHRUN | {"CUDA_VISIBLE_DEVICES": "0"}), 1, r"rank 3 is number 4 on"),
    ],
)
def test_a_rank_without_a_device_says_so_in_one_line(name: str, here: Placement, visible: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        choose_device(name, here, visible)
    assert "\n" not in str(caught.value)
