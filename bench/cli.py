"""``wmdd bench ...``."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from wmdd.cli_options import ConfigArgument, SetOption
from wmdd.runtime.signals import STOPS, stop_on

app = typer.Typer(
    help="Compare methods under one protocol, and measure speed.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def bench() -> None:
    """Compare methods under one protocol, and measure speed."""


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
            metavar="PROTOCOL",
            help="Shipped protocols (such as digits, tiny-10, tiny-imagenet) or TOML files. They run in this order.",
        ),
    ],
    override: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the runs; of several protocols, their parent folder. Default: runs/NAME."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Number of concurrent runs on this machine, each on its own GPU.")
    ] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Time limit in minutes: then the runs checkpoint. The same command resumes them."),
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE", help="SLURM profile: submit the runs to a cluster. The same command reports them later."
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print how much work is done and how much is left; run nothing.")
    ] = False,
) -> None:
    """Run and report protocols. Only missing runs are run. Intervals are over independent distilled sets."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes  # imports count
    from bench import protocol as protocols
    from bench import remaining
    from wmdd import launchers
    from wmdd.errors import InputError
    from wmdd.records.files import record_files
    from wmdd.report import collect, text
    from wmdd.report.html import write_html
    from wmdd.runtime.log import results

    if slurm and minutes is not None:
        raise InputError(
            "--minutes limits runs on this machine; the profile of --slurm sets the time limit of its jobs"
        )
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
    if not any(path for folder in folders for path in record_files(folder)):
        typer.echo(f"{', '.join(map(str, folders))}: no student has finished yet; the same command reports them later")
        return
    html = (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
    collected = collect.collect(folders)
    write_html(collected, html)
    text.terminal(collected, results())
    typer.echo(f"report: {html}")


@app.command(
    epilog="Examples:  wmdd bench throughput digits   |   "
    "wmdd bench throughput imagenet-1k --set data.root=/scratch/synthetic --stage synthesis --profile profiles   |   "
    "wmdd bench throughput imagenet-1k --count"
)
def throughput(
    config: ConfigArgument,
    override: SetOption = None,
    stage: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Stages to time.")
    ] = "synthesis,statistics,students,barycenters",
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed repeats per engine, alternating with the plain reference.")
    ] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="Target duration of one repeat, in seconds.")] = 0.5,
    reference: Annotated[
        bool, typer.Option(help="Also time a plain reference implementation, and compare its results.")
    ] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="File to append the records to.")] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for profiler traces and tables of kernels.")
    ] = None,
    count: Annotated[
        bool,
        typer.Option(
            "--count", help="Count kernels, bytes and FLOPs of one step of each stage. Time nothing, read no images."
        ),
    ] = False,
) -> None:
    """Time each stage on one device. Reports rate, memory, MFU, and speed compared with a plain reference."""
    from bench import throughput as speeds
    from wmdd.config.loading import load_config
    from wmdd.errors import InputError
    from wmdd.runtime.log import results

    if count:
        from bench import counts

        if out or profile:
            raise InputError("--count times nothing and writes no records or profiles: leave out --out and --profile")
        settings = load_config(config, override or [])
        counts.tell(settings, counts.run(settings), results())
        return
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
        typer.Option(min=1, help="Number of classes in the largest group; by default as many as make up 1,000 images."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats per group size; the sizes take turns.")] = 5,
    seconds: Annotated[
        float, typer.Option(min=0, help="Target duration of one repeat of the largest group, in seconds.")
    ] = 2.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="File to append the records to.")] = None,
) -> None:
    """Time several group sizes. The command suggests a value of synthesis.classes_per_group."""
    from bench import group_size as study
    from wmdd.config.loading import load_config
    from wmdd.runtime.log import results

    found, notes = study.run(load_config(config, override or []), most, repeats, seconds)
    study.tell(found, notes, out, results())


