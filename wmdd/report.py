"""Run folders consolidated: what was measured, what is missing, what it cost and where each number comes from.

``collect`` reads the folders once; the same tables then go to a terminal, to Markdown, to CSV or into one HTML page.
Only like is averaged and compared with like: students of one setting (``wmdd.metrics.SETTING``) share one recipe and
one set of test images, and runs of one name share one distillation; else the report is refused with what differs.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.errors import InputError, WmddError
from wmdd.files import read_json
from wmdd.metrics import REFERENCE, SETTING, compare
from wmdd.records import Record, flatten, read_records, refuse_unlike, shorten

if TYPE_CHECKING:
    from rich.console import Console

_DISTILLATION = ("method", "ipc", "data", "teacher", "statistics", "barycenter", "synthesis")
_SELECTION = ("method", "ipc", "data")
_UNITS = {"checkpoint": "epoch", "resolution": "px"}


@dataclass(frozen=True)
class Run:
    """What one run folder holds; parts that are absent or damaged are empty."""

    folder: Path
    label: str
    """Its place below the folder that holds all runs of the report."""
    owner: Path | None
    """Folder of the run that this one is a baseline of."""
    name: str
    """Name in the config; a baseline goes by the name of its owner."""
    config: dict[str, Any]
    teacher: dict[str, Any]
    blocks: dict[int, dict[str, Any]]
    """Sidecars of the blocks whose tensors are there."""
    records: list[Record]

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.config.get("method", self.folder.name))

    @property
    def groups(self) -> list[dict[str, Any]]:
        """What the sidecars say about groups: classes, seconds, curve."""
        return [group for _, sidecar in sorted(self.blocks.items()) for group in sidecar.get("groups", ())]


@dataclass(frozen=True)
class Table:
    """A table ready to print."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    words: int = 1
    """Leading columns that hold words; the others hold numbers."""
    terms: dict[str, str] = field(default_factory=dict)
    """The recipe that all rows share."""


@dataclass(frozen=True)
class Report:
    """The consolidated runs; accuracies are fractions, costs seconds."""

    runs: list[Run]
    accuracy: pd.DataFrame
    """``wmdd.metrics.compare``, with the ``recipe`` of each row; then a row for each teacher, without an IPC."""
    coverage: pd.DataFrame
    cost: pd.DataFrame
    provenance: pd.DataFrame
    problems: list[str]
    """What could not be read or does not count, one sentence each."""


def collect(folders: Sequence[Path]) -> Report:
    """Read run folders, or folders of run folders, with the baselines in them.

    Raises:
        InputError: a folder holds no run, or unlike measurements would be averaged or compared.
    """
    problems: list[str] = []
    runs = _read_runs(folders, problems)
    students = _students(runs, problems)
    return Report(runs, _accuracy(students, runs), _coverage(runs), _cost(runs), _provenance(students, runs), problems)


def _read_runs(folders: Sequence[Path], problems: list[str]) -> list[Run]:
    found: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such run folder")
        here = {file.resolve().parent for file in folder.rglob("config.json")}
        here |= {file.resolve().parent.parent for file in folder.rglob("*.jsonl") if file.parent.name == "records"}
        if not here:
            raise InputError(f"{folder}: holds no run (neither config.json nor records/*.jsonl)")
        found |= here
    common = Path(os.path.commonpath(found))
    base = common.parent if common in found else common
    runs: dict[Path, Run] = {}
    for folder in sorted(found):  # an owner comes before its baselines
        owner = runs.get(folder.parent.parent) if folder.parent.name == "baselines" else None
        runs[folder] = _read_run(folder, str(folder.relative_to(base)), owner, problems)
    # Places below the runs say enough, and a published page should not show somebody's home folder.
    problems[:] = [problem.replace(f"{base}{os.sep}", "") for problem in problems]
    return list(runs.values())


def _read_run(folder: Path, label: str, owner: Run | None, problems: list[str]) -> Run:
    def load(path: Path) -> dict[str, Any]:
        try:
            value = read_json(path) if path.exists() else {}
        except WmddError as error:
            problems.append(str(error))
            return {}
        return value if isinstance(value, dict) else {}

    config = load(folder / "config.json").get("config") or {}
    records: list[Record] = []
    if (folder / "records").is_dir():
        records, unread = read_records(folder / "records")
        problems += unread
    sidecars = [
        path for path in sorted(folder.glob("blocks/block-*.json")) if path.with_suffix(".safetensors").exists()
    ]
    blocks = {int(path.stem.removeprefix("block-")): sidecar for path in sidecars if (sidecar := load(path))}
    name = owner.name if owner else config.get("name") or (records[0].run if records else folder.name)
    teacher = load(folder / "teacher.json")
    return Run(folder, label, owner.folder if owner else None, name, config, teacher, blocks, records)


