"""Tables of accuracies: methods beside each other, beside what is published, across networks, taken apart."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.report.aggregate import BYTES
from wmdd.report.comparison import COMPARABLE, CORESET, REFERENCE
from wmdd.report.families import bare
from wmdd.report.format import (
    NONE,
    Row,
    behind,
    count,
    difference,
    p_value,
    percent,
    points,
    setting_cells,
    size,
    with_interval,
)
from wmdd.report.sections import REGIMES, ReportSection, sections
from wmdd.report.table import Table, term
from wmdd.report.verdict import ONE_SET, improving, place_of, single

if TYPE_CHECKING:
    from wmdd.report.collect import Report

_ABLATION = {
    "wmdd": ("barycenter", "class"),
    "ce-pcbn": ("cross-entropy", "class"),
    "barycenter-global": ("barycenter", "global"),
    "ce-global": ("cross-entropy", "global"),
}
"""The four cells: what features are compared with, and whose BatchNorm moments are matched."""
_UNOPTIMIZED = {"start": ("nothing", "nothing"), "noise": ("nothing", "nothing")}
"""Rows beside the four cells where they were measured: the images that all start from, and noise."""


def overview(report: "Report") -> Iterator[Table]:
    """Yield methods × (IPC, labels) of each section, where several methods were measured under several of these."""
    every = sections(report)
    covered: list[tuple[ReportSection, Any]] = []
    for section in every:
        rows = section.students
        across = list(dict.fromkeys((row["ipc"], row["regime"]) for row in rows))
        across.sort(key=lambda pair: (REGIMES.index(pair[1]), pair[0]))
        lines: dict[tuple[Any, ...], dict[tuple[int, str], Row]] = {}
        for row in rows:
            key = tuple(row[key] for key in ("dataset", "network", "view", "method"))
            lines.setdefault(key, {})[row["ipc"], row["regime"]] = row
        if len(across) > 1 and len({method for *_, method in lines}) > 2:
            covered.append((section, (across, lines)))
    left = [one.name for one in every if one.students and one not in [section for section, _ in covered]]
    for section, (across, lines) in covered:
        yield _overview(section.name if len(every) > 1 else "", across, lines, left)


def _overview(
    section: str,
    across: list[tuple[int, str]],
    lines: dict[tuple[Any, ...], dict[tuple[int, str], Row]],
    left: list[str],
) -> Table:
    # The method that leads in most settings comes first.
    order = sorted(
        lines, key=lambda key: (key[1:3], -sum(row["top1"] for row in lines[key].values()) / len(lines[key]))
    )
    names = {place: f"IPC {place[0]} {place[1]}" for place in across}
    cells = [(number, place, lines[key][place]) for number, key in enumerate(order) for place in lines[key]]
    rows = [row for found in lines.values() for row in found.values()]
    marks = {(number, names[place]): mark for number, place, row in cells if (mark := _mark(row))}
    return Table(
        title="Overview",
        section=section,
        caption=(
            "Top-1 %. Bold: best of its column; underlined: not distinguishable from the best. Colour: the adjusted"
            f" test shows a difference to {REFERENCE} images at 5 %, blue above and orange below; white: it does not."
            + (f" Not here, with two methods or one setting: {'; '.join(left)}." if left else "")
            + (" *: students still change when they train twice as long." if any(map(improving, rows)) else "")
        ),
        columns=["Data set", "Network", "View", "Method", *names.values()],
        rows=[
            [*key, *(_marked(lines[key][place]) if place in lines[key] else NONE for place in across)] for key in order
        ],
        words=4,
        setting=3,
        marks=marks,
        heat={(number, names[place]): heat for number, place, row in cells if (heat := _heat(row))},
    )


def _mark(row: Row) -> str:
    found = place_of(row)
    return found if found in ("best", "tie") else ""


def _heat(row: Row) -> float:
    """Return the difference to random images in 95 % intervals, from −1 to 1; 0 where the adjusted test shows none."""
    if row["scope"] != "sets" or row["p_adjusted"] > 0.05:
        return 0.0
    return max(-1.0, min(1.0, float(row["difference"] / (row["high95"] - row["low95"]))))


def accuracy(report: "Report") -> Iterator[Table]:
    """Yield a table of each section: interval, difference to the baseline, bytes, and what varies of the recipe."""
    every = sections(report)
    for section in every:
        yield _accuracy(section, section.name if len(every) > 1 else "")


def _accuracy(section: ReportSection, name: str) -> Table:
    rows = [{**row, "recipe": _whole(row)} for row in section.rows]
    learned = [row["recipe"] for row in rows if not pd.isna(row["ipc"])]
    keys = list(dict.fromkeys(key for recipe in learned or [row["recipe"] for row in rows] for key in recipe))
    # What the reader must know first; the rest in the order of the records.
    first = ["classes", "resolution", "evaluated_on", "test_images", "epochs", "updates", "batch_size", "teacher"]
    keys = [key for key in first if key in keys] + [key for key in keys if key not in first]
    values = {key: {term(key, recipe.get(key)) for recipe in learned} for key in keys}
    values |= {"evaluated_on": {term("evaluated_on", row["recipe"]["evaluated_on"]) for row in rows}}
    unlike = [key for key in keys if len(values[key]) > 1]
    front = ["Data set", "Network", "View", "IPC", "Labels", "Method", "Top-1 %", f"vs {REFERENCE}, points", "p"]
    front += [f"Detects vs {REFERENCE}, points", f"vs {CORESET}, points", f"p vs {CORESET}", "n"]
    leads = ["Best ahead, points", "p vs best", "Detects vs best, points"]
    sizes = ["Images", "Labels on disk", "Teacher", "All bytes", "Labelling, FLOP", "Top-5 %"]
    checked = any(not pd.isna(row["convergence"]) and row["convergence"].state != "not checked" for row in rows)
    tuned = any(_tuned(row) != NONE for row in rows)
    tail = ["Converged"] * checked + ["Recipe chosen on"] * tuned
    return Table(
        title="Accuracy",
        section=name,
        caption=_about(rows, learned, checked),
        columns=[*front, *leads, *sizes, *(key.replace("_", " ") for key in unlike), *tail],
        rows=[
            [*setting_cells(row)[1:], _named(row), percent(row, "top1"), difference(row), p_value(row["p_adjusted"])]
            + [points(row["detects"]), difference(row, "coreset_"), p_value(row["coreset_p_adjusted"]), count(row)]
            + [behind(row), p_value(row["behind_p"]), points(row["behind_detects"])]
            + [size(row[key]) for key in BYTES[:3]]
            + [size(all_bytes(row)), size(row["labelling_flops"], "FLOP"), percent(row, "top5")]
            + [term(key, row["recipe"].get(key)) for key in unlike]
            + [_converged(row)] * checked
            + [_tuned(row)] * tuned
            for row in rows
        ],
        words=6,
        tail=len(tail),
        setting=5,
        terms={key.replace("_", " "): next(iter(values[key])) for key in keys if key not in unlike and values[key]},
        origins=[row["origins"] for row in rows],
        marks={
            (number, column): mark
            for number, row in enumerate(rows)
            if not pd.isna(row["ipc"]) and (mark := _mark(row))
            for column in ("Method", "Top-1 %")
        },
        optional=frozenset([*leads, *sizes, *(key.replace("_", " ") for key in unlike)]),
    )


def _whole(row: Row) -> dict[str, Any]:
    return {"classes": row["classes"], "resolution": row["resolution"], **row["recipe"]}


def _about(rows: list[Row], learned: list[dict[str, Any]], checked: bool) -> str:
    """Return what one must know to read the table of accuracies."""
    spread = any(not pd.isna(row["top1_half_width"]) for row in rows)
    said = ["n = distinct distilled sets × students of each."]
    if any(row["behind_scope"] == "sets" for row in rows):
        said.append(
            "Bold: best of its setting; underlined: not distinguishable from the best. Best ahead: lead of the best"
            " method over the row, with p and interval by Bonferroni over the other methods of the setting."
        )
    said.append("Mean ± half-width of the 95 % t-interval over sets." if spread else "Means.")
    if any(pd.isna(row["top1_half_width"]) and row["n"] > 1 for row in rows):
        said.append("In parentheses: least and most, where fewer than three independent values give no interval.")
    if any(single(row) for row in rows):
        said.append(f"Where n is 1×m, {ONE_SET}.")
    if any(row["fixed"] == 1 for row in rows):
        said.append("Where no seed changes the images, the interval is over their students.")
    if any(row["scope"] == "sets" for row in rows):
        said.append(
            f"Differences to {REFERENCE} real images: Welch's t-test over sets; p and interval are adjusted by Holm"
            " for the distinct comparisons of a setting. Detects: smallest true difference found with 80 % power."
        )
    if any(row["scope"] == "this set" for row in rows):
        said.append("This set only: over the students of the one set and the other's sets.")
    said += _about_teachers(learned)
    if checked:
        said.append("Converged: the mean of three students moves by less than one point when they train twice as long.")
    elif learned:
        said.append("Whether students have converged was not checked.")
    if any(not pd.isna(row["label_bytes"]) for row in rows):
        said.append("All bytes: images, labels, and the teacher where it makes the labels online.")
    return " ".join(said)


def all_bytes(row: Row) -> float | None:
    """Return the bytes that students need: images, labels, and the teacher where labels are made online."""
    if pd.isna(row["image_bytes"]) or pd.isna(row["label_bytes"]):
        return None
    teacher = row["teacher_bytes"]
    if row["regime"] != "soft":  # other labels are made before
        return float(row["image_bytes"] + row["label_bytes"])
    return None if pd.isna(teacher) else float(row["image_bytes"] + row["label_bytes"] + teacher)


def architectures(report: "Report") -> Table:
    """Return methods × student networks, where one distilled set taught several."""
    rows = [row for row in report.accuracy.to_dict("records") if not pd.isna(row["ipc"])]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    keys = [key for key in COMPARABLE if key != "network"]
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((*(row[key] for key in keys), row["method"]), {})[row["network"]] = row
    several = [found for found in lines.values() if len(found) > 1]
    return Table(
        title="Cross-architecture",
        caption="Top-1 % of each student network on the same distilled images, as in the accuracy table.",
        columns=["Recipe", "Data set", "View", "IPC", "Labels", "Method", *networks],
        rows=[
            [cell for i, cell in enumerate(setting_cells(next(iter(found.values())))) if i != 2]
            + [next(iter(found.values()))["method"]]
            + [percent(found[network], "top1") if network in found else NONE for network in networks]
            for found in several
        ],
        words=6,
        setting=5,
        origins=[[one for row in found.values() for one in row["origins"]] for found in several],
    )


def ablation(report: "Report") -> Table:
    """Return the four cells of the method, where all of them were measured."""
    cells_of = _ABLATION | _UNOPTIMIZED
    rows = [row for row in report.accuracy.to_dict("records") if bare(row["method"]) in cells_of]
    figures = [figure for figure in report.published if figure.entry.study == "ablation"]
    lines: list[list[str]] = []
    origins = []
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(tuple(row[key] for key in COMPARABLE), []).append(row)
    for found in settings.values():
        if not {bare(row["method"]) for row in found} >= set(_ABLATION):
            continue
        for row in sorted(found, key=lambda row: list(cells_of).index(bare(row["method"]))):
            at = (row["dataset"], row["ipc"], row["network"], bare(row["method"]))
            same = [f for f in figures if (f.dataset, f.ipc, f.entry.network, f.entry.ours) == at]
            soft = [f for f in same if (f.entry.regime == "hard") == (row["regime"] == "hard")]
            cells = [percent(row, "top1"), count(row), f"{100 * soft[0].top1:.1f}" if soft else NONE]
            lines.append([*setting_cells(row), row["method"], *cells_of[bare(row["method"])], *cells])
            origins.append(row["origins"])
    caption = (
        "Features are matched to barycenters or classified by the teacher; BatchNorm moments are those of the class"
    )
    caption += " or of the whole training set. Start: the images that the cells begin from, never optimized."
    if any(line[-1] != NONE for line in lines):
        caption += " Published: ablation of WMDD's project page."
    columns = ["Recipe", "Data set", "Network", "View", "IPC", "Labels", "Method", "Features", "BatchNorm"]
    return Table(
        "Ablation", caption, [*columns, "Top-1 %", "n", "Published %"], lines, words=9, setting=6, origins=origins
    )


def robustness(report: "Report") -> Table:
    """Return the scores of DD-Ranking, where at least one is known."""
    found = report.robustness
    rows = found[found[["hlr", "lrs", "ars"]].notna().any(axis=1)].to_dict("records")
    return Table(
        title="Robustness",
        caption=(
            "DD-Ranking's scores (arXiv:2505.13300) on fractions, with both weights 0.5. HLR, points: accuracy of the"
            " whole training set less that of the images, under hard labels (less is better); the former is the"
            " teacher's, where teacher and student are one network, and otherwise missing. IOR, points: gain over"
            f" {REFERENCE} real images under the row's labels. LRS joins both, ARS the gains with and without"
            " augmentation; from 0 to 100, 26.9 stands for no loss and no gain. Their 95 % intervals are over distilled"
            " sets, for the one teacher."
        ),
        columns=["Recipe", "Data set", "Network", "View", "IPC", "Labels", "Method", "HLR", "IOR", "LRS", "ARS"],
        rows=[
            [
                *setting_cells(row),
                row["method"],
                points(row["hlr"]),
                points(row["ior"], "+"),
                _score(row, "lrs"),
                _score(row, "ars"),
            ]
            for row in rows
        ],
        words=7,
        setting=6,
        origins=[row["origins"] for row in rows],
    )


def _score(row: Row, name: str) -> str:
    """Return a score with its interval, where one is known."""
    text = with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], sign="")
    return f"{text} (this set only)" if row[f"{name}_scope"] == "this set" else text


def _about_teachers(recipes: list[dict[str, Any]]) -> list[str]:
    """Return what the intervals say about other teachers."""
    if any("one for each set" in str(recipe.get("teacher")) for recipe in recipes):
        return ["Each set has a teacher of its own; differences are paired by it."]
    known = any(recipe.get("teacher") for recipe in recipes)
    return ["One teacher: nothing is said about others."] if known else []


def _marked(row: Row) -> str:
    return percent(row, "top1") + "*" * improving(row)


def _converged(row: Row) -> str:
    return NONE if pd.isna(row["convergence"]) else row["convergence"].text


def _tuned(row: Row) -> str:
    """Return what the recipe of the images was chosen on, and in how many trials."""
    if pd.isna(row["tuned_on"]) or row["tuned_on"] == "unknown":
        return NONE
    names = {"published": "published constants", "holdout": "hold-out", "test": "test set: no evidence"}
    return names[row["tuned_on"]] + (f", {row['trials']} trials" if row["trials"] else "")


def _named(row: Row) -> str:
    """Return the method, and another one that chose the same images."""
    return row["method"] if pd.isna(row["same_as"]) else f"{row['method']} = {row['same_as']}"
