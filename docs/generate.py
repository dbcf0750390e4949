"""Write the pages of docs/reference that follow from the code: ``python docs/generate.py``.

``tests/test_docs.py`` compares the committed pages with what this program returns.
"""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- This page is generated from the code: python docs/generate.py -->"


def pages() -> dict[str, str]:
    """Return the text of each generated page by its file name."""
    return {"config.md": config_page(), "presets.md": presets_page(), "cli.md": cli_page(), "files.md": files_page()}


def config_page() -> str:
    """Return the reference of the config: type, default, scope and meaning of each key."""
    from wmdd.config.schema import DECIDES, Config

    top = [name for name, field in Config.model_fields.items() if not isinstance(field.default, BaseModel)]
    sections = {name: type(field.default) for name, field in Config.model_fields.items() if name not in top}
    parts = [
        f"{NOTE}\n# Config keys",
        "A run is one config. Start from a [preset](presets.md) or from a TOML file, and override keys with"
        " `--set KEY=VALUE`.",
        "```bash\nwmdd config show digits > mine.toml    # every key with its meaning\n"
        "wmdd run mine.toml --set synthesis.lr=0.02\n```",
        "*Decides* names what changes when the key changes. `data`, `teacher`, `statistics`, `images`, `labels` and"
        " `students` follow each other: a key decides its own step and all later ones. `selection` chooses which"
        " students are trained. `arithmetic` decides rounding. `nothing` marks places, names and speed.",
        "## Top level",
        *_fields(Config, top, lambda key: DECIDES[key]),
    ]
    for section, model in sections.items():
        parts += [f"## `[{section}]`", _text(model.__doc__)]
        names = list(model.model_fields)
        parts += _fields(model, names, lambda key, section=section: DECIDES[f"{section}.{key}"], f"{section}.")
    return "\n\n".join(parts) + "\n"


