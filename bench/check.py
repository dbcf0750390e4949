"""``wmdd bench check``: checks that a file of records follows the rules that its tables rely on."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wmdd.errors import InputError
from wmdd.records.convergence import Convergence, base_view, convergence
from wmdd.records.files import read_records, write_records
from wmdd.records.schema import Record, SpeedRecord
from wmdd.report.comparison import SETTING
from wmdd.storage.files import digest

Row = tuple[Any, ...]
"""Setting, method and name of a row of a table."""
_VERSIONS = ("wmdd", "torch", "python")


def check(path: Path) -> list[str]:
    """Return the problems of a file of records, one sentence each; none for a file that may be published.

    Raises:
        InputError: there is no such file, or it holds no accuracies and no speeds.
    """
    records, problems = read_records(path)
    speeds, _ = read_records(path, SpeedRecord)
    if not records and not speeds and not problems:
        raise InputError(f"{path}: holds no records")
    students = [record for record in records if record.kind == "student"]
    found = [*problems, *_revisions(records), *_baselines(speeds)]
    for rule in (_repeated_seeds, _checkpoints, _test_images, _tuning, _recipes, _convergence):
        found += rule(students)
    return found


def mark(path: Path) -> int:
    """Write into every record whether its row has converged, from the file's own students; return the changed records.

    Raises:
        InputError: there is no such file, or a line of it cannot be read.
    """
    records, problems = read_records(path)
    speeds, _ = read_records(path, SpeedRecord)
    if problems:
        raise InputError(problems[0])
    if speeds:
        raise InputError(f"{path}: holds speeds, which have nothing to mark")
    states = _states([record for record in records if record.kind == "student"])
    marked = [
        record.model_copy(update={"convergence": states[_row(record)].state}) if record.kind == "student" else record
        for record in records
    ]
    if changed := sum(one != other for one, other in zip(marked, records, strict=True)):
        write_records(path, marked)
    return changed


def _row(record: Record) -> Row:
    values = {key: getattr(record, key) for key in SETTING} | {"view": base_view(record.view)}
    return *values.values(), record.method, record.run


def _name(row: Row) -> str:
    setting = dict(zip(SETTING, row, strict=False))
    name = row[-1] if row[-1] == row[-2] else f"{row[-2]} ({row[-1]})"
    return f"{name}, {setting['dataset']}, IPC {setting['ipc']}, {setting['network']}, {setting['regime']} labels"


def _by_row(students: Iterable[Record]) -> dict[Row, list[Record]]:
    rows: dict[Row, list[Record]] = defaultdict(list)
    for record in students:
        rows[_row(record)].append(record)
    return rows


def _revisions(records: Sequence[Record]) -> Iterator[str]:
    """One revision a table, without uncommitted changes, and one version of each package."""
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in records:
        tables[one.dataset].append(one.provenance)
    for table, found in tables.items():
        revisions = Counter(str(one.get("revision"))[:12] for one in found)
        if len(revisions) > 1:
            counts = ", ".join(f"{name} ({count})" for name, count in revisions.most_common())
            yield f"{table}: mixes revisions: {counts}; measure all of it at one"
        if changed := sum(bool(one.get("dirty")) for one in found):
            yield f"{table}: {changed} records were measured with uncommitted changes"
        for name in _VERSIONS:
            versions = sorted({str(one.get(name)) for one in found})
            if len(versions) > 1:
                yield f"{table}: mixes versions of {name}: {', '.join(versions)}"


def _baselines(speeds: Sequence[SpeedRecord]) -> Iterator[str]:
    """A file of speeds may grow over revisions; an engine and what it is compared with are of one."""
    measured: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for speed in speeds:
        place = speed.kind, speed.stage, speed.dataset, speed.network, speed.resolution
        measured[place, speed.provenance.get("revision")].add(speed.engine)
    for speed in speeds:
        place = speed.kind, speed.stage, speed.dataset, speed.network, speed.resolution
        revision = speed.provenance.get("revision")
        if "ratio" in speed.metrics and len(measured[place, revision]) < 2:
            yield f"{speed.stage} by {speed.engine}: its baseline was not measured at its revision {str(revision)[:12]}"
    if changed := sum(bool(speed.provenance.get("dirty")) for speed in speeds):
        yield f"{changed} speeds were measured with uncommitted changes"


def _repeated_seeds(students: Sequence[Record]) -> Iterator[str]:
    """No student twice, and no seed of a distillation with two sets of images."""
    for row, own in _by_row(students).items():
        twice = Counter((record.view, record.artefact, record.distillation_seed, record.student_seed) for record in own)
        for (_, artefact, seed, student), count in twice.items():
            if count > 1:
                yield f"{_name(row)}: seed {seed} with student {student} stands {count} times (set {str(artefact)[:8]})"
        # One seed that several students of a seeded method share must not be counted as several sets.
        sets = defaultdict(set)
        for record in own:
            sets[record.distillation_seed].add(record.artefact)
        for seed, artefacts in sets.items():
            if len(artefacts) > 1:
                yield f"{_name(row)}: seed {seed} was used twice, for {len(artefacts)} sets of images"


def _checkpoints(students: Sequence[Record]) -> Iterator[str]:
    """The accuracy of the last epoch, never of the best."""
    for row, own in _by_row(students).items():
        others = sorted({str(r.recipe.get("checkpoint")) for r in own if r.recipe.get("checkpoint") != "last"})
        if others:
            yield f"{_name(row)}: measured at the {', '.join(others)} epoch; only the last one is evidence"


def _test_images(students: Sequence[Record]) -> Iterator[str]:
    """All of a table on the same images: the test set, or the hold-out."""
    for dataset in sorted({record.dataset for record in students}):
        own = [record for record in students if record.dataset == dataset]
        if len({record.evaluated_on for record in own}) > 1:
            yield f"{dataset}: some students were measured on held-out images and some on the test set"
    for row, own in _by_row(students).items():
        if len({record.test_images for record in own}) > 1:
            yield f"{_name(row)}: students were measured on different numbers of test images"


def _tuning(students: Sequence[Record]) -> Iterator[str]:
    """No recipe chosen on the images that it is then measured on."""
    for row, own in _by_row(students).items():
        if any(record.tuned_on == record.evaluated_on for record in own if record.tuned_on in ("test", "holdout")):
            where = "the test set" if own[0].evaluated_on == "test" else "the hold-out"
            yield f"{_name(row)}: its recipe was chosen on {where}, which it is measured on"


def _recipes(students: Sequence[Record]) -> Iterator[str]:
    """One recipe of students in a setting; one teacher, or one for each distillation seed."""
    settings: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in students:
        settings[tuple(getattr(record, key) for key in SETTING)].append(record)
    for setting, own in settings.items():
        at = dict(zip(SETTING, setting, strict=True))
        place = f"{at['dataset']}, IPC {at['ipc']}, {at['network']}, {at['regime']} labels, {at['view']}"
        recipes = {digest({key: value for key, value in one.recipe.items() if key != "teacher"}) for one in own}
        if len(recipes) > 1:
            yield f"{place}: students of {len(recipes)} recipes in one setting"
        pairs = {(one.distillation_seed, str(one.recipe.get("teacher"))) for one in own}
        teachers = {teacher for _, teacher in pairs}
        if len(teachers) > 1 and not len(pairs) == len(teachers) == len({seed for seed, _ in pairs}):
            yield f"{place}: {len(teachers)} teachers that some sets share; use one, or one for each distillation seed"


def _states(students: Sequence[Record]) -> dict[Row, Convergence]:
    states = {}
    for row, own in _by_row(students).items():
        once, twice = (
            {(str(r.artefact), r.student_seed or 0): r.metrics["top1"] for r in own if (r.view == row[6]) is base}
            for base in (True, False)
        )
        states[row] = convergence(once, twice)
    return states


def _convergence(students: Sequence[Record]) -> Iterator[str]:
    """Every row bears the mark that the file's own students that train twice as long give it."""
    for row, state in _states(students).items():
        own = [record for record in students if _row(record) == row]
        wrong = sorted({str(record.convergence) for record in own if record.convergence != state.state})
        if wrong:
            marks = ", ".join("no mark" if one == "None" else f"the mark {one!r}" for one in wrong)
            yield f"{_name(row)}: is {state.text} and bears {marks}; set it with --mark"
