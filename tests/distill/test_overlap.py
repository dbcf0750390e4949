"""Decoding overlaps the synthesis, is done once for a team, and never waits for another process that waits for us."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_until
from PIL import Image
from rank_processes import in_ranks

from wmdd import pipeline
from wmdd.config.schema import ComputeConfig, Config
from wmdd.data.dataset import ImageSet
from wmdd.data.decoding import decoders
from wmdd.runs.work_queue import WorkQueue
from wmdd.runtime.ranks import ranks
from wmdd.runtime.team import SINGLE

DISTILL = pipeline.Share(("teacher", "distill"))


def test_decoders_begin_with_the_next_group_before_it_is_read(tmp_path: Path) -> None:
    def work(batch: int) -> int:
        (tmp_path / str(batch)).touch()
        return batch

    with decoders(work, 2, ahead=3) as decode:
        assert list(decode(range(3))) == [0, 1, 2]
        following = decode(range(3, 8))
        wait_until(lambda: len(list(tmp_path.iterdir())) == 8, 60)
        third = decode(range(8, 30))
        assert list(following) == [3, 4, 5, 6, 7] and list(third) == list(range(8, 30))
        assert list(decode([])) == [] and list(decode([9])) == [9]


def test_a_process_that_holds_a_group_does_not_wait_for_the_groups_of_others(tmp_path: Path) -> None:
    with ranks(ComputeConfig(device="cpu")) as job:
        queues = [
            WorkQueue(
                "groups", job, SINGLE, range(3), lambda item: tmp_path / str(item), lambda _: False, lambda: False
            )
            for _ in range(3)
        ]
        try:
            held = [queue.next() for queue in queues]  # three runs on one folder
            assert held == [(0, 0), (1, 1), (2, 2)]
            assert [queue.next(wait=False) for queue in queues] == [None] * 3, "all three wait for each other"
            queues[1].release(1)
            assert queues[0].next(wait=False) == (1, 1)
        finally:
            for queue in queues:
                queue.close()


@contextmanager
def decoding_noted(file: Path) -> Iterator[None]:
    """Write process and number of images of each decoding to a file."""
    decode = ImageSet.decode

    def noted(self: ImageSet, indices: object) -> object:
        found = decode(self, indices)  # type: ignore[arg-type]
        with open(file, "a") as notes:
            notes.write(f"{os.getpid()} {len(found)}\n")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSet, "decode", noted)
        yield


def decoded(file: Path) -> Counter[int]:
    """Return the number of images that each process has decoded."""
    found: Counter[int] = Counter()
    for line in file.read_text().splitlines():
        process, images = line.split()
        found[int(process)] += int(images)
    return found


@pytest.fixture
def pictures(tiny: Config, tmp_path: Path) -> Config:
    """Return the config of a run on image files: 3 classes of 9 + 2 small pictures."""
    draw = np.random.default_rng(0)
    for split, number in (("train", 9), ("val", 2)):
        for name in "abc":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for image in range(number):
                pixels = draw.integers(0, 256, (10, 12), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{image}.png")
    source = {"data.source": "folder", "data.root": str(tmp_path / "images"), "data.classes": None}
    return tiny.replace(source | {"student.baselines": (), "compute.workers": 2})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "rded", "wmdd"])
def test_starts_and_selections_are_decoded_by_the_processes_of_the_run(
    pictures: Config, tmp_path: Path, method: str
) -> None:
    pipeline.run(pictures, tmp_path / "first", share=pipeline.Share(("teacher",)))
    changes = {"method": method, "synthesis.start": "real", "statistics.batch_size": 9}
    with decoding_noted(tmp_path / "notes"):
        pipeline.run(pictures.replace(changes), tmp_path / "run", share=DISTILL)
    assert os.getpid() not in decoded(tmp_path / "notes"), "the main process decoded images"
    alone = pictures.replace(changes | {"compute.workers": 0})
    pipeline.run(alone, tmp_path / "alone", share=DISTILL)
    block = "blocks/block-00000.safetensors"
    assert (tmp_path / "run" / block).read_bytes() == (tmp_path / "alone" / block).read_bytes()


@pytest.mark.slow
@pytest.mark.ranks
def test_a_team_that_shares_classes_decodes_each_image_once(pictures: Config, tmp_path: Path) -> None:
    split = pictures.replace({"compute.workers": 0, "synthesis.split_class": 2, "synthesis.start": "noise"})
    pipeline.run(split.replace({"synthesis.split_class": 1}), tmp_path / "first", share=pipeline.Share(("teacher",)))
    with decoding_noted(tmp_path / "notes"):
        in_ranks(2, lambda: pipeline.run(split, tmp_path / "run", share=DISTILL))
    assert sum(decoded(tmp_path / "notes").values()) == 27 and len(decoded(tmp_path / "notes")) == 2
