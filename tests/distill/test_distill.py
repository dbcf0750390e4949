"""Group after group: the next one is measured ahead, its barycenters are computed beside, and a stop loses nothing."""

import multiprocessing
import signal
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import blocks_of

from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.data.dataset import load_dataset
from wmdd.errors import Interrupted, WmddError
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime.progress_bars import observed_by
from wmdd.storage.files import read_metadata, write_tensors

DISTIL = pipeline.Share(("teacher", "distill"))


def with_workers(config: Config, workers: int) -> Config:
    """Return the run with 4 classes in 4 groups, and so many processes."""
    compute = config.compute.model_copy(update={"workers": workers})
    synthesis = config.synthesis.model_copy(update={"classes_per_group": 1})
    return config.model_copy(update={"compute": compute, "synthesis": synthesis})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wmdd", "medoids"])
def test_processes_change_no_byte(tiny: Config, tmp_path: Path, method: str) -> None:
    tiny = tiny.model_copy(update={"method": method})
    for workers in (0, 2):
        pipeline.run(with_workers(tiny, workers), tmp_path / str(workers), share=DISTIL)
    assert len({DistilledSet.load(tmp_path / name).sha256 for name in "02"}) == 1
    first, second = (RunFolder(tmp_path / name).sidecar(0) for name in "02")
    assert first and second and first["w2"] == second["w2"] and len(first["w2"]) == 4


def test_a_group_is_synthesised_once_the_next_is_measured_and_no_other(tiny: Config, tmp_path: Path) -> None:
    measured = 0
    at_start: list[int] = []

    def watch(title: str, steps: int, total: int, unit: str) -> None:
        nonlocal measured
        if title.startswith("statistics"):
            measured = steps
        if unit == "iterations" and steps % tiny.synthesis.iterations == 1:
            at_start.append(measured)

    with observed_by(watch):
        pipeline.run(with_workers(tiny, 0), tmp_path / "run", share=DISTIL)
    train = load_dataset(tiny.data).train
    through = list(accumulate(len(train.of_class(index)) for index in range(4)))
    assert at_start == [*through[1:], through[-1]]


@pytest.mark.slow
def test_barycenters_have_processes_of_their_own_until_the_run_ends(tiny: Config, tmp_path: Path) -> None:
    running: set[int] = set()

    def watch(title: str, steps: int, total: int, unit: str) -> None:
        if unit == "iterations" and 0 < steps < total:
            running.add(len(multiprocessing.active_children()))

    for workers in (0, 2):  # the second run reads the statistics of the first: nothing is decoded
        running.clear()
        with observed_by(watch):
            pipeline.run(with_workers(tiny, workers), tmp_path / str(workers), share=DISTIL)
        assert running == {workers}
        assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_stop_between_groups_is_resumed_to_the_same_bytes(tiny: Config, tmp_path: Path) -> None:
    config, folder = with_workers(tiny, 2), RunFolder(tmp_path / "run")
    pipeline.run(config, tmp_path / "whole", share=DISTIL)

    def stop_after_one(title: str, steps: int, total: int, unit: str) -> None:
        if unit == "iterations" and steps == tiny.synthesis.iterations:
            signal.raise_signal(signal.SIGUSR2)

    with observed_by(stop_after_one), pytest.raises(Interrupted, match="stopped before piece 2 of 4"):
        pipeline.run(config, folder.path, share=DISTIL)
    assert [folder.group_file(index).exists() for index in range(4)] == [True, False, False, False]
    assert not multiprocessing.active_children()

    wanted: dict[str, int] = {}
    with observed_by(lambda title, steps, total, unit: wanted.update({title: total})):
        pipeline.run(config, folder.path, share=DISTIL)
    train = load_dataset(tiny.data).train
    assert wanted["statistics"] == sum(len(train.of_class(index)) for index in (1, 2, 3))
    assert blocks_of(folder.path) == blocks_of(tmp_path / "whole")


def test_only_a_file_that_is_absent_or_damaged_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert read_metadata(path) == {}
    write_tensors(path, {"one": torch.ones(3)}, {"made": "whole"})
    assert read_metadata(path) == {"made": "whole"}
    path.write_bytes(path.read_bytes()[:-2])
    assert read_metadata(path) == {}
    for make in (lambda: path.symlink_to(path), path.mkdir):
        path.unlink()
        make()
        with pytest.raises(WmddError, match=r"x\.safetensors: cannot be read"):
            read_metadata(path)
