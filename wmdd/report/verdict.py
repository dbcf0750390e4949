"""The verdict of each setting: which method is best, which are as good, and what could have been detected."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from wmdd.report.comparison import REFERENCE, SAME
from wmdd.report.families import family, is_random
from wmdd.report.format import NONE, Row, behind, count, difference, p_value, percent, points
from wmdd.report.sections import VIEWS, ReportSection, sections, settings

if TYPE_CHECKING:
    from wmdd.report.collect import Report

ONE_SET = "one set says nothing about another distillation"
"""What stands wherever a seeded method has a single distilled set."""


def single(row: Row) -> bool:
    """Return whether a row is of one distilled set of a method whose seed changes the images."""
    return bool(row["sets"] == 1 and not row["fixed"])


def improving(row: Row) -> bool:
    """Return whether students of a row are known to change when they train twice as long."""
    return not pd.isna(row["convergence"]) and row["convergence"].state == "improving"


def place_of(row: Row) -> str:
    """Return the place of a method in its setting: ``best``, ``tie`` with the best, ``untested`` or nothing."""
    if row["behind_scope"] == "best":
        return "best"
    if row["behind_scope"] != "sets":
        return "untested"
    return "tie" if row["behind_p"] > 0.05 else ""


@dataclass(frozen=True)
class Bar:
    """The difference of one method to random images, as a forest plot shows it; positions are shares of the width."""

    row: Row
    method: str
    family: str
    at: float
    thin: tuple[float, float] | None
    """The interval at 95 %, or that of this set only."""
    wide: tuple[float, float] | None
    """The interval adjusted for all comparisons of the setting."""
    hollow: bool
    """Whether it says nothing about another distillation."""
    place: str
    """``best``; ``tie``: not distinguishable from the best; ``untested``: too few sets; or empty."""
    text: str
    p: str
    n: str
    top1: str


@dataclass(frozen=True)
class Forest:
    """Differences to random images of one setting, the best method first."""

    bars: list[Bar]
    zero: float | None
    """Where no difference lies; None where random images were not measured."""
    ticks: list[tuple[float, str]]

    @property
    def tested(self) -> bool:
        """Whether any bar has a p-value."""
        return any(bar.p != NONE for bar in self.bars)


@dataclass(frozen=True)
class Verdict:
    """What a setting shows."""

    section: ReportSection
    setting: str
    """IPC, labels and network in words."""
    rows: list[Row]
    """The best first."""

    @property
    def best(self) -> Row:
        """The method of the highest mean."""
        return self.rows[0]

    @property
    def tested(self) -> bool:
        """Whether the sets of the best method can be compared with those of any other."""
        return any(row["behind_scope"] == "sets" for row in self.rows)

    def methods(self, place: str) -> list[str]:
        """Return the methods of a place."""
        return [row["method"] for row in self.rows if place_of(row) == place]

    def sentences(self) -> list[str]:
        """Return the verdict, one idea a sentence; the first names the best method."""
        said = [self._first()]
        alike, untested = self.methods("tie"), self.methods("untested")
        if alike:
            said.append(f"Not distinguishable from {self.best['method']}: {_listed(alike)}")
        if ruled_out := self.methods(""):
            said.append(f"Behind it: {_listed(ruled_out)}")
        said += self._wider()
        if untested and not single(self.best):
            said.append(f"Too few sets to test: {_listed(untested)}")
        if rank := self._rank():
            said.append(rank)
        groups: dict[str, list[str]] = {}
        for row in self.rows:
            if not pd.isna(row["same_as"]):
                groups.setdefault(row["same_as"], [row["same_as"]]).append(row["method"])
        said += [f"The same images: {_listed(names)}" for names in groups.values()]
        if (hardest := self._hardest()) is not None:
            said.append(
                f"A true difference of {points(hardest['behind_detects'])} points between {self.best['method']} and"
                f" {hardest['method']} would be found 4 times in 5; smaller ones are often missed"
            )
        if fixed := [row["method"] for row in self.rows if row["fixed"] == 1 and row["sets"] == 1]:
            said.append(f"No seed changes the images of {_listed(fixed)}: ± is over students")
        if any(single(row) for row in self.rows if not is_random(row)):
            said.append(ONE_SET[0].upper() + ONE_SET[1:])
        if moving := [row["method"] for row in self.rows if improving(row)]:
            said.append(f"Still {self.best['convergence'].text if improving(self.best) else 'improving'} when trained"
                        f" twice as long: {_listed(moving)}")  # fmt: skip
        if (held := self.best["recipe"]["evaluated_on"]) != "test":
            said.append(f"Measured on the {held} images")
        return said

    def _wider(self) -> list[str]:
        """Return why a method may be ruled out although its mean is nearer to the best than that of another."""
        said = []
        for number, row in enumerate(self.rows):
            nearer = [one["method"] for one in self.rows[:number] if not place_of(one)]
            if place_of(row) == "tie" and nearer:
                name, which = row["method"], " and ".join(nearer)
                said.append(f"{name} has a lower mean than {which}, but a wider spread that does not rule it out")
        return said

    def _hardest(self) -> Row | None:
        """Return the method that needs the largest difference from the best to be found.

        It is one that is not distinguishable from the best if there is any, or else random.
        """
        rows = [row for row in self.rows if row["behind_scope"] == "sets"]
        rows = [row for row in rows if place_of(row) == "tie"] or [row for row in rows if is_random(row)] or rows
        return max(rows, key=lambda row: row["behind_detects"], default=None)

    @property
    def outcome(self) -> str:
        """What the setting shows, in words that several settings can share."""
        if not self.tested or self.methods("untested"):
            return "Too few sets to test"
        if not self.methods("tie") and not is_random(self.best):
            return f"{self.best['method']} is ahead of every other method"
        if any(row["scope"] == "sets" and row["low"] > 0 for row in self.rows):
            return f"A method is above {REFERENCE} images, but none is ahead of all others,"
        if not any(map(is_random, self.rows)):
            return "No method is shown to be ahead of all others"
        return f"No method is shown to be above {REFERENCE} images"

    def _first(self) -> str:
        best = self.best
        word = "Best" if self.tested else "Highest mean"
        text = f"{word}: {best['method']} {percent(best, 'top1')} %"
        if not pd.isna(best["difference"]) and best["scope"] != SAME:
            text += f", {difference(best, unit=f' points over {REFERENCE}')}"
            text += "" if pd.isna(best["p_adjusted"]) else f" (p {p_value(best['p_adjusted'])})"
            text += ", the interval holds 0" if best["low"] <= 0 <= best["high"] else ""
        elif is_random(best) and len(self.rows) > 1:
            text += f"; no method is above {REFERENCE} images"
        rival = next((row for row in self.rows if row["behind_scope"] != "best"), None)
        if rival and rival["behind_scope"] == "sets" and not is_random(rival):
            unit = "" if REFERENCE in text else " points"
            text += f"; {behind(rival)}{unit} over {rival['method']}, next by mean (p {p_value(rival['behind_p'])})"
        return text

    def _rank(self) -> str:
        distinct = [row for row in self.rows if pd.isna(row["same_as"])]
        places = [number for number, row in enumerate(distinct, start=1) if is_random(row)]
        if len(distinct) < 3 or len(places) != 1:
            return ""
        same = len(self.rows) - len(distinct)
        return (
            f"{REFERENCE} is {_ordinal(places[0])} of {len(distinct)}"
            + " (methods with the same images count once)" * bool(same)
        )

    def forest(self) -> Forest:
        """Return the differences to random images, drawn to one scale."""
        known = [row for row in self.rows if not pd.isna(row["difference"])]
        if not known:
            return Forest([self._bar(row, lambda _: 0.0) for row in self.rows], None, [])
        ends = [0.0]
        for row in known:
            ends += [row[key] for key in ("difference", "low", "high", "low95", "high95") if not pd.isna(row[key])]
        ticks = _ticks(100 * min(ends), 100 * max(ends))
        low, high = ticks[0], ticks[-1]

        def at(value: float) -> float:
            return (100 * value - low) / (high - low)

        marks = [((tick - low) / (high - low), f"{tick:+g}".replace("-", "−") if tick else "0") for tick in ticks]
        return Forest([self._bar(row, at) for row in self.rows], at(0.0), marks)

    def _bar(self, row: Row, at: Callable[[float], float]) -> Bar:
        random = is_random(row)
        value = 0.0 if random else row["difference"]
        adjusted = not random and row["scope"] == "sets"
        plain = ("low95", "high95") if adjusted else ("low", "high")
        known = not random and not pd.isna(row[plain[0]])
        return Bar(
            row=row,
            method=row["method"],
            family=family(row["method"]),
            at=math.nan if pd.isna(value) else at(value),
            thin=(at(row[plain[0]]), at(row[plain[1]])) if known else None,
            wide=(at(row["low"]), at(row["high"])) if adjusted else None,
            hollow=not random and row["scope"] != "sets",
            place=place_of(row),
            text="baseline" if random else difference(row).removesuffix(" (this set only)"),  # the hollow dot says it
            p=NONE if random else p_value(row["p_adjusted"]),
            n=count(row),
            top1=percent(row, "top1"),
        )


def verdicts(report: "Report") -> list[Verdict]:
    """Return the verdict of every setting, section by section."""
    found = []
    for section in sections(report):
        several = {row["network"] for row in section.students}, {row["view"] for row in section.students}
        for (view, network, ipc, regime), rows in settings(section.students).items():
            name = f"IPC {ipc}, {regime} labels"
            name += f", {network}" if len(several[0]) > 1 else ""
            name += VIEWS[view] or (", by epochs" if len(several[1]) > 1 else "")
            found.append(Verdict(section, name, rows))
    return found


def summary(found: list[Verdict]) -> list[str]:
    """Return what all verdicts say together: where a method is alone best, and where none is above random images."""
    if len(found) < 2:
        return []
    told: dict[str, list[Verdict]] = {}
    for one in found:
        told.setdefault(one.outcome, []).append(one)
    totals = Counter(one.rows[0]["regime"] for one in found)
    said = []
    for outcome, own in sorted(told.items(), key=lambda pair: -len(pair[1])):
        regimes = Counter(one.rows[0]["regime"] for one in own)
        parts = [f"{name} labels {regimes[name]} of {totals[name]}" for name in totals if regimes[name]]
        said.append(f"{outcome} in {len(own)} of {len(found)} settings ({', '.join(parts)}).")
    return said


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from below ``low`` to above ``high``, at most six."""
    span = max(high - low, 0.1)
    raw = span / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 6) for number in range(first, max(last, first + 1) + 1)]
