"""``wmdd bench ...``."""

import time
from pathlib import Path
from typing import Annotated

import typer

from wmdd.cli_options import ConfigArgument, SetOption
from wmdd.runtime.signals import STOPS, stop_on

app = typer.Typer(
    help="Compare methods under one protocol, and measure speeds.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def bench() -> None:
    """Compare methods under one protocol, and measure speeds."""


@app.command(
    epilog="Examples:  wmdd bench protocol digits --jobs 2   |   "
    "wmdd bench protocol tiny-imagenet tiny-imagenet-ablation --minutes 9   |   "
    "wmdd bench protocol tiny-10 --set data.root=/data/tiny-imagenet-200 --slurm a100"
)
@stop_on(*STOPS)  # before torch is imported, which takes seconds
def protocol(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="PROTOCOL", help="Shipped protocols (digits, tiny-10, tiny-imagenet) or TOML files, in this order."
        ),
    ],
    override: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the runs; with several, of one folder for each. runs/NAME by default."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs at a time here, each on its own GPU.")] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop after so many minutes as SIGTERM does; the same command goes on."),
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Submit the runs instead; the same command reports them later."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only list what is done and what is left.")] = False,
) -> None:
    """Run what is missing of protocols, and report them together: paired by seed, with intervals."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes  # imports count
    from bench import protocol as protocols
    from bench import remaining
    from wmdd import launchers
    from wmdd.errors import InputError
    from wmdd.report import collect, text
    from wmdd.report.html import write_html
    from wmdd.runtime.log import results

    if slurm and minutes is not None:
        raise InputError("--minutes is for this machine; the times of jobs are set in the profile of --slurm")
    chosen = [protocols.load_protocol(file) for file in files]
    folders = protocols.folders(chosen, out)
    tables = [protocols.cells(one, folder, override or []) for one, folder in zip(chosen, folders, strict=True)]
    every = [cell for table in tables for cell in table]
    if plan:
        remaining.tell(every, results())
        return
    launcher = launchers.find("slurm", slurm) if slurm else launchers.Local(jobs, deadline)
    todo = protocols.check(every)
    for one, table, folder in zip(chosen, tables, folders, strict=True):
        protocols.write_plan(one, table, folder)
    launcher.launch([(cell.config, cell.folder) for cell in todo], f"protocol {', '.join(one.name for one in chosen)}")
    if not any(path for folder in folders for path in folder.rglob("records/*.jsonl")):
        typer.echo(f"{', '.join(map(str, folders))}: no student has finished yet; the same command reports them later")
        return
    html = (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
    collected = collect.collect(folders)
    write_html(collected, html)
    text.terminal(collected, results())
    typer.echo(f"report: {html}")


@app.command(
    epilog="Examples:  wmdd bench throughput digits   |   "
    "wmdd bench throughput imagenet-1k --set data.root=/scratch/synthetic --stage synthesis --profile profiles"
)
def throughput(
    config: ConfigArgument,
    override: SetOption = None,
    stage: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="What to time.")
    ] = "synthesis,statistics,students,barycenters",
    repeats: Annotated[int, typer.Option(min=1, help="Of each engine, in turns with the reference.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="That one repeat shall last.")] = 0.5,
    reference: Annotated[bool, typer.Option(help="Time the same work done plainly, and compare results.")] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Add the records to this file.")] = None,
    profile: Annotated[Path | None, typer.Option(metavar="DIR", help="Write traces and tables of kernels.")] = None,
) -> None:
    """Time each stage on one device: rates, memory, MFU, and how they compare to the same work done plainly."""
    from bench import throughput as speeds
    from wmdd.config.loading import load_config
    from wmdd.runtime.log import results

    stages = speeds.stages_of(stage)
    found = speeds.run(load_config(config, override or []), stages, repeats, seconds, reference, profile)
    speeds.tell(found, out, results())


@app.command(
    epilog="Example:  wmdd bench groups imagenet-1k --set data.root=/data/imagenet --most 64 --out speeds.jsonl"
)
def groups(
    config: ConfigArgument,
    override: SetOption = None,
    most: Annotated[
        int | None,
        typer.Option(min=1, help="Classes of the largest group; by default as many as make up 1,000 images."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of each size, in turns.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="That one repeat of the largest group shall last.")] = 2.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Add the records to this file.")] = None,
) -> None:
    """Time synthesis of 1, 2, 4, 8, ... classes together, and suggest synthesis.classes_per_group."""
    from bench import group_size as study
    from wmdd.config.loading import load_config
    from wmdd.runtime.log import results

    found, told = study.run(load_config(config, override or []), most, repeats, seconds)
    study.tell(found, told, out, results())


@app.command(
    epilog="Examples:  wmdd bench evaluate sre2l_in1k_rn18_4k_ipc50 --config imagenet-1k   |   "
    "wmdd bench evaluate theirs --config digits --set student.epochs=50 --baselines random"
)
@stop_on(*STOPS)
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Distilled images, one sub-folder a class.")],
    config: Annotated[
        str, typer.Option(metavar="CONFIG", help="Preset or TOML file: data set, teacher, labels and students.")
    ],
    override: SetOption = None,
    layout: Annotated[
        str, typer.Option(metavar="auto|classes|numbered", help="What the sub-folders are called.")
    ] = "auto",
    ipc: Annotated[int | None, typer.Option(help="Images of each class; read off the folder by default.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the report; the folder's by default.")] = None,
    baselines: Annotated[
        str, typer.Option(metavar="METHOD,...", help="Methods measured beside it; an empty text for none.")
    ] = "random,medoids",
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
) -> None:
    """Measure a distilled set that others made, beside random real images and a real coreset, and report it."""
    from bench.evaluate import config_of
    from wmdd import pipeline

    beside = [method.strip() for method in baselines.split(",") if method.strip()]
    pipeline.run(config_of(folder, config, override or [], layout, ipc, name, beside), out)


@app.command(
    epilog="Examples:  wmdd bench scaling digits --ranks 1,2 --set synthesis.iterations=500 --out scaling.jsonl   |   "
    "wmdd bench scaling imagenet-1k --ranks 1,8,64 --slurm a100"
)
def scaling(
    config: ConfigArgument,
    override: SetOption = None,
    ranks: Annotated[str, typer.Option(metavar="N,N", help="Numbers of ranks.")] = "1,2",
    mode: Annotated[
        str, typer.Option(help="strong: the same groups for all; weak: as many for each rank; both.")
    ] = "strong",
    repeats: Annotated[int, typer.Option(min=1, help="Of each number of ranks, in turns.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Add the records to this file.")] = None,
    slurm: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Run all sizes in one job of a cluster, on the same nodes.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder on a shared disk, whose finished steps are kept; with --slurm runs/scaling by default."
        ),
    ] = None,
) -> None:
    """Time synthesis over more and more ranks: efficiency, and where the time goes."""
    from bench import scaling as study
    from wmdd import launchers
    from wmdd.config.loading import load_config
    from wmdd.runtime.log import results

    numbers = study.numbers_of(ranks)
    chosen = study.modes_of(mode)
    launcher = launchers.find("slurm", slurm) if slurm else None
    place = folder or (Path("runs") / "scaling" if slurm else None)
    settings = load_config(config, override or [])
    study.tell(study.run(settings, numbers, chosen, repeats, launcher, place), out, results())


@app.command(epilog="Example:  wmdd bench plan imagenet-1k --gpus 64 --from speeds.jsonl")
def plan(
    config: ConfigArgument,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the run.")],
    override: SetOption = None,
    source: Annotated[
        Path, typer.Option("--from", metavar="FILE.jsonl", help="Records of `wmdd bench throughput --out`.")
    ] = Path("speeds.jsonl"),
) -> None:
    """Project the GPU-hours and the wall time of a whole run from measured speeds."""
    from bench import projection
    from wmdd.config.loading import load_config
    from wmdd.runtime.log import results

    settings = load_config(config, override or [])
    parts, told = projection.run(settings, gpus, projection.read(source), source)
    projection.tell(settings, gpus, parts, told, results())


@app.command(epilog="Example:  wmdd bench power bench/results/digits-wmdd.jsonl --difference 1")
def power(
    places: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of records, or run folders.")],
    difference: Annotated[float, typer.Option(min=0.01, help="True difference to be found, in points of top-1.")] = 1.0,
) -> None:
    """Say which differences to random images the measured sets could find, and how many sets find a given one."""
    from bench import power as study
    from wmdd.runtime.log import results

    study.print_power(study.power(places, difference / 100), difference / 100, results())


@app.command(epilog="Example:  wmdd bench compare fp32.jsonl bf16.jsonl --margin 1")
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="File of records, or run folder.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="The same methods under another recipe.")],
    margin: Annotated[
        float | None, typer.Option(min=0.01, help="Test equivalence within so many points of top-1.")
    ] = None,
) -> None:
    """Compare the same methods under two recipes or precisions: paired where the images are the same."""
    from bench import recipes
    from wmdd.runtime.log import results

    wanted = None if margin is None else margin / 100
    found, differing = recipes.effects(first, second, wanted)
    recipes.print_effects(found, differing, wanted, results())


@app.command(epilog="Example:  wmdd bench check bench/results/*.jsonl")
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of records.")],
    mark: Annotated[
        bool, typer.Option("--mark", help="First write into each record whether its row has converged.")
    ] = False,
) -> None:
    """Check files of records: seeds, last epoch, hold-out, one revision, versions, convergence; exit code 1 if not."""
    from bench import check as checks

    found = []
    for file in files:
        if mark and (changed := checks.mark(file)):
            typer.echo(f"{file}: {changed} records marked")
        found += [f"{file}: {problem}" for problem in checks.check(file)]
    for problem in found:
        typer.echo(problem)
    if found:
        raise typer.Exit(1)
    typer.echo(f"{len(files)} files keep all rules")
