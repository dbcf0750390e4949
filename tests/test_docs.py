"""The docs say what the program does: commands, keys, links, tables and examples are checked against the code."""

import json
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from forked import python
from typer.testing import CliRunner

import wmdd
from bench.protocol import Protocol, load_protocol
from slurm.profile import load_profile
from sweeps.space_file import load_space, parse_space
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.config.schema import DEFAULTS, Config
from wmdd.errors import WmddError

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
COMMANDS: dict[tuple[str, ...], Any] = dict(GENERATE["commands"]())
END = {">", ">>", "|", "&&", ";", "||"}
"""Words of a shell line that end a command"""
NO_KEYS = {"teacher.json", "statistics.features", "data.atoms"}
"""What looks like a config key: a file, and members of ``ClassData``"""

every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, without the indentation of a list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def inline(page: Path) -> list[str]:
    """Return what stands between backticks outside of blocks."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def commands_in(line: str) -> Iterator[list[str]]:
    """Yield the words of each ``wmdd ...`` in a shell line."""
    words = shlex.split(line, comments=True)
    for position, word in enumerate(words):
        if word.startswith("$(wmdd "):
            yield from commands_in(word.removeprefix("$(").removesuffix(")"))
        elif word == "wmdd":
            rest = words[position + 1 :]
            yield rest[: next((index for index, other in enumerate(rest) if other in END), len(rest))]


def find(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words name, and the words after its name."""
    name: tuple[str, ...] = ("wmdd",)
    while hasattr(COMMANDS[name], "list_commands") and words and not words[0].startswith("-"):
        assert (*name, words[0]) in COMMANDS, f"no command {' '.join([*name, words[0]])}"
        name, words = (*name, words[0]), words[1:]
    return COMMANDS[name], words


def known_key(text: str) -> None:
    key = text.partition("=")[0]
    assert key in DEFAULTS or key == "KEY", f"no config key {key}"


def read_commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [command for line in lines for command in commands_in(line)]


def parameters(command: Any, words: list[str]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = command.make_context("wmdd", list(words)).params
    except Exception as error:  # typer and click each have errors of their own
        pytest.fail(f"{words}: {error}")
    return found


@every_page
def test_every_command_of_the_docs_is_accepted(page: Path) -> None:
    for words in read_commands(page):
        command, rest = find(words)
        if "--help" in rest or hasattr(command, "list_commands"):
            continue
        values = parameters(command, rest)
        overrides = values.get("override") or []
        for override in overrides:
            known_key(override)
        config = values.get("config", "")
        if config and config != "CONFIG" and not config.endswith(".toml"):
            load_config(config, overrides)
        for key, load in (("profile", load_profile), ("slurm", load_profile)):
            name = values.get(key)
            if isinstance(name, str) and name != "P" and not name.endswith(".toml"):
                load(name)
        if "space" in values and not values["space"].endswith(".toml"):
            load_space(values["space"], load_config("digits"))
        for name in values.get("files") or []:
            if isinstance(name, str) and not name.endswith(".toml"):
                load_protocol(name)


@every_page
def test_every_command_and_option_in_a_sentence_exists(page: Path) -> None:
    for text in inline(page):
        for words in commands_in(text):
            if words and words[0].isupper():  # wmdd COMMAND --help
                continue
            command, rest = find(words)
            options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
            for word in rest:
                if word.startswith("--"):
                    assert word.partition("=")[0] in options, f"{text}: no option {word}"


@every_page
def test_every_config_key_of_the_docs_exists(page: Path) -> None:
    sections = "|".join(name for name in Config.model_fields if f"{name}." in "".join(DEFAULTS))
    for text in inline(page):
        if re.match(rf"({sections})\.[a-z0-9_]+(=.*)?$", text) and text not in NO_KEYS:
            known_key(text)
        if match := re.match(r"--set (\S+)$", text):
            known_key(match[1])


@every_page
def test_every_toml_block_of_the_docs_is_accepted(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "toml")):
        table = tomllib.loads(text)
        file = tmp_path / f"{number}.toml"
        file.write_text(text)
        if "methods" in table:
            Protocol.model_validate(table)
        elif "parameters" in table:
            parse_space("space", table, load_config("digits"))
        elif "partition" in table:
            load_profile(str(file))
        elif "project" not in table and page.name != "presets.md":
            load_config(file)


