"""DD-Ranking's scores of the rows of the accuracy table, with what is known of their uncertainty."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from wmdd.records.intervals import Difference
from wmdd.records.scores import hard_label_recovery, normalized
from wmdd.records.set_samples import Scope, compared
from wmdd.report.comparison import COMPARABLE, sample_of_values
from wmdd.report.families import is_random

WEIGHT = 0.5
"""Share of the gain over random images in LRS, and of the augmented gain in ARS, as published."""

Row = dict[str, Any]
Values = Mapping[tuple[str, int], float]


def robustness(found: pd.DataFrame) -> pd.DataFrame:
    """Return HLR, IOR, LRS and ARS (``records.scores``) of each row of students in ``accuracy``; missing where unknown.

    The accuracy of the whole training set under hard labels is the teacher's, where teacher and student are one
    network and were measured on the same images; it counts as known, for there is one teacher. ARS compares the views
    ``epochs`` and ``plain``, on the row of the former. Both scores are computed for each distilled set, and their
    intervals are those of ``samples.compared``.
    """
    rows = found.to_dict("records")
    whole = {row["teacher"]: row for row in rows if pd.isna(row["ipc"]) and row["teacher"]}
    cell = [key for key in [*COMPARABLE, "method", "name"] if key not in ("regime", "view")]
    table = {(row["regime"], row["view"], *(row[key] for key in cell)): row for row in rows if not pd.isna(row["ipc"])}
    scores = []
    for (regime, view, *rest), row in table.items():
        hard, plain = table.get(("hard", view, *rest)), table.get((regime, "plain", *rest))
        score: Row = {key: row[key] for key in [*COMPARABLE, "method", "name", "origins"]}
        if is_random(row):
            score["ior"] = 0.0
        elif not pd.isna(row["difference"]):
            score["ior"] = row["difference"]
        full = _whole(row, whole.get(row["teacher"]))
        if full is not None and hard:
            score["hlr"] = hard_label_recovery(full, hard["top1"])
        if "ior" in score:
            random = {key: _random(one, rows) for key, one in (("own", row), ("plain", plain)) if one}
            if full is not None and hard:
                score |= _label_robust(row, hard, random["own"], full)
            if plain and view == "epochs" and random["plain"] is not None:
                score |= _augmentation_robust(row, plain, random)
        scores.append(score)
    parts = [f"{name}{part}" for name in ("lrs", "ars") for part in ("", "_low", "_high", "_scope")]
    return pd.DataFrame(scores, columns=[*COMPARABLE, "method", "name", "origins", "hlr", "ior", *parts])


def _label_robust(row: Row, hard: Row, random: Row | None, full: float) -> Row:
    """LRS: of α = w·(soft − random) − (1 − w)·(full − hard), set by set."""
    if random is None:
        return {}
    share = 1 - WEIGHT
    if is_random(row):  # it gains nothing over itself
        own = sample_of_values({key: share * value for key, value in hard["values"].items()}, row["fixed"])
        spread = own.interval()
        half = spread.half_width if spread else math.nan
        return _score("lrs", own.mean - share * full, own.mean - share * full - half, half, "sets")
    both = _mixed(row["values"], hard["values"])
    if not both:
        return {}
    others = sample_of_values({key: WEIGHT * value for key, value in random["values"].items()}, random["fixed"])
    return _from("lrs", *compared(sample_of_values(both, row["fixed"]), others), share * full)


def _augmentation_robust(row: Row, plain: Row, random: Mapping[str, Row | None]) -> Row:
    """ARS: of β = γ·(gain with augmentation) + (1 − γ)·(gain without), set by set."""
    if is_random(row):
        return {"ars": normalized(0.0)}
    own = _mixed(row["values"], plain["values"])
    one, other = random["own"], random["plain"]
    others = _mixed(one["values"], other["values"]) if one and other else {}
    if not one or not own or not others:
        return {}
    samples = sample_of_values(own, row["fixed"]), sample_of_values(others, one["fixed"])
    return _from("ars", *compared(*samples), 0.0)


def _mixed(one: Values, other: Values) -> dict[tuple[str, int], float]:
    """Return the weighted mean of two measurements of the same students' seeds on the same sets."""
    return {key: WEIGHT * one[key] + (1 - WEIGHT) * other[key] for key in one if key in other}


def _from(name: str, found: Difference, scope: Scope, less: float) -> Row:
    low, high = found.bounds() if scope != "none" else (math.nan, math.nan)
    return _score(name, found.mean - less, low - less, (high - low) / 2, scope)


def _score(name: str, mean: float, low: float, half: float, scope: Scope) -> Row:
    """Map a sum of gains and its interval to a score, which grows with it."""
    made: Row = {name: normalized(mean), f"{name}_scope": scope}
    if not math.isnan(half):
        made |= {f"{name}_low": normalized(low), f"{name}_high": normalized(low + 2 * half)}
    return made


def _whole(row: Row, teacher: Row | None) -> float | None:
    """Return the accuracy of a row's teacher, if it tells what the row's network reaches on the whole training set."""
    if teacher is None or teacher["recipe"]["evaluated_on"] != row["recipe"]["evaluated_on"]:
        return None
    alike = all(teacher[key] == row[key] for key in ("dataset", "classes", "resolution", "network"))
    return float(teacher["top1"]) if alike else None


def _random(row: Row, rows: list[Row]) -> Row | None:
    """Return the random images that a row is compared with."""
    setting = [row[key] for key in COMPARABLE]
    found = {other["name"]: other for other in rows if is_random(other) and [other[k] for k in COMPARABLE] == setting}
    return found.get(row["name"]) or found.get("")
