"""``wmdd slurm ...``.  Heavy imports wait for the command that needs them."""

from pathlib import Path
from typing import Annotated

import typer

from wmdd.cli_options import RefreshOption, RunArgument, SetOption
from wmdd.errors import InputError

app = typer.Typer(
    help="Run on a SLURM cluster: one array task per block of classes.", no_args_is_help=True, rich_markup_mode=None
)
local = typer.Typer(
    help="A throw-away cluster on this machine, to try things.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(local, name="local")

RootOption = Annotated[Path | None, typer.Option(help="Folder of the cluster; a short path, by default under /tmp.")]


@app.command(
    epilog="Examples:  wmdd slurm submit imagenet-1k --profile a100 --dry-run   |   "
    "wmdd slurm submit digits --profile mine.toml --blocks 5   |   wmdd slurm submit --selftest --profile a100"
)
def submit(
    profile: Annotated[str, typer.Option(help="Name of a profile that ships (a100, preemptible, cpu, local) or file.")],
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="Preset, preset with a variant, TOML file, or the folder of a run."),
    ] = None,
    override: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder, on a shared disk; runs/NAME by default.")] = None,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Blocks of classes; by default from --task-minutes.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Students of each kind (student.seeds).")] = None,
    task_minutes: Annotated[float, typer.Option(min=0.1, help="Target length of a task, in minutes.")] = 30.0,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Image-iterations per second of one rank, if you know them.")
    ] = None,
    rate_from: Annotated[Path | None, typer.Option(help="Take speeds from this run, done on the same nodes.")] = None,
    stages: Annotated[str, typer.Option(help="Part of the graph.")] = "teacher,distill,students,report",
    only_blocks: Annotated[
        str | None, typer.Option(help="Blocks to submit, such as 0-499; students follow the last missing block.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, scripts and estimate; submit nothing.")
    ] = False,
    refresh: RefreshOption = False,
    selftest: Annotated[
        bool,
        typer.Option("--selftest", help="Run wmdd selftest on every node of the partition, in place of a CONFIG."),
    ] = False,
) -> None:
    """Submit what is missing of a run: teacher, array of blocks, array of students, report."""
    if selftest:
        _selftest(profile, config, out or Path("runs/selftest"), dry_run)
        return
    if config is None:
        raise InputError("CONFIG is missing: name a preset, a TOML file or a run folder, or use --selftest")
    from dataclasses import replace

    from slurm import estimate, messages, scheduler
    from slurm import submit as submission
    from slurm.plan import Selection
    from slurm.profile import load_profile, parse_blocks, parse_stages
    from wmdd.config.loading import load_config
    from wmdd.config.schema import Config
    from wmdd.runs.folder import RunFolder

    known = load_profile(profile)
    wanted = Selection(parse_stages(stages), parse_blocks(only_blocks) if only_blocks else None)
    if not dry_run:
        scheduler.require("sbatch")
    overrides = [*(override or []), *([f"student.seeds={seeds}"] if seeds else [])]
    if (bound := Path(config) / "config.json").is_file():
        if overrides or out:
            raise InputError(f"{config}: is a run folder, which has a config; leave out --set, --seeds and --out")
        settings, out = Config.model_validate(RunFolder(bound.parent).bound()["config"]), bound.parent
    else:
        settings = load_config(config, overrides)
    if blocks is None and any(one.partition("=")[0].strip() == "blocks" for one in overrides):
        blocks = settings.blocks
    speed = estimate.measured(rate_from) if rate_from else estimate.ClusterSpeed()
    speed = replace(speed, rate=rate, rates=None) if rate else speed
    request = submission.prepare(settings, out, known, blocks, task_minutes, speed, wanted, refresh)
    if dry_run:
        typer.echo(messages.dry_run(request))
        return
    launched = submission.submit(request) if request.arrays else []
    if launched:
        typer.echo(messages.submitted(request, launched))
    else:
        queued = ", or it is in the queue" if request.arrays or request.waiting else ""
        typer.echo(f"{request.folder.path}: nothing is missing{queued}")


