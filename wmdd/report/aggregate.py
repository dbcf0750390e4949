"""Runs as tables of numbers: accuracy, coverage, cost, provenance; fractions, seconds and bytes throughout.

Only like is averaged and compared with like: students of one setting (``comparison.SETTING``) share one recipe and
one set of test images, and runs of one name share one distillation; else the report is refused with what differs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from wmdd.config.schema import DECIDES, DEFAULTS, decides
from wmdd.records.comparability import refuse_unlike
from wmdd.records.convergence import base_view, convergence
from wmdd.records.schema import Record, SpeedRecord
from wmdd.report.comparison import COMPARABLE, REFERENCE, SETTING, compare
from wmdd.report.recipes import RecipeOfStudents, named
from wmdd.report.runs import MissingRun, Run
from wmdd.report.sections import VIEWS
from wmdd.runs.baselines import baseline_folders
from wmdd.storage.files import digest, flatten

BYTES = ("image_bytes", "label_bytes", "teacher_bytes", "labelling_flops")
"""What students learned from, as their records tell it (``Record.cost``)."""
STAGES = ("teacher", "statistics", "distillation", "students")


def students(runs: list[Run], problems: list[str]) -> tuple[pd.DataFrame, list[RecipeOfStudents]]:
    """Return the students that count, and the recipes that they were trained by.

    One student counts for each setting, recipe, method, name of the run and pair of seeds.

    Raises:
        InputError: students that would be averaged are unlike; the message names the keys that differ.
    """
    taken = [*SETTING, "method", "distillation_seed", "student_seed", "metrics", "time"]
    rows = [
        {key: getattr(record, key) for key in taken}
        | {"name": run.name, "baseline": run.baseline or record.method == REFERENCE}
        | {"images": record.artefact or record.config, "seeded": record.seeded, "run": run, "record": record}
        | {"teacher": record.recipe.get("teacher")}
        for run in runs
        for record in run.records
        if record.kind == "student"
    ]
    columns = [*taken, "name", "baseline", "images", "seeded", "run", "record", "teacher"]
    frame = pd.DataFrame(rows, columns=columns).sort_values("time", kind="stable")
    frame["recipe_name"], recipes = named(frame)
    # A baseline that several runs measured on the same images makes one row, whatever the runs are called.
    for _, group in frame[frame["baseline"].astype(bool)].groupby([*COMPARABLE, "method"]):
        if (group.groupby("distillation_seed")["images"].nunique() == 1).all():
            frame.loc[group.index, "name"] = ""
    cell, seeds = [*COMPARABLE, "method", "name"], ["distillation_seed", "student_seed"]
    latest = frame.drop_duplicates([*cell, *seeds, "images"], keep="last")
    if repeated := len(frame) - len(latest):
        problems.append(f"{repeated} measurements were repeated on the same images; the latest of each counts")
    for (*setting, method, name), group in latest.groupby(cell):
        what = f"runs of {method} that go by one name ({name or method}) on {where(setting)}"
        refuse_unlike(what, _distillations(group))
        for _, twice in group[group.duplicated(seeds, keep=False)].groupby(seeds):
            images = zip(twice["run"], twice["images"], strict=True)
            refuse_unlike(f"{what} and one seed", ((run.label, {"artefact": artefact}) for run, artefact in images))
    return latest, recipes


def _distillations(group: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    for run in {run.label: run for run in group["run"] if run.config}.values():
        yield run.label, distillation(run)


def distillation(run: Run) -> dict[str, Any]:
    """Return what decides a run's images, but for its seed or the files of an external set."""
    config = flatten(run.config)
    # A baseline that selects real images depends neither on rounding nor on how the run that owns it synthesises.
    selected = run.baseline and not run.optimized
    scope = "data" if selected else "images"
    used = [sidecar.get("arithmetic") for _, sidecar in sorted(run.blocks.items())]
    # The teacher's seed is not looked at: where teachers differ, the recipes of the students say so.
    seeds = {"seed", "teacher.seed", "external.sha256"}
    keys = {"method", "ipc", *(key for key in DECIDES if decides(key, scope))} - seeds
    settings = {key: config.get(key, DEFAULTS[key]) for key in sorted(keys)}
    return settings | ({"arithmetic": used[0]} if used and not selected else {})