@every_page
def test_every_link_and_path_of_the_docs_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        place = target.partition("#")[0]
        if place and not re.match(r"[a-z]+:", place):
            assert (page.parent / place).exists(), f"{page}: leads to {target}"
    for text in inline(page):
        if page.name != "CHANGELOG.md" and re.match(r"(wmdd|bench|slurm|sweeps|tests|docs|examples)/[\w./-]+$", text):
            assert (ROOT / text).exists() or (page.parent / text).exists(), f"{page}: names {text}"


@every_page
def test_no_page_names_a_shipped_thing_that_is_gone(page: Path) -> None:
    """Module names such as ``wmdd.records.schema`` can be imported."""
    for text in inline(page):
        if re.match(r"(wmdd|bench|slurm|sweeps)(\.[a-z_]+)+$", text):
            place = ROOT / text.replace(".", "/")
            owner = place.parent.with_suffix(".py"), place.parent / "__init__.py"
            assert place.is_dir() or place.with_suffix(".py").exists() or any(map(Path.exists, owner)), text


def test_the_generated_pages_are_those_of_the_code() -> None:
    for name, text in GENERATE["pages"]().items():
        committed = (ROOT / "docs" / "reference" / name).read_text()
        assert committed == text, f"docs/reference/{name} is old: run python docs/generate.py"


def test_the_reference_names_every_command_option_and_key() -> None:
    cli, config = GENERATE["cli_page"](), GENERATE["config_page"]()
    assert all(f"### `{key}`" in config for key in DEFAULTS)
    assert all(f"## `{' '.join(words)}`" in cli for words, command in COMMANDS.items() if not find_group(command))


def find_group(command: Any) -> bool:
    return hasattr(command, "list_commands")


def test_every_page_of_the_docs_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs") for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [str(page) for page in pages if f": {page}\n" not in menu] == []


def test_the_map_of_the_packages_is_that_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    floors = [[name.strip().removeprefix("wmdd.") for name in layer.split("|")] for layer in layers]
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    sentence = guide.partition("Top first: ")[2].partition(".\n")[0]
    assert [re.findall(r"`(\w+)`", part) for part in sentence.split(";")] == floors
    packages = [path.parent.name for path in (ROOT / "wmdd").glob("*/__init__.py")]
    assert [name for name in packages if f"| `wmdd/{name}/` |" not in guide] == []
    picture = blocks(ROOT / "docs" / "concepts" / "architecture.md", "text")[-1]
    assert [name for name in packages if not re.search(rf"\b{name}\b", picture)] == []


@pytest.mark.slow
def test_the_docs_build_without_a_warning_and_ask_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    assert re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="https?:[^"]*"', page) == []
    assert not list((tmp_path / "site").rglob("*.py"))


def test_the_readme_fits_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
    for folder in ("bench", "slurm", "sweeps"):
        assert len((ROOT / folder / "README.md").read_text().splitlines()) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/reference/python.md"])
