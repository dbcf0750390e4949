"""``wmdd bench ...``."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Compare methods under one protocol.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Compare methods under one protocol."""


@app.command(epilog="Example:  wmdd bench protocol digits --out runs/digits-protocol")
def protocol(
    file: Annotated[str, typer.Argument(metavar="PROTOCOL", help="Shipped protocol (digits) or TOML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder of its runs; runs/NAME by default.")] = None,
) -> None:
    """Run what is missing of a protocol, and report it: paired by seed, with intervals."""
    from rich.console import Console

    from bench import protocol as protocols
    from wmdd import page, report

    chosen = protocols.load_protocol(file)
    folder = out or Path("runs") / chosen.name
    collected = report.collect(protocols.run(chosen, folder))
    page.write_html(collected, folder / "report.html")
    report.render_terminal(collected, Console())
    typer.echo(f"report: {folder / 'report.html'}")