def _selftest(profile: str, config: str | None, out: Path, dry_run: bool) -> None:
    """Submit the self-test to every node without a result, and show where each node stands."""
    from slurm import selftest as nodes
    from slurm.profile import load_profile
    from wmdd.runtime.log import results

    if config is not None:
        raise InputError(f"--selftest takes no CONFIG: leave out {config}")
    known = load_profile(profile)
    if dry_run:
        typer.echo(nodes.script(known, "NODE", out.absolute()))
        return
    found = nodes.on_every_node(known, out)
    results().print(nodes.table(found))
    typer.echo(nodes.summary(found, out))
    if any(one.bad for one in found):
        raise typer.Exit(1)


@app.command()
def status(
    run: RunArgument,
    all_tasks: Annotated[bool, typer.Option("--all", help="Show the tasks that are done, too.")] = False,
    watch: Annotated[
        float | None,
        typer.Option(min=30, help="Seconds between two updates; the command ends when all tasks have ended."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print plain values instead of a table.")] = False,
) -> None:
    """Show where a submitted run stands; exit 1 if a task is over without its result."""
    import time

    from rich.live import Live

    from slurm import status as reporter
    from wmdd.runtime.log import results

    found = reporter.status(run)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found.as_json(), indent=2))
    elif watch:
        with Live(reporter.render(found, all_tasks), console=results(), auto_refresh=False) as live:
            while found.active:
                time.sleep(watch)
                found = reporter.status(run)
                live.update(reporter.render(found, all_tasks), refresh=True)
    else:
        results().print(reporter.render(found, all_tasks))
    if lines := reporter.mending(run, found):
        typer.echo("\n".join(lines), err=True)
        raise typer.Exit(1)


@app.command(epilog="Examples:  wmdd slurm logs runs/digits 3   |   wmdd slurm logs runs/digits 0 --stage report")
def logs(
    run: RunArgument,
    block: Annotated[int, typer.Argument(min=0, metavar="BLOCK", help="Block, or position of a student.")] = 0,
    stage: Annotated[str, typer.Option(help="teacher, distill, students or report.")] = "distill",
    lines: Annotated[int, typer.Option(min=1, help="Last lines of each log.")] = 40,
) -> None:
    """Print the end of the log of the task that last worked on a block."""
    from slurm.profile import parse_stages
    from slurm.status import log_files

    for file in log_files(run.absolute(), parse_stages(stage)[0], block):
        text = file.read_text(errors="replace").splitlines()
        typer.echo("\n".join([f"==> {file} <==", *text[-lines:]]))


@app.command()
def cancel(run: RunArgument) -> None:
    """Take every task of a run out of the queue; what is finished is kept."""
    from slurm import scheduler, submissions

    gone = scheduler.cancel_all([one.job for one in submissions.read(run)])
    typer.echo(f"{run}: {gone} tasks were cancelled" if gone else f"{run}: no task was in the queue")


@app.command(epilog="Example:  wmdd slurm throttle runs/imagenet-1k 64")
def throttle(
    run: RunArgument,
    parallel: Annotated[int, typer.Argument(min=1, metavar="N", help="Tasks of an array that run at the same time.")],
) -> None:
    """Change how many tasks of each array of a run work at the same time."""
    from slurm import scheduler, submissions

    launched = submissions.read(run)
    known = scheduler.queue(one.job for one in launched)
    active = {name for name, task in known.items() if task.active}
    waiting = [one for one in launched if len(one.tasks) > 1 and active.intersection(one.names())]
    for one in waiting:
        scheduler.throttle(one.job, parallel)
    what = ", ".join(f"{one.stage} (job {one.job})" for one in waiting)
    typer.echo(f"{run}: {what}: {parallel} tasks at a time" if waiting else f"{run}: no array is in the queue")


@local.command("start", epilog='Example, which sets SLURM_CONF for this shell:  eval "$(wmdd slurm local start)"')
def local_start(
    root: RootOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="Virtual nodes.")] = 4,
    accounting: Annotated[bool, typer.Option("--accounting", help="Also slurmdbd and MariaDB, for sacct.")] = False,
) -> None:
    """Boot the cluster and print the line that makes this shell use it."""
    from slurm.local_cluster import LocalCluster, default_root

    cluster = LocalCluster(root or default_root(), nodes=nodes, accounting=accounting)
    cluster.start()
    typer.echo(f"export SLURM_CONF={cluster.conf}")


@local.command("stop")
def local_stop(root: RootOption = None) -> None:
    """End the jobs and the daemons of the cluster, and delete its folder."""
    from slurm.local_cluster import default_root, stop

    stop(root or default_root())
