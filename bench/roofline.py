"""What a run needs on a GPU that is not there: peak memory, roofline times, largest group and student batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from bench.dry_steps import DryStep, dry_steps, precision_of, student_step, synthesis_step
from bench.op_counter import OpCounts
from bench.throughput import duration, number
from wmdd.config.schema import Config
from wmdd.distill.methods import registry
from wmdd.errors import InputError, nearest
from wmdd.records.data_sheets import DATA_SHEETS

LAUNCH_SECONDS = 5e-6
"""Host time of one launch of eager code."""
CONTEXT_BYTES = 0.5e9
"""Memory of the CUDA context."""
USABLE = 0.9
"""Share of the other memory that a step may fill. The rest is for workspaces of cuDNN and for fragmentation"""


@dataclass(frozen=True)
class Gpu:
    """Values from a GPU's data sheet."""

    name: str
    peaks: dict[str, float]
    """Precision -> FLOP/s of dense products; ``memory`` -> bytes/s"""
    memory: float
    """Bytes of memory"""

    @property
    def usable(self) -> float:
        """Bytes that a step may fill."""
        return USABLE * (self.memory - CONTEXT_BYTES)


GPUS = {
    short: Gpu(short, DATA_SHEETS[name], memory)
    for short, name, memory in (
        ("H100", "NVIDIA H100", 80e9),
        ("H200", "NVIDIA H200", 141e9),
        ("A100", "NVIDIA A100-SXM4-80GB", 80e9),
        ("L40S", "NVIDIA L40S", 48e9),
        ("4090", "NVIDIA GeForce RTX 4090", 24e9),
        ("B200", "NVIDIA B200", 180e9),
    )
}
"""Short name -> values of NVIDIA's data sheets: H100 SXM5, H200 SXM, A100 SXM of 80 GB, L40S, GeForce RTX 4090, and one
GPU of an HGX B200."""


def gpu_of(name: str) -> Gpu:
    """Return a GPU by its short name.

    Raises:
        InputError: its data sheet is not known.
    """
    if name not in GPUS:
        raise InputError(f"--gpu {name}: no data sheet of {name!r}; {nearest(name, list(GPUS))}")
    return GPUS[name]


@dataclass(frozen=True)
class Roofline:
    """The three lower bounds of the time of a step, in seconds."""

    compute: float
    """FLOPs of products and convolutions at the data sheet's peak"""
    memory: float
    """Inputs and outputs of all kernels at the data sheet's bandwidth"""
    launch: float
    """Launches of all kernels by the host"""

    @property
    def seconds(self) -> float:
        """The largest bound: a step takes at least as long."""
        return max(self.compute, self.memory, self.launch)

    @property
    def bound_by(self) -> str:
        """Name of the largest bound."""
        return max(vars(self), key=lambda name: float(getattr(self, name)))


def roofline(counts: OpCounts, gpu: Gpu, precision: str) -> Roofline:
    """Return the bounds of a step of eager code on a GPU.

    Raises:
        InputError: the GPU has no products in this precision.
    """
    if precision not in gpu.peaks:
        raise InputError(f"compute.precision = {precision}: the data sheet of the {gpu.name} has no such products")
    return Roofline(
        counts.flops / gpu.peaks[precision], counts.bytes / gpu.peaks["memory"], counts.kernels * LAUNCH_SECONDS
    )


@dataclass(frozen=True)
class Fit:
    """How many units of a step fit in a GPU."""

    most: int
    """Largest number of units; 0 if one does not fit"""
    fixed: float
    """Bytes that do not depend on the number of units"""
    each: float
    """Bytes of each unit"""


def fit(peak_of: Callable[[int], int], few: int, gpu: Gpu) -> Fit:
    """Return how many units fit, from the peaks of ``few`` and ``2·few`` units: the peak is a line.

    Args:
        peak_of: returns the peak memory of a step of a number of units, in bytes.
        few: a small number of units.
        gpu: GPU to fit.
    """
    low, high = peak_of(few), peak_of(2 * few)
    each = (high - low) / few
    fixed = low - each * few
    return Fit(max(0, int((gpu.usable - fixed) / each)), fixed, each)


