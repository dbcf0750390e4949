"""How many processes a rank may start beside itself."""

import os
from collections.abc import Mapping


def processes(wanted: int) -> int:
    """Return the number of processes that this rank starts when the config asks for ``wanted`` (``compute.workers``).

    There is at most one for each CPU that the rank may use, but never none where one is wanted.  More would only wait
    for each other, and torch would warn.  Results do not depend on the number.
    """
    return min(wanted, max(1, cpus_of_rank(len(os.sched_getaffinity(0)), os.environ)))


def cpus_of_rank(usable: int, environment: Mapping[str, str]) -> int:
    """Return the number of CPUs of one rank.

    Args:
        usable: number of CPUs that the process may use.  The ranks of a node share them under torchrun; srun gives
            each rank its own.
        environment: environment variables of the process.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in environment
    if not under_torchrun and (own := environment.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        return min(usable, int(own))
    return usable // max(1, int(environment.get("LOCAL_WORLD_SIZE", "1")))