def accuracy(chosen: pd.DataFrame, runs: list[Run]) -> pd.DataFrame:
    """Return ``comparison.compare`` with what belongs to each row; then a row for each teacher, without an IPC.

    Added: ``recipe``, ``teacher`` (SHA-256), ``origins`` (``origins`` of its records), the columns ``BYTES``,
    ``device_seconds`` that the statistics and one distilled set took, ``teacher_device_seconds``, λ as ``bn_weight``
    and ``otherwise``, a name for all else that decided the images.
    """
    twice = chosen["view"].map(base_view) != chosen["view"]
    chosen, longer = chosen[~twice], chosen[twice]
    frame = compare(chosen)
    several = frame.groupby("method")["name"].nunique() > 1
    names = zip(frame["method"], frame["name"], strict=True)
    labels = [f"{m} ({n})" if several[m] and n not in ("", m) else m for m, n in names]
    spent = {row["run"]: row for row in cost(runs).to_dict("records")}
    key = [*COMPARABLE, "method", "name"]
    cells = {cell: _about(group, spent) for cell, group in chosen.groupby(key)}
    added = pd.DataFrame([cells[cell] for cell in frame[key].itertuples(index=False, name=None)])
    doubled = {cell: _values(group) for cell, group in longer.assign(view=longer["view"].map(base_view)).groupby(key)}
    checked = zip(frame[key].itertuples(index=False, name=None), frame["values"], strict=True)
    frame["convergence"] = [convergence(values, doubled.get(cell, {})) for cell, values in checked]
    teachers = pd.DataFrame(list(_teachers(runs)), dtype=object)
    columns = [*frame.columns, "recipe", "teacher", "origins", *BYTES, "bn_weight", "otherwise"]
    columns += ["device_seconds", "teacher_device_seconds"]
    columns += ["best_top1", "tuned_on", "trials"]
    frame = frame.assign(method=labels).join(added).astype(object)
    whole = pd.concat([part for part in (frame, teachers) if len(part)] or [frame]).reindex(columns=columns)
    return whole.sort_values("dataset", kind="stable", ignore_index=True)


def _values(group: pd.DataFrame) -> dict[tuple[str, int], float]:
    found = zip(group["images"], group["student_seed"], group["metrics"], strict=True)
    return {(images, int(seed)): metrics["top1"] for images, seed, metrics in found}


def _about(group: pd.DataFrame, spent: dict[str, dict[str, Any]]) -> dict[str, Any]:
    records: list[Record] = list(group["record"])
    sizes = {key: [record.cost[key] for record in records if key in record.cost] for key in BYTES}
    labels = dict.fromkeys(run.label for run in group["run"])
    charged = [spent[label] for label in labels if label in spent and not pd.isna(spent[label]["set_device_seconds"])]
    teachers = [one["teacher_device_seconds"] for one in charged]
    own = [one["set_device_seconds"] - one["teacher_device_seconds"] for one in charged]
    return {
        **{key: sum(found) / len(found) if found else None for key, found in sizes.items()},
        "device_seconds": sum(own) / len(own) if own else None,
        "teacher_device_seconds": sum(teachers) / len(teachers) if teachers else None,
        "recipe": {"evaluated_on": records[0].evaluated_on, **_test_images(records), **_recipe(group)},
        "teacher": records[0].recipe.get("teacher"),
        "best_top1": _best(records),
        "tuned_on": records[0].tuned_on,
        "trials": records[0].trials,
        **_bn_weight(group["run"].iloc[0]),
        "origins": origins(zip(group["run"], records, strict=True)),
    }


def _best(records: Sequence[Record]) -> float | None:
    """Return the mean of the best epochs, where every student was validated on the way."""
    found = [record.best_top1 for record in records if record.best_top1 is not None]
    return sum(found) / len(found) if len(found) == len(records) else None


def _recipe(group: pd.DataFrame) -> dict[str, Any]:
    """Return the recipe of the students of a row, flat."""
    teachers = group["teacher"].nunique()
    recipe: dict[str, Any] = flatten(group["record"].iloc[0].recipe)
    return recipe | ({"teacher": f"{teachers}, one for each set"} if teachers > 1 else {})


def _test_images(records: Sequence[Record]) -> dict[str, int]:
    """Return the number of images that students were measured on, where it is known and the same for all."""
    counts = {sum(record.test_images) if record.test_images else None for record in records}
    (only,) = counts if len(counts) == 1 else (None,)
    return {} if only is None else {"test_images": only}


def _bn_weight(run: Run) -> dict[str, Any]:
    """Return λ of a run and a name for all else that decides its images, if it was optimised."""
    weight = run.config.get("synthesis", {}).get("bn_weight")
    if weight is None or not run.optimized:
        return {}
    otherwise = {key: value for key, value in distillation(run).items() if key != "synthesis.bn_weight"}
    return {"bn_weight": weight, "otherwise": digest(otherwise)}


