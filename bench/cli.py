"""``wmdd bench ...``."""

import typer

app = typer.Typer(help="Measure methods and speed.", no_args_is_help=True, rich_markup_mode=None)