def presets_page() -> str:
    """Return all presets and variants as they ship."""
    from wmdd.config.loading import preset_names

    folder = resources.files("wmdd.config") / "presets"
    presets, variants = preset_names()
    parts = [
        f"{NOTE}\n# Presets",
        "```bash\nwmdd config list\nwmdd run digits+paper    # a preset with a variant\n```",
        "A key that a preset does not name has the default of [Config keys](config.md).",
    ]
    for place, title, names in ((folder, "Preset", presets), (folder / "variants", "Variant", variants)):
        for name in names:
            parts += [f"## {title} `{name}`", f"```toml\n{(place / f'{name}.toml').read_text().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def files_page() -> str:
    """Return the reference of the TOML files that are no configs: protocols, spaces, profiles."""
    from bench.protocol import Protocol, ProtocolRow
    from slurm.profile import Profile, Resources
    from sweeps.space import Budget

    stages = [name for name in Profile.model_fields if name not in ("name", "stages")]
    parts = [f"{NOTE}\n# Protocols, spaces and profiles", "The keys of the other TOML files that `wmdd` reads."]
    for title, guide, model, names in (
        ("Protocol", "[Compare methods](../guides/protocols.md)", Protocol, list(Protocol.model_fields)),
        ("Protocol: an entry of `methods`", "", ProtocolRow, list(ProtocolRow.model_fields)),
        ("Space: `[budget]`", "[Sweeps](../guides/sweeps.md)", Budget, list(Budget.model_fields)),
        ("Profile: resources of a task", "[SLURM](../guides/slurm.md)", Resources, list(Resources.model_fields)),
        ("Profile: speeds", "", Profile, stages),
    ):
        parts += [f"## {title}", *([f"Guide: {guide}."] if guide else []), *_fields(model, names)]
    return "\n\n".join(parts) + "\n"


def cli_page() -> str:
    """Return the reference of the command line: arguments and options of each command."""
    parts = [
        f"{NOTE}\n# Command line",
        "`wmdd COMMAND --help` prints the same on the terminal. Exit codes: 0 done, 1 failed, 2 wrong input,"
        " 75 stopped after a checkpoint (the same command resumes). `wmdd --version` prints the version.",
    ]
    for words, command in commands():
        if hasattr(command, "list_commands"):
            continue
        arguments = [param for param in command.params if param.param_type_name == "argument"]
        options = [param for param in command.params if param.param_type_name == "option" and not param.hidden]
        usage = [*words, *(f"{param.metavar or param.name.upper()}" for param in arguments)]
        usage += [_option(param) for param in options if param.required] + ["[OPTIONS]"] * bool(options)
        parts += [f"## `{' '.join(words)}`", _text(command.help), f"```text\n{' '.join(usage)}\n```"]
        rows = [(f"`{param.metavar or param.name.upper()}`", param.help or "") for param in arguments]
        rows += [(f"`{_option(param)}`", f"{param.help or ''}{_default(param)}") for param in options]
        if rows:
            lines = [f"| {_cell(name)} | {_cell(meaning)} |" for name, meaning in rows]
            parts.append("\n".join(["| argument or option | meaning |", "| --- | --- |", *lines]))
        if command.epilog:
            _, _, text = command.epilog.partition(":")
            examples = [example.strip() for example in text.split("   |   ")]
            parts.append("\n".join(["```bash", *examples, "```"]))
    return "\n\n".join(parts) + "\n"


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words of each command, such as ``("wmdd", "slurm", "submit")``, and the command; groups come too."""
    import typer

    from wmdd.cli import app

    def walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield words, command
        if hasattr(command, "list_commands"):
            for name in command.list_commands(None):
                yield from walk((*words, name), command.get_command(None, name))

    return walk(("wmdd",), typer.main.get_command(app))


def _fields(model: type[BaseModel], names: list[str], decides: Any = None, prefix: str = "") -> Iterator[str]:
    schema = model.model_json_schema()
    for name in names:
        entry = schema["properties"][name]
        facts = [_kind(entry, schema)]
        if name in schema.get("required", ()):
            facts.append("required")
        else:
            default = entry.get("default", {})
            facts.append("not set" if default is None else f"default `{json.dumps(default, ensure_ascii=False)}`")
        if decides is not None:
            facts.append(f"decides {decides(name)}")
        yield f"### `{prefix}{name}`"
        yield " · ".join(facts)
        yield _text(entry.get("description"))


def _kind(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return the type of a field in words, with its bounds."""
    if "anyOf" in entry:
        return " or ".join(_kind(choice, schema) for choice in entry["anyOf"] if choice.get("type") != "null")
    if "$ref" in entry:
        return "table"
    if "enum" in entry:
        return "one of " + ", ".join(f"`{value}`" for value in entry["enum"])
    kind = entry.get("type", "value")
    if kind == "array":
        own = entry.get("prefixItems", [entry.get("items", {})])
        return f"list of {len(own) if len(own) > 1 else 'values'}, each {_kind(own[0], schema)}"
    words = {"integer": "whole number", "boolean": "`true` or `false`", "string": "text", "object": "table"}
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return " ".join(
        [words.get(kind, kind), *(f"{word} {entry[key]:g}" for key, word in bounds.items() if key in entry)]
    )


def _option(param: Any) -> str:
    names = " / ".join([*param.opts, *param.secondary_opts])
    return names if param.is_flag else f"{names} {param.metavar or param.name.upper()}"


def _default(param: Any) -> str:
    if param.default is None or param.required or (param.is_flag and not param.secondary_opts):
        return ""
    value = param.opts[0].lstrip("-") if param.is_flag else param.default
    return f" Default: `{value}`."


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _cell(text: str) -> str:
    words = " ".join(text.split())
    if "|" in words and words.startswith("`"):  # a backslash before a bar stays visible in code
        words = f"<code>{words.strip('`')}</code>"
    return words.replace("|", "&#124;")


if __name__ == "__main__":
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)
