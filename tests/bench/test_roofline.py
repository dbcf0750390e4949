"""Predictions without hardware: memory, bounds of time, and what fits, on numbers that are computed by hand."""

from pathlib import Path

import pytest
from conftest import TINY
from rich.console import Console
from torch import nn

from bench import projection, roofline
from bench.dry_steps import DryStep, synthesis_step, teacher_step
from bench.op_counter import OpCounts
from bench.roofline import CONTEXT_BYTES, LAUNCH_SECONDS, USABLE, Gpu, Plan
from wmdd.config.loading import load_config
from wmdd.errors import InputError
from wmdd.networks import create

GPU = Gpu("toy", {"fp32": 1e12, "memory": 1e11}, 10e9)


def test_a_roofline_is_the_longest_of_three_times() -> None:
    for counts, seconds, name in (
        (OpCounts(10, 10**9, 2 * 10**12), 2.0, "compute"),
        (OpCounts(10, 3 * 10**11, 2 * 10**12), 3.0, "memory"),
        (OpCounts(10**6, 10**9, 10**9), 10**6 * LAUNCH_SECONDS, "launch"),
    ):
        found = roofline.roofline(counts, GPU, "fp32")
        assert (found.seconds, found.bound_by) == (pytest.approx(seconds), name)
    with pytest.raises(InputError, match="the toy has no such products"):
        roofline.roofline(OpCounts(), GPU, "bf16")


def test_what_fits_follows_from_a_line_through_two_peaks() -> None:
    found = roofline.fit(lambda size: 10**9 + size * 2 * 10**8, 3, GPU)
    assert (found.fixed, found.each) == (1e9, 2e8)
    assert found.most == int((USABLE * (10e9 - CONTEXT_BYTES) - 1e9) / 2e8)
    assert roofline.fit(lambda size: 10**12 + size, 3, GPU).most == 0


@pytest.mark.parametrize("name", list(roofline.GPUS))
def test_every_gpu_has_its_data_sheet(name: str) -> None:
    gpu = roofline.gpu_of(name)
    assert gpu.peaks["bf16"] > gpu.peaks["tf32"] >= gpu.peaks["fp32"] > gpu.peaks["memory"] > 1e11
    assert 20e9 < gpu.usable < gpu.memory
    with pytest.raises(InputError, match="no data sheet of 'H10'"):
        roofline.gpu_of("H10")


def test_the_peak_of_a_small_teacher_is_the_sum_of_its_parts() -> None:
    config = load_config("digits", [*TINY, "compute.precision=fp32", "teacher.optimizer=adamw"])
    step = teacher_step(config, 10)
    data = config.data
    network: nn.Module = create.create(config.teacher.network, 10, data.channels, data.resolution)
    weights = sum(4 * weight.numel() for weight in network.parameters())
    images = step.images * data.channels * data.resolution**2
    # At the end of the backward pass: weights, gradients, two moments of AdamW, and the images as uint8 and fp32.
    assert step.peak > 4 * weights + images * (1 + 4)
    # In the forward pass: every layer keeps its input for the backward pass, and one more tensor is being made.
    widths = [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    maps = [4 * step.images * width * (data.resolution >> depth) ** 2 for depth, width in enumerate(widths)]
    kept = sum(maps) * 2 + sum(maps) / 4  # outputs of convolution and of BatchNorm, in place of ReLU's, and of pooling
    assert step.peak < 4 * weights + images * 17 + kept + 3 * maps[0] + 50_000


@pytest.mark.slow
def test_the_peak_of_a_group_is_a_line_in_its_classes() -> None:
    config = load_config("digits", [*TINY, "compute.precision=bf16"])
    peaks = [synthesis_step(config, 10, size, 2).peak for size in (2, 4, 6)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.02) and peaks[1] > peaks[0]


def test_a_missing_measurement_is_replaced_by_a_roofline_that_says_so() -> None:
    config = load_config("digits", [*TINY, "compute.precision=fp32", "student.baselines=[]"])
    steps = [
        DryStep("statistics", config.teacher.network, 30, OpCounts(0, 0, 3 * 10**12), 1),
        DryStep("synthesis", config.teacher.network, 4, OpCounts(0, 0, 10**12), 1),
        DryStep("students", config.student.networks[0], 4, OpCounts(0, 0, 2 * 10**12), 1),
    ]
    plan = Plan(GPU, "fp32", steps, None, {})
    parts, notes = projection.run(config, 1, [], Path("none.jsonl"), plan)
    rates = {part.record.stage: part.record.metrics["rate"] for part in parts}
    assert rates["statistics"] == pytest.approx(10.0) and rates["synthesis"] == pytest.approx(4.0)
    told = Console(record=True, width=160)
    projection.tell(config, 1, parts, notes, told)
    text = told.export_text()
    assert "≤ 4 img·iter/s" in text and "toy, roofline" in text and "rooflines" in text
    with pytest.raises(InputError, match="measure it with"):
        projection.run(config, 1, [], Path("none.jsonl"))
