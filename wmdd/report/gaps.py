"""What a report cannot answer, because it was never measured."""

from typing import TYPE_CHECKING

import pandas as pd

from wmdd.report.format import Row
from wmdd.report.sections import ReportSection, sections, settings

if TYPE_CHECKING:
    from wmdd.report.collect import Report


def gaps(report: "Report") -> list[tuple[str, list[str]]]:
    """Return what was not measured anywhere, then what not in each section, one phrase each."""
    found = []
    every = sections(report)
    for section in every:
        if section.students:
            siblings = [one for one in every if one.recipe.data == section.recipe.data and one is not section]
            others = {row["method"] for one in siblings for row in one.students}
            found.append((section.name, [*_missing(section, siblings), *_never(section, others)]))
    shared = [one for one in found[0][1] if all(one in phrases for _, phrases in found)] if len(found) > 1 else []
    own = [(name, [one for one in phrases if one not in shared]) for name, phrases in found]
    speeds = [speed for _, speed in report.speeds]
    if speeds and not any(speed.provenance.get("cuda") for speed in speeds):
        shared = [*shared, "speeds on a GPU: all are of CPUs"]
    told = [("everywhere", shared), *own]
    return [(name, phrases) for name, phrases in told if phrases]


def _missing(section: ReportSection, siblings: list[ReportSection]) -> list[str]:
    """Return the methods and settings that were measured elsewhere on the same data, and not here."""
    here = settings(section.students)
    methods = list(dict.fromkeys(row["method"] for row in section.students))
    said = []
    holes: dict[str, list[str]] = {}
    for setting, rows in here.items():
        absent = [one for one in methods if one not in {row["method"] for row in rows}]
        if absent:
            holes.setdefault(", ".join(absent), []).append(_words(setting))
    said += [f"{names}: not at {'; '.join(places)}" for names, places in holes.items()]
    known = {row["method"] for one in siblings for row in one.students}
    if absent := sorted(known - set(methods)):
        said.append(f"methods of other recipes: {', '.join(absent)}")
    places = [setting for one in siblings for setting in settings(one.students) if setting not in here]
    if places:
        said.append(f"settings of other recipes: {'; '.join(dict.fromkeys(map(_words, places)))}")
    return said


def _words(setting: tuple[object, ...]) -> str:
    view, _, ipc, regime = setting
    return f"IPC {ipc} {regime}" + ("" if view == "epochs" else f" ({view})")


def _never(section: ReportSection, others: set[str]) -> list[str]:
    rows = section.students
    said = []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if len(methods) < 3 and not others - set(methods):
        said.append(f"methods other than {' and '.join(methods)}")
    if len(networks := {row["network"] for row in rows}) == 1:
        said.append(f"students of another network than {next(iter(networks))}")
    if {row["view"] for row in rows} == {"epochs"}:
        said.append("students that train for a fixed number of updates")
    unchecked = [row for row in rows if pd.isna(row["convergence"]) or row["convergence"].state == "not checked"]
    if len(unchecked) == len(rows):
        said.append("whether students have converged")
    elif unchecked:
        said.append(f"whether students have converged, for {len(unchecked)} of {len(rows)} results")
    if _one_teacher(rows):
        said.append("another teacher: results hold for one")
    if not any("test_images" in row["recipe"] for row in rows):
        said.append("which test images were right (so no accuracy by class, no interval over other test images)")
    if len(section.rows) == len(rows):
        said.append("the accuracy of the teacher, or of the whole training set")
    return said


def _one_teacher(rows: list[Row]) -> bool:
    return not any("one for each set" in str(row["recipe"].get("teacher")) for row in rows)
