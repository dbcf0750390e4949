"""The best recipe of a sweep as a file, and its single measurement on the test set."""

from importlib import metadata
from pathlib import Path
from statistics import fmean

from sweeps.confirm import lines, load_confirmation
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

    A complete confirmation decides which trial it is: the confirmed one, or trial 0 where nothing beats it. The config
    is the sweep's, with the trial's values: the whole dataset, the full budget, no hold-out.

    Args:
        folder: folder of the sweep.
        measure: whether to run the config in ``DIR/best/trial-NUMBER`` and measure it on the test set, for the first
            time in the sweep. A second call reads the results of the first.

    Raises:
        InputError: the folder contains no sweep.
        WmddError: no trial is complete.
    """
    log = Log.load(folder)
    sweep = Sweep.from_identity(log.identity)
    chosen = sweep.objective.best(log.trials)
    if chosen is None:
        raise WmddError(f"{folder}: no trial is complete; resume the sweep with `wmdd sweep run`")
    trials = sum(trial.finished for trial in log.trials)
    found = load_confirmation(folder, sweep.objective)
    first = f"Best of {trials} trials of a sweep: "
    if found and found.complete:
        chosen = log.trials[found.winner]
        first = "Confirmed on fresh seeds: " if found.winner else f"Nothing of {trials} trials beats the config: "
        verdict = lines(sweep.objective, found)
    else:
        verdict = [
            "Unconfirmed: the best of many trials on one distilled set each looks better than it is. Confirm it with"
            f" `wmdd sweep confirm {folder}`."
        ]
        verdict += lines(sweep.objective, found)[:1] if found else []
    name = f"{sweep.config.name}-best"
    chosen_on = {"tuning.on": "holdout", "tuning.trials": trials}
    values = {**chosen.values, "name": name, "data.holdout_per_class": 0, **chosen_on}
    config = sweep.config.replace(values, "the best trial")
    provenance = log.identity["provenance"]
    seeds = seeds_of(chosen)
    comments = [
        first + f"trial {chosen.number}" + (", the unchanged config." if chosen.number == 0 else "."),
        *verdict,
        f"Objective {sweep.objective.name}: {sweep.objective.text(sweep.objective.value(chosen, log.trials))};"
        f" {sweep.objective.meaning}.",
        f"Top-1 of the proxy on the hold-out: {_text(seeds)}." if seeds else "",
        f"Space {sweep.space.name}, search {sweep.search}, scheduler {sweep.scheduler}, seed {sweep.seed};"
        f" values: {', '.join(f'{key} = {show(value)}' for key, value in chosen.values.items())}.",
        f"wmdd {metadata.version('wmdd')}, revision {provenance['revision']}{' + changes' * bool(provenance['dirty'])},"
        f" on {provenance['device']} ({provenance['cpu']}).",
    ]
    if measure:
        for regime, top1 in _measure(config, folder / "best" / f"trial-{chosen.number:05d}").items():
            comments.append(f"Test set, {regime} labels, this config in full: top-1 {_text(top1)}.")
    else:
        comments.append("Not measured on the test set.")
    return "".join(f"# {comment}\n" for comment in comments if comment) + "\n" + to_toml(config)


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
