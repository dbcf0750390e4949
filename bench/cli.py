"""``wmdd bench ...``."""

from pathlib import Path
from typing import Annotated

import typer

from wmdd.cli import SetOption

app = typer.Typer(help="Compare methods under one protocol.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Compare methods under one protocol."""


@app.command(
    epilog="Examples:  wmdd bench protocol digits --jobs 2   |   "
    "wmdd bench protocol tiny-10 --set data.root=/data/tiny-imagenet-200 --slurm a100"
)
def protocol(
    file: Annotated[str, typer.Argument(metavar="PROTOCOL", help="Shipped protocol (digits, tiny-10) or TOML file.")],
    override: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder of its runs; runs/NAME by default.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")] = 1,
    slurm: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Submit the runs instead; the same command reports them later."),
    ] = None,
) -> None:
    """Run what is missing of a protocol, and report it: paired by seed, with intervals."""
    from rich.console import Console

    from bench import protocol as protocols
    from wmdd import launchers, page, report

    chosen = protocols.load_protocol(file)
    folder = out or Path("runs") / chosen.name
    table = protocols.cells(chosen, folder, override or [])
    launcher = launchers.find("slurm", slurm) if slurm else launchers.Local(jobs)
    protocols.check(table)
    protocols.write_plan(chosen, table, folder)
    launcher.launch([(cell.config, cell.folder) for cell in table], f"protocol {chosen.name}")
    if not any(folder.rglob("records/*.jsonl")):
        typer.echo(f"{folder}: no student has finished yet; the same command reports them later")
        return
    collected = report.collect([folder])
    page.write_html(collected, folder / "report.html")
    report.render_terminal(collected, Console())
    typer.echo(f"report: {folder / 'report.html'}")
