"""Load a config from a preset or TOML file with overrides, and write it as TOML."""

import tomllib
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from wmdd.config.schema import Config
from wmdd.config.section import Section
from wmdd.errors import InputError, complaint, nearest
from wmdd.storage.files import read_toml


def preset_names() -> tuple[list[str], list[str]]:
    """Return the names of the presets, and of the variants that combine with them (``preset+variant``)."""
    folder = resources.files("wmdd.config") / "presets"
    return tuple(  # type: ignore[return-value]
        sorted(entry.name.removesuffix(".toml") for entry in place.iterdir() if entry.name.endswith(".toml"))
        for place in (folder, folder / "variants")
    )


def load_config(source: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Load a preset (``digits``), a preset with variants (``digits+paper``) or a TOML file, and apply overrides.

    A TOML file may extend another config: ``extends = "preset+variant"``.

    Args:
        source: name of a preset, or path of a TOML file.
        overrides: strings such as ``synthesis.bn_weight=30``.  A value is parsed as TOML, else taken as a string.

    Raises:
        InputError: the preset or file does not exist, a key is unknown, or a value has the wrong type or range.
    """
    values = _read(str(source))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected key=value, for example synthesis.bn_weight=30")
        _merge(values, _nest(key.strip().split("."), _parse(text.strip())), f"--set {override}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"config {source}: {_explain(error)}") from None


def describe(config: Config) -> list[tuple[str, Any, str]]:
    """Return (dotted key, value, description) of every field, in order."""
    rows: list[tuple[str, Any, str]] = []

    def walk(section: Section, prefix: str) -> None:
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            if isinstance(value, Section):
                walk(value, f"{prefix}{key}.")
            else:
                rows.append((prefix + key, value, " ".join((field.description or "").split())))

    walk(config, "")
    return rows


def to_toml(config: Config) -> str:
    """Return the whole config as TOML for ``load_config``, with a description above each key."""
    import json
    import textwrap

    lines: list[str] = []
    section = ""
    for key, value, meaning in describe(config):
        head, _, tail = key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        lines += [f"# {line}" for line in textwrap.wrap(meaning, 110)]
        lines.append(f"# {tail} is not set" if value is None else f"{tail} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines).strip() + "\n"


def _read(source: str) -> dict[str, Any]:
    if source.endswith(".toml") or "/" in source:
        return _read_file(Path(source))
    presets, variants = preset_names()
    base, *extras = source.split("+")
    if base not in presets:
        hint = nearest(base, presets)
        raise InputError(f"{source}: no preset {base!r}; {hint} (the name of a config file must end in .toml)")
    folder = resources.files("wmdd.config") / "presets"
    values = tomllib.loads((folder / f"{base}.toml").read_text())
    for extra in extras:
        if extra not in variants:
            raise InputError(f"{source}: no variant {extra!r}; {nearest(extra, variants)}")
        _merge(values, tomllib.loads((folder / "variants" / f"{extra}.toml").read_text()), source)
        values["name"] = f"{values['name']}+{extra}"
    return values


def _read_file(path: Path) -> dict[str, Any]:
    values = read_toml(path, str(path))
    parent = values.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise InputError(
                f"{path}: extends = {parent!r}: expected a preset, such as 'digits+paper', or a .toml file"
            )
        inherited = _read(str(path.parent / parent) if parent.endswith(".toml") else parent)
        _merge(inherited, values, str(path))
        values = inherited
    values.setdefault("name", path.stem)
    return values


def _merge(into: dict[str, Any], values: dict[str, Any], source: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, source)
        elif isinstance(into.get(key), dict):
            raise InputError(f"{source}: {key} is a section; set one of its keys, as in {key}.KEY={value}")
        else:
            into[key] = value


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _parse(text: str) -> Any:
    if text in ("None", "null"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError) -> str:
    """Return the first three validation errors of pydantic on one line."""
    keys = [key for key, _, _ in describe(Config())]
    return "; ".join(
        complaint(item, list(_section_at(item["loc"][:-1]).model_fields), elsewhere=keys) for item in error.errors()[:3]
    )


def _section_at(location: tuple[Any, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not isinstance(annotation, type | types.GenericAlias) or not issubclass(annotation, BaseModel):
            break
        model = annotation
    return model
