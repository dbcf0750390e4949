"""Options that the command groups share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from wmdd.errors import InputError, WmddError, tell
from wmdd.runtime import interpreter
from wmdd.runtime.log import on_screen

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Preset (digits), preset with a variant (digits+paper) or TOML file.")
]


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Config key to override, such as synthesis.lr=0.1. May be repeated."
    ),
]


RefreshOption = Annotated[
    bool, typer.Option("--refresh", help="List the images again, even if their folders have not changed.")
]


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]


def parse_blocks(text: str) -> list[int]:
    """Return the block numbers in a text such as ``7``, ``0-15`` or ``1,3-5``.

    Raises:
        InputError: the text has another form.
    """
    blocks: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"--only-blocks {text}: expected a number, a range or a list, such as 7, 0-15 or 1,3-5")
        blocks += range(int(first), int(last or first) + 1)
    return blocks


def answer(program: Callable[[], object]) -> NoReturn:
    """Run a program and end the process.  A known error prints one line without a traceback, and sets the exit code."""
    interpreter.expect_many_objects()
    code: object = 0
    try:
        with on_screen():
            program()
    except SystemExit as reason:
        code = reason.code or 0
    except WmddError as error:
        tell(error)
        code = error.exit_code
    except KeyboardInterrupt:
        typer.echo("wmdd: interrupted", err=True)
        code = 130
    if not isinstance(code, int):  # a message: Python prints it
        sys.exit(str(code))
    interpreter.end(code)
