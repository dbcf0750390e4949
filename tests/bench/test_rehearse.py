"""Rehearsals: the product's queue and agreements, with given group times on a virtual clock."""

import json
from pathlib import Path

import pytest
from conftest import TINY
from rich.console import Console

from bench import rehearse, rehearse_task
from bench.rehearse import GroupTimes
from wmdd.config.loading import load_config
from wmdd.errors import InputError

TEN_GROUPS = [*TINY, "data.classes=10", "synthesis.classes_per_group=1"]


def test_ranks_are_at_work_as_much_as_whole_groups_allow_and_agree_in_three_requests(tmp_path: Path) -> None:
    config, times = load_config("digits", [*TEN_GROUPS, "blocks=10"]), GroupTimes(60, 6)
    found = rehearse.run(config, [1, 3, 16], times)
    assert [(one.groups, one.fewest_groups, one.most_groups) for one in found] == [(10, 10, 10), (10, 3, 4), (10, 0, 1)]
    assert [one.seconds for one in found] == pytest.approx([660, 264, 66])
    assert [one.bound for one in found] == pytest.approx([1, 10 / 12, 10 / 16])
    for one in found:
        assert one.of_bound >= 0.97
        assert 0 < one.agreement_requests <= 3
        assert one.queue_requests <= 1 + 2 * one.ranks / one.groups, "more than a ticket for each group and rank"
    told = Console(record=True, width=120)
    rehearse.tell(found, times, None, tmp_path / "out.json", told)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["given"]["synthesis"] == 60 and written["rehearsals"][1]["of_bound"] == found[1].of_bound
    assert "0.833" in told.export_text()


def test_a_slow_rank_gets_fewer_groups() -> None:
    (found,) = rehearse.run(load_config("digits", TEN_GROUPS), [2], GroupTimes(60, 0, slow=4))
    # The slow rank claims its third group with the second one, when three of the others are left.
    assert (found.fewest_groups, found.most_groups) == (3, 7)
    assert found.seconds == pytest.approx(3 * 240)


def test_the_bound_counts_whole_groups() -> None:
    assert rehearse.fewest_seconds([1.0] * 10, 4, 4) == 3
    assert rehearse.fewest_seconds([5.0, 1.0, 1.0], 2, 2) == 5
    assert rehearse.fewest_seconds([3.0, 3.0, 2.0], 2, 2) == 5, "one team must do the last two"
    assert rehearse.fewest_seconds([1.0] * 10, 2, 1.25) == 8


def test_ranks_that_teams_do_not_fill_are_refused() -> None:
    with pytest.raises(InputError, match=r"--ranks 3: synthesis\.split_class = 2 does not divide it"):
        rehearse.run(load_config("digits", [*TEN_GROUPS, "synthesis.split_class=2"]), [3], GroupTimes(1, 0))


@pytest.mark.slow
def test_one_of_hundreds_of_student_tasks_opens_each_block_once_and_few_other_files() -> None:
    config = load_config("digits", [*TEN_GROUPS, "blocks=10", "student.seeds=100"])
    cost = rehearse_task.run(config)
    assert (cost.blocks, cost.students >= 100, cost.block_opens, cost.sidecar_opens) == (10, True, 1, 1)
    assert 0 < cost.other_files <= 50
    assert 0 < cost.peak_gb < 2
