"""Shared by all tests: a store of their own, a small trained teacher, a run of seconds."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.networks import create

T = TypeVar("T")

TINY = [
    "ipc=2",
    "data.resolution=8",
    "data.classes=4",
    "compute.threads=1",
    "teacher.network=convnet2x8",
    "teacher.epochs=2",
    "synthesis.iterations=6",
    "student.networks=['convnet2x8']",
    "student.epochs=2",
    "student.seeds=2",
    "student.baseline_sets=1",
]
"""Overrides that make a run on digits last about a second."""
UNREPORTED = pipeline.Share(("teacher", "distill", "students"))
"""All of a run except the report, which draws plots for as long as a tiny run trains its students."""


def needs(program: str | None, name: str, absence: str) -> pytest.MarkDecorator:
    """Return the mark of tests that need a program: skipped without it, or an error where WMDD_REQUIRE_NAME=1 asks."""
    if program is None and os.environ.get(f"WMDD_REQUIRE_{name}") == "1":
        pytest.fail(f"WMDD_REQUIRE_{name}=1, but {absence}", pytrace=False)
    return pytest.mark.skipif(program is None, reason=absence)


WORKERS, FAST_WORKERS = 4, 2
"""Test processes of a run of the whole suite, of which slow tests wait half of the time, and of one without them."""
SHARED = {"booted": "slurm", "accounting": "slurm", "start": "ray"}
"""Fixtures that start a cluster, and the marker of the tests that use them."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the suite in parallel where pytest-xdist is installed; run named files or folders in one process."""
    option = config.option
    if hasattr(config, "workerinput"):
        option.loadgroup = True  # pytest-xdist tells its workers only what stands on the command line
    elif hasattr(option, "numprocesses") and not option.usepdb:
        # pytest-cov has chosen by now how to collect from workers: with --cov, ask for them yourself (-n 4).
        alone = getattr(option, "cov_source", None) or config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        if option.numprocesses is None and not alone:
            option.numprocesses = FAST_WORKERS if "not slow" in option.markexpr else WORKERS
        if option.numprocesses and option.dist == "no":
            option.dist, option.loadscopereorder = "loadgroup", False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use a cluster, and say which tests share a worker.

    The tests of a cluster share a worker, so that the cluster starts once.  So do the fast tests of a file, because of
    the file's fixtures.  A slow test of no group goes to the next worker that is free; slow tests begin first.
    """
    ranked = {}
    for item in items:
        cluster = next((name for name in SHARED if name in getattr(item, "fixturenames", ())), None)
        if cluster:
            item.add_marker(SHARED[cluster])
            item.add_marker("slow")
        slow = item.get_closest_marker("slow") is not None
        if item.get_closest_marker("xdist_group") is None and (cluster or not slow):
            item.add_marker(pytest.mark.xdist_group(cluster or str(item.path.relative_to(config.rootpath))))
        ranked[item] = (*SHARED, None).index(cluster), not slow
    if getattr(config, "workerinput", None):
        items.sort(key=ranked.__getitem__)


@pytest.fixture(autouse=True, scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests store and compile out of the user's caches, and share it between the tests of a worker."""
    patch = pytest.MonkeyPatch()
    patch.setenv("WMDD_CACHE", str(tmp_path_factory.mktemp("store")))
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes that compile would import torch again
    torch.set_num_threads(1)
    # The first backward pass of a process decides whether autograd starts threads.  After a compilation it would, and
    # the ranks that tests fork could compute no gradients.
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Return the messages that are logged from here on."""
    lines: list[str] = []

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Said(), logging.getLogger("wmdd")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


@pytest.fixture
def tiny() -> Config:
    """Return the config of a run of about a second: 4 digits, 2 images each."""
    return load_config("digits", TINY)


@pytest.fixture
def classifier() -> torch.nn.Module:
    """Return a ConvNet of 5 classes for 3-channel images of 16 px whose BatchNorm layers are not trivial."""
    torch.manual_seed(0)
    network = create.create("convnet3x8", 5, 3, 16)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, std=0.3)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.2)
    return network


def blocks_of(run: Path) -> dict[str, bytes]:
    """Return the images of each class of a run, however its blocks are cut."""
    from wmdd.runs.distilled_set import DistilledSet

    found = DistilledSet.load(run)
    return {name: found.images[found.labels == index].numpy().tobytes() for index, name in enumerate(found.classes)}


def members(session: int) -> list[int]:
    """Return the living processes of a session, such as those of a program begun with ``start_new_session``."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = place.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(own) == session and state != "Z":
            found.append(int(place.parent.name))
    return found


def wait_until(condition: Callable[[], T], seconds: float = 120) -> T:
    """Return the first true value of a condition.

    Raises:
        AssertionError: it was false for so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found