@app.command(
    epilog="Examples:  wmdd bench evaluate sre2l_in1k_rn18_4k_ipc50 --config imagenet-1k   |   "
    "wmdd bench evaluate theirs --config digits --set student.epochs=50 --baselines random"
)
@stop_on(*STOPS)
def evaluate(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of distilled images, with one sub-folder per class.")
    ],
    config: Annotated[
        str,
        typer.Option(metavar="CONFIG", help="Preset or TOML file that sets dataset, teacher, labels and students."),
    ],
    override: SetOption = None,
    layout: Annotated[
        str,
        typer.Option(
            metavar="auto|classes|numbered", help="Names of the sub-folders: class names, numbers, or detect them."
        ),
    ] = "auto",
    ipc: Annotated[int | None, typer.Option(help="Images per class; by default as many as the folder has.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the set in the report; the folder's by default.")] = None,
    baselines: Annotated[
        str, typer.Option(metavar="METHOD,...", help="Methods to compare the set with; an empty text for none.")
    ] = "random,medoids",
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
) -> None:
    """Measure a distilled set from elsewhere. The report compares it with real images at the same IPC."""
    from bench.evaluate import config_of
    from wmdd import pipeline

    chosen = [method.strip() for method in baselines.split(",") if method.strip()]
    pipeline.run(config_of(folder, config, override or [], layout, ipc, name, chosen), out)


@app.command(
    epilog="Examples:  wmdd bench scaling digits --ranks 1,2 --set synthesis.iterations=500 --out scaling.jsonl   |   "
    "wmdd bench scaling imagenet-1k --ranks 1,8,64 --slurm a100"
)
def scaling(
    config: ConfigArgument,
    override: SetOption = None,
    ranks: Annotated[str, typer.Option(metavar="N,N", help="Numbers of ranks to time.")] = "1,2",
    mode: Annotated[
        str,
        typer.Option(help="strong: the same total work for every size; weak: the same work per rank; or both."),
    ] = "strong",
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats per number of ranks; the sizes take turns.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="File to append the records to.")] = None,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE", help="SLURM profile: run all sizes in one job of a cluster, on the same nodes."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps finished steps, on a shared disk. Default with --slurm: runs/scaling."),
    ] = None,
) -> None:
    """Time several numbers of ranks. Reports rate and efficiency of the synthesis, and the time of each phase."""
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


