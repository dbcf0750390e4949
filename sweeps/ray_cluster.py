"""Ray, well behaved: loopback on one machine, no usage reports, nothing left behind.

A local Ray listens on 127.0.0.1 only and asks for a token that lives in this process's environment and nowhere else,
so that other users of the machine cannot join.  A cluster that is joined by its address was started by somebody else,
who decides its interface and its token (``RAY_AUTH_MODE=token``); it is left running.
"""

import functools
import hashlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmdd.errors import InputError, WmddError
from wmdd.storage import cache

_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
}
_OBJECT_STORE_BYTES = 100 * 2**20
"""Bytes; trials exchange a few numbers, and a default store would take a third of the memory."""
_MAX_TMP_PATH = 40
"""Characters of a temporary folder: sockets lie below it, and their paths may have 107."""


@dataclass(frozen=True)
class TrialResources:
    """What each trial gets, and how many run at once."""

    cpus: float
    gpus: float
    concurrent: int | None = None
    """None for as many as there is room for"""


def check_local(resources: TrialResources) -> None:
    """Refuse more than this machine has, before Ray starts.

    Raises:
        InputError: more CPUs or GPUs per trial than there are.
    """
    import torch

    _check({"CPU": float(_cpus()), "GPU": float(torch.cuda.device_count())}, resources, "this machine has")


def check_address(address: str) -> None:
    """Refuse an address at which nobody listens: Ray itself would try for minutes.

    Raises:
        InputError: no cluster is there.
    """
    host, _, port = address.rpartition(":")
    if address == "auto":
        return  # Ray looks for the cluster that was started on this machine
    if not host or not port.isdigit():
        raise InputError(f"--address {address}: expected HOST:PORT of a running Ray cluster, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--address {address}: nobody answers ({reason}); is the cluster running?") from None


def _check(largest: Mapping[str, float], resources: TrialResources, who: str) -> None:
    for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        found = largest.get(kind, 0.0)
        if wanted > found:
            hint = "none: leave --gpus out" if not found else f"{found:g}: use --{kind.lower()}s {found:g} or less"
            raise InputError(f"--{kind.lower()}s {wanted:g}: a trial asks for {wanted:g} {kind}s, {who} {hint}")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ray_session(out: Path, resources: TrialResources, address: str | None) -> Iterator[int]:
    """Start Ray on this machine or join the cluster at ``address``; yields how many trials run at once.

    Raises:
        InputError: the cluster's nodes cannot hold one trial.
        WmddError: the cluster cannot be joined.
    """
    with _environment(_ALWAYS | ({} if address else _local_environment())):
        import ray

        # The sweep says itself which trials failed and why.
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        folder = None if address else _make_folder(out)
        try:
            _connect(ray, address, folder)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            largest = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "GPU")}
            _check(largest, resources, "the largest node of the cluster has")
            yield _room(nodes, resources)
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _room(nodes: list[dict[str, float]], resources: TrialResources) -> int:
    """Return how many trials fit, and no more than asked for."""
    wanted = [(kind, count) for kind, count in (("CPU", resources.cpus), ("GPU", resources.gpus)) if count]
    # A trial lies on one node, and a fraction of a GPU on one GPU.
    room = (
        sum(min(int(node.get(kind, 0.0) / count + 1e-9) for kind, count in wanted) for node in nodes) if wanted else 1
    )
    return max(1, min(room, resources.concurrent or room))


def _connect(ray: Any, address: str | None, folder: Path | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    # Trials on other nodes read teacher and statistics from the same store.
    quiet["runtime_env"] = {"env_vars": {"WMDD_CACHE": str(cache.cache_root().absolute())}}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WmddError(
                f"--address {address}: cannot join the Ray cluster ({reason}); is it running, and are RAY_AUTH_MODE"
                " and its token the same here?"
            ) from None
        return
    import torch

    ray.init(
        address="local",
        num_cpus=_cpus(),
        num_gpus=torch.cuda.device_count(),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=str(folder),
        **quiet,
    )


@functools.cache
def _token() -> str:
    """Return this process's token: Ray remembers the first one that it met."""
    return secrets.token_hex(32)


def _local_environment() -> dict[str, str]:
    return {
        # What keeps Ray on loopback on macOS and Windows does so on Linux too; --node-ip-address 127.0.0.1 does not.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
    }


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the length of the block; Ray reads them when it is imported and when it starts processes."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _make_folder(out: Path) -> Path:
    """Make Ray's temporary folder; its name follows from the sweep's, so that what a kill -9 left is found again."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _MAX_TMP_PATH and Path("/tmp").is_dir():  # noqa: S108
        base = Path("/tmp")  # noqa: S108
    name = hashlib.sha256(f"{os.getuid()}:{out.absolute()}".encode()).hexdigest()[:12]
    folder = base / f"wmdd-{name}"
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made for Ray ({error.strerror}); set TMPDIR to a short path") from None
    return folder
