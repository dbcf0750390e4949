"""Intervals and tests keep what they promise, on normal values and on those of the committed records."""

import itertools
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from wmdd.records.files import read_records
from wmdd.records.set_samples import compared, sample_of

RESULTS = Path(__file__).parents[2] / "bench" / "results"
DRAWS = 4000


def committed() -> tuple[np.ndarray, np.ndarray]:
    """Return residuals of sets and of students of the committed records, each of standard deviation one in its row.

    A row is a method in one setting. Rows of several sets with one student each give the first; rows of one set with
    several students the second.
    """
    rows: dict[tuple[object, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(RESULTS.glob("*.jsonl")):
        for one in read_records(file)[0]:
            rows[file.name, one.run, one.ipc, one.regime, one.view][one.artefact or ""].append(one.metrics["top1"])
    found: tuple[list[float], list[float]] = ([], [])
    for sets in rows.values():
        values = [fmean(own) for own in sets.values()] if len(sets) >= 3 else next(iter(sets.values()))
        if len(values) >= 3 and np.std(values):
            found[len(sets) < 3].extend((np.array(values) - np.mean(values)) / np.std(values))
    return np.array(found[0]), np.array(found[1])


def draw(random: np.random.Generator, source: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    return random.standard_normal(shape) if source is None else random.choice(source, shape)


@pytest.mark.parametrize("residuals", ["normal", "committed"])
@pytest.mark.parametrize(("sets", "students"), [(3, 1), (5, 1), (5, 3)])
def test_intervals_cover_and_equal_methods_are_not_told_apart(sets: int, students: int, residuals: str) -> None:
    random = np.random.default_rng(0)
    over_sets, over_students = committed() if residuals == "committed" else (None, None)
    truth = [0.80, 0.80]
    # Standard deviations of sets and of students, as they were found: those of one side are twice the other's.
    noise = [(0.020, 0.009), (0.010, 0.009)]
    values = []
    for mean, (between, within) in zip(truth, noise, strict=True):
        luck = between * draw(random, over_sets, (DRAWS, sets, 1))
        values.append(mean + luck + within * draw(random, over_students, (DRAWS, sets, students)))

    covered = claimed = own = 0
    for one, other in zip(*values, strict=True):
        samples = [sample_of({str(i): list(row) for i, row in enumerate(side)}) for side in (one, other)]
        found, scope = compared(*samples)
        low, high = found.bounds()
        covered += low <= 0 <= high
        claimed += found.p < 0.05
        assert scope == "sets"
        interval = samples[0].interval()
        assert interval is not None
        own += abs(interval.mean - truth[0]) <= interval.half_width

    assert covered / DRAWS >= 0.93
    assert claimed / DRAWS <= 0.06
    assert own / DRAWS >= 0.93


def test_students_of_one_set_are_no_evidence_about_the_method() -> None:
    one = sample_of({"a": [0.97, 0.96, 0.98]})
    several = sample_of({"b": [0.95], "c": [0.96], "d": [0.94]})

    assert one.interval() is None
    for pair in itertools.product((one,), (one, sample_of({"x": [0.9, 0.91, 0.92]}))):
        found, scope = compared(*pair)
        assert (scope, np.isnan(found.p)) == ("none", True)
        assert np.isnan(found.bounds()).all()
    assert compared(several, one)[1] == "none", "one random set tells nothing about random images"
