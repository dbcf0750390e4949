"""Tables from which test images were right: accuracy by class, and what other test images could change."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wmdd.records.correct_bitmaps import by_class, mcnemar, two_way, unpack
from wmdd.records.intervals import Difference
from wmdd.records.schema import Record
from wmdd.records.set_samples import compared
from wmdd.report.comparison import COMPARABLE, REFERENCE, sample_of_values
from wmdd.report.families import bare, is_random
from wmdd.report.format import NONE, Row, p_value, points, setting_cells, with_interval
from wmdd.report.recipes import DATA
from wmdd.report.table import Table
from wmdd.report.verdict import single

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wmdd.report.collect import Report

MAX_CLASSES = 20
"""Classes that fit side by side; of more, the table has those that differ most from random images."""

_COLUMNS = ("Recipe", "Data set", "Network", "View", "IPC", "Labels", "Method")

Bits = dict[tuple[str, int], "NDArray[np.bool_]"]
"""Which test images were right, by set and student seed."""


def accuracy_by_class(report: "Report") -> Iterator[Table]:
    """Yield the accuracy of each class of each dataset, for every method whose records say which images were right."""
    by_data: dict[tuple[Any, ...], list[tuple[Row, tuple[int, ...], NDArray[np.floating]]]] = {}
    for row, counts, bits in _measured(report):
        by_data.setdefault(tuple(row[key] for key in DATA), []).append((row, counts, _mean(bits)))
    for data, rows in by_data.items():
        section = f"{data[0]} ({data[1]} classes, {data[2]} px)" if len(by_data) > 1 else ""
        yield _by_class(section, rows, _class_names(report, data[0]))


def _by_class(
    section: str, rows: "list[tuple[Row, tuple[int, ...], NDArray[np.floating]]]", names: dict[int, str]
) -> Table:
    classes = [by_class(mean, counts) for _, counts, mean in rows]
    shown = _shown(rows, classes)
    columns = {index: names.get(index, str(index)) for index in shown}
    random = {
        tuple(row[key] for key in COMPARABLE): own
        for (row, _, _), own in zip(rows, classes, strict=True)
        if is_random(row)
    }
    heat: dict[tuple[int, str], float] = {}
    for number, ((row, _, _), own) in enumerate(zip(rows, classes, strict=True)):
        base = random.get(tuple(row[key] for key in COMPARABLE), own)
        heat |= {(number, columns[index]): max(-1.0, min(1.0, 5 * (own[index] - base[index]))) for index in shown}
    few = f" Of {len(classes[0])} classes, those that differ most from {REFERENCE} images."
    return Table(
        title="Accuracy by class",
        section=section,
        caption=(
            "Top-1 % of each class; mean of all students. Colour: difference to"
            f" {REFERENCE} images, blue above and orange below, full at 20 points."
            + few
            * (len(shown) < len(classes[0]))
        ),
        columns=[*_COLUMNS, *columns.values()],
        rows=[
            [*setting_cells(row), row["method"], *(points(own[index]) if index < len(own) else NONE for index in shown)]
            for (row, _, _), own in zip(rows, classes, strict=True)
        ],
        words=7,
        setting=6,
        heat={place: share for place, share in heat.items() if abs(share) > 0.05},
    )


def _class_names(report: "Report", dataset: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for run in report.runs:
        if run.dataset == dataset:
            found |= run.class_names
    return found


def pairs_of_methods(report: "Report") -> Table:
    """Return how the first student of each method errs on other images than that of the best one."""
    by_setting: dict[tuple[Any, ...], list[tuple[Row, tuple[int, ...], Bits]]] = {}
    for one in _measured(report):
        by_setting.setdefault(tuple(one[0][key] for key in COMPARABLE), []).append(one)
    lines = []
    for own in by_setting.values():
        best, counts, bits = max(own, key=lambda one: float(one[0]["top1"]))
        first = _first(bits)
        for row, other_counts, other_bits in own:
            if row is best or other_counts != counts:
                continue
            second = _first(other_bits)
            only, missed, p = mcnemar(first, second)
            both, neither = int((first & second).sum()), int((~first & ~second).sum())
            tells = not single(row) and not single(best)
            cells = [str(both), str(only), str(missed), str(neither), p_value(p) if tells else NONE]
            lines.append([*setting_cells(best), f"{best['method']} and {row['method']}", *cells])
    return Table(
        title="Pairs of methods",
        caption=(
            "Test images that the first student of the best method and that of another one got right. McNemar's exact p"
            " is about these two students, not about their methods; each pair for itself."
        ),
        columns=[*_COLUMNS[:-1], "Pair", "Both right", "Only the first", "Only the second", "Both wrong", "p, McNemar"],
        rows=lines,
        words=7,
        setting=6,
    )


def other_images(report: "Report") -> Table:
    """Return each difference to random images with its interval over sets alone, and over other test images as well."""
    measured = _measured(report)
    lines: list[list[str]] = []
    origins = []
    for row, counts, bits in measured:
        reference = _reference(row, measured)
        if reference is None or reference[1] != counts:
            continue
        other, _, others = reference
        samples = [sample_of_values(one["values"], one["fixed"]) for one in (row, other)]
        found, scope = compared(*samples)
        if scope == "none":
            continue
        both = two_way(_units(row, bits), _units(other, others))
        only, missed, p = mcnemar(_first(bits), _first(others))
        about = " (this set only)" if scope == "this set" else ""
        cells = [str(sum(counts)), f"{_interval(found)}{about}", f"{_interval(both)}{about}", f"{only} / {missed}"]
        lines.append([*setting_cells(row), row["method"], *cells, p_value(p) if scope == "sets" else NONE])
        origins.append(row["origins"])
    return Table(
        title="Other test images",
        caption=(
            f"Difference to {REFERENCE} images, points. The interval over sets is about these test images; the one"
            " beside it is about others as well (bootstrap over sets and images). Right / wrong: images that only the"
            f" first student of the method, or only that of {REFERENCE} images, got right, and McNemar's exact p, which"
            " is about these two students. 95 %, each comparison for itself."
        ),
        columns=[*_COLUMNS, "Test images", "Over sets", "Over sets and images", "Right / wrong", "p, McNemar"],
        rows=lines,
        words=7,
        setting=6,
        origins=origins,
    )


def _measured(report: "Report") -> list[tuple[Row, tuple[int, ...], Bits]]:
    """Return the rows of the accuracy table whose students all have a bitmap of the same test images."""
    cells: dict[tuple[Any, ...], list[tuple[str, Record]]] = {}
    key = [*COMPARABLE, "method", "name"]
    if report.students.empty:
        return []
    for cell, group in report.students.groupby(key):
        cells[cell] = list(zip(group["images"], group["record"], strict=True))
    found = []
    for row in report.accuracy.to_dict("records"):
        if pd.isna(row["ipc"]):
            continue
        name = bare(row["method"])
        students = cells.get((*(row[part] for part in COMPARABLE), name, row["name"]), [])
        counts = {record.test_images for _, record in students}
        if len(counts) == 1 and all(record.correct and record.test_images for _, record in students):
            (only,) = counts
            bits = {(i, r.student_seed or 0): unpack(str(r.correct), sum(only or ())) for i, r in students}
            found.append((row, only or (), bits))
    return found


def _reference(row: Row, measured: list[tuple[Row, tuple[int, ...], Bits]]) -> tuple[Row, tuple[int, ...], Bits] | None:
    random = {
        other["name"]: (other, counts, bits)
        for other, counts, bits in measured
        if is_random(other) and all(other[key] == row[key] for key in COMPARABLE)
    }
    own = random.get(row["name"]) or random.get("")
    return own if own and own[0] is not row else None


def _units(row: Row, bits: Bits) -> "list[NDArray[np.floating]]":
    """Return the share of right students at each image: of each set, or of each student where there is one set."""
    if row["sets"] == 1:
        return [one.astype(float) for one in bits.values()]
    sets: dict[str, list[NDArray[np.bool_]]] = {}
    for (images, _), one in bits.items():
        sets.setdefault(images, []).append(one)
    return [np.mean(own, axis=0) for own in sets.values()]


def _mean(bits: Bits) -> "NDArray[np.floating]":
    found: NDArray[np.floating] = np.mean(list(bits.values()), axis=0)
    return found


def _first(bits: Bits) -> "NDArray[np.bool_]":
    return bits[min(bits, key=lambda key: (key[1], key[0]))]


def _shown(rows: list[tuple[Row, tuple[int, ...], Any]], classes: list[list[float]]) -> list[int]:
    """Return the positions of the classes that fit."""
    most = max(map(len, classes), default=0)
    if most <= MAX_CLASSES:
        return list(range(most))
    random = [own for (row, _, _), own in zip(rows, classes, strict=True) if is_random(row)]
    if not random:
        return list(range(MAX_CLASSES))
    gaps = [max(abs(own[index] - random[0][index]) for own in classes if len(own) == most) for index in range(most)]
    return sorted(sorted(range(most), key=lambda index: -gaps[index])[:MAX_CLASSES])


def _interval(found: Difference) -> str:
    return with_interval(found.mean, *found.bounds())