@app.command(epilog="Example:  wmdd bench rehearse imagenet-1k --ranks 1,8,64,512 --out rehearsal.json")
def rehearse(
    config: ConfigArgument,
    override: SetOption = None,
    ranks: Annotated[str, typer.Option(metavar="N,N", help="Numbers of ranks to rehearse.")] = "1,8,64,512",
    group_seconds: Annotated[
        float, typer.Option(min=0.001, help="Time of the synthesis of one group on one rank, in seconds.")
    ] = 60.0,
    statistics_seconds: Annotated[
        float, typer.Option(min=0, help="Time of the class statistics of one group on one rank, in seconds.")
    ] = 6.0,
    spread: Annotated[
        float, typer.Option(min=0, max=1, help="Relative standard deviation of the time of a group.")
    ] = 0.0,
    slow: Annotated[float, typer.Option(min=1, help="Factor of the times of the last rank, as on a slow node.")] = 1.0,
    student_task: Annotated[
        bool,
        typer.Option(
            "--student-task", help="Also rehearse one student task: its files and its memory, without training."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="File to write the figures to.")] = None,
) -> None:
    """Rehearse how many ranks share the groups of a run. Reports the share of ranks at work, and the cost of an
    agreement. No image is read, and nothing is synthesized."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a warning for each client without a name in DNS
    from bench import rehearse as study
    from bench import rehearse_task
    from bench.scaling import numbers_of
    from wmdd.config.loading import load_config
    from wmdd.runtime.log import results

    times = study.GroupTimes(group_seconds, statistics_seconds, spread, slow)
    settings = load_config(config, override or [])
    found = study.run(settings, numbers_of(ranks), times)
    study.tell(found, times, rehearse_task.run(settings) if student_task else None, out, results())


@app.command(
    epilog="Examples:  wmdd bench plan imagenet-1k --gpu H100   |   "
    "wmdd bench plan imagenet-1k --gpus 64 --from speeds.jsonl"
)
def plan(
    config: ConfigArgument,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs that share the run.")] = 1,
    override: SetOption = None,
    source: Annotated[
        Path, typer.Option("--from", metavar="FILE.jsonl", help="File of speeds, from `wmdd bench throughput --out`.")
    ] = Path("speeds.jsonl"),
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="H100|H200|A100|L40S|4090|B200",
            help="GPU to predict memory and least times for, from its data sheet. Measured speeds come first.",
        ),
    ] = None,
) -> None:
    """Project the GPU-hours of a run from measured speeds. With --gpu also predict its memory and least times, without
    hardware."""
    from bench import projection, roofline
    from wmdd.config.loading import load_config
    from wmdd.runtime.log import results

    settings = load_config(config, override or [])
    predicted = None
    if gpu:
        predicted = roofline.run(settings, projection.size_of(settings)[0], roofline.gpu_of(gpu))
        roofline.tell(predicted, results())
    measured = projection.read(source) if source.exists() or not gpu else []
    parts, notes = projection.run(settings, gpus, measured, source, predicted)
    projection.tell(settings, gpus, parts, notes, results())


@app.command(epilog="Example:  wmdd bench power bench/results/digits-wmdd.jsonl --difference 1")
def power(
    places: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of records, or run folders.")],
    difference: Annotated[
        float, typer.Option(min=0.01, help="Difference from random images to detect, in points of top-1.")
    ] = 1.0,
) -> None:
    """Print the power of a comparison. It is the smallest detectable difference from random images, and the number of
    sets that a given difference needs."""
    from bench import power as study
    from wmdd.runtime.log import results

    study.print_power(study.power(places, difference / 100), difference / 100, results())


@app.command(
    epilog="Examples:  wmdd bench compare fp32.jsonl bf16.jsonl --margin 1   |   "
    "wmdd bench compare speeds-before.jsonl speeds-after.jsonl"
)
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="File of records, or run folder.")],
    new: Annotated[
        Path,
        typer.Argument(metavar="NEW", help="File or folder to compare: the same methods or the same work."),
    ],
    margin: Annotated[
        float | None, typer.Option(min=0.01, help="Margin of a test of equivalence, in points of top-1.")
    ] = None,
) -> None:
    """Compare two recipes, precisions or revisions. Accuracies need the same methods; differences are paired on the
    same images. Speeds need the same work; a change counts where it exceeds the spread of the repeats."""
    from bench import recipes, speed_changes
    from wmdd.errors import InputError
    from wmdd.records.files import read_records
    from wmdd.records.schema import SpeedRecord
    from wmdd.runtime.log import results

    speeds = [read_records(place, SpeedRecord)[0] for place in (old, new)]
    if all(speeds):
        changes = speed_changes.changes(*speeds)
        if not changes:
            raise InputError(f"{old} and {new}: time no work in common (stage, data, network, engine, set-up)")
        speed_changes.print_changes(changes, results())
        return
    wanted = None if margin is None else margin / 100
    found, differing = recipes.effects(old, new, wanted)
    recipes.print_effects(found, differing, wanted, results())


@app.command(epilog="Example:  wmdd bench check bench/results/*.jsonl")
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of records.")],
    mark: Annotated[
        bool, typer.Option("--mark", help="Before the check, write into each record whether its row has converged.")
    ] = False,
) -> None:
    """Check files of records. Rules: seeds, test images, revisions and convergence. Exit code 1 if one is broken."""
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
    typer.echo(f"{len(files)} files follow all rules")
