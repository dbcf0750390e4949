"""Ranks as processes of one machine, with the environment that torchrun gives them."""

import atexit
import contextlib
import multiprocessing
import multiprocessing.util
import os
import secrets
import socket
import traceback
from collections.abc import Callable
from typing import Any

fork = multiprocessing.get_context("fork")
# The programs of wmdd run exit handlers at their end.  In a fork these would be the tests' own, which delete folders.
multiprocessing.util.register_after_fork(atexit, lambda module: module._clear())


def free_port() -> int:
    """Return a port that nobody listens on, for processes that will.

    Each worker has its own ports, below those that the kernel hands out: no other test takes the port in between.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 30000 + 300 * (worker % 9) + secrets.randbelow(300)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def in_ranks(size: int, work: Callable[[], Any]) -> list[Any]:
    """Call ``work`` in ``size`` processes with the environment that torchrun gives, and return what each returned."""
    port = str(free_port())
    results = fork.SimpleQueue()

    def member(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
        try:
            results.put((rank, work(), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))

    processes = [fork.Process(target=member, args=(rank,), daemon=True) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        found = sorted((take(results) for _ in processes), key=lambda item: item[0])
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    assert [error for *_, error in found if error] == []
    return [value for _, value, _ in found]


def take(results: Any, seconds: float = 300) -> Any:
    """Return what a rank sends, or fail: it hangs."""
    assert results._reader.poll(seconds), "a rank hangs"
    return results.get()