def _students(runs: list[Run], problems: list[str]) -> pd.DataFrame:
    """Return the students that count, one for each setting, method, name of the run and pair of seeds."""
    taken = [*SETTING, "method", "distillation_seed", "student_seed", "metrics", "time"]
    rows = [
        {key: getattr(record, key) for key in taken}
        | {"name": run.name, "baseline": run.owner is not None or record.method == REFERENCE}
        | {"images": record.artefact or record.config, "run": run, "record": record}
        for run in runs
        for record in run.records
        if record.kind == "student"
    ]
    frame = pd.DataFrame(rows, columns=[*taken, "name", "baseline", "images", "run", "record"]).sort_values("time")
    for setting, group in frame.groupby(SETTING):
        refuse_unlike(f"students of {_where(setting)}", _recipes(group))
    # A baseline that several runs measured on the same images makes one row, whatever the runs are called.
    for _, group in frame[frame["baseline"].astype(bool)].groupby([*SETTING, "method"]):
        if (group.groupby("distillation_seed")["images"].nunique() == 1).all():
            frame.loc[group.index, "name"] = ""
    cell, seeds = [*SETTING, "method", "name"], ["distillation_seed", "student_seed"]
    latest = frame.drop_duplicates([*cell, *seeds, "images"], keep="last")
    if repeated := len(frame) - len(latest):
        problems.append(f"{repeated} measurements were repeated on the same images; the latest of each counts")
    for (*setting, method, name), group in latest.groupby(cell):
        what = f"runs of {method} that go by one name ({name or method}) on {_where(setting)}"
        refuse_unlike(what, _distillations(group))
        for _, twice in group.groupby(seeds):
            images = zip(twice["run"], twice["images"], strict=True)
            refuse_unlike(f"{what} and one seed", ((run.label, {"artefact": artefact}) for run, artefact in images))
    return latest


