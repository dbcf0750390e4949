"""Sizes of groups: what is timed, where memory ends, what is suggested, and what that changes."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import nn
from typer.testing import CliRunner

from bench import group_size, timing
from bench.workloads import OWN, Workload, groups_of
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.distill.synthesis.objective import Objective, Target, evaluate
from wmdd.errors import InputError
from wmdd.networks.frozen import FrozenNetwork
from wmdd.records.files import read_records
from wmdd.records.schema import SpeedRecord
from wmdd.report import collect, cost_tables


def test_sizes_double_up_to_the_largest() -> None:
    assert [group_size.sizes(most) for most in (1, 2, 8)] == [[1], [1, 2], [1, 2, 4, 8]]
    assert group_size.sizes(10) == [1, 2, 4, 8, 10]


def test_the_smallest_group_within_five_percent_of_the_best_is_suggested() -> None:
    assert group_size.suggested({1: 60.0, 2: 94.9, 4: 95.0, 8: 100.0, 10: 99.0}) == 4
    assert group_size.suggested({1: 96.0, 2: 100.0}) == 1


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return what the command prints for four classes, and the file of its records."""
    out = tmp_path_factory.mktemp("groups") / "speeds.jsonl"
    keys = [f"--set={key}" for key in [*TINY, "ipc=5", "blocks=3", "synthesis.classes_per_group=1"]]
    asked = ["bench", "groups", "digits", *keys, "--repeats", "2", "--seconds", "0", "--out", str(out)]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout, out


def test_rates_count_the_images_of_each_size(told: tuple[str, Path]) -> None:
    found, _ = read_records(told[1], SpeedRecord)
    assert [(one.setup["classes"], one.setup["batch"]) for one in found] == [(1, 5), (2, 10), (4, 20)]
    for one in found:
        done = one.setup["batch"] * one.metrics["steps"] / one.metrics["seconds"]
        assert one.metrics["rate_low"] <= done * (1 + 1e-9) and done <= one.metrics["rate_high"] * (1 + 1e-9)


def test_all_sizes_do_as_many_steps() -> None:
    seen: Counter[int] = Counter()

    def look(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, FrozenNetwork):
            seen[len(arguments[0])] += 1

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        group_size.run(load_config("digits", TINY), repeats=2, seconds=0.0)
    finally:
        hook.remove()
    assert seen[2] == seen[4] == seen[8] > 2 * 2  # two images of one, two and four classes


def test_the_suggestion_can_be_pasted(told: tuple[str, Path]) -> None:
    found, _ = read_records(told[1], SpeedRecord)
    size = group_size.suggested({one.setup["classes"]: one.metrics["rate"] for one in found})
    line = next(line for line in told[0].splitlines() if line.startswith("Suggestion: "))
    pasted = load_config("digits", [*TINY, "blocks=3", *re.findall(r"--set (\S+)", line)])
    assert {len(group.classes) for group in groups_of(pasted, 4)} == {size}


def test_it_asks_for_no_more_blocks_than_there_are_groups() -> None:
    config = load_config("digits", [*TINY, "blocks=3"])
    lines = group_size.advice(config, Objective(1.0, 10.0, 0.0), {1: 50.0, 2: 100.0, 4: 101.0}, classes=4)
    assert lines[0] == "Suggestion: --set synthesis.classes_per_group=2 --set blocks=2"
    with pytest.raises(InputError, match="blocks <= 2"):
        groups_of(load_config("digits", [*TINY, "blocks=3", "synthesis.classes_per_group=2"]), 4)


def test_a_report_keeps_the_sizes_apart(told: tuple[str, Path]) -> None:
    shown = cost_tables.throughput(collect.collect([told[1]]))
    columns = [[row[shown.columns.index(key)] for row in shown.rows] for key in ("classes", "batch")]
    assert columns == [["1", "2", "4"], ["5", "10", "20"]]


@pytest.mark.slow
def test_each_size_is_compiled_for_itself() -> None:
    config = load_config("digits", [*TINY, "compute.compile=true"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance(force_backend="eager"):  # graphs are traced, and kernels not generated
        group_size.run(config, repeats=1, seconds=0.0)
    torch._dynamo.reset()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # of one, two and four classes


def test_memory_ends_the_search() -> None:
    asked = []

    def work(size: int) -> Workload:
        asked.append(size)

        def run(steps: int, watch: timing.Stopwatch) -> None:
            if size > limit:
                raise torch.OutOfMemoryError
            for _ in range(steps):
                watch()

        device = torch.device("cpu")
        return Workload("synthesis", "img·iter/s", {OWN: run}, float, 10, 1, device, dict, {"batch": size})

    limit = 2
    assert list(group_size.fitting([1, 2, 4, 8], work)) == [1, 2]
    assert asked == [1, 2, 4]  # no larger one is prepared
    limit = 0
    with pytest.raises(InputError, match="split_class"):
        group_size.fitting([1, 2], work)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(1.0, 5.0, 0.0),
        Objective(1.0, 0.0, 0.0, per_class=False),
        Objective(1.0, 5.0, 0.0, per_class=False),
        Objective(1.0, 5.0, 0.0, squared=False),
        Objective(1.0, 5.0, 10.0),
    ],
)
def test_it_says_when_other_classes_of_a_group_pull_at_an_image(classifier: nn.Module, objective: Objective) -> None:
    network = FrozenNetwork(classifier)
    torch.manual_seed(4)
    images = torch.randn(4, 3, 16, 16)
    moments = torch.randn(2 if objective.per_class else 1, sum(network.layer_sizes))
    labels, weights, atoms = torch.tensor([4, 4, 1, 1]), torch.full((2, 2), 0.5), torch.rand(2, 2, 32)

    def gradient(classes: int) -> torch.Tensor:
        """Return that of the first class's two images, in a group of so many classes."""
        count = 2 * classes
        means, variances = moments[:classes], moments[:classes].square()
        target = Target(labels[:count], weights[:classes], means, variances, atoms[:classes])
        pixels = images[:count].clone().requires_grad_(True)
        loss = evaluate(objective, network(pixels), target, network.layer_sizes).total
        return torch.autograd.grad(loss, pixels)[0][:2]

    alone, together = gradient(1), gradient(2)
    pulled = bool((together - alone).norm() > 1e-3 * alone.norm())
    assert pulled == bool(group_size.couplings(objective))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("method=random", "optimizes no images"),
        ("synthesis.split_class=2", "synthesis.split_class=1"),
        ("ipc=1000", "training images; use ipc <="),
    ],
)
def test_refusals(key: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        group_size.run(load_config("digits", [*TINY, key]))


def test_the_largest_group_has_a_class() -> None:
    done = CliRunner().invoke(app, ["bench", "groups", "digits", "--most", "0"])
    assert done.exit_code == 2 and "--most" in done.output
