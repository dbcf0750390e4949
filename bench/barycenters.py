"""Barycenters of many classes, compared with POT's free-support solver: ``python -m bench.barycenters``.

Both start from the same points. The generated features resemble those of ReLU networks: non-negative, about half of
them zero, clustered within a class.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import ot
import torch
import typer
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from wmdd import cli_options
from wmdd.config.schema import BarycenterConfig, ComputeConfig
from wmdd.distill.barycenter.processes import barycenters
from wmdd.distill.barycenter.solve import starts
from wmdd.errors import InputError
from wmdd.records import files, provenance
from wmdd.records.schema import SpeedRecord
from wmdd.runtime.cpus import processes
from wmdd.runtime.log import results
from wmdd.runtime.progress_bars import progress

MIXTURE_MODES = 12
"""Number of clusters in a class."""
Spectrum = Literal["decaying", "flat"]


def features(images: int, dimension: int, spectrum: Spectrum, seed: int) -> torch.Tensor:
    """Generate the features [n, D] of one class: the positive part of a mixture of 12 Gaussians.

    - ``decaying``: clusters of unequal size, with 20 directions of variance 1, 1/2, 1/3, ... and white noise.
    - ``flat``: clusters of equal size, with white noise alone. This is the hardest case for a solver that relies on
      structure.
    """
    draw = np.random.default_rng(seed)
    centres = 0.8 * draw.normal(size=(MIXTURE_MODES, dimension))
    if spectrum == "flat":
        noise = draw.normal(size=(images, dimension))
        return torch.from_numpy(np.maximum(centres[draw.integers(MIXTURE_MODES, size=images)] + noise, 0)).float()
    shares = draw.dirichlet(np.full(MIXTURE_MODES, 2.0))
    directions = draw.normal(size=(20, dimension)) / np.sqrt(np.arange(1, 21))[:, None]
    points = centres[draw.choice(MIXTURE_MODES, size=images, p=shares)] + draw.normal(size=(images, 20)) @ directions
    return torch.from_numpy(np.maximum(points + 0.6 * draw.normal(size=points.shape) - 0.4, 0)).float()


def compare(
    cloud: Callable[[int], torch.Tensor],
    classes: int,
    count: int,
    workers: int = 2,
    repeats: int = 5,
    advance: Callable[[int], None] = lambda classes: None,
) -> dict[str, dict[str, float]]:
    """Solve each class with ``wmdd`` in ``workers`` processes and with POT in one, both from the same start.

    The classes are split among the repeats. Who begins alternates between repeats. The time of ``wmdd`` always includes
    drawing the starts, the exact W2², and choosing the nearest images. The time of POT includes

    - in ``ratio``: its loop, and drawing the same starts with the same function;
    - in ``ratio_strict``: its loop alone;
    - in ``ratio_same_results``: all that the time of ``wmdd`` includes, with ``ot.emd2`` and scipy's assignment.

    Args:
        cloud: returns the features [n, D] of a class. Its argument is the class index, which also seeds the starts.
        classes: number of classes.
        count: number K of atoms of each class.
        workers: number of processes of ``wmdd``.
        repeats: number of parts of the classes; each part is timed separately.
        advance: called with the number of classes done.

    Returns:
        Metrics of ``wmdd`` and ``pot``: classes per second (POT's with drawing the starts) and mean W2². ``wmdd`` also
        has the ratios of the times (median and extremes over the repeats), and the mean relative excess of W2².
    """
    settings = BarycenterConfig(starts=1)
    seconds: dict[str, list[float]] = {"wmdd": [], "pot": [], "loop": [], "same": []}
    w2: dict[str, list[float]] = {"wmdd": [], "pot": []}
    parts = [part.tolist() for part in np.array_split(np.arange(classes), min(repeats, classes))]
    for turn, part in enumerate(parts):
        made = [cloud(index) for index in part]
        points = [one.double().numpy() for one in made]

        def own(part: list[int] = part, made: list[torch.Tensor] = made) -> None:
            begun = time.perf_counter()
            found = list(barycenters(made, count, settings, part, workers))
            seconds["wmdd"].append(time.perf_counter() - begun)
            w2["wmdd"] += [atoms.w2 for atoms in found]

        def pot(part: list[int] = part, points: list[np.ndarray] = points) -> None:
            mass, even = ot.unif(len(points[0])), ot.unif(count)
            clock = [time.perf_counter()]
            drawn = [starts(one, count, 1, index)[0] for one, index in zip(points, part, strict=True)]
            clock.append(time.perf_counter())
            pairs = zip(points, drawn, strict=True)
            found = [ot.lp.free_support_barycenter([one], [mass], start) for one, start in pairs]
            clock.append(time.perf_counter())
            for one, atoms in zip(points, found, strict=True):
                cost = ot.dist(atoms, one)
                w2["pot"].append(float(ot.emd2(even, mass, cost)))
                linear_sum_assignment(cost)
            clock.append(time.perf_counter())
            seconds["loop"].append(clock[2] - clock[1])
            seconds["pot"].append(clock[2] - clock[0])
            seconds["same"].append(clock[3] - clock[0])

        with threadpool_limits(limits=1):
            for solve in (own, pot) if turn % 2 else (pot, own):
                solve()
        advance(len(part))

    sizes = [len(part) for part in parts]
    table = {name: _rates(sizes, seconds[name]) | {"w2": statistics.fmean(w2[name])} for name in ("wmdd", "pot")}
    ratios = {
        name: [theirs / ours for ours, theirs in zip(seconds["wmdd"], seconds[name], strict=True)]
        for name in ("pot", "loop", "same")
    }
    below = np.array(w2["wmdd"]) / np.array(w2["pot"]) - 1
    table["wmdd"] |= {
        "ratio": statistics.median(ratios["pot"]),
        "ratio_low": min(ratios["pot"]),
        "ratio_high": max(ratios["pot"]),
        "ratio_strict": statistics.median(ratios["loop"]),
        "ratio_same_results": statistics.median(ratios["same"]),
        "w2_excess": float(below.mean()),
        "w2_excess_error": float(below.std(ddof=1) / np.sqrt(classes)) if classes > 1 else 0.0,
    }
    return table


def _rates(sizes: list[int], seconds: list[float]) -> dict[str, float]:
    rates = [size / taken for size, taken in zip(sizes, seconds, strict=True)]
    return {
        "rate": statistics.median(rates),
        "rate_low": min(rates),
        "rate_high": max(rates),
        "repeats": len(rates),
        "seconds": sum(seconds),
    }


def main(
    classes: Annotated[int, typer.Option(min=1)] = 1000,
    images: Annotated[int, typer.Option(min=2, help="Number of images in each class.")] = 1300,
    dimension: Annotated[int, typer.Option(min=1, help="Dimension of the features.")] = 512,
    ipc: Annotated[str, typer.Option(metavar="K,K,...", help="Numbers of atoms per class to time.")] = "10,50",
    spectrum: Annotated[str, typer.Option(help="Variances within a cluster: decaying or flat.")] = "decaying",
    workers: Annotated[int, typer.Option(min=1, help="Processes of wmdd; POT has one.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the features.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="File to append the records to.")] = None,
) -> None:
    """Time the barycenters of generated classes, compared with POT."""
    if spectrum not in ("decaying", "flat"):
        raise InputError(f"--spectrum {spectrum}: valid: decaying, flat")
    parts = [part.strip() for part in ipc.split(",")]
    counts = [int(part) for part in parts if part.isdecimal()]
    if len(counts) < len(parts) or not all(1 <= count <= images for count in counts):
        raise InputError(f"--ipc {ipc}: expected numbers from 1 to {images}, such as 10,50")
    chosen: Spectrum = "flat" if spectrum == "flat" else "decaying"

    def cloud(index: int) -> torch.Tensor:
        return features(images, dimension, chosen, seed * 1_000_003 + index)

    table = Table("IPC", "engine", "classes/s", "least", "most", "ratio", "least", "most", "mean W2²")
    table.caption = "ratio: time of POT, including drawing the starts, divided by the time of wmdd"
    for count in counts:
        with progress(f"barycenters, IPC {count}", classes, "classes") as advance:
            found = compare(cloud, classes, count, workers, advance=advance)
        for engine, metrics in found.items():
            keys = ("rate", "rate_low", "rate_high", "ratio", "ratio_low", "ratio_high", "w2")
            row = [f"{metrics[key]:.2f}" if key in metrics else "–" for key in keys]
            table.add_row(str(count), engine, *row)
            setup: dict[str, object] = {
                "ipc": count,
                "images": images,
                "dimension": dimension,
                "classes": classes,
                "starts": 1,
            }
            setup |= {"weights": "uniform", "spectrum": spectrum, "seed": seed, "threads": 1}
            setup |= {"workers": processes(workers) if engine == "wmdd" else 1}
            speed = SpeedRecord(
                kind="throughput",
                stage="barycenters",
                engine=engine,
                dataset="synthetic",
                unit="classes/s",
                metrics=metrics,
                setup=setup,
                provenance=provenance.provenance(ComputeConfig(device="cpu")),
            )
            if out:
                files.append(out, speed)
        own = found["wmdd"]
        typer.echo(
            f"IPC {count}: {own['ratio']:.2f} times as fast as POT's loop including drawing the starts "
            f"({own['ratio_strict']:.2f} without, {own['ratio_same_results']:.2f} with W2² and nearest images too), "
            f"W2² {own['w2_excess']:+.2%} ± {own['w2_excess_error']:.2%} (standard error)"
        )
    results().print(table)


if __name__ == "__main__":
    cli_options.answer(lambda: typer.run(main))
