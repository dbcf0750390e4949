"""Starts Ray on this machine, or joins a running cluster: no usage reports, no files left behind.

A local Ray listens on 127.0.0.1 only and requires a token. The token exists only in this process's environment, so
other users of the machine cannot join. A running cluster has its own interface and token (``RAY_AUTH_MODE=token``),
chosen by the user who started it. It keeps running after the sweep.
"""

import functools
import hashlib
import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
"""Size of Ray's object store. Trials exchange a few numbers; the default would take a third of the memory."""
_LOOK_SECONDS = 5.0
"""Seconds between two looks at the nodes of the cluster."""
_MAX_TMP_PATH = 40
"""Characters in the path of a temporary folder: Ray's sockets lie in it, and a socket's path may have 107."""


@dataclass(frozen=True)
class TrialResources:
    """CPUs and GPUs of each trial, and the number of concurrent trials."""

    cpus: float
    gpus: float
    concurrent: int | None = None
    """Limit on concurrent trials; None for as many as fit"""


def check_local(resources: TrialResources) -> None:
    """Check, before Ray starts, that one trial fits on this machine.

    Raises:
        InputError: a trial needs more CPUs or GPUs than the machine has.
    """
    import torch

    _check({"CPU": float(_cpus()), "GPU": float(torch.cuda.device_count())}, resources, "this machine has")


def check_address(address: str) -> None:
    """Check that a cluster answers at this address. Ray itself would try for minutes.

    Raises:
        InputError: no cluster answers, or the address is malformed.
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
        raise InputError(f"--address {address}: no cluster answers ({reason}); is it running?") from None


def _check(largest: Mapping[str, float], resources: TrialResources, who: str) -> None:
    if resources.gpus > 1:
        raise InputError(f"--gpus {resources.gpus:g}: a trial uses one GPU; use 1, or a share such as 0.5")
    for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        found = largest.get(kind, 0.0)
        if wanted > found:
            hint = "none: leave --gpus out" if not found else f"{found:g}: use --{kind.lower()}s {found:g} or less"
            raise InputError(f"--{kind.lower()}s {wanted:g}: a trial needs {wanted:g} {kind}s, {who} {hint}")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ray_session(out: Path, resources: TrialResources, address: str | None) -> Iterator[Callable[[], int]]:
    """Start Ray on this machine, or join the cluster at ``address``.

    Yields:
        A function that returns the number of concurrent trials. It asks the cluster again every few seconds, so nodes
        that join later are used.

    Raises:
        InputError: a trial does not fit on any node of the cluster.
        WmddError: the cluster cannot be joined.
    """
    with _environment(_ALWAYS | ({} if address else _local_environment())):
        import ray

        # Ray's messages are not needed: the sweep itself reports which trials failed, and why.
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        folder = None if address else _make_folder(out)
        _read_environment(ray)
        try:
            _connect(ray, address, folder)
            nodes = _nodes(ray)
            largest = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "GPU")}
            _check(largest, resources, "the largest node of the cluster has")
            yield _current_room(lambda: _nodes(ray), resources)
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _current_room(nodes: Callable[[], list[dict[str, float]]], resources: TrialResources) -> Callable[[], int]:
    """Return a function that returns ``_room``, and asks for the nodes at most once every few seconds."""
    known = 0, -math.inf

    def room() -> int:
        nonlocal known
        if time.monotonic() - known[1] > _LOOK_SECONDS:
            known = _room(nodes(), resources), time.monotonic()
        return known[0]

    return room


def _room(nodes: list[dict[str, float]], resources: TrialResources) -> int:
    """Return the number of concurrent trials: as many as fit, up to ``resources.concurrent``."""
    wanted = [(kind, count) for kind, count in (("CPU", resources.cpus), ("GPU", resources.gpus)) if count]
    # A trial runs on one node, and a share of a GPU is on one GPU.
    room = (
        sum(min(int(node.get(kind, 0.0) / count + 1e-9) for kind, count in wanted) for node in nodes) if wanted else 1
    )
    return max(1, min(room, resources.concurrent or room))


def _connect(ray: Any, address: str | None, folder: Path | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    # Trials on other nodes read teacher and statistics from the same cache.
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


def _read_environment(ray: Any) -> None:
    """Make Ray read its variables again: it has read them if this process imported it before.

    It would start its cluster without a token, and under ``uv run`` build an environment for the trials.
    """
    ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


@functools.cache
def _token() -> str:
    """Return the token of this process. There is only one: Ray keeps the first token that it reads."""
    return secrets.token_hex(32)


def _local_environment() -> dict[str, str]:
    return {
        # Without clusters, as on macOS and Windows, Ray listens on loopback only; --node-ip-address does not do this.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
    }


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables during the ``with`` block. Ray reads them at its import and when it starts processes."""
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
    """Make Ray's temporary folder. Its name depends on the sweep's folder, so files left by kill -9 are found again."""
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
        raise InputError(
            f"{folder}: cannot be created for Ray ({error.strerror}); set TMPDIR to a short path"
        ) from None
    return folder
