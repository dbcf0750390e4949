"""The number of ranks on a node, and of helper processes that a rank may start."""

import os
import re
from collections.abc import Mapping


def processes(wanted: int) -> int:
    """Return the number of helper processes of this rank for ``wanted`` (``compute.workers``).

    It is at most the number of CPUs that the rank may use, and at least 1 unless ``wanted`` is 0.  More processes would
    only wait for each other, and torch would warn.  Results do not depend on the number.
    """
    return min(wanted, max(1, cpus_of_rank(len(os.sched_getaffinity(0)), os.environ)))


def cpus_of_rank(usable: int, environment: Mapping[str, str]) -> int:
    """Return the number of CPUs of one rank.

    Args:
        usable: number of CPUs that the process may use.  Under torchrun the ranks of a node share them; under srun
            each rank has its own CPUs.
        environment: environment variables of the process.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in environment
    if not under_torchrun and (own := environment.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        return min(usable, int(own))
    return usable // max(1, int(environment.get("LOCAL_WORLD_SIZE", "1")))


def ranks_on_node(environment: Mapping[str, str]) -> int:
    """Return the number of ranks of this job on a node: the largest number, if nodes differ.

    torchrun and ``wmdd slurm`` set LOCAL_WORLD_SIZE. srun sets a list such as ``8(x2),4``. Without either, all ranks
    count as ranks of one node.
    """
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    if "RANK" in environment:
        return int(environment.get("WORLD_SIZE", "1"))
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1" or "SLURM_PTY_PORT" in environment:
        return 1
    numbers = re.sub(r"\(x\d+\)", "", environment["SLURM_STEP_TASKS_PER_NODE"])
    return max(map(int, numbers.split(",")))
