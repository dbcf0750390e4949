"""Options that the command groups share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from wmdd.errors import InputError, WmddError, tell
from wmdd.runtime.garbage import expect_many_objects
from wmdd.runtime.log import on_screen

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Preset (digits), preset with variant (digits+paper) or TOML file.")
]


SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. synthesis.lr=0.1.")
]


RefreshOption = Annotated[
    bool, typer.Option("--refresh", help="List the images again, although their folders have not changed.")
]


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def parse_blocks(text: str) -> list[int]:
    """Return the block numbers that ``7``, ``0-15`` or ``1,3-5`` names.

    Raises:
        InputError: the text is none of these.
    """
    blocks: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"--only-blocks {text}: expected a number, a range or a list, such as 7, 0-15 or 1,3-5")
        blocks += range(int(first), int(last or first) + 1)
    return blocks


def answer(program: Callable[[], object]) -> None:
    """Run a program; a known error ends it with one line and its exit code, never with a trace."""
    expect_many_objects()
    try:
        with on_screen():
            program()
    except WmddError as error:
        tell(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("wmdd: interrupted", err=True)
        sys.exit(130)