@dataclass(frozen=True)
class Plan:
    """What a run needs on one GPU."""

    gpu: Gpu
    precision: str
    steps: list[DryStep]
    group: Fit | None
    """Classes of a group; None for methods that optimize nothing"""
    batches: dict[str, Fit]
    """Architecture of students -> images of an update"""

    def bounds(self, step: DryStep) -> Roofline:
        """Return the bounds of a step."""
        return roofline(step.counts, self.gpu, self.precision)

    def rate(self, stage: str, network: str) -> float | None:
        """Return the largest possible number of images per second of a stage; None for stages without a step."""
        found = [step for step in self.steps if (step.stage, step.network) == (stage, network)]
        return found[0].images / self.bounds(found[0]).seconds if found else None


def run(config: Config, classes: int, gpu: Gpu) -> Plan:
    """Predict what a run needs on a GPU, from steps on tensors without values.

    Args:
        config: config of the run.
        classes: number of classes in the dataset.
        gpu: GPU that the run will use.

    Raises:
        InputError: a network does not exist, or the GPU has no products in the precision.
    """
    precision = precision_of(config)
    group = None
    if registry.create(config).objective() is not None:
        group = fit(lambda size: synthesis_step(config, classes, size, config.ipc).peak, 1, gpu)
    batches = {
        name: fit(lambda size, name=name: student_step(config, classes, name, size).peak, 8, gpu)  # type: ignore[misc]
        for name in config.student.networks
    }
    return Plan(gpu, precision, dry_steps(config, classes), group, batches)


def tell(plan: Plan, console: Console) -> None:
    """Print a plan with its assumptions."""
    gpu = plan.gpu
    title = f"PREDICTION, not a measurement: one step of each stage on one {gpu.name}, {plan.precision}, eager"
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in ("Stage", "Network"):
        shown.add_column(column)
    for column in ("Images", "Peak GB", "Kernels", "GB", "TFLOP", "At least", "Bound by", "At most img/s"):
        shown.add_column(column, justify="right")
    for step in plan.steps:
        bounds, counts = plan.bounds(step), step.counts
        amounts = (
            f"{step.peak / 1e9:.2f}",
            str(counts.kernels),
            number(counts.bytes / 1e9),
            number(counts.flops / 1e12),
        )
        limits = (duration(bounds.seconds), bounds.bound_by, number(step.images / bounds.seconds))
        shown.add_row(step.stage, step.network, str(step.images), *amounts, *limits)
    console.print(shown)
    for line in [*_fits(plan), "Assumptions:", *(f"- {note}" for note in assumptions(gpu, plan.precision))]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _fits(plan: Plan) -> list[str]:
    lines = []
    if plan.group:
        one = f"each class takes {plan.group.each / 1e9:.2f} GB"
        lines.append(f"Largest group that fits: synthesis.classes_per_group={plan.group.most} ({one})")
    for name, batch in plan.batches.items():
        lines.append(f"Largest batch of a {name} student that fits: {batch.most} images")
    return lines


def assumptions(gpu: Gpu, precision: str) -> Sequence[str]:
    """Return the assumptions of a prediction, one sentence each."""
    return (
        f"data sheet of the {gpu.name}: {gpu.peaks[precision] / 1e12:,.0f} TFLOP/s dense ({precision}),"
        f" {gpu.peaks['memory'] / 1e12:.3g} TB/s, {gpu.memory / 1e9:.0f} GB",
        "a step takes at least the longest of: its FLOPs at that peak, its bytes at that bandwidth, and"
        f" {LAUNCH_SECONDS * 1e6:.0f} µs for each kernel; real kernels reach neither peak",
        "compiled code has fewer kernels and bytes; decoding, copies to the GPU and exchange between ranks are not"
        " counted",
        f"a step may fill {USABLE:.0%} of the memory without the CUDA context ({CONTEXT_BYTES / 1e9:.1f} GB)",
    )
