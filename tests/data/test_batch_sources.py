"""Images that are held, read from shards or decoded ahead give the same batches, hence the same teacher."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from rank_processes import in_ranks

from wmdd.config.loading import load_config
from wmdd.config.schema import ComputeConfig, Config
from wmdd.data.batch_sources import batch_source
from wmdd.data.dataset import load_dataset
from wmdd.data.pack import pack
from wmdd.errors import Interrupted
from wmdd.networks.accuracy import Validation
from wmdd.runtime.cpus import ranks_on_node
from wmdd.runtime.ranks import ranks
from wmdd.teacher import obtain


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four classes of 9 + 2 small pictures, two of them not decodable."""
    draw = np.random.default_rng(0)
    for split, number in (("train", 9), ("val", 2)):
        for name in "abcd":
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for image in range(number):
                Image.fromarray(draw.integers(0, 256, (12, 10), dtype=np.uint8)).save(folder / f"{image}.png")
    for name in ("a/4", "d/0"):
        (tmp_path / "tree" / "train" / f"{name}.png").write_bytes(b"no picture")
    return tmp_path / "tree"


def wanted(tree: Path, *options: str) -> Config:
    """Return the config of a teacher on these images."""
    folder = ("data.source=folder", f"data.root={tree}", "data.on_error=skip", "data.holdout_per_class=2")
    training = ("data.classes=['a', 'c', 'd']", "teacher.batch_size=7", "compute.workers=0")
    return load_config("digits", [*TINY, *folder, *training, *options])


@pytest.fixture
def packed(tree: Path, tmp_path: Path) -> str:
    """Pack the pictures, one or two classes a shard."""
    pack(wanted(tree).replace({"data.classes": None}).data, tmp_path / "packed", workers=0, shard_bytes=64 * 25)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    return f"data.packed={tmp_path / 'packed'}"


def taught(store: Path, config: Config, stop: Callable[[], bool] = lambda: False) -> str:
    """Return the SHA-256 of the teacher that is trained with an empty cache."""
    with pytest.MonkeyPatch.context() as patch, ranks(ComputeConfig(device="cpu")) as job:
        patch.setenv("WMDD_CACHE", str(store))
        dataset = load_dataset(config.data, 0)
        validation = Validation(config, dataset, job)
        return obtain.get_or_train_teacher(config, dataset, validation, job, stop).sha256


@pytest.mark.slow
def test_a_teacher_on_held_packed_or_streamed_images_has_the_same_bytes(
    tree: Path, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = taught(tmp_path / "held", wanted(tree))
    monkeypatch.setattr("wmdd.teacher.train.decode_all", None)  # no whole set is decoded from here on
    few = "data.memory_gb=0"
    assert taught(tmp_path / "packed-store", wanted(tree, few, packed)) == whole
    assert taught(tmp_path / "streamed", wanted(tree, few)) == whole
    assert taught(tmp_path / "decoders", wanted(tree, few, "compute.workers=2")) == whole
    for name, options in (("a", (few, packed)), ("b", (few, "compute.workers=2"))):
        updates = count()
        with pytest.raises(Interrupted, match="checkpointed after 2 of"):
            taught(tmp_path / name, wanted(tree, *options), lambda updates=updates: next(updates) == 3)
        assert taught(tmp_path / name, wanted(tree, *options)) == whole, "the stop changed the teacher"


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_that_share_a_teacher_read_the_same_batches_from_shards(tree: Path, packed: str, tmp_path: Path) -> None:
    def both(name: str, *options: str) -> list[str]:
        return in_ranks(2, lambda: taught(tmp_path / name, wanted(tree, "teacher.ranks=2", *options)))

    assert both("held") == both("packed-store", packed, "data.memory_gb=0") == both("streamed", "data.memory_gb=0")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_packed", [False, True])
def test_batches_come_in_their_order_and_epoch_after_epoch(
    tree: Path, packed: str, workers: int, is_packed: bool
) -> None:
    config = wanted(tree, f"compute.workers={workers}", *([packed] if is_packed else []))
    images = load_dataset(config.data).train
    with batch_source(images, config, torch.device("cpu")) as fetch:
        for epoch in range(3):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
            rows = [slice(start + 1, start + 8, 2) for start in range(0, len(images), 7)]
            for own, batch in zip(rows, fetch(order, rows), strict=True):
                assert torch.equal(batch, images.decode(order[own].tolist()))


@pytest.mark.parametrize(
    ("environment", "ranks_there"),
    [
        ({}, 1),
        ({"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "20", "SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "1"}, 1),
    ],
)
def test_the_ranks_of_a_node_are_known_from_the_launcher(environment: dict[str, Any], ranks_there: int) -> None:
    assert ranks_on_node(environment) == ranks_there
