"""``wmdd bench power``: smallest detectable difference of the measured sets, and sets needed for a given one."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from wmdd.errors import InputError
from wmdd.records.power import MOST_SETS, sets_needed
from wmdd.records.set_samples import Sample, compared
from wmdd.report.aggregate import where
from wmdd.report.collect import collect
from wmdd.report.comparison import COMPARABLE, REFERENCE, sample_of_values
from wmdd.report.families import is_random
from wmdd.report.format import NONE, points


@dataclass(frozen=True)
class Power:
    """Power of a comparison with random real images; accuracies are fractions."""

    setting: str
    method: str
    sets: tuple[int, int]
    """Number of independent values of the method, and of random images."""
    spread: tuple[float, float]
    """Standard deviations of these values; NaN with one value, or with one set of a seeded method."""
    detects: float
    """Smallest difference that these sets detect with 80 % power; NaN if unknown."""
    needed: int | None
    """Number of sets per method that detects the given difference; None if unknown, or too large."""


def power(places: list[Path], difference: float) -> list[Power]:
    """Return the power of every comparison with random images in files of records or run folders.

    Args:
        places: files of records or run folders.
        difference: difference to detect, as a fraction.

    Raises:
        InputError: a file or folder contains no results, or no setting has both random images and a method.
    """
    rows = [row for row in collect(places).accuracy.to_dict("records") if row["ipc"] == row["ipc"]]
    found = []
    for row in rows:
        setting = [row[key] for key in COMPARABLE]
        random = [one for one in rows if [one[key] for key in COMPARABLE] == setting and is_random(one)]
        if not random or is_random(row):
            continue
        other = next((one for one in random if one["name"] == row["name"]), random[0])
        found.append(_power(where(setting), row, other, difference))
    if not found:
        raise InputError(f"{', '.join(map(str, places))}: no setting has both {REFERENCE} images and a method")
    return found


def _power(setting: str, row: dict[str, Any], other: dict[str, Any], difference: float) -> Power:
    samples = [sample_of_values(one["values"], one["fixed"]) for one in (row, other)]
    spread = _spread(samples[0]), _spread(samples[1])
    known, scope = compared(*samples)
    return Power(
        setting,
        row["method"],
        (len(samples[0].values), len(samples[1].values)),
        spread,
        known.detects() if scope == "sets" else math.nan,
        None if any(map(math.isnan, spread)) else sets_needed(*spread, difference),
    )


def _spread(sample: Sample) -> float:
    return stdev(sample.values) if len(sample.values) > 1 and sample.kind != "one set" else math.nan


def print_power(found: list[Power], difference: float, console: Console) -> None:
    """Print a line for each comparison."""
    wanted = f"{100 * difference:g} points"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Setting", overflow="fold")
    table.add_column("Method")
    heads = ("n", f"n {REFERENCE}", "sd, points", f"sd {REFERENCE}", "Detects, points", f"Sets for {wanted}")
    for head in heads:
        table.add_column(head, justify="right")
    for one in found:
        beyond = f"> {MOST_SETS:,}" if not any(map(math.isnan, one.spread)) else NONE
        needed = beyond if one.needed is None else f"{one.needed:,}"
        figures = [*(str(count) for count in one.sets), *map(points, one.spread), points(one.detects), needed]
        table.add_row(one.setting, one.method, *figures)
    console.print(table)
    console.print(
        "Two-sided test at 5 %, not adjusted for several comparisons, 80 % power. Sets: number of sets per method, with"
        " one student each. A single set has no standard deviation."
    )
