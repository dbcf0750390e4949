"""Small sweeps: four digits at 8 px, trials of about a second."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY

from sweeps.run import Sweep, resolve

SMALL = [*TINY, "student.baselines=[]", "labels.regimes=['soft']", "synthesis.iterations=8", "student.epochs=4"]
BUDGET = {"student_seeds": 2, "iterations": 1.0, "student_epochs": 1.0}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Sweep]:
    """Return a function that resolves a sweep over a space written as TOML, or a shipped one."""

    def resolved(space: str, overrides: tuple[str, ...] = (), **options: object) -> Sweep:
        if "=" in space:
            path = tmp_path / "space.toml"
            path.write_text(space)
            space = str(path)
        chosen = {"objective": "top1", "kind": "random", "scheduler": "none", "seed": 0, "budget": BUDGET, **options}
        return resolve("digits", [*SMALL, *overrides], space, **chosen)  # type: ignore[arg-type]

    return resolved


@pytest.fixture
def home() -> Iterator[Path]:
    """Return an empty folder with a short name for HOME and TMPDIR: all that Ray could leave lies there."""
    folder = Path(tempfile.mkdtemp(prefix="sw", dir="/tmp"))
    (folder / "tmp").mkdir()
    (folder / "home").mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(home: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts ``wmdd sweep run digits`` in a process group of its own."""

    def started(space: str, out: Path, *options: str) -> subprocess.Popen[str]:
        settings = [part for override in SMALL for part in ("--set", override)]
        budget = [part for key, value in BUDGET.items() for part in ("--budget", f"{key}={value}")]
        command = [sys.executable, "-m", "wmdd", "sweep", "run", "digits", "--space", space, "--out", str(out)]
        return subprocess.Popen(
            [*command, *settings, *budget, *options],
            env={**os.environ, "HOME": str(home / "home"), "TMPDIR": str(home / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return started