def _recipes(group: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    for run, record in zip(group["run"], group["record"], strict=True):
        yield run.label, record.recipe | {"evaluated_on": record.evaluated_on, "protocol": record.protocol}


def _distillations(group: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    for run in {run.folder: run for run in group["run"] if run.config}.values():
        # A baseline that selects real images does not depend on how the run that owns it synthesises.
        sections = _SELECTION if run.owner and not any(group.get("curve") for group in run.groups) else _DISTILLATION
        terms = {key: run.config.get(key) for key in sections}
        data = {key: value for key, value in (terms["data"] or {}).items() if key != "root"}
        arithmetic = {key: run.config.get("compute", {}).get(key) for key in ("threads", "precision", "compile")}
        yield run.label, terms | {"data": data, "compute": arithmetic}


def _accuracy(students: pd.DataFrame, runs: list[Run]) -> pd.DataFrame:
    frame = compare(students)
    several = frame.groupby("method")["name"].nunique() > 1
    labels = [f"{m} ({n})" if n and several[m] else m for m, n in zip(frame["method"], frame["name"], strict=True)]
    recipes = {
        setting: {"evaluated_on": record.evaluated_on, **flatten(record.recipe)}
        for setting, record in students.groupby(SETTING)["record"].first().items()
    }
    frame["recipe"] = [recipes[setting] for setting in frame[SETTING].itertuples(index=False, name=None)]
    teachers: dict[str, dict[str, Any]] = {}
    for run in runs:
        if "top1" in run.teacher:
            data, about = run.config.get("data", {}), run.records[0] if run.records else None
            row = {key: run.teacher.get(key) for key in ("network", "top1", "top5")}
            row |= {"dataset": about.dataset if about else data.get("source", "?"), "method": "teacher", "n": 1}
            row["resolution"] = about.resolution if about else data.get("resolution")
            row |= {"classes": about.classes if about else None, "name": "", "baseline": True}
            row["recipe"] = {"evaluated_on": run.teacher.get("evaluated_on")}
            teachers.setdefault(run.teacher.get("sha256", run.label), row)
    whole = pd.concat([frame.assign(method=labels).astype(object), pd.DataFrame(list(teachers.values()), dtype=object)])
    return whole[list(frame.columns)].sort_values("dataset", kind="stable", ignore_index=True)


def _coverage(runs: list[Run]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for run in runs:
        student, labels = run.config.get("student", {}), run.config.get("labels", {})
        kinds = [(network, regime) for network in student.get("networks", ()) for regime in labels.get("regimes", ())]
        seeds, blocks = range(student.get("seeds", 0)), range(run.config.get("blocks", 0))
        done = {(record.network, record.regime, record.student_seed) for record in run.records}
        missing = [f"block {gap}" for gap in _ranges(index for index in blocks if index not in run.blocks)]
        for network, regime in kinds:
            gaps = _ranges(seed for seed in seeds if (network, regime, seed) not in done)
            missing += [f"student {network} {regime} seed {gap}" for gap in gaps]
        row = {"run": run.label, "method": run.method, "seed": run.config.get("seed")}
        row |= {"blocks": len(run.blocks), "blocks_expected": len(blocks), "students_expected": len(kinds) * len(seeds)}
        row["students"] = sum((network, regime, seed) in done for network, regime in kinds for seed in seeds)
        rows.append(row | {"missing": ", ".join(missing) if run.config else "config.json"})
        there = {run.method} | {other.folder.name for other in runs if other.owner == run.folder}
        for method in student.get("baselines", ()):
            if run.owner is None and method not in there:
                label = f"{run.label}/baselines/{method}"
                rows.append({**row, "run": label, "method": method, "blocks": 0, "students": 0, "missing": "all"})
    return pd.DataFrame(rows)


def _cost(runs: list[Run]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for run in runs:
        spent = [group.get("seconds", 0.0) for group in run.groups]
        costs = [record.cost for record in run.records if record.kind == "student"]
        row: dict[str, Any] = {"run": run.label, "teacher": run.teacher.get("seconds")}
        row["distillation"] = sum(spent) if spent else None
        row["students"] = sum(cost.get("seconds", 0.0) for cost in costs) if costs else None
        row["total"] = sum(row[stage] or 0.0 for stage in ("teacher", "distillation", "students"))
        row["peak_bytes"] = max((cost["peak_bytes"] for cost in costs if "peak_bytes" in cost), default=None)
        rows.append(row | {"teacher_sha256": run.teacher.get("sha256")})
    return pd.DataFrame(rows)


def _provenance(students: pd.DataFrame, runs: list[Run]) -> pd.DataFrame:
    """Return a row for each distinct origin of accuracies (records) and of blocks (sidecars), with their number."""
    origins: Counter[tuple[str, ...]] = Counter()
    for run, record in zip(students["run"], students["record"], strict=True):
        origins["accuracy", run.label, record.config, record.artefact or "", *_origin(record.provenance)] += 1
    for run in runs:
        for sidecar in run.blocks.values():
            origins["block", run.label, "", "", *_origin(sidecar.get("provenance") or {})] += 1
    columns = ["of", "run", "config", "artefact", "revision", "hardware", "versions", "setup", "count"]
    return pd.DataFrame([(*origin, count) for origin, count in origins.items()], columns=columns)


def _origin(found: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return the code revision (marked where it had changes), hardware, versions and set-up of a provenance."""
    revision = str(found.get("revision") or "") + (" + changes" if found.get("dirty") else "")
    hardware = [str(found[key]) for key in ("device", "cpu") if found.get(key) not in (None, "cpu")]
    versions = [f"{name} {found[name]}" for name in ("wmdd", "torch", "python", "cuda") if found.get(name)]
    keys = ("world_size", "threads", "precision")
    setup = {key: found[key] for key in keys if key in found} | flatten({"slurm": found.get("slurm") or {}})
    return revision, ", ".join(hardware), ", ".join(versions), ", ".join(f"{key} {setup[key]}" for key in setup)


def headlines(report: Report) -> list[tuple[str, str, str]]:
    """Return (setting, method, result) of every method that is no baseline, as words."""
    lines = []
    rows = report.accuracy.to_dict("records")
    for row in (row for row in rows if not row["baseline"]):
        alike = [other for other in rows if all(other[key] == row[key] for key in SETTING)]
        result = f"{_percent(row, 'top1')} %"
        references = {other["name"]: other for other in alike if other["method"].partition(" ")[0] == REFERENCE}
        reference = references.get(row["name"]) or references.get("")
        if reference and not pd.isna(row["difference"]):
            result += f" vs {reference['method']} {_percent(reference, 'top1')} %, {_difference(row)} points"
            result += " (the interval holds 0)" if row["low"] <= 0 <= row["high"] else ""
        held = "" if row["recipe"]["evaluated_on"] == "test" else f", on the {row['recipe']['evaluated_on']} images"
        lines.append((_where([row[key] for key in SETTING]), row["method"], f"{result}, n = {_count(row)}{held}"))
    return lines


def tables(report: Report) -> list[Table]:
    """Return the tables of the report as text: accuracy, coverage, cost, provenance."""
    return [_accuracy_table(report), _coverage_table(report), _cost_table(report), _provenance_table(report)]


def _accuracy_table(report: Report) -> Table:
    rows = report.accuracy.to_dict("records")
    for row in rows:
        row["recipe"] = {"classes": row["classes"], "resolution": row["resolution"], **row["recipe"]}
    students = [row["recipe"] for row in rows if not pd.isna(row["ipc"])]
    keys = list(dict.fromkeys(key for recipe in students or [row["recipe"] for row in rows] for key in recipe))
    values = {key: {_term(key, recipe.get(key)) for recipe in students} for key in keys}
    values |= {"evaluated_on": {_term("evaluated_on", row["recipe"]["evaluated_on"]) for row in rows}}
    unlike = [key for key in keys if len(values[key]) > 1]
    columns = ["Data set", "IPC", "Network", "Labels", "Method", "Top-1 %", "Top-5 %", "n"]
    columns += [f"vs {REFERENCE}, points", "p", *(key.replace("_", " ") for key in unlike)]
    return Table(
        title="Accuracy",
        caption=(
            "Mean ± half-width of the 95 % t-interval, over n = distillation seeds × student seeds. Differences to"
            f" {REFERENCE} real images are paired by both seeds, with their 95 % interval; p: paired t-test,"
            " Holm-adjusted within a setting. Over a single distillation seed an interval tells how students vary, and"
            " not how images do."
        ),
        columns=columns,
        rows=[
            [row["dataset"], "all" if pd.isna(row["ipc"]) else str(row["ipc"]), row["network"]]
            + ["–" if pd.isna(row["regime"]) else row["regime"], row["method"]]
            + [_percent(row, "top1"), _percent(row, "top5"), _count(row), _difference(row), _p(row["p_holm"])]
            + [_term(key, row["recipe"].get(key)) for key in unlike]
            for row in rows
        ],
        words=5,
        terms={key.replace("_", " "): next(iter(values[key])) for key in keys if key not in unlike and values[key]},
    )


def _coverage_table(report: Report) -> Table:
    rows = report.coverage.to_dict("records")
    complete = sum(not row["missing"] for row in rows)
    return Table(
        title="Coverage",
        caption=f"{complete} of {len(rows)} runs are complete.",
        columns=["Run", "Method", "Missing", "Seed", "Blocks", "Students"],
        rows=[
            [row["run"], row["method"], row["missing"] or "nothing", _term("seed", row["seed"])]
            + [f"{row[part]} / {row[f'{part}_expected']}" for part in ("blocks", "students")]
            for row in sorted(rows, key=lambda row: not row["missing"])
        ],
        words=3,
    )


def _cost_table(report: Report) -> Table:
    stages, cost = ["teacher", "distillation", "students"], report.cost
    # Runs that share a teacher waited for it once.
    once = cost["teacher"][~cost["teacher_sha256"].fillna(cost["run"]).duplicated()].sum()
    total = {"run": "all runs, each teacher once", "teacher": once, "peak_bytes": cost["peak_bytes"].max()}
    total |= {stage: cost[stage].sum() for stage in stages[1:]}
    total["total"] = sum(total[stage] for stage in stages)
    columns = ["Run", "Teacher, s", "Distillation, s", "Students, s", "Total, s"]
    rows = [
        [row["run"], *(_number(row[stage]) for stage in (*stages, "total")), _number(row["peak_bytes"], 2**30)]
        for row in (*cost.to_dict("records"), total)
    ]
    caption = "Seconds of wall-clock time, summed over groups and students."
    if pd.isna(total["peak_bytes"]):
        return Table("Cost", caption, columns, [row[:-1] for row in rows])
    return Table("Cost", f"{caption} Peak memory of a student.", [*columns, "Peak, GiB"], rows)


def _provenance_table(report: Report) -> Table:
    return Table(
        title="Provenance",
        caption="Where each accuracy and each block of images comes from; fingerprints and artefacts are SHA-256.",
        columns=["Of", "Run", "Config", "Artefact", "Revision", "Hardware", "Versions", "Set-up", "Count"],
        rows=[[str(value) for value in row] for row in report.provenance.itertuples(index=False)],
        words=8,
    )


def render_terminal(report: Report, console: "Console") -> None:
    """Print the report, without provenance, on a rich console; what a whole column shares goes below the table."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    for where, method, result in headlines(report):
        console.print(Text(f"{where}: "), Text(method, style="bold"), Text(result), sep=" ")
    for table in tables(report)[:-1]:
        values = [{row[index] for row in table.rows} for index in range(table.words)]
        shared = [index for index in range(table.words) if len(values[index]) == 1 < len(table.rows)]
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        grid.collapse_padding = True
        for index, column in enumerate(table.columns):
            if index not in shared:
                words = index < table.words
                # A narrow terminal breaks between words and never inside one; the last columns give way first.
                longest = max(
                    len(word) for cell in [column, *(row[index] for row in table.rows)] for word in cell.split()
                )
                grid.add_column(column, justify="left" if words else "right", min_width=longest if words else None)
        for row in table.rows:
            grid.add_row(*(Text(cell) for index, cell in enumerate(row) if index not in shared))
        common = " ".join(f"{table.columns[index]}: {table.rows[0][index]}." for index in shared)
        console.print(grid, Text(f"{common} {_caption(table)}\n".lstrip(), style="dim"))
    for problem in report.problems:
        console.print(Text(problem, style="yellow"))


def to_markdown(report: Report) -> str:
    """Return the report as Markdown, tables and problems."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"

    parts = ["\n".join(f"- {where}: **{method}** {result}" for where, method, result in headlines(report))]
    for table in tables(report):
        rule = [":--" if index < table.words else "--:" for index in range(len(table.columns))]
        lines = [line(table.columns), line(rule), *map(line, table.rows)]
        parts += [f"## {table.title}", _caption(table), "\n".join(lines)]
    if report.problems:
        parts += ["## Problems", "\n".join(f"- {problem}" for problem in report.problems)]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_csv(report: Report) -> str:
    """Return the accuracy table as CSV: fractions at full precision, each key of the recipe in a column."""
    frame = report.accuracy.drop(columns="recipe")
    recipes = pd.DataFrame(list(report.accuracy["recipe"]), index=frame.index)
    return str(frame.join(recipes.add_prefix("recipe.")).to_csv(index=False))


def _caption(table: Table) -> str:
    terms = ", ".join(f"{key} {value}" for key, value in table.terms.items())
    return f"{table.caption} Recipe: {terms}." if terms else table.caption


def _where(setting: Sequence[Any]) -> str:
    dataset, classes, resolution, ipc, network, regime = setting
    return f"{dataset} ({classes} classes, {resolution} px), IPC {ipc}, {network}, {regime} labels"


def _percent(row: dict[str, Any], metric: str) -> str:
    mean, half_width = row[metric], row[f"{metric}_half_width"]
    if pd.isna(mean):
        return "–"
    return f"{100 * mean:.1f}" if pd.isna(half_width) else f"{100 * mean:.1f} ± {100 * half_width:.1f}"


def _difference(row: dict[str, Any]) -> str:
    if pd.isna(row["difference"]):
        return "–"
    text = f"{100 * row['difference']:+.1f}"
    if not pd.isna(row["low"]):
        text += f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return text.replace("-", "−")


def _count(row: dict[str, Any]) -> str:
    if pd.isna(row["student_seeds"]):
        return str(row["n"])
    crossed = f"{row['distillation_seeds']}×{row['student_seeds']}"
    return crossed if row["n"] == row["distillation_seeds"] * row["student_seeds"] else f"{row['n']} of {crossed}"


def _number(value: Any, unit: int = 1) -> str:
    return "–" if pd.isna(value) else f"{value / unit:,.1f}"


def _p(value: Any) -> str:
    return "–" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _term(key: str, value: Any) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join([shorten(value), *([_UNITS[key]] if key in _UNITS else [])])


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Return [3, 5, 6, 7] as ["3", "5–7"]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