def _teachers(runs: list[Run]) -> Iterator[dict[str, Any]]:
    seen = set()
    for run in runs:
        data, about = run.config.get("data", {}), run.records[0] if run.records else None
        found = [
            {
                "network": record.network,
                **record.metrics,
                "evaluated_on": record.evaluated_on,
                "sha256": record.artefact,
            }
            for record in run.records
            if record.kind == "teacher"
        ]
        for facts in found or ([run.teacher] if "top1" in run.teacher else []):
            sha = facts.get("sha256")
            if (sha or run.label) in seen:
                continue
            seen.add(sha or run.label)
            yield {
                **{key: facts.get(key) for key in ("network", "top1", "top5")},
                "dataset": run.dataset,
                "resolution": about.resolution if about else data.get("resolution"),
                "classes": about.classes if about else None,
                "view": "epochs",
                "method": "teacher",
                "name": "",
                "baseline": True,
                "n": 1,
                "recipe": {"evaluated_on": facts.get("evaluated_on")},
                "teacher": sha,
                "origins": [{"run": run.label, "weights": str(sha or "–"), "origin": str(facts.get("origin", "–"))}],
            }


def speeds(runs: list[Run], problems: list[str]) -> list[tuple[Run, SpeedRecord]]:
    """Return the speeds that count: of one that was measured again under the same circumstances, the latest."""
    found = [(run, speed) for run in runs for speed in run.speeds]
    latest: dict[str, tuple[Run, SpeedRecord]] = {}
    for run, speed in sorted(found, key=lambda pair: pair[1].time):
        about = speed.model_dump(include=set(SpeedRecord.model_fields) - {"schema_version", "time", "metrics"})
        about["provenance"] = origin(speed.provenance)
        latest[str(flatten(about))] = run, speed
    if repeated := len(found) - len(latest):
        problems.append(f"{repeated} speeds were measured again on the same machine; the latest of each counts")
    return list(latest.values())


def coverage(runs: list[Run], waiting: Sequence[MissingRun]) -> pd.DataFrame:
    """Return a row for each run that has a config, or that one or a protocol asks for, with what is missing of it."""
    rows: list[dict[str, Any]] = []
    for run in (run for run in runs if run.folder.is_dir() and (run.config or run.records)):
        student, labels = run.config.get("student", {}), run.config.get("labels", {})
        kinds = [
            (network, regime, view)
            for network in student.get("networks", ())
            for regime in labels.get("regimes", ())
            for view in student.get("views", ("epochs",))
        ]
        first, count = student.get("first_seed", 0), student.get("seeds", 0)
        seeds, blocks = range(first, first + count), range(run.config.get("blocks", 0))
        done = {(record.network, record.regime, record.view, record.student_seed) for record in run.records}
        missing = [f"block {gap}" for gap in _ranges(index for index in blocks if index not in run.blocks)]
        for kind in kinds:
            gaps = _ranges(seed for seed in seeds if (*kind, seed) not in done)
            words = [word for word in kind if word != "epochs"]
            missing += [f"student {' '.join(words)} seed {gap}" for gap in gaps]
        row = {"run": run.label, "method": run.method, "seed": run.config.get("seed")}
        row |= {"blocks": len(run.blocks), "blocks_expected": len(blocks), "students_expected": len(kinds) * count}
        row["students"] = sum((*kind, seed) in done for kind in kinds for seed in seeds)
        rows.append(row | {"missing": ", ".join(missing) if run.config else "config.json"})
        there = {other.folder.name for other in runs if other.owner == run.folder}
        for folder, (method, _) in baseline_folders(student).items():
            if run.owner is None and folder not in there:
                label = f"{run.label}/baselines/{folder}"
                rows.append({**row, "run": label, "method": method, "blocks": 0, "students": 0, "missing": "all"})
    for cell in waiting:
        rows.append({"run": cell.label, "method": cell.method, "seed": cell.seed, "missing": "all"})
    columns = ["run", "method", "seed", "blocks", "blocks_expected", "students", "students_expected", "missing"]
    return pd.DataFrame(rows, columns=columns).astype(object)


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Return [3, 5, 6, 7] as ["3", "5–7"]."""
    found = list(numbers)
    edges = [index for index, (one, other) in enumerate(pairwise(found), start=1) if other != one + 1]
    parts = [found[low:high] for low, high in pairwise([0, *edges, len(found)])] if found else []
    return [str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts]


def cost(runs: list[Run]) -> pd.DataFrame:
    """Return what each run took: the seconds of each stage, ``device_seconds``, ``peak_bytes``, ``joules``.

    ``set_device_seconds``: of the teacher, the statistics and the distilled set, without students. Where only seconds
    were recorded, one device is counted. The teacher counts in each of its runs; ``teacher_sha256`` tells them apart.
    """
    rows = []
    for run in runs:
        recorded: dict[str, list[dict[str, Any]]] = {}
        for record in run.records:
            if record.cost:
                recorded.setdefault(record.kind, []).append(record.cost)
        statistics = [group["statistics_seconds"] for group in run.groups if group.get("statistics_seconds")]
        parts = {
            "teacher": recorded.get("teacher") or [part for part in [run.teacher] if "seconds" in part],
            "statistics": [{"seconds": seconds} for seconds in statistics],
            "distillation": run.groups or recorded.get("distillation", []),
            "students": recorded.get("student", []),
        }
        if not any(parts.values()):
            continue
        row: dict[str, Any] = {"run": run.label, "teacher_sha256": run.teacher.get("sha256")}
        seconds = {stage: sum(part.get("seconds", 0.0) for part in found) for stage, found in parts.items()}
        row |= {stage: seconds[stage] if parts[stage] else None for stage in STAGES} | {"total": sum(seconds.values())}
        devices = {stage: sum(map(_device_seconds, found)) for stage, found in parts.items()}
        row["device_seconds"] = sum(devices.values())
        made = bool(parts["distillation"])
        row["teacher_device_seconds"] = devices["teacher"]
        row["set_device_seconds"] = row["device_seconds"] - devices["students"] if made else None
        every = [part for found in parts.values() for part in found]
        row["peak_bytes"] = max((part["peak_bytes"] for part in every if "peak_bytes" in part), default=None)
        joules = [part["joules"] for part in every if "joules" in part]
        row["joules"] = sum(joules) if joules else None
        rows.append(row)
    columns = ["run", *STAGES, "total", "device_seconds", "set_device_seconds", "teacher_device_seconds"]
    return pd.DataFrame(rows, columns=[*columns, "peak_bytes", "joules", "teacher_sha256"])


def _device_seconds(part: dict[str, Any]) -> float:
    return float(part.get("device_seconds", part.get("seconds", 0.0)))


def provenance(chosen: pd.DataFrame, runs: list[Run], timed: Sequence[tuple[Run, SpeedRecord]]) -> pd.DataFrame:
    """Return a row for each distinct origin of accuracies, speeds and blocks, with the number of these."""
    found: Counter[tuple[str, ...]] = Counter()
    for run, record in zip(chosen["run"], chosen["record"], strict=True):
        found["accuracy", run.label, record.config, record.artefact or "", *origin(record.provenance)] += 1
    for run, speed in timed:
        found["speed", run.label, "", "", *origin(speed.provenance)] += 1
    for run in runs:
        for sidecar in run.blocks.values():
            found["block", run.label, "", "", *origin(sidecar.get("provenance") or {})] += 1
    columns = ["of", "run", "config", "artefact", "revision", "hardware", "versions", "setup", "count"]
    return pd.DataFrame([(*one, count) for one, count in sorted(found.items())], columns=columns)


def origins(measured: Iterable[tuple[Run, Record]]) -> list[dict[str, str]]:
    """Return where the students of one row come from: one entry for each run, artefact and circumstance."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for run, record in measured:
        key = (run.label, record.config, record.artefact or "–", *origin(record.provenance))
        found.setdefault(key, []).append(record)
    names = ("run", "config", "artefact", "revision", "hardware", "versions", "set-up")
    return [
        {
            **dict(zip(names, key, strict=True)),
            "seeds": _seeds(own),
            "measured": f"{max(r.time for r in own):%Y-%m-%d %H:%M}",
        }
        for key, own in sorted(found.items(), key=lambda item: item[0])
    ]


