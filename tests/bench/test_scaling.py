"""Scaling studies: the work that each size gets, efficiency, the images of all sizes, refusals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY
from rich.console import Console

from bench import scaling, scaling_worker
from bench.scaling import Point, Size
from wmdd.config.loading import load_config
from wmdd.errors import InputError, WmddError
from wmdd.launchers import Local, last_words
from wmdd.records.files import read_records
from wmdd.records.schema import SpeedRecord
from wmdd.storage.files import write_json

ONE_CLASS = [*TINY, "synthesis.classes_per_group=1"]


class Here(Local):
    """Does a job of one rank in this process, which saves the start of another."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []

    def job(self, ranks: int, module: str, arguments: Sequence[str]) -> None:
        self.begun.append(ranks)
        config, place, _, groups = arguments
        if ranks == 1:
            scaling_worker.main(config, Path(place), int(groups))
        else:
            super().job(ranks, module, arguments)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_study_over_real_ranks(tmp_path: Path) -> None:
    config, out = load_config("digits", ONE_CLASS), tmp_path / "scaling.jsonl"
    told = Console(record=True, width=120)
    launcher = Here()
    scaling.tell(scaling.run(config, [2, 1], ["strong"], 1, launcher, tmp_path / "study"), out, told)
    assert launcher.begun == [2, 1], "the largest size is not the first"
    found, problems = read_records(out, SpeedRecord)
    assert not problems
    assert [(record.kind, record.mode, record.ranks) for record in found] == [("scaling", "strong", n) for n in (1, 2)]
    for record in found:
        metrics = record.metrics
        # Four classes, two images each, six iterations.
        assert metrics["rate"] * metrics["seconds"] == pytest.approx(4 * 2 * 6)
        assert metrics["total"] >= metrics["startup"] + metrics["statistics"] + metrics["synthesis"]
        assert 0 <= metrics["waiting"] <= metrics["synthesis"]
        assert record.setup["threads"] == 1
        assert metrics["startup"] > 0.5, "imports do not count"
        assert metrics["total_decoded"] == pytest.approx(metrics["total"] - metrics["statistics"] + metrics["decoded"])
        assert record.provenance["precision"] == "fp32"
        assert metrics["same_images"] == 1
    assert found[0].metrics["efficiency"] == 1
    expected = found[1].metrics["rate"] / 2 / found[0].metrics["rate"]
    assert found[1].metrics["efficiency"] == pytest.approx(expected)
    assert found[1].provenance["world_size"] == 2, "not the circumstances of the ranks"
    assert "Images: the same" in told.export_text()
    again = Here()
    (tmp_path / "study" / "strong-1-0" / "rank-00000.json").unlink()
    scaling.run(config, [2, 1], ["strong"], 1, again, tmp_path / "study")
    assert again.begun == [1], "a finished step ran again, or an unfinished one did not"
    with pytest.raises(InputError, match="holds a scaling study of another config"):
        scaling.run(config.replace({"ipc": 1}), [1], ["strong"], 1, again, tmp_path / "study")


def test_strong_studies_share_all_groups_and_weak_ones_give_each_rank_as_many() -> None:
    assert scaling.sizes([4, 1, 2], 9, "strong") == [Size(1, 9), Size(2, 9), Size(4, 9)]
    assert scaling.sizes([1, 2, 4], 9, "weak") == [Size(1, 2), Size(2, 4), Size(4, 8)]
    assert scaling.sizes([2, 4], 4, "weak", team=2) == [Size(2, 2), Size(4, 4)]


def test_the_bound_is_that_of_the_rank_with_most_groups() -> None:
    assert Size(2, 5).balance == pytest.approx(5 / 6)
    assert Size(4, 8).balance == 1


def point(seconds: float, images: dict[str, str] | None = None) -> Point:
    phases = {name: 0.0 for name in scaling.PHASES} | {"synthesis": seconds, "waiting": 0.0}
    return Point(100, phases, images or {}, "fp32", "cpu", {})


def test_efficiency_is_of_pairs_of_repeats() -> None:
    one, two = [point(8.0), point(16.0)], [point(4.0), point(10.0)]
    told = scaling.efficiency(two, 2, one, 1)
    assert (told["efficiency_low"], told["efficiency_high"]) == (0.8, 1.0)
    weak = replace(two[0], work=200)  # twice the work in the same time
    assert scaling.efficiency([weak], 2, [point(4.0)], 1)["efficiency"] == 1


def test_images_that_differ_are_noticed() -> None:
    assert scaling.same_images([{"0": "a", "1": "b"}, {"0": "a"}])
    assert not scaling.same_images([{"0": "a", "1": "b"}, {"1": "c"}])


def test_the_slowest_rank_counts_and_every_rank_must_have_written(tmp_path: Path) -> None:
    rank = {name: 1.0 for name in scaling.PHASES} | {"own": 1.0, "precision": "fp32", "device": "cpu"}
    rank |= {"decoded": 1.0, "provenance": {}}
    write_json(tmp_path / "rank-00000.json", {**rank, "images": {"0": "a"}})
    with pytest.raises(WmddError, match="rank-00001"):
        scaling.collect(tmp_path, Size(2, 2), 10)
    write_json(tmp_path / "rank-00001.json", {**rank, "synthesis": 5.0, "own": 5.0, "images": {"1": "b"}})
    told = scaling.collect(tmp_path, Size(2, 2), 10)
    assert told.rate == 2 and told.images == {"0": "a", "1": "b"}


def test_the_last_words_of_a_job_are_those_of_the_rank_that_failed() -> None:
    assert last_words("noise\nwmdd: no teacher\nTraceback\nsigterm") == "no teacher"
    assert last_words("noise\nKilled\n") == "Killed"
    assert last_words("") == "it printed nothing"


def test_refusals() -> None:
    config = load_config("digits", ONE_CLASS)
    with pytest.raises(InputError, match="4 groups, so 4 ranks would have none"):
        scaling.run(config, [8], ["strong"])
    with pytest.raises(InputError, match="optimizes no images"):
        scaling.run(load_config("digits", [*TINY, "method=random"]), [1], ["strong"])
    with pytest.raises(InputError, match=r"synthesis\.split_class = \d+ does not divide it"):
        scaling.sizes([3], 4, "strong", team=2)
    for text in ("", "0", "1,x"):
        with pytest.raises(InputError, match="expected numbers from 1"):
            scaling.numbers_of(text)
    assert scaling.modes_of("both") == ("strong", "weak")
    with pytest.raises(InputError, match="expected strong, weak or both"):
        scaling.modes_of("all")
