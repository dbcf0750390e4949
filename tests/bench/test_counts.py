"""Counts of steps on tensors without values: they equal those of real tensors, and of arithmetic by hand."""

import pytest
import torch
from conftest import TINY
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from bench.dry_steps import DryStep, dry_steps, synthesis_step
from bench.op_counter import OpCounter, OpCounts, steps_of
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.errors import InputError
from wmdd.networks.frozen import FrozenNetwork
from wmdd.teacher.train import create_network


def counted(work: object) -> OpCounts:
    (found,), _ = steps_of(lambda advance: (work(), advance(1)), 1)  # type: ignore[operator]
    return found


def test_an_operation_counts_its_inputs_and_outputs_once() -> None:
    rows, weights = torch.ones(10, 20), torch.ones(30, 20)
    assert counted(lambda: functional.linear(rows, weights)) == OpCounts(1, 4 * (200 + 600 + 300), 2 * 10 * 20 * 30)
    assert counted(lambda: rows * rows) == OpCounts(1, 4 * (200 + 200), 0)
    assert counted(lambda: rows.mul_(2)) == OpCounts(1, 4 * (200 + 200), 0)
    assert counted(lambda: rows.zero_()) == OpCounts(1, 4 * 200, 0)
    assert counted(lambda: rows + torch.zeros(1, 1).expand(10, 20)) == OpCounts(2, 4 + 4 * (200 + 1 + 200), 0)


def test_views_and_allocations_are_no_kernels() -> None:
    values = torch.ones(10, 20)
    assert counted(lambda: (values.t()[2:].unsqueeze(0), values.detach(), torch.empty(5))) == OpCounts()


def test_inference_mode_counts_the_same_kernels() -> None:
    layer, images = nn.Conv2d(3, 4, 3), torch.ones(2, 3, 8, 8)
    with torch.inference_mode():
        found = counted(lambda: layer(images).flatten(1))
    assert found == counted(lambda: layer(images).flatten(1))
    assert found.flops == 2 * 2 * 4 * 36 * 27


def test_memory_is_counted_until_it_is_freed() -> None:
    with OpCounter() as counter:
        first = torch.ones(100)
        view, second = first[50:], torch.ones(50)
        del first
        assert counter.live == 600
        del view, second
        assert (counter.live, counter.peak) == (0, 600)


@pytest.fixture(scope="module")
def steps() -> dict[str, DryStep]:
    config = load_config("digits", [*TINY, "compute.precision=bf16"])
    return {step.stage: step for step in dry_steps(config, 10)}


@pytest.mark.slow
def test_every_stage_has_a_step_without_a_data_set(steps: dict[str, DryStep]) -> None:
    assert set(steps) == {"statistics", "synthesis", "students", "teacher"}
    for step in steps.values():
        assert step.counts.kernels > 10 and step.counts.bytes > 1000 and step.counts.flops > 1000
        assert step.peak > step.counts.bytes / step.counts.kernels


def test_a_dry_step_counts_what_a_real_network_does(steps: dict[str, DryStep]) -> None:
    config = load_config("digits", [*TINY])
    network = FrozenNetwork(create_network(config, 10))
    images = torch.rand(config.statistics.batch_size, config.data.channels, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        real = counted(lambda: network(images.contiguous(memory_format=torch.channels_last)))
    # The step also converts and normalizes the pixels, and joins the batches of a class.
    assert real.flops == steps["statistics"].counts.flops
    assert 0 < steps["statistics"].counts.kernels - real.kernels < 15


@pytest.mark.slow  # a ResNet-18 has thousands of operations, and no smaller network has its share of moments
def test_an_iteration_of_the_synthesis_stays_lean() -> None:
    step = synthesis_step(load_config("imagenet-1k"), 1000, 10, 10)
    assert step.counts.kernels <= 300
    assert step.counts.bytes / step.images <= 135e6
    assert step.counts.flops / step.images == pytest.approx(7.53e9, rel=0.01)


@pytest.mark.slow
def test_the_command_counts_without_images() -> None:
    settings = [part for key in TINY for part in ("--set", key)]
    told = CliRunner().invoke(app, ["bench", "throughput", "digits", "--count", *settings])
    assert told.exit_code == 0, told.output
    assert "synthesis" in told.output and "GFLOP/image" in told.output
    refused = CliRunner().invoke(app, ["bench", "throughput", "digits", "--count", "--out", "x"])
    assert isinstance(refused.exception, InputError) and "--count times nothing" in str(refused.exception)
