"""``wmdd sweep ...``. Ray, Optuna and torch are imported by the commands that need them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Search config keys, such as barycenter weights and regularization, for the best recipe on a budget.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SweepArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the sweep.")]


@app.command(
    epilog="Examples:  wmdd sweep run digits --space regularization --trials 12   |   "
    "wmdd sweep run digits --space regularization --trials 24"
)
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Preset, preset+variant or TOML file to vary.")],
    space: Annotated[
        str,
        typer.Option(
            help="Keys to vary and their values: regularization, barycenter, weights-and-lambda, synthesis, full, or a"
            " TOML file."
        ),
    ],
    trials: Annotated[
        int, typer.Option(help="Total number of trials. Trial 0 is the unchanged config. A larger number adds trials.")
    ] = 20,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; runs/NAME-SPACE by default.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the config.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Override one key of the space's [budget].")
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help="Early stopping: asha stops weak trials early; none completes every trial.")
    ] = "asha",
    search: Annotated[str, typer.Option(help="Search method: optuna (TPE), random or grid.")] = "optuna",
    objective: Annotated[
        str,
        typer.Option(
            help="Value to optimize, on images held out of the training set: top1 (accuracy), lrs (label-robust score),"
            " w2 (distance in feature space) or time (seconds of synthesis)."
        ),
    ] = "top1",
    seed: Annotated[int, typer.Option(help="Random seed of the search.", min=0)] = 0,
    gpus: Annotated[
        float | None,
        typer.Option(
            help="GPUs per trial; 0.25 puts four trials on one GPU, 0 uses CPUs only. Default: 1 with a GPU, else 0.",
            min=0,
        ),
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="CPUs per trial; compute.threads by default.", min=0.1)] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Number of trials at the same time; by default as many as fit.", min=1)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a running Ray cluster, HOST:PORT or auto. By default Ray starts on this machine."
        ),
    ] = None,
) -> None:
    """Run a sweep. The same command resumes a stopped sweep; more --trials extend a finished one."""
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
    html: Annotated[Path | None, typer.Option(help="File of the page; DIR/sweep.html by default.")] = None,
) -> None:
    """Print the trials of a sweep. Also writes a page with the importance and the effect of each key."""
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
    no_test: Annotated[
        bool, typer.Option("--no-test", help="Print the config without measuring it on the test set.")
    ] = False,
) -> None:
    """Measure and print the best recipe. Measures it once, on the test set, and prints a config for `wmdd run`."""
    from sweeps.best import best as find

    typer.echo(find(folder, measure=not no_test), nl=False)
