"""``wmdd bench throughput``: speed of each stage on one device, compared with a plain reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import timing
from bench.stages import STAGES
from bench.workloads import OWN, BenchSession, Workload, open_bench
from wmdd.config.schema import Config
from wmdd.errors import InputError, nearest
from wmdd.records import files, provenance
from wmdd.records.schema import SpeedRecord
from wmdd.runtime.progress_bars import progress
from wmdd.runtime.ranks import Ranks


def stages_of(text: str) -> list[str]:
    """Return the stages in a text such as ``synthesis,students``.

    Raises:
        InputError: a stage does not exist.
    """
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    for name in wanted or [text]:
        if name not in STAGES:
            raise InputError(f"--stage {text}: no stage {name!r}; {nearest(name, list(STAGES))}")
    return wanted


def run(
    config: Config,
    stages: Sequence[str],
    repeats: int = 5,
    seconds: float = 0.5,
    with_reference: bool = True,
    folder: Path | None = None,
) -> list[SpeedRecord]:
    """Time the stages, one after the other, in this process.

    Args:
        config: config of the run.
        stages: names in ``STAGES``.
        repeats: timed repeats per engine, alternating with the reference.
        seconds: target duration of one repeat.
        with_reference: whether to time the plain reference and compare results.
        folder: folder of the profiles; None for no profiles.

    Returns:
        One record for each stage and engine.

    Raises:
        InputError: config, dataset or stage is wrong, or the reference does not support the objective.
    """
    found: list[SpeedRecord] = []
    peaks: dict[str, float] = {}
    with open_bench(config) as bench:
        for stage in stages:
            workload = STAGES[stage](bench, with_reference)
            contestants = {
                name: steps if name == OWN else in_precision(bench.ranks, steps)
                for name, steps in workload.contestants.items()
            }
            with progress(f"timing {stage}", (repeats + 1) * len(contestants), "repeats") as advance:
                samples = timing.in_turns(
                    contestants, repeats, seconds, workload.most, workload.device, workload.warm, advance
                )
            found += records_of(bench, workload, samples, peaks)
            if folder:
                own = workload.contestants[OWN]
                timing.profile(own, workload.device, workload.warm, folder, stage, min(3, workload.most))
    return found


def in_precision(job: Ranks, run: timing.Run) -> timing.Run:
    """Return the run of a plain reference in the engine's precision: PyTorch's autocast around all of it.

    Without autocast's cache, which would keep the bf16 copies of a student's first weights.
    """

    def cast(steps: int, watch: timing.Stopwatch) -> None:
        with torch.autocast(job.device.type, torch.bfloat16, job.precision == "bf16", cache_enabled=False):
            run(steps, watch)

    return cast


def records_of(
    bench: BenchSession, workload: Workload, samples: dict[str, list[timing.TimedRun]], peaks: dict[str, float]
) -> list[SpeedRecord]:
    """Return one record of each engine that was timed.

    Args:
        bench: session of the benchmark.
        workload: workload that was timed.
        samples: engine -> its repeats.
        peaks: precision -> FLOP/s of a matrix product. Missing values are measured and added.
    """
    checked = workload.check()
    baseline = next((name for name in samples if name != OWN), None)
    operations = workload.step_flops() if workload.step_flops else None
    precision = bench.ranks.precision
    made = []
    for engine, taken in samples.items():
        metrics = timing.figures(taken, workload.work) | dict(checked.get(engine, {}))
        if operations:
            if precision not in peaks:
                peaks[precision] = timing.matmul_peak(bench.ranks.device, precision)
            achieved = operations * metrics["steps"] / metrics["seconds"]
            if workload.step_work:  # what was done, where not every step is a whole one
                achieved = operations / workload.step_work * metrics["rate"]
            metrics |= {"product_share": achieved / peaks[precision], "peak_flops": peaks[precision]}
            if sheet := timing.data_sheet_peak(bench.ranks.device, precision):
                metrics |= {"mfu": achieved / sheet, "data_sheet_flops": sheet}
        if engine == OWN and baseline:
            metrics |= timing.ratio(taken, samples[baseline])
        made.append(
            SpeedRecord(
                kind="throughput",
                stage=workload.stage,
                engine=engine,
                dataset=bench.name,
                network=workload.network,
                resolution=bench.config.data.resolution,
                unit=workload.unit,
                metrics=metrics,
                setup=_circumstances(bench.config, bench.ranks, engine, precision) | dict(workload.setup),
                provenance=provenance.provenance(bench.config.compute),
            )
        )
    return made


def _circumstances(config: Config, job: Ranks, engine: str, precision: str) -> dict[str, Any]:
    return {
        "device": job.device.type,
        "precision": precision,
        "threads": config.compute.threads,
        "compile": config.compute.compile and engine == OWN,
    }


def tell(found: Sequence[SpeedRecord], out: Path | None, console: Console) -> None:
    """Append the records to ``out``, if given, and print table and footnotes."""
    if out:
        for record in found:
            files.append(out, record)
    console.print(table(found))
    for line in footnotes(found):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def table(found: Sequence[SpeedRecord]) -> Table:
    """Return the records as a table for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, title="Throughput", title_justify="left", pad_edge=False)
    shown.add_column("Stage")
    shown.add_column("Engine")
    # On a CPU only the memory of the whole process is known, which does not compare engines.
    cuda = any(record.setup["device"] == "cuda" for record in found)
    for column in ("Rate", "Step", *(["Memory", "MFU"] if cuda else []), "Of product", "× baseline"):
        shown.add_column(column, justify="right")
    for record in found:
        metrics = record.metrics
        shown.add_row(
            record.stage,
            record.engine,
            spread_text(metrics, "rate"),
            duration(metrics["p50"]),
            *([f"{metrics['peak_bytes'] / 1e6:,.0f} MB" if "peak_bytes" in metrics else "–"] if cuda else []),
            *([f"{metrics['mfu']:.1%}" if "mfu" in metrics else "–"] if cuda else []),
            f"{metrics['product_share']:.1%}" if "product_share" in metrics else "–",
            spread_text(metrics, "ratio") if "ratio" in metrics else "–",
        )
    return shown


