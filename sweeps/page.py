"""A sweep for people: a table on the terminal, and one HTML page that loads no other file."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from sweeps import confirm, plots, search
from sweeps.format import show
from sweeps.objective import range_text, seeds_of
from sweeps.run import Sweep
from sweeps.trial_log import Log, Trial, savings
from wmdd.storage.files import write_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_NONE = "–"


def columns(sweep: Sweep) -> list[str]:
    """Return the column names of the table of trials."""
    keys = [parameter.key for parameter in sweep.space.parameters]
    return ["trial", "state", *_measured(sweep), "students", "vs trial 0", "iter.", "s", *keys]


def rows(sweep: Sweep, log: Log) -> list[list[str]]:
    """Return the table of trials: complete trials, best first, then stopped ones, then the rest.

    ``students`` is the range of top-1 over the students of the trial's set. ``vs trial 0`` is the mean difference of
    top-1 from the unchanged config. A trial has one set, so neither has an interval.
    """
    return [_row(sweep, trial, log.trials) for trial in ranked(sweep, log)]


def ranked(sweep: Sweep, log: Log) -> list[Trial]:
    """Return the trials in the order of the table: by state, then by value."""
    states = ("done", "stopped", "running", "failed")

    def key(trial: Trial) -> tuple[int, int, float, int]:
        worth = trial.last.get(sweep.objective.key, 0.0)
        if trial.state == "done":
            worth = sweep.objective.value(trial, log.trials)
        return states.index(trial.state), -len(trial.reports), -sweep.objective.sign * worth, trial.number

    return sorted(log.trials, key=key)


def _measured(sweep: Sweep) -> list[str]:
    return ["top1"] if sweep.objective.key == "top1" else [sweep.objective.name, "top1"]


def _row(sweep: Sweep, trial: Trial, trials: Sequence[Trial]) -> list[str]:
    worth = [_worth(sweep, trial, trials)]
    if sweep.objective.key != "top1":
        worth.append(f"{100 * trial.last['top1']:.2f}" if "top1" in trial.last else _NONE)
    students = range_text(seeds_of(trial)) or _NONE
    values = [
        show(trial.values[parameter.key]) if parameter.key in trial.values else _NONE
        for parameter in sweep.space.parameters
    ]
    iteration = str(trial.last.get("iteration", _NONE))
    return [str(trial.number), trial.state, *worth, students, _against(trial, trials), iteration, _time(trial), *values]


def _worth(sweep: Sweep, trial: Trial, trials: Sequence[Trial]) -> str:
    if sweep.objective.key not in trial.last:
        return _NONE
    value = sweep.objective.value(trial, trials) if trial.state == "done" else trial.last[sweep.objective.key]
    return sweep.objective.text(value).removesuffix(" %").removesuffix(" s")


def _against(trial: Trial, trials: Sequence[Trial]) -> str:
    """Return the mean difference of top-1 from trial 0, in points."""
    if trial.number == 0 or trial.state != "done" or trials[0].state != "done":
        return _NONE
    return f"{100 * (fmean(seeds_of(trial)) - fmean(seeds_of(trials[0]))):+.2f}"


def _time(trial: Trial) -> str:
    return f"{trial.seconds:.1f}" if trial.reports else _NONE


def summary(sweep: Sweep, log: Log, confirmed: confirm.Confirmation | None) -> list[str]:
    """Return a summary of the sweep: the best trial, the time that the scheduler saved, the failures."""
    lines = []
    best = sweep.objective.best(log.trials)
    if best is None:
        lines.append("No trial is complete.")
    else:
        values = ", ".join(f"{key} = {show(value)}" for key, value in best.values.items())
        stands = " (the unchanged config)" if best.number == 0 else ""
        seeds = seeds_of(best)
        worth = sweep.objective.text(sweep.objective.value(best, log.trials))
        if len(seeds) > 1 and sweep.objective.key == "top1":
            worth = f"{100 * fmean(seeds):.2f} % (students {range_text(seeds)})"
        lines.append(f"Best: trial {best.number}{stands}, {sweep.objective.name} {worth}: {values}.")
        if sweep.objective.name != "time" and not (confirmed and confirmed.complete):
            lines.append(f"Unconfirmed: compare it with trial 0 on fresh seeds, `wmdd sweep confirm {log.path}`.")
    if saved := savings(log.trials):
        stopped, spent, whole = saved
        lines.append(
            f"{sweep.scheduler} stopped {stopped} of {len(log.trials)} trials: {spent:.0f} s of trials instead of about"
            f" {whole:.0f} s, {100 * (1 - spent / whole):.0f} % saved (estimated from the complete trials)."
        )
    failed = [trial for trial in log.trials if trial.state == "failed"]
    if failed:
        lines.append(f"{len(failed)} failed; trial {failed[0].number}: {failed[0].error}")
    return lines


def render_terminal(sweep: Sweep, log: Log, console: "Console") -> None:
    """Print the table and the summary."""
    console.print(trial_table(sweep, log))
    found = confirm.load_confirmation(log.path, sweep.objective)
    for line in summary(sweep, log, found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if found:
        render_confirmation(sweep, found, console)


def trial_table(sweep: Sweep, log: Log, most: int | None = None) -> "Table":
    """Return the trials as a table for a terminal: the ``most`` best ones, or all."""
    from rich.table import Table

    table = Table(title=f"{sweep.config.name} over {sweep.space.name}, on the hold-out", title_justify="left", box=None)
    measured = [*columns(sweep)[: -len(sweep.space.parameters)], "values"]
    for head in measured:
        table.add_column(head, justify="left" if head in ("state", "values") else "right", no_wrap=head != "values")
    names = [parameter.key.rpartition(".")[2] for parameter in sweep.space.parameters]
    for row in rows(sweep, log)[:most]:
        values = zip(names, row[len(measured) - 1 :], strict=True)
        text = ", ".join(f"{name} {value}" for name, value in values if value != _NONE)
        table.add_row(*row[: len(measured) - 1], text)
    return table


def render_confirmation(sweep: Sweep, found: confirm.Confirmation, console: "Console") -> None:
    """Print the confirmation of a sweep: a table with intervals over independent distilled sets, and the verdict."""
    console.print(confirmation_table(sweep, found))
    console.print(confirm.lines(sweep.objective, found)[0], markup=False, highlight=False, soft_wrap=True)


def confirmation_table(sweep: Sweep, found: confirm.Confirmation) -> "Table":
    """Return the confirmation of a sweep as a table for a terminal."""
    from rich.table import Table

    shown = Table(title=f"{sweep.config.name}: confirmation on fresh seeds", title_justify="left")
    for head in confirm.COLUMNS:
        shown.add_column(head, justify="right", no_wrap=True)
    for row in confirm.table_rows(sweep.objective, found):
        shown.add_row(*row)
    return shown


def write_summary(sweep: Sweep, log: Log) -> None:
    """Write the tables of a sweep as plain files: DIR/summary.csv for programs, DIR/summary.md for people."""
    import csv
    import io

    heads, body = columns(sweep), rows(sweep, log)
    plain = io.StringIO()
    filled = [["" if cell == _NONE else cell for cell in row] for row in body]
    csv.writer(plain, lineterminator="\n").writerows([heads, *filled])
    write_bytes(log.path / "summary.csv", plain.getvalue().encode())
    found = confirm.load_confirmation(log.path, sweep.objective)
    parts = [f"# {sweep.config.name}: sweep over {Path(sweep.space.name).stem}", *summary(sweep, log, found)]
    if found:
        parts += ["## Confirmation", _markdown(confirm.COLUMNS, confirm.table_rows(sweep.objective, found))]
        parts += confirm.lines(sweep.objective, found)[:1]
    parts += ["## Trials", _markdown(heads, body)]
    write_bytes(log.path / "summary.md", ("\n\n".join(parts) + "\n").encode())


def _markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *body])


def write_html(sweep: Sweep, log: Log, path: Path) -> None:
    """Write the page: summary, trials, importance, responses, parallel coordinates, provenance.

    Raises:
        WmddError: the page cannot be written.
    """
    import jinja2

    shown = [trial for trial in log.trials if trial.state in ("done", "stopped")]
    found = confirm.load_confirmation(log.path, sweep.objective)
    rung, count, importance = search.importances(sweep.space, sweep.objective, log.trials)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("sweeps") / "templates" / "sweep.html.j2").read_text())
    content = template.render(
        title=f"{sweep.config.name}: sweep over {Path(sweep.space.name).stem}",
        summary=summary(sweep, log, found),
        confirmation=confirm.lines(sweep.objective, found) if found else [],
        columns=columns(sweep),
        rows=rows(sweep, log),
        objective=sweep.objective,
        budget=sweep.space.budget,
        importance=sorted(importance.items(), key=lambda item: -item[1]),
        importance_rung=rung,
        importance_count=count,
        responses=[plots.response(parameter, shown, sweep.objective) for parameter in sweep.space.parameters],
        parallel=plots.parallel(sweep.space.parameters, shown, sweep.objective)
        if any(trial.state == "done" for trial in shown)
        else "",
        identity={key: value for key, value in log.identity.items() if key in ("space", "search", "scheduler", "seed")},
        provenance={key: value for key, value in log.identity["provenance"].items() if value not in (None, "")},
        failed=[(trial.number, trial.error) for trial in log.trials if trial.state == "failed"],
    )
    write_bytes(path, content.encode())
