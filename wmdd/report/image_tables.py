"""Tables from which test images were right: accuracy by class, and what other test images could change."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wmdd.records.correct_bitmaps import by_class, mcnemar, two_way, unpack
from wmdd.records.intervals import Difference
from wmdd.records.schema import Record
from wmdd.records.set_samples import compared
from wmdd.report.comparison import COMPARABLE, REFERENCE, sample_of_values
from wmdd.report.format import NONE, Row, p_value, points
from wmdd.report.table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wmdd.report.collect import Report

MAX_CLASSES = 20
"""Classes that fit side by side; of more, the table has those that differ most from random images."""

_COLUMNS = ("Recipe", "Data set", "Network", "View", "IPC", "Labels", "Method")

Bits = dict[tuple[str, int], "NDArray[np.bool_]"]
"""Which test images were right, by set and student seed."""


def accuracy_by_class(report: "Report") -> Table:
    """Return the accuracy of each class, for every method whose records say which images were right."""
    rows = [(row, counts, _mean(bits)) for row, counts, bits in _measured(report)]
    classes = [by_class(mean, counts) for _, counts, mean in rows]
    shown = _shown(rows, classes)
    return Table(
        title="Accuracy by class",
        caption=(
            "Top-1 % of each class, by its position; mean of all students."
            + (f" Of {len(classes[0])} classes, those that differ most from {REFERENCE} images." if shown and
               len(shown) < len(classes[0]) else "")
        ),
        columns=[*_COLUMNS, *map(str, shown)],
        rows=[
            [*_setting(row), *(points(own[index]) if index < len(own) else NONE for index in shown)]
            for (row, _, _), own in zip(rows, classes, strict=True)
        ],
        words=7,
        setting=6,
        origins=[row["origins"] for row, _, _ in rows],
    )  # fmt: skip


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
        lines.append([*_setting(row), *cells, p_value(p) if scope == "sets" else NONE])
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
        name = str(row["method"]).partition(" ")[0]
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
        if str(other["method"]).partition(" ")[0] == REFERENCE and all(other[key] == row[key] for key in COMPARABLE)
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
    random = [own for (row, _, _), own in zip(rows, classes, strict=True) if str(row["method"]).startswith(REFERENCE)]
    if not random:
        return list(range(MAX_CLASSES))
    gaps = [max(abs(own[index] - random[0][index]) for own in classes if len(own) == most) for index in range(most)]
    return sorted(sorted(range(most), key=lambda index: -gaps[index])[:MAX_CLASSES])


def _interval(found: Difference) -> str:
    return f"{points(found.mean, '+')} [{', '.join(map(points, found.bounds()))}]"


def _setting(row: Row) -> list[str]:
    setting = [row["dataset"], row["network"], row["view"], str(row["ipc"]), row["regime"], row["method"]]
    return [row["recipe_name"] or NONE, *setting]
