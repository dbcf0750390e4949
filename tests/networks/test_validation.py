"""Validation images are decoded once for a node: in memory, from shards, or in one mapped file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import in_ranks

from wmdd.config.schema import ComputeConfig, Config
from wmdd.data.dataset import load_dataset
from wmdd.data.pack import pack
from wmdd.errors import Interrupted
from wmdd.networks import accuracy, create
from wmdd.networks.accuracy import Validation
from wmdd.runtime.ranks import ranks


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "cache"))


def judged(config: Config, **changes: Any) -> tuple[dict[str, float], list[bool], bool]:
    """Return the accuracy of an untrained network, and whether its images come from a file of the cache."""
    dataset = load_dataset(config.data)
    torch.manual_seed(0)
    network = create.create("convnet2x8", 4, 1, 8).eval()
    with ranks(ComputeConfig(device="cpu")) as job:
        validation = Validation(config, dataset, job, **changes)
        found = validation(network, job.team(job.size, "student.ranks"))
    return found.metrics, list(found.correct), "images.safetensors" in Path("/proc/self/maps").read_text()


def test_held_mapped_and_packed_images_give_the_same_accuracy(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, correct, from_file = judged(tiny)
    assert not from_file and not (tmp_path / "cache" / "images").exists()
    little = tiny.replace({"data.memory_gb": 0})
    assert judged(little) == (metrics, correct, True)
    monkeypatch.setattr(accuracy, "decoded_in_order", None)  # the file of the cache is used again
    assert judged(little) == (metrics, correct, True)
    pack(tiny.data, tmp_path / "packed", 0)
    packed = little.replace({"data.packed": str(tmp_path / "packed")})
    monkeypatch.setattr(Validation, "_mapped", None)
    assert judged(packed)[:2] == (metrics, correct)


def test_a_stop_leaves_no_part_of_the_file(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped while decoding the test images"):
        judged(tiny.replace({"data.memory_gb": 0}), stop=lambda: True)
    assert [path.name for path in (tmp_path / "cache" / "images").rglob("*") if path.is_file()] == [".lock"]


@pytest.mark.slow
@pytest.mark.ranks
def test_the_ranks_of_a_node_map_one_file_that_one_of_them_has_written(tiny: Config, tmp_path: Path) -> None:
    alone = judged(tiny)[:2]

    def work() -> tuple[Any, int]:
        decoded = []
        in_order = accuracy.decoded_in_order

        def noted(*arguments: Any) -> Any:
            decoded.append(1)
            return in_order(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accuracy, "decoded_in_order", noted)
            return judged(tiny), len(decoded)

    found = in_ranks(3, work)
    assert [from_file for (_, _, from_file), _ in found] == [True] * 3
    assert sum(number for _, number in found) == 1, "the images were decoded more than once"
    for (metrics, correct, _), _ in found:
        assert correct == alone[1] and metrics == pytest.approx(alone[0])