def test_the_python_of_the_docs_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word but for the budget."""
    monkeypatch.chdir(tmp_path)
    wmdd.run("digits", out="runs/digits", overrides=TINY)
    codes = blocks(ROOT / page, "python")
    assert codes
    for code in codes:
        space: dict[str, Any] = {}
        exec(code.replace("overrides=[", f"overrides=[*{TINY!r}, "), space)  # noqa: S102 - the docs' own code
        assert space["image"].shape == (1, 8, 8)


@pytest.mark.slow
def test_the_run_folder_holds_what_the_quickstart_shows_and_the_picture_is_drawn_from_it(tmp_path: Path) -> None:
    run = wmdd.run("digits", tmp_path / "run", TINY)
    (tree,) = [block for block in blocks(ROOT / "docs" / "quickstart.md", "text") if block.startswith("runs/digits/")]
    names = [line.split()[0] for line in tree.splitlines()[1:]]
    assert len(names) >= 5 and [name for name in names if not (run / name).exists()] == []
    runpy.run_path(str(ROOT / "docs" / "picture.py"))["draw"](run, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_guide_to_own_images_works_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "guides" / "own-data.md"
    (config,) = [block for block in blocks(page, "toml") if block.startswith("# flowers.toml")]
    Path("flowers.toml").write_text(config)
    done = read_commands(page)
    made = next(words for words in done if words[:2] == ["data", "synthesize"])
    todo = [made, *(words for words in done if words[-1].endswith(("flowers.toml", "packed", "data.packed=packed")))]
    budget = ["teacher.epochs=1", "synthesis.iterations=2", "student.epochs=1", "student.seeds=1", "compute.workers=0"]
    for words in todo:
        sets = [part for override in budget for part in ("--set", override)] if words[0] == "run" else []
        result = CliRunner().invoke(app, [*words, *sets], catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)
    assert [words[:2] for words in todo] == [
        ["data", "synthesize"],
        ["data", "check"],
        ["run", "flowers.toml"],
        ["data", "pack"],
        ["run", "flowers.toml"],
    ]
    assert len(wmdd.DistilledSet.load("runs/flowers")) == 15


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path) -> None:
    def run(name: str, *arguments: str) -> str:
        done = python(str(ROOT / "examples" / name), *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = [override for override in TINY if not override.startswith(("ipc", "student.seeds"))]
    assert "4 images of 4 classes" in run("distill_digits.py", *small)
    assert "test images correct" in run("train_on_distilled.py", "runs/example", "2")
    assert "runs/surest/report.html" in run("own_method.py", *small)
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "distill_digits.py",
        "train_on_distilled.py",
        "own_method.py",
    }


def measured(file: str) -> dict[tuple[str, int], list[float]]:
    """Return the mean top-1 % of each distilled set under hard labels, by method and IPC."""
    sets: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in (ROOT / "bench" / "results" / file).read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "student" and record["regime"] == "hard":
            sets[record["method"], record["ipc"]][record["artefact"]].append(100 * record["metrics"]["top1"])
    return {key: [statistics.mean(tops) for tops in found.values()] for key, found in sets.items()}


def shown(tops: list[float]) -> str:
    mean = f"{statistics.mean(tops):.1f}"
    return mean if len(tops) == 1 else f"{mean} [{min(tops):.1f}, {max(tops):.1f}]"


@pytest.mark.parametrize(
    ("page", "file", "methods"),
    [
        ("README.md", "digits-wmdd.jsonl", ["wmdd", "random"]),
        ("docs/results/digits.md", "digits-wmdd.jsonl", ["wmdd", "random"]),
        ("docs/results/tiny-10.md", "tiny-10.jsonl", ["random", "herding", "k-center", "medoids", "rded", "wmdd"]),
    ],
)
def test_the_tables_of_accuracies_are_those_of_the_records(page: str, file: str, methods: list[str]) -> None:
    found, text = measured(file), (ROOT / page).read_text()
    for method in methods:
        for ipc in (1, 10):
            assert f" {shown(found[method, ipc])} |" in text, (method, ipc, shown(found[method, ipc]))


def test_the_version_is_said_once_and_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"wmdd {version('wmdd')}"
    assert wmdd.__version__ == version("wmdd")
    assert f"\nversion: {version('wmdd')}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version('wmdd')}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "wmdd" / "py.typed").exists()


@pytest.mark.parametrize(
    "line",
    ["wmdd runs digits", "wmdd run digits --sets ipc=1", "wmdd run digits --set ipcs=1", "wmdd run", "wmdd run digit"],
)
def test_a_wrong_command_in_a_page_would_be_seen(line: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{line}\n```\n")
    with pytest.raises((AssertionError, WmddError, pytest.fail.Exception)):
        test_every_command_of_the_docs_is_accepted(page)
