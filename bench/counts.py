"""``wmdd bench throughput --count``: kernels, bytes and FLOPs of one step of each stage, without timing."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.dry_steps import DryStep, dry_steps, precision_of
from bench.projection import size_of
from bench.throughput import number
from wmdd.config.schema import Config


def run(config: Config) -> list[DryStep]:
    """Return one step of each stage of a run.

    Raises:
        InputError: a network does not exist, or the number of classes depends on images that are missing.
    """
    return dry_steps(config, size_of(config)[0])


def tell(config: Config, found: Sequence[DryStep], console: Console) -> None:
    """Print the counts, and what they mean."""
    title = f"One step of each stage: {config.name}, {config.data.resolution} px, {precision_of(config)}"
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    shown.add_column("Stage")
    shown.add_column("Network")
    for column in ("Images", "Kernels", "MB/image", "GFLOP/image"):
        shown.add_column(column, justify="right")
    for step in found:
        megabytes, gigaflops = step.counts.bytes / step.images / 1e6, step.counts.flops / step.images / 1e9
        counts = (str(step.images), str(step.counts.kernels), number(megabytes), number(gigaflops))
        shown.add_row(step.stage, step.network, *counts)
    console.print(shown)
    for line in (
        "Nothing was timed. The counts are those of eager code, and the same on every machine.",
        "Kernels: operations of torch that write memory. MB: inputs and outputs of these operations.",
        "GFLOP: operations of matrix products and convolutions. Steps include the optimizer and online soft labels.",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
