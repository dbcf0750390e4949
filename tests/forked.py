"""Python programs in forks of the test process: real processes, but what the tests have imported need not be again.

The import of torch, POT and the compiler takes a new interpreter several seconds of a core.  A test of what a process
imports, or of its first moments, starts ``sys.executable`` instead.  Functions registered with ``atexit`` do not run.
"""

import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from conftest import members
from rank_processes import fork


class Forked:
    """A Python program in a session of its own, with as much of ``subprocess.Popen`` as the tests use.

    Args:
        words: words after ``python``: ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``.
        cwd: its working directory; None: that of the tests.
        env: variables that are added to its environment.
    """

    def __init__(self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self._said = [tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")]  # noqa: SIM115
        self._words, self._cwd, self._env = words, cwd, env or {}
        self._process = fork.Process(target=self._main)
        self._process.start()
        self.pid = self._process.pid or 0

    def _main(self) -> None:
        os.setsid()
        for number, file in enumerate(self._said, start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        logging.getLogger().handlers.clear()
        os.environ.update(self._env)
        tempfile.tempdir = None
        if self._cwd:
            os.chdir(self._cwd)
        first, *rest = self._words
        sys.argv = [first, *rest] if first not in ("-m", "-c") else ["-c" if first == "-c" else rest[0], *rest[1:]]
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - the test's own code
        else:
            runpy.run_path(first, run_name="__main__")

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end; return what it wrote to stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it has not ended within ``timeout`` seconds.
        """
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self._words, timeout, *map(self._read, self._said))
        out, err = map(self._read, self._said)
        return out, err

    @staticmethod
    def _read(file: TextIO) -> str:
        file.seek(0)
        return file.read()

    def end(self) -> None:
        """Kill what still lives of it and of its children."""
        for pid in members(self.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.join()


def python(
    *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run ``python WORDS`` in a fork to its end."""
    one = Forked(*words, cwd=cwd, env=env)
    try:
        said = one.communicate()
    finally:
        one.end()
    return subprocess.CompletedProcess(words, one.returncode or 0, *said)