def spread_text(metrics: dict[str, float], key: str) -> str:
    """Return ``median [least, largest]`` of a metric, safe in a table."""
    low, high = number(metrics[f"{key}_low"]), number(metrics[f"{key}_high"])
    return escape(f"{number(metrics[key])} [{low}, {high}]")


_COMPARED = {
    "loss_difference": "loss",
    "gradient_difference": "gradient",
    "feature_difference": "features",
    "moment_difference": "moments",
    "student_difference": "logits after the first updates",
}
"""Metric -> name of the quantity that engine and reference are compared by."""


def footnotes(found: Sequence[SpeedRecord]) -> list[str]:
    """Return the notes below the table: hardware, units, compared results, meaning of MFU."""
    if not found:
        return []
    seen = found[0].provenance
    place = seen["device"] if seen["device"] != "cpu" else seen["cpu"]
    setup = found[0].setup
    lines = [
        f"{place}, {setup['threads']} thread(s), {setup['precision']}, torch {seen['torch']}, {found[0].dataset},"
        f" {found[0].resolution} px; median [least, largest] of {found[0].metrics['repeats']:.0f} repeats in turns"
    ]
    units = {record.stage: record.unit for record in found}
    lines.append(f"Rates: {', '.join(f'{stage} in {unit}' for stage, unit in units.items())}; Step: median")
    for record in found:
        differ = [f"{name} {record.metrics[key]:.1e}" for key, name in _COMPARED.items() if key in record.metrics]
        if differ:
            lines.append(f"{record.stage}: relative difference from the reference: {', '.join(differ)}")
        if "gradient_rounding" in record.metrics:
            own = record.metrics["gradient_rounding"]
            lines.append(f"{record.stage}: relative difference of the reference's gradient from its float64: {own:.1e}")
    distances = [f"{record.engine} {number(record.metrics['w2'])}" for record in found if "w2" in record.metrics]
    if distances:
        lines.append(f"barycenters: mean W2²: {', '.join(distances)}")
    meanings = {
        "peak_flops": "Of product: operations of the networks, as a share of a square matrix product measured here",
        "data_sheet_flops": "MFU: operations of the networks, as a share of the data sheet's dense peak",
    }
    for key, meaning in meanings.items():
        peaks = {record.setup["precision"]: record.metrics[key] for record in found if key in record.metrics}
        if peaks:
            told = ", ".join(f"{peak / 1e12:.3g} TFLOP/s ({precision})" for precision, peak in peaks.items())
            lines.append(f"{meaning}: {told}")
    return lines


def number(value: float) -> str:
    """Return a number with three significant digits and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return seconds, or milliseconds below one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
