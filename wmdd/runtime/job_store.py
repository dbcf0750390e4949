"""The key-value store of a job: who hosts it, which addresses it listens on, and its secret word."""

import os
import resource
import socket
from collections.abc import Mapping
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from wmdd.runtime.placement import SECRET_VARIABLE, Placement

_LOOPBACK = ("127.0.0.1", "localhost")
_FILES_OF_A_RANK = 4
"""Open files of the store's host for each rank: clients of requests, heartbeats and process groups; one in reserve."""


def open_store(here: Placement, environment: Mapping[str, str], timeout: timedelta) -> dist.Store:
    """Connect to the store of the job; rank 0 starts it, unless torchrun has started it.

    A store that rank 0 starts for an address on loopback listens on loopback only.  By itself torch would listen on all
    network interfaces.

    Args:
        here: placement of this process.
        environment: environment variables of the process.
        timeout: maximum wait for rank 0, and for all ranks.

    Raises:
        torch.distributed.DistError: the other ranks do not come.
        OSError: the port is occupied.
    """
    if here.rank == 0 and not (here.meeting == "env://" and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        allow_open_files(_FILES_OF_A_RANK * here.size)
        address = urlsplit(here.meeting)
        host, port = address.hostname or environment["MASTER_ADDR"], address.port or int(environment["MASTER_PORT"])
        if host in _LOOPBACK:
            return loopback_store(port, here.size, timeout)
    store, *_ = next(dist.rendezvous(here.meeting, here.rank, here.size, timeout=timeout))
    return store


def loopback_store(port: int, size: int, timeout: timedelta) -> dist.TCPStore:
    """Start a store that listens on 127.0.0.1 only, and wait for its clients.

    Args:
        port: port of the store; 0 for any free port.
        size: number of ranks, this one included.
        timeout: maximum wait for the clients, and default timeout of requests.

    Raises:
        torch.distributed.DistError: the clients do not come.
        OSError: the port is occupied.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK[0], port))
        listener.listen(max(128, size))
        own = listener.getsockname()[1]
        return dist.TCPStore(_LOOPBACK[0], own, size, True, timeout, master_listen_fd=listener.detach())


def allow_open_files(count: int) -> None:
    """Raise this process's limit on open files, so that ``count`` more can be opened, as far as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def secret_of(environment: Mapping[str, str]) -> str:
    """Return the secret of one start of a job: the word in the environment, with SLURM's numbers of the start.

    Without the word the result is an empty text or public numbers, and protects nothing.
    """
    numbers = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return "/".join([environment.get(SECRET_VARIABLE, ""), *(environment.get(name, "") for name in numbers)])
