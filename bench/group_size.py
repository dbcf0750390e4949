"""``wmdd bench groups``: speed of the synthesis for several group sizes, and a suggested size."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo
from rich import box
from rich.console import Console
from rich.table import Table

from bench import timing
from bench.stage_synthesis import synthesis_of
from bench.throughput import duration, footnotes, records_of, spread_text
from bench.workloads import OWN, BenchSession, Workload, open_bench
from wmdd.config.schema import Config
from wmdd.distill.methods import registry
from wmdd.distill.synthesis.objective import Objective
from wmdd.errors import InputError
from wmdd.records import files
from wmdd.records.schema import SpeedRecord
from wmdd.runtime.progress_bars import progress

logger = logging.getLogger(f"wmdd.{__name__}")

TOLERANCE = 0.05
"""Share of the best rate that a smaller group may lose: smaller groups can be spread over more ranks."""
MAX_IMAGES = 1000
"""Images in the largest group by default: ten times the default group."""


def run(
    config: Config, most: int | None = None, repeats: int = 5, seconds: float = 2.0
) -> tuple[list[SpeedRecord], list[str]]:
    """Time the synthesis of groups of 1, 2, 4, 8, ... classes, in turns.

    Args:
        config: config of the run.
        most: number of classes in the largest group; by default as many as make up ``MAX_IMAGES`` images. It is limited
            to the classes of the dataset.
        repeats: timed repeats per group size.
        seconds: target duration of one repeat of the largest group; the others do the same number of iterations.

    Returns:
        One record for each size, in order, and the suggestion, one sentence per line.

    Raises:
        InputError: config or dataset is wrong, the method optimizes no images, or one class does not fit in memory.
    """
    objective = registry.create(config).objective()
    if objective is None:
        raise InputError(f"method = {config.method!r} optimizes no images, so its speed does not depend on groups")
    if config.synthesis.split_class > 1:
        raise InputError(
            f"synthesis.split_class = {config.synthesis.split_class}: groups are timed on one device, which needs whole"
            " classes; use synthesis.split_class=1"
        )
    # Every size is compiled separately, as in a run. By default torch stops compiling after eight sizes.
    compiled = torch._dynamo.config.patch(recompile_limit=64)
    with open_bench(config) as bench, compiled:
        classes = len(bench.dataset.classes)
        tried = sizes(min(most or max(1, MAX_IMAGES // config.ipc), classes))
        works = fitting(tried, lambda size: work_of(bench, size))
        # The largest comes first: the first contestant's speed decides the number of steps.
        contestants = {str(size): work.contestants[OWN] for size, work in reversed(works.items())}
        first = works[1]
        with progress("timing groups", (repeats + 1) * len(works), "repeats") as advance:
            samples = timing.in_turns(contestants, repeats, seconds, first.most, first.device, first.warm, advance)
        found = [one for size, work in works.items() for one in records_of(bench, work, {OWN: samples[str(size)]}, {})]
    rates = {size: record.metrics["rate"] for size, record in zip(works, found, strict=True)}
    return found, advice(config, objective, rates, classes)


def sizes(most: int) -> list[int]:
    """Return 1, 2, 4, 8, ... and ``most`` itself."""
    return [*(2**power for power in range((most - 1).bit_length())), most]


def work_of(bench: BenchSession, size: int) -> Workload:
    """Return the synthesis of a run's first group, with groups of ``size`` classes."""
    config = bench.config.replace({"synthesis.classes_per_group": size, "blocks": 1})
    return replace(synthesis_of(replace(bench, config=config), with_reference=False), step_flops=None)


def fitting(tried: Sequence[int], work: Callable[[int], Workload]) -> dict[int, Workload]:
    """Return the workload of every size that fits in the device's memory.

    Raises:
        InputError: no size fits.
    """
    found: dict[int, Workload] = {}
    for size in tried:
        made = work(size)
        try:
            timing.once(made.contestants[OWN], 1, made.device, made.warm)
        except torch.OutOfMemoryError:
            logger.info(f"{size} classes ({made.setup['batch']} images) do not fit in the memory of {made.device}")
            break
        found[size] = made
    if not found:
        raise InputError(
            "a single class does not fit in the device's memory: use a smaller ipc, or split each class among several"
            " devices (synthesis.split_class)"
        )
    return found


def suggested(rates: Mapping[int, float]) -> int:
    """Return the smallest size whose rate is within ``TOLERANCE`` of the best."""
    enough = (1 - TOLERANCE) * max(rates.values())
    return min(size for size, rate in rates.items() if rate >= enough)


def advice(config: Config, objective: Objective, rates: Mapping[int, float], classes: int) -> list[str]:
    """Return the suggestion, its reason, the possible number of ranks, and its effect on the images.

    Args:
        config: config of the run.
        objective: objective of the method.
        rates: number of classes in a group -> median rate.
        classes: number of classes in the dataset.
    """
    size, best = suggested(rates), max(rates, key=lambda size: rates[size])
    groups = math.ceil(classes / size)
    # A run with more blocks than groups is an error.
    fewer_blocks = f" --set blocks={groups}" if config.blocks > groups else ""
    lines = [
        f"Suggestion: --set synthesis.classes_per_group={size}{fewer_blocks}",
        f"It is the smallest group whose median rate is within {TOLERANCE:.0%} of the best rate (at {best} classes).",
        f"Groups: {groups}, for {classes} classes. No more ranks, or blocks, than groups have work.",
        "The value is part of the recipe: crops, flips and rolls are drawn for each group, so another value gives other"
        " images.",
    ]
    if coupled := couplings(objective):
        lines.append(f"With this objective it also changes what is minimized: {'; '.join(coupled)}.")
    return lines


def couplings(objective: Objective) -> list[str]:
    """Return the terms that couple the classes of a group; none if the objective is a plain sum over classes."""
    reasons = {
        "BatchNorm moments are matched over all images of a group (bn_target = global)": (
            objective.bn and not objective.per_class
        ),
        "norms are taken or averaged over a group (norm = euclidean)": not objective.squared,
        "cross-entropy is averaged over a group (ce_weight)": objective.ce,
    }
    return [reason for reason, holds in reasons.items() if holds]


def tell(found: Sequence[SpeedRecord], notes: Sequence[str], out: Path | None, console: Console) -> None:
    """Append the records to ``out``, if given, and print table, footnotes and suggestion."""
    if out:
        for record in found:
            files.append(out, record)
    console.print(table(found))
    for line in [*footnotes(found), "", *notes]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def table(found: Sequence[SpeedRecord]) -> Table:
    """Return the records as a table for the terminal."""
    title = f"Synthesis of {found[0].dataset} in groups, IPC {found[0].setup['ipc']}"
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    cuda = found[0].setup["device"] == "cuda"  # on a CPU only the memory of the whole process is known
    for column in ("Classes", "Images", found[0].unit, "Step", *(["Memory"] if cuda else [])):
        shown.add_column(column, justify="right")
    for record in found:
        metrics = record.metrics
        memory = [f"{metrics['peak_bytes'] / 1e6:,.0f} MB"] if cuda else []
        counts = (str(record.setup["classes"]), str(record.setup["batch"]))
        shown.add_row(*counts, spread_text(metrics, "rate"), duration(metrics["p50"]), *memory)
    return shown
