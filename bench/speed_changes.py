"""``wmdd bench compare OLD NEW`` of speeds: each work before and after, and whether the change exceeds the spread."""

from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from wmdd.records.comparability import shorten
from wmdd.records.schema import SpeedRecord
from wmdd.report.aggregate import origin
from wmdd.report.cost_tables import rate
from wmdd.storage.files import flatten

Verdict = Literal["faster", "slower", "within the spread", "one repeat"]

_WORK = ("kind", "stage", "engine", "dataset", "network", "resolution", "ranks", "mode", "unit")


@dataclass(frozen=True)
class SpeedChange:
    """One work, timed twice."""

    work: str
    before: SpeedRecord
    after: SpeedRecord
    elsewhere: bool
    """Whether the two were timed on other hardware."""

    @property
    def ratio(self) -> float:
        """New rate over the old one."""
        return self.after.metrics["rate"] / self.before.metrics["rate"]

    @property
    def verdict(self) -> Verdict:
        """Whether all repeats of one are beyond all of the other."""
        old, new = (self._ends(speed) for speed in (self.before, self.after))
        if old is None or new is None:
            return "one repeat"
        return "faster" if new[0] > old[1] else "slower" if new[1] < old[0] else "within the spread"

    @staticmethod
    def _ends(speed: SpeedRecord) -> tuple[float, float] | None:
        metrics = speed.metrics
        return (metrics["rate_low"], metrics["rate_high"]) if {"rate_low", "rate_high"} <= metrics.keys() else None


def changes(old: list[SpeedRecord], new: list[SpeedRecord]) -> list[SpeedChange]:
    """Return the works that both lists hold, in the order of the new one; of several timings the latest counts."""
    before, after = (_latest(speeds) for speeds in (old, new))
    found = []
    for key, speed in after.items():
        if key in before:
            elsewhere = origin(before[key].provenance)[1] != origin(speed.provenance)[1]
            found.append(SpeedChange(_words(speed), before[key], speed, elsewhere))
    return found


def _latest(speeds: list[SpeedRecord]) -> dict[str, SpeedRecord]:
    timed = (speed for speed in sorted(speeds, key=lambda speed: speed.time) if "rate" in speed.metrics)
    return {
        str([*(getattr(speed, key) for key in _WORK), sorted(flatten(speed.setup).items())]): speed for speed in timed
    }


def _words(speed: SpeedRecord) -> str:
    parts: list[Any] = [speed.stage, speed.dataset, speed.network, speed.resolution and f"{speed.resolution} px"]
    parts += [speed.engine, f"{speed.ranks} ranks" if speed.ranks > 1 else None, speed.mode]
    parts += [f"{key} {shorten(speed.setup[key])}" for key in ("batch", "ipc", "precision") if key in speed.setup]
    return ", ".join(str(part) for part in parts if part)


def print_changes(found: list[SpeedChange], console: Console) -> None:
    """Print a line for each work, and what is wrong with the comparison."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Work", overflow="fold")
    for head in ("Old", "New", "New / old", "Change"):
        table.add_column(head, justify="right")
    for one in found:
        rates = [rate(speed) for speed in (one.before, one.after)]
        verdict = one.verdict + (" (other hardware)" if one.elsewhere else "")
        style = {"faster": "green", "slower": "bold red"}.get(one.verdict, "")
        table.add_row(one.work, *rates, f"{one.ratio:.2f}×", verdict, style=style if not one.elsewhere else "")
    console.print(table)
    slower = sum(one.verdict == "slower" and not one.elsewhere for one in found)
    console.print(
        f"{slower} of {len(found)} slower. Median rate [least, most]; faster or slower: all repeats of one are beyond"
        " all of the other. Works that only one file holds are left out.",
        markup=False,
    )