def _seeds(records: list[Record]) -> str:
    by_set: dict[int, list[int]] = {}
    for record in records:
        by_set.setdefault(record.distillation_seed or 0, []).append(record.student_seed or 0)
    return "; ".join(f"{seed} with students {', '.join(_ranges(sorted(own)))}" for seed, own in sorted(by_set.items()))


def origin(found: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return the code revision (marked where it had changes), hardware, versions and set-up of a provenance."""
    revision = str(found.get("revision") or "") + (" + changes" if found.get("dirty") else "")
    hardware = [str(found[key]) for key in ("device", "cpu") if found.get(key) not in (None, "cpu")]
    versions = [f"{name} {found[name]}" for name in ("wmdd", "torch", "python", "cuda") if found.get(name)]
    keys = ("world_size", "threads", "precision")
    setup = {key: found[key] for key in keys if key in found} | flatten({"slurm": found.get("slurm") or {}})
    return revision, ", ".join(hardware), ", ".join(versions), ", ".join(f"{key} {setup[key]}" for key in setup)


def where(setting: Sequence[Any]) -> str:
    """Return the values of ``SETTING`` or ``COMPARABLE`` in words."""
    dataset, classes, resolution, ipc, network, regime, view, *recipe = setting
    longer = VIEWS[base_view(view)] + (", twice as long" if view != base_view(view) else "")
    return f"{dataset} ({classes} classes, {resolution} px), IPC {ipc}, {network}, {regime} labels{longer}" + (
        f", recipe {recipe[0]}" if recipe and recipe[0] else ""
    )
