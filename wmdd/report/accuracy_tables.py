"""Tables of accuracies: methods beside each other, beside what is published, across networks, taken apart."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.report.aggregate import BYTES, where
from wmdd.report.comparison import CORESET, REFERENCE, SETTING
from wmdd.report.format import NONE, Row, count, difference, p_value, percent, points, size
from wmdd.report.published import PublishedAccuracy
from wmdd.report.table import Table, term

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


ONE_SET = "one set says nothing about another distillation"
"""What stands wherever a seeded method has a single distilled set."""


def single(row: Row) -> bool:
    """Return whether a row is of one distilled set of a method whose seed changes the images."""
    return bool(row["sets"] == 1 and not row["fixed"])


def improving(row: Row) -> bool:
    """Return whether students of a row are known to change when they train twice as long."""
    return not pd.isna(row["convergence"]) and row["convergence"].state == "improving"


def headlines(report: "Report") -> list[tuple[str, str, str]]:
    """Return (setting, method, result) of every method that is no baseline, as words."""
    lines = []
    rows = report.accuracy.to_dict("records")
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    for row in (row for row in rows if not row["baseline"]):
        setting = tuple(row[key] for key in SETTING)
        result = f"{percent(row, 'top1')} %"
        references = {other["name"]: other for other in settings[setting] if _bare(other) == REFERENCE}
        reference = references.get(row["name"]) or references.get("")
        if reference and not pd.isna(row["difference"]):
            result += f" vs {reference['method']} {percent(reference, 'top1')} %, {difference(row, unit=' points')}"
            result += ", the interval holds 0" if row["low"] <= 0 <= row["high"] else ""
        held = "" if row["recipe"]["evaluated_on"] == "test" else f", on the {row['recipe']['evaluated_on']} images"
        alone = f"; {ONE_SET}" if single(row) else ""
        alone += f"; students are still {row['convergence'].text} when trained twice as long" if improving(row) else ""
        lines.append((where(setting), row["method"], f"{result}, n = {count(row)}{held}{alone}"))
    return lines


def overview(report: "Report") -> Table:
    """Return methods × (IPC, labels), where several methods were measured under several of these."""
    rows = [row for row in report.accuracy.to_dict("records") if not pd.isna(row["ipc"])]
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    across = sorted({(row["ipc"], row["regime"]) for row in rows}, key=lambda pair: (pair[0], regimes.index(pair[1])))
    lines: dict[tuple[Any, ...], dict[tuple[int, str], Row]] = {}
    for row in rows:
        key = tuple(row[key] for key in ("dataset", "network", "view", "method"))
        lines.setdefault(key, {})[row["ipc"], row["regime"]] = row
    if len(across) < 2 or len({method for *_, method in lines}) < 3:
        lines = {}
    return Table(
        title="Overview",
        caption="Top-1 % of every method, as in the accuracy table, which adds differences, counts and bytes."
        + (" *: students still change when they train twice as long." if any(map(improving, rows)) else ""),
        columns=["Data set", "Network", "View", "Method", *(f"IPC {ipc} {regime}" for ipc, regime in across)],
        rows=[
            [*key, *(_marked(found[place]) if place in found else NONE for place in across)]
            for key, found in lines.items()
        ],
        words=4,
        setting=3,
        origins=[[one for row in found.values() for one in row["origins"]] for found in lines.values()],
    )


def accuracy(report: "Report") -> Table:
    """Return every setting and method: interval, difference to the baseline, bytes, and what varies of the recipe."""
    rows = report.accuracy.to_dict("records")
    for row in rows:
        row["recipe"] = {"classes": row["classes"], "resolution": row["resolution"], **row["recipe"]}
    learned = [row["recipe"] for row in rows if not pd.isna(row["ipc"])]
    keys = list(dict.fromkeys(key for recipe in learned or [row["recipe"] for row in rows] for key in recipe))
    if "updates" in keys:  # which epochs alone do not tell
        keys.remove("updates")
        keys.insert(keys.index("epochs") + 1 if "epochs" in keys else len(keys), "updates")
    values = {key: {term(key, recipe.get(key)) for recipe in learned} for key in keys}
    values |= {"evaluated_on": {term("evaluated_on", row["recipe"]["evaluated_on"]) for row in rows}}
    unlike = [key for key in keys if len(values[key]) > 1]
    columns = ["Data set", "IPC", "Network", "Labels", "View", "Method", "Top-1 %", "Top-5 %", "n"]
    columns += [
        f"vs {REFERENCE}, points",
        "p",
        "Detects, points",
        f"vs {CORESET}, points",
        f"p vs {CORESET}",
        "Images",
        "Labels on disk",
        "Teacher",
        "Labelling, FLOP",
    ]
    columns += [key.replace("_", " ") for key in unlike]
    checked = any(not pd.isna(row["convergence"]) and row["convergence"].state != "not checked" for row in rows)
    tuned = any(_tuned(row) != NONE for row in rows)
    tail = ["Converged"] * checked + ["Recipe chosen on"] * tuned
    return Table(
        title="Accuracy",
        caption=(
            "n = distinct distilled sets × students of each."
            + (" Mean ± half-width of the 95 % t-interval over sets."
               if report.accuracy["top1_half_width"].notna().any() else " Means.")
            + (" In parentheses: least and most, where fewer than three independent values give no interval."
               if any(pd.isna(row["top1_half_width"]) and row["n"] > 1 for row in rows) else "")
            + (f" Where n is 1×m, {ONE_SET}." if any(single(row) for row in rows) else "")
            + (" Where no seed changes the images, the interval is over their students."
               if any(row["fixed"] == 1 for row in rows) else "")
            + (f" Differences to {REFERENCE} real images: Welch's t-test over sets; p and interval are adjusted by Holm"
               " for the distinct comparisons of a setting. Detects: smallest true difference found with 80 % power."
               if any(row["scope"] == "sets" for row in rows) else "")
            + (" This set only: over the students of the one set and the other's sets."
               if any(row["scope"] == "this set" for row in rows) else "")
            + _about_teachers(learned)
            + (" Converged: the mean of three students moves by less than one point when they train twice as long."
               if checked else " Whether students have converged was not checked." if learned else "")
            + (" Labels made online take no bytes but need the teacher, whose bytes stand in a column of their own."
               if report.accuracy["label_bytes"].notna().any() else "")
        ),
        columns=[*columns, *tail],
        rows=[
            [*_setting(row)[:-1], _named(row), percent(row, "top1"), percent(row, "top5"), count(row)]
            + [difference(row), p_value(row["p_adjusted"]), points(row["detects"])]
            + [difference(row, "coreset_"), p_value(row["coreset_p_adjusted"])]
            + [size(row[key], "FLOP" if key == "labelling_flops" else "B") for key in BYTES]
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
    )  # fmt: skip


def published(report: "Report") -> Table:
    """Return measured rows beside the figure that is published for their method, then what others published.

    A figure stands only beside students of its own kind of labels; settings without any figure are left out.
    """
    figures: dict[tuple[Any, ...], list[PublishedAccuracy]] = {}
    for figure in (figure for figure in report.published if figure.entry.study == "main"):
        kind = figure.entry.regime if figure.ipc else "hard"
        figures.setdefault((figure.dataset, figure.ipc, figure.entry.network, kind), []).append(figure)
    measured: dict[tuple[Any, ...], list[Row]] = {}
    for row in report.accuracy.to_dict("records"):
        whole = pd.isna(row["ipc"])
        kind = "hard" if whole or row["regime"] == "hard" else "soft"
        if row["view"] == "epochs":
            place = row["dataset"], None if whole else row["ipc"], row["network"], kind
            measured.setdefault(place, []).append(row)
    lines: list[list[str]] = []
    origins = []
    for (dataset, ipc, network, kind), own in measured.items():
        here = figures.get((dataset, ipc, network, kind), [])
        shown = set()
        for row in own if here else ():
            name = _bare(row) if ipc else "whole training set"
            match = next((f for f in here if (f.entry.ours or f.entry.method.lower()) == name), None)
            shown.add(match)
            cells = [percent(row, "top1"), f"{row['resolution']} px", *_literature(match)]
            lines.append([*_setting(row)[:4], row["method"], *cells])
            origins.append(row["origins"])
        for figure in sorted(here, key=lambda figure: -figure.top1):
            if figure not in shown:
                front = [dataset, str(ipc or "all"), network, kind if ipc else NONE, figure.entry.method]
                lines.append([*front, NONE, NONE, *_literature(figure)])
                origins.append([])
    columns = ["Data set", "IPC", "Network", "Labels", "Method", "Measured %", "measured at"]
    return Table(
        title="Measured and published",
        caption=(
            "What was measured here, and what is published for the same data set, IPC and network: in columns of their"
            " own, because student recipes, resolutions and checkpoints differ. Author: read in the authors' own"
            " pages; second-hand: quoted by others; memory: to be checked."
        ),
        columns=[*columns, "Published %", "published at", "Mark", "Source", "Checkpoint", "Note"],
        rows=lines,
        words=5,
        tail=4,
        setting=4,
        origins=origins,
    )


def _literature(figure: PublishedAccuracy | None) -> list[str]:
    if figure is None:
        return [NONE] * 6
    entry = figure.entry
    value = f"{100 * figure.top1:.1f}" + (f" ± {100 * figure.spread:.1f}" if figure.spread is not None else "")
    resolution = f"{entry.resolution} px" if entry.resolution else "?"
    return [value, resolution, entry.mark, entry.source, entry.checkpoint or "not known", entry.note or NONE]


def architectures(report: "Report") -> Table:
    """Return methods × student networks, where one distilled set taught several."""
    rows = [row for row in report.accuracy.to_dict("records") if not pd.isna(row["ipc"])]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    keys = [key for key in SETTING if key != "network"]
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((*(row[key] for key in keys), row["method"]), {})[row["network"]] = row
    several = [found for found in lines.values() if len(found) > 1]
    return Table(
        title="Cross-architecture",
        caption="Top-1 % of each student network on the same distilled images, as in the accuracy table.",
        columns=["Data set", "IPC", "Labels", "View", "Method", *networks],
        rows=[
            [cell for i, cell in enumerate(_setting(next(iter(found.values())))) if i != 2]
            + [percent(found[network], "top1") if network in found else NONE for network in networks]
            for found in several
        ],
        words=5,
        setting=4,
        origins=[[one for row in found.values() for one in row["origins"]] for found in several],
    )


def ablation(report: "Report") -> Table:
    """Return the four cells of the method, where all of them were measured."""
    cells_of = _ABLATION | _UNOPTIMIZED
    rows = [row for row in report.accuracy.to_dict("records") if _bare(row) in cells_of]
    figures = [figure for figure in report.published if figure.entry.study == "ablation"]
    lines: list[list[str]] = []
    origins = []
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    for found in settings.values():
        if not {_bare(row) for row in found} >= set(_ABLATION):
            continue
        for row in sorted(found, key=lambda row: list(cells_of).index(_bare(row))):
            at = (row["dataset"], row["ipc"], row["network"], _bare(row))
            same = [f for f in figures if (f.dataset, f.ipc, f.entry.network, f.entry.ours) == at]
            soft = [f for f in same if (f.entry.regime == "hard") == (row["regime"] == "hard")]
            cells = [percent(row, "top1"), count(row), f"{100 * soft[0].top1:.1f}" if soft else NONE]
            lines.append([*_setting(row), *cells_of[_bare(row)], *cells])
            origins.append(row["origins"])
    caption = (
        "Features are matched to barycenters or classified by the teacher; BatchNorm moments are those of the class"
    )
    caption += " or of the whole training set. Start: the images that the cells begin from, never optimized."
    if any(line[-1] != NONE for line in lines):
        caption += " Published: ablation of WMDD's project page."
    columns = ["Data set", "IPC", "Network", "Labels", "View", "Method", "Features", "BatchNorm"]
    return Table(
        "Ablation", caption, [*columns, "Top-1 %", "n", "Published %"], lines, words=8, setting=5, origins=origins
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
        columns=["Data set", "IPC", "Network", "Labels", "View", "Method", "HLR", "IOR", "LRS", "ARS"],
        rows=[
            [*_setting(row), points(row["hlr"]), points(row["ior"], "+"), _score(row, "lrs"), _score(row, "ars")]
            for row in rows
        ],
        words=6,
        setting=5,
        origins=[row["origins"] for row in rows],
    )


def _score(row: Row, name: str) -> str:
    """Return a score with its interval, where one is known."""
    text = points(row[name])
    if not pd.isna(row[f"{name}_low"]):
        text += f" [{points(row[f'{name}_low'])}, {points(row[f'{name}_high'])}]"
    return f"{text} (this set only)" if row[f"{name}_scope"] == "this set" else text


def _setting(row: Row) -> list[str]:
    """Return data set, IPC, network, labels, view and method."""
    ipc = "all" if pd.isna(row["ipc"]) else str(row["ipc"])
    regime = NONE if pd.isna(row["regime"]) else row["regime"]
    return [row["dataset"], ipc, row["network"], regime, _view(row), row["method"]]


def _about_teachers(recipes: list[dict[str, Any]]) -> str:
    """Return what the intervals say about other teachers."""
    if any("one for each set" in str(recipe.get("teacher")) for recipe in recipes):
        return " Each set has a teacher of its own; differences are paired by it."
    known = any(recipe.get("teacher") for recipe in recipes)
    return " One teacher: nothing is said about others." if known else ""


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


def _view(row: Row) -> str:
    return NONE if pd.isna(row["view"]) else str(row["view"])


def _bare(row: Row) -> str:
    return str(row["method"]).partition(" ")[0]
