"""Speeds: what is timed, that both engines do the same work, and that a wrong engine is seen to be wrong."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from rich.console import Console
from typer.testing import CliRunner

from bench import reference, throughput, timing
from bench.stage_synthesis import first_group, reference_loss, reference_targets, start_differences, synthesis_of
from bench.stages import STAGES, statistics_of
from bench.workloads import OWN, BenchSession, open_bench
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.data.pixels import normalize, pixel_range
from wmdd.distill.synthesis.engine import Problem, State, synthesize
from wmdd.distill.synthesis.objective import Objective
from wmdd.errors import InputError
from wmdd.records.files import read_records
from wmdd.records.schema import SpeedRecord

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("digits", [*TINY, "statistics.batch_size=30"])


@pytest.fixture(scope="module")
def found(config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], SpeedRecord]:
    """Return what the command wrote, by stage and engine."""
    out = tmp_path_factory.mktemp("speeds") / "speeds.jsonl"
    told = Console(record=True, width=200)
    throughput.tell(throughput.run(config, list(STAGES), repeats=2, seconds=0.0), out, told)
    text = told.export_text()
    assert all(stage in text for stage in STAGES) and "relative difference" in text
    records, problems = read_records(out, SpeedRecord)
    assert not problems
    return {(record.stage, record.engine): record for record in records}


@pytest.mark.slow
def test_every_stage_has_a_record_of_each_engine(found: dict[tuple[str, str], SpeedRecord]) -> None:
    engines = {"synthesis": "reference", "statistics": "reference", "students": "reference", "barycenters": "pot"}
    assert set(found) == {(stage, engine) for stage, other in engines.items() for engine in (OWN, other)}
    for record in found.values():
        metrics = record.metrics
        assert metrics["rate_low"] <= metrics["rate"] <= metrics["rate_high"]
        assert metrics["repeats"] == 2 and 0 < metrics["p50"] <= metrics["p90"]
        assert metrics["peak_bytes"] > 1e6
        assert (record.dataset, record.resolution, record.setup["threads"]) == ("digits", 8, 1)
        if record.stage != "barycenters":
            assert 0 < metrics["product_share"] < 1
            assert "mfu" not in metrics, "a CPU has no data sheet's peak"
        if record.engine == OWN:
            assert metrics["ratio_low"] <= metrics["ratio"] <= metrics["ratio_high"]


@pytest.mark.slow
def test_the_rate_is_work_over_time(found: dict[tuple[str, str], SpeedRecord]) -> None:
    record = found["synthesis", OWN]
    images = record.setup["batch"] * record.metrics["steps"]
    assert record.setup["batch"] == 4  # two classes of two images
    assert record.metrics["rate_low"] <= images / record.metrics["seconds"] <= record.metrics["rate_high"]
    student = found["students", OWN]
    assert student.setup["updates"] == 2  # two epochs of one batch
    hours = student.metrics["steps"] / student.setup["updates"] / (student.metrics["seconds"] / 3600)
    assert student.metrics["rate_low"] <= hours * (1 + 1e-9) and hours <= student.metrics["rate_high"] * (1 + 1e-9)


@pytest.mark.slow
def test_engine_and_reference_do_the_same_work(found: dict[tuple[str, str], SpeedRecord]) -> None:
    assert found["synthesis", OWN].metrics["loss_difference"] < 1e-4
    assert found["synthesis", OWN].metrics["gradient_difference"] < 1e-4
    assert found["statistics", OWN].metrics["feature_difference"] < 1e-5
    assert found["statistics", OWN].metrics["moment_difference"] < 1e-5
    assert found["students", OWN].metrics["student_difference"] < 1e-2
    # Several starts, of which one is a random one as POT's, are not worse than one.
    assert found["barycenters", OWN].metrics["w2"] <= 1.02 * found["barycenters", "pot"].metrics["w2"]


def compared(bench: BenchSession, images: torch.Tensor, problem: Problem, engine_bn: float) -> dict[str, float]:
    """Return the differences at ``images`` of an engine whose BatchNorm term has the weight ``engine_bn``."""
    settings = bench.config.synthesis
    other = replace(problem, objective=replace(problem.objective, bn=engine_bn))
    probe = reference.Probe(bench.classifier)

    def engine(chosen: Any, start: torch.Tensor, iterations: int) -> State:
        asked = replace(other, settings=chosen.replace({"iterations": iterations}))
        return synthesize(asked, State(start), bench.ranks)

    loss_of = reference_loss(Objective.from_settings(settings), problem.target.weights)
    plain = reference_targets(problem.target, probe, CPU)
    return start_differences(engine, settings, images, probe, plain, loss_of, CPU)


@pytest.mark.parametrize("variant", ["digits", "digits+paper", "digits+upstream"])
def test_they_agree_along_the_trajectory_of_the_reference(variant: str) -> None:
    config = load_config(variant, [*TINY, "synthesis.jitter=1"])
    with open_bench(config) as bench:
        prepared, problem = first_group(bench)
        images = prepared.images
        probe = reference.Probe(bench.classifier)
        loss_of = reference_loss(Objective.from_settings(config.synthesis), problem.target.weights)
        plain = reference_targets(problem.target, probe, CPU)
        views = reference.Views((0.9, 1.0), False, 1)
        limits = pixel_range(config.data)
        for _ in range(3):
            told = compared(bench, images, problem, config.synthesis.bn_weight)
            assert told["loss_difference"] < 1e-4 and told["gradient_difference"] < 1e-4
            assert 0 < told["gradient_rounding"] < 1e-4
            moved = reference.synthesize(
                images, lambda pixels: loss_of(probe, pixels, plain), views, 4, 0.05, (0.5, 0.9), limits
            )
            assert (moved - images).abs().max() > 0.01
            images = moved


def test_a_reference_runs_in_the_precision_of_the_engine_and_sees_each_update(config: Config) -> None:
    layer, seen = torch.nn.Linear(4, 4, bias=False), []

    def run(steps: int, watch: timing.Stopwatch) -> None:
        for _ in range(steps):
            seen.append(layer(torch.ones(1, 4)))
            layer.weight.data.mul_(2)

    with open_bench(config.replace({"compute.precision": "bf16"})) as bench:
        throughput.in_precision(bench.ranks, run)(2, timing.Stopwatch(CPU))
    assert [output.dtype for output in seen] == [torch.bfloat16, torch.bfloat16]
    assert torch.equal(seen[1], 2 * seen[0])


def test_an_engine_with_another_weight_is_found_out(config: Config) -> None:
    with open_bench(config) as bench:
        prepared, problem = first_group(bench)
        told = compared(bench, prepared.images, problem, engine_bn=1.01 * config.synthesis.bn_weight)
    assert told["loss_difference"] > 1e-3 and told["gradient_difference"] > 1e-3


def test_the_reference_descends(config: Config) -> None:
    with open_bench(config) as bench:
        prepared, problem = first_group(bench)
        probe = reference.Probe(bench.classifier)
        loss_of = reference_loss(Objective.from_settings(config.synthesis), problem.target.weights)
        plain = reference_targets(problem.target, probe, CPU)
        views = reference.Views((0.9, 1.0), False, 0, each=True)
        start = normalize(torch.full_like(prepared.images, 128), config.data)
        final = reference.synthesize(
            start, lambda pixels: loss_of(probe, pixels, plain), views, 30, 0.1, (0.5, 0.9), None
        )
        with torch.no_grad():
            assert loss_of(probe, final, plain) < 0.7 * loss_of(probe, start, plain)


def test_statistics_are_decoded_anew_in_every_repeat(config: Config) -> None:
    reads: list[tuple[str, int, int]] = []
    with open_bench(config) as bench:
        catalogue = bench.dataset.train.catalogue
        read = catalogue.read
        object.__setattr__(catalogue, "read", lambda *place: (reads.append(place), read(*place))[1])
        workload = statistics_of(bench, with_reference=False)
        watch = timing.Stopwatch(CPU)
        for _ in range(2):
            workload.contestants[OWN](3, watch)
    assert len(reads) == 2 * workload.work(3) == 180
    assert len(watch.read()) == 6


def test_each_repeat_times_all_contestants_before_the_next() -> None:
    order: list[tuple[str, int]] = []

    def contestant(name: str, pause: float) -> timing.Run:
        def run(steps: int, watch: timing.Stopwatch) -> None:
            order.append((name, steps))
            for _ in range(steps):
                time.sleep(pause)
                watch()

        return run

    samples = timing.in_turns({"a": contestant("a", 0.001), "b": contestant("b", 0.004)}, 3, 0.01, 7, CPU, warm=1)
    timed = order[4:]  # after two warm-ups of each
    assert [name for name, _ in timed] == ["a", "b"] * 3
    assert len({steps for _, steps in timed}) == 1 and timed[0][1] <= 7 + 1
    assert all(len(sample.steps) == sample.asked == timed[0][1] - 1 for sample in samples["a"])  # the warm step is out


def test_ratios_are_of_pairs_and_rates_of_the_work_asked_for() -> None:
    own = [timing.TimedRun(4, [0.5, 0.5], 10), timing.TimedRun(4, [1.0, 1.0], 30), timing.TimedRun(4, [1.0, 3.0], 20)]
    baseline = [timing.TimedRun(4, [2.0], None), timing.TimedRun(4, [6.0], None), timing.TimedRun(4, [4.0], None)]
    # Of the medians it would be 4 / 2 as well; of the extremes 2 / 1 and 6 / 4.
    assert timing.ratio(own, baseline) == {"ratio": 2.0, "ratio_low": 1.0, "ratio_high": 3.0}
    told = timing.figures(own, lambda steps: 10.0 * steps)
    assert (told["rate"], told["rate_low"], told["rate_high"]) == (20.0, 10.0, 40.0)
    assert (told["p50"], told["peak_bytes"], told["seconds"]) == (1.0, 30.0, 2.0)
    assert "peak_bytes" not in timing.figures(baseline, float)


def test_flops_are_those_of_forward_and_image_gradient(config: Config) -> None:
    with open_bench(config) as bench:
        workload = synthesis_of(bench, with_reference=False)
        assert workload.step_flops is not None
        both = workload.step_flops()
        with torch.no_grad():
            images = torch.zeros(4, 1, 8, 8)
            forward = timing.flops(lambda: bench.teacher.network.predict(images))
    # 8 -> 8 channels of 8 and 4 px: by hand; the gradient for the image costs as much again.
    expected = 2 * 4 * (8 * 1 * 9 * 64 + 8 * 8 * 9 * 16 + 32 * 4)
    assert forward == expected and both == 2 * forward


@pytest.mark.slow
def test_profiles_are_written(config: Config, tmp_path: Path) -> None:
    throughput.run(config, ["synthesis"], repeats=1, seconds=0.0, with_reference=False, folder=tmp_path)
    assert "aten::" in (tmp_path / "synthesis.txt").read_text()
    assert json.loads((tmp_path / "synthesis.trace.json").read_text())["traceEvents"]


def test_refusals(config: Config) -> None:
    with pytest.raises(InputError, match="did you mean 'synthesis'"):
        throughput.stages_of("students,sythesis")
    other = load_config("digits", [*TINY, "synthesis.bn_first_weight=10"])
    with pytest.raises(InputError, match="--no-reference"):
        throughput.run(other, ["synthesis"])
    augmented = load_config("digits", [*TINY, "statistics.augment=true"])
    with pytest.raises(InputError, match="--no-reference"):
        throughput.run(augmented, ["statistics"])
    averaged = load_config("digits", [*TINY, "student.ema=0.9"])
    with pytest.raises(InputError, match=r"student\.ema.*--no-reference"):
        throughput.run(averaged, ["students"])
    with pytest.raises(InputError, match="no synthesis to time"):
        throughput.run(load_config("digits", [*TINY, "method=random"]), ["synthesis"])


@pytest.mark.slow
def test_the_command_names_generated_images(tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "speeds.jsonl"
    run = CliRunner()
    sizes = ["--classes", "4", "--images", "6", "--val", "1", "--pixels", "24", "--workers", "1"]
    assert run.invoke(app, ["data", "synthesize", *sizes, "--out", str(tree)]).exit_code == 0
    small = ["teacher.network=convnet2x8", "synthesis.classes_per_group=2", "ipc=2", "compute.workers=0"]
    places = ["data.source=folder", f"data.root={tree}", "data.resolution=16"]
    config = tmp_path / "generated.toml"
    config.write_text("")
    arguments = [f"--set={key}" for key in [*small, *places]]
    asked = ["bench", "throughput", str(config), *arguments, "--stage", "statistics", "--repeats", "1", "--seconds=0"]
    done = run.invoke(app, [*asked, "--out", str(out)], catch_exceptions=False)
    assert "synthetic" in done.stdout
    records, _ = read_records(out, SpeedRecord)
    assert [record.dataset for record in records] == ["synthetic", "synthetic"]


def test_a_speed_has_the_energy_of_a_repeat_where_a_counter_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter([10.0, 13.0, 20.0, 27.0, 30.0, 34.0])
    monkeypatch.setattr(timing, "energy_joules", lambda device: next(counter))

    def run(steps: int, watch: timing.Stopwatch) -> None:
        for _ in range(steps):
            watch()

    samples = [timing.once(run, 2, torch.device("cpu"), 0) for _ in range(3)]

    assert timing.figures(samples, float)["joules"] == 4.0
    monkeypatch.setattr(timing, "energy_joules", lambda device: None)
    assert "joules" not in timing.figures([timing.once(run, 2, torch.device("cpu"), 0)], float)


def test_the_peak_of_a_data_sheet_is_that_of_the_device_and_a_cpu_has_none() -> None:
    cuda = torch.device("cuda")

    assert timing.data_sheet_peak(cuda, "bf16", "NVIDIA H100 80GB HBM3") == 989e12
    assert timing.data_sheet_peak(cuda, "bf16", "NVIDIA H100 PCIe") == 756e12
    assert timing.data_sheet_peak(cuda, "bf16", "Another GPU") is None
    assert timing.data_sheet_peak(torch.device("cpu"), "fp32") is None


@pytest.mark.slow
def test_a_smaller_last_batch_counts_as_the_images_it_has(found: dict[tuple[str, str], SpeedRecord]) -> None:
    metrics = found["statistics", OWN].metrics
    config = load_config("digits", TINY)
    with open_bench(config) as bench:
        workload = statistics_of(bench, with_reference=False)
        operations = workload.step_flops() if workload.step_flops else 0.0

    per_image = operations / config.statistics.batch_size
    assert metrics["product_share"] * metrics["peak_flops"] == pytest.approx(per_image * metrics["rate"])
