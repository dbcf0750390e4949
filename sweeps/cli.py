"""``wmdd sweep ...``: Ray, Optuna and torch wait for the command that needs them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Search barycenter weights, regularisation and any other key for the best recipe on a budget.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SweepArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a sweep.")]


@app.command(
    epilog="Examples:  wmdd sweep run digits --space regularization --trials 12   |   "
    "wmdd sweep run digits --space regularization --trials 24"
)
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Preset, preset+variant or TOML file to vary.")],
    space: Annotated[str, typer.Option(help="regularization, barycenter, synthesis, full, or a TOML file.")],
    trials: Annotated[int, typer.Option(help="Trials in all; the first is the config as it stands.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Folder; runs/NAME-SPACE by default.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the config.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Override one key of the space's [budget].")
    ] = None,
    scheduler: Annotated[str, typer.Option(help="asha stops weak trials early; none runs all to their end.")] = "asha",
    search: Annotated[str, typer.Option(help="optuna (TPE), random or grid.")] = "optuna",
    objective: Annotated[str, typer.Option(help="top1, lrs, w2 or time; all on the hold-out.")] = "top1",
    seed: Annotated[int, typer.Option(help="Of the search.", min=0)] = 0,
    gpus: Annotated[
        float | None,
        typer.Option(help="GPUs of a trial, such as 0.25; 0 for CPUs only; 1 by default where there is one.", min=0),
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="CPUs of a trial; compute.threads by default.", min=0.1)] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Trials at once; as many as there is room for by default.", min=1)
    ] = None,
    address: Annotated[str | None, typer.Option(help="Join a running Ray cluster (HOST:PORT or auto).")] = None,
) -> None:
    """Run a sweep, go on with one that was stopped, or add trials to one that is finished."""
    from sweeps import page
    from sweeps.ray_cluster import TrialResources
    from sweeps.run import resolve
    from sweeps.run import run as run_sweep
    from wmdd.runtime.log import results

    sweep = resolve(config, override or [], space, _budget(budget or []), objective, search, scheduler, seed)
    if gpus is None:
        gpus = _default_gpus(sweep.config.compute.device)
    place = out or Path("runs") / f"{sweep.config.name}-{Path(space).stem}"
    resources = TrialResources(cpus or sweep.config.compute.threads, gpus, concurrent)
    log = run_sweep(sweep, place, trials, resources, address)
    page.render_terminal(sweep, log, results())


def _budget(given: list[str]) -> dict[str, object]:
    import tomllib

    from wmdd.errors import InputError

    found: dict[str, object] = {}
    for text in given:
        key, _, value = text.partition("=")
        try:
            found[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            raise InputError(f"--budget {text}: expected key=number, for example iterations=0.25") from None
    return found


def _default_gpus(device: str) -> float:
    import torch

    return 1.0 if device != "cpu" and torch.cuda.is_available() else 0.0


@app.command(epilog="Example:  wmdd sweep show runs/digits-regularization --html digits.html")
def show(
    folder: SweepArgument,
    html: Annotated[Path | None, typer.Option(help="Where to write the page; DIR/sweep.html by default.")] = None,
) -> None:
    """Print the trials, and write a page with the importance of each key and its response."""
    from sweeps import page
    from sweeps.run import Sweep
    from sweeps.trial_log import Log
    from wmdd.runtime.log import results

    log = Log.load(folder)
    sweep = Sweep.from_identity(log.identity)
    page.render_terminal(sweep, log, results())
    place = html or folder / "sweep.html"
    page.write_html(sweep, log, place)
    typer.echo(f"page: {place}", err=True)


@app.command(epilog="Example:  wmdd sweep best runs/digits-regularization > best.toml && wmdd run best.toml")
def best(
    folder: SweepArgument,
    no_test: Annotated[bool, typer.Option("--no-test", help="Only write the config: no run on the test set.")] = False,
) -> None:
    """Measure the best recipe on the test set, once, and print it as a config that `wmdd run` takes."""
    from sweeps.best import best as find

    typer.echo(find(folder, measure=not no_test), nl=False)
