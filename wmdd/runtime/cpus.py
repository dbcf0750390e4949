"""The number of helper processes that a rank may start."""

import os
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
