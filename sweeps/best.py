"""The best recipe of a sweep as a file, and its single measurement on the test set."""

from importlib import metadata
from pathlib import Path
from statistics import fmean

from sweeps.format import show
from sweeps.objective import range_text, seeds_of
from sweeps.run import Sweep
from sweeps.trial_log import Log
from wmdd.config.loading import to_toml
from wmdd.config.schema import Config
from wmdd.errors import WmddError
from wmdd.records.files import read_records


def best(folder: Path, measure: bool = True) -> str:
    """Return the best trial's config as TOML, with its provenance in comments at the top.

    The config is the sweep's, with the trial's values: the whole dataset, the full budget, no hold-out.

    Args:
        folder: folder of the sweep.
        measure: whether to run the config in ``DIR/best`` and measure it on the test set, for the first time in the
            sweep. A second call reads the results of the first.

    Raises:
        InputError: the folder contains no sweep.
        WmddError: no trial is complete.
    """
    log = Log.load(folder)
    sweep = Sweep.from_identity(log.identity)
    chosen = sweep.objective.best(log.trials)
    if chosen is None:
        raise WmddError(f"{folder}: no trial is complete; resume the sweep with `wmdd sweep run`")
    name = f"{sweep.config.name}-best"
    trials = sum(trial.finished for trial in log.trials)
    chosen_on = {"tuning.on": "holdout", "tuning.trials": trials}
    values = {**chosen.values, "name": name, "data.holdout_per_class": 0, **chosen_on}
    config = sweep.config.replace(values, "the best trial")
    provenance = log.identity["provenance"]
    seeds = seeds_of(chosen)
    lines = [
        f"Best of {trials} trials of a sweep: trial {chosen.number}"
        + (", the unchanged config." if chosen.number == 0 else "."),
        f"Objective {sweep.objective.name}: {sweep.objective.text(sweep.objective.value(chosen, log.trials))};"
        f" {sweep.objective.meaning}.",
        f"Top-1 of the proxy on the hold-out: {_text(seeds)}." if seeds else "",
        f"Space {sweep.space.name}, search {sweep.search}, scheduler {sweep.scheduler}, seed {sweep.seed};"
        f" values: {', '.join(f'{key} = {show(value)}' for key, value in chosen.values.items())}.",
        f"wmdd {metadata.version('wmdd')}, revision {provenance['revision']}{' + changes' * bool(provenance['dirty'])},"
        f" on {provenance['device']} ({provenance['cpu']}).",
    ]
    if measure:
        for regime, found in _measure(config, folder / "best").items():
            lines.append(f"Test set, {regime} labels, this config in full: top-1 {_text(found)}.")
    else:
        lines.append("Not measured on the test set.")
    return "".join(f"# {line}\n" for line in lines if line) + "\n" + to_toml(config)


def _measure(config: Config, folder: Path) -> dict[str, list[float]]:
    """Run the config without baselines, if that is not done yet; return top-1 on the test set by label regime."""
    from wmdd import pipeline
    from wmdd.pipeline import Share

    alone = config.replace({"student.baselines": ()}, "the best trial")
    pipeline.run(alone, folder, share=Share(("teacher", "distill", "students")))
    records, _ = read_records(folder / "records")
    top1: dict[str, dict[int, list[float]]] = {}
    for record in records:
        if record.kind == "student" and record.regime and record.student_seed is not None:
            seeds = top1.setdefault(record.regime, {})
            seeds.setdefault(record.student_seed, []).append(record.metrics["top1"])
    return {regime: [fmean(values) for values in seeds.values()] for regime, seeds in top1.items()}


def _text(found: list[float]) -> str:
    """Return top-1 of the students of one set. They give no interval: another set may differ."""
    students = f"{len(found)} students of one set: {range_text(found)}" if len(found) > 1 else "one student"
    return f"{100 * fmean(found):.2f} % ({students})"
