"""The guide's table "When something goes wrong": each row names what a test here shows on a real cluster."""

import importlib
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "slurm.md"

SHOWN_BY = {
    "time limit": (
        "test_graph",
        "test_a_time_limit_requeues_a_task_in_a_container_and_a_cancelled_one_does_not_come_back",
    ),
    "preemption, `scontrol requeue`": (
        "test_graph",
        "test_a_task_that_loses_its_node_and_is_requeued_goes_on_from_its_checkpoints",
    ),
    "a node dies": ("test_graph", "test_a_task_that_loses_its_node_and_is_requeued_goes_on_from_its_checkpoints"),
    "a task is killed, runs out of memory or fails": (
        "test_graph",
        "test_a_killed_task_one_that_fails_twice_and_a_bad_node_cost_starts_and_no_block",
    ),
    "a node fails the device check": (
        "test_graph",
        "test_a_killed_task_one_that_fails_twice_and_a_bad_node_cost_starts_and_no_block",
    ),
    "wrong input": ("test_refusals", "test_wrong_input_is_not_tried_again_and_status_says_what_is_wrong"),
    "a task is stopped three times at the same point": (
        "test_task",
        "test_three_stops_at_the_same_point_end_a_task_and_a_hundred_with_progress_do_not",
    ),
    "no retries are left": (
        "test_graph",
        "test_what_is_lost_for_good_is_reported_and_the_command_that_status_prints_sends_only_that",
    ),
    "`wmdd slurm cancel`": (
        "test_graph",
        "test_a_time_limit_requeues_a_task_in_a_container_and_a_cancelled_one_does_not_come_back",
    ),
    "sbatch refuses an array": ("test_refusals", "test_a_queue_that_takes_no_more_is_one_line"),
    "SLURM cannot launch a task, and holds it": (
        "test_refusals",
        "test_a_task_that_slurm_holds_is_named_with_the_command_that_releases_it",
    ),
    "nodes are down or drained": ("test_refusals", "test_nodes_that_are_away_today_refuse_nothing"),
}
"""Module and name of the test of each row"""


def test_every_row_of_the_guide_has_a_test() -> None:
    table = GUIDE.read_text().split("## When something goes wrong")[1].split("\n\n")[1]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]

    assert rows == list(SHOWN_BY)
    for module, name in SHOWN_BY.values():
        assert callable(getattr(importlib.import_module(f".{module}", __package__), name, None)), f"{module}.{name}"
