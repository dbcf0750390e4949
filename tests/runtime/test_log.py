"""What a process says reaches the screen and the log of the run, and leaves everything else alone."""

import io
import logging
import re
from pathlib import Path

import pytest
from rank_processes import in_ranks
from rich.console import Console

from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime import log
from wmdd.runtime.progress_bars import observed_by, progress

IMAGES = pipeline.Share(("teacher", "distill"))
LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} (DEBUG|INFO|WARNING|ERROR) rank 0: .*"
logger = logging.getLogger("wmdd.test")


def lines_of(run: Path, name: str = "run") -> list[str]:
    return (run / "logs" / f"{name}.log").read_text().splitlines()


@pytest.mark.slow
def test_a_run_keeps_what_it_says_from_its_first_line_on_and_a_resumed_one_adds_to_it(
    tiny: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for times in (1, 2):
        pipeline.run(tiny, tmp_path / "run")
        lines = lines_of(tmp_path / "run")
        assert all(re.fullmatch(LINE, line) for line in lines)
        assert sum("report: " in line for line in lines) == times
    shown = [
        line for line in capfd.readouterr().err.splitlines() if line.endswith("...") or line.startswith("report: ")
    ]
    kept = [line.partition("rank 0: ")[2] for line in lines]
    assert shown == [line for line in kept if line.endswith("...") or line.startswith("report: ")]
    assert {path.name for path in (tmp_path / "run" / "logs").glob("*.log")} == {"run.log"}


def test_a_share_has_a_log_of_its_own(tiny: Config, tmp_path: Path) -> None:
    pipeline.run(tiny, tmp_path / "run", share=pipeline.Share(("teacher", "distill"), (0,)))
    assert any(" wmdd: " in line for line in lines_of(tmp_path / "run", "blocks-0"))


@pytest.mark.slow
def test_ranks_other_than_0_say_nothing_until_they_have_a_warning(tiny: Config, tmp_path: Path) -> None:
    pipeline.run(tiny, tmp_path / "run", share=IMAGES)
    file = tmp_path / "run" / "blocks" / "block-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    def warned() -> str:
        def warn(title: str, done: int, total: int, unit: str) -> None:
            if unit == "iterations" and done == 0:
                logger.warning(f"the {title} is hot")

        log.console.file = io.StringIO()
        with observed_by(warn):
            pipeline.run(tiny, tmp_path / "run", share=IMAGES)
        return log.console.file.getvalue()

    first, second = in_ranks(2, warned)
    assert "is distilled again" in first and "the wmdd is hot" in first
    assert set(second.splitlines()) == {"the wmdd is hot"}
    assert len(lines_of(tmp_path / "run", "teacher-distill")) > 3
    lines = lines_of(tmp_path / "run", "teacher-distill.rank1")
    assert {line.split(maxsplit=2)[2] for line in lines} == {"WARNING rank 1: the wmdd is hot"}


def test_ranks_without_a_warning_leave_no_file(tmp_path: Path) -> None:
    for rank in (0, 3):
        with log.in_file(tmp_path / "logs" / "run.log", rank) as open_file:
            open_file()
            logger.info("all is well")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["run.log"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (WmddError("no room"), r"ERROR rank 0: no room"),
        (Interrupted("stopped at 3"), r"INFO rank 0: stopped at 3"),
        (ZeroDivisionError("bug"), r"ERROR rank 0: bug\nTraceback(.|\n)*in fail\n(.|\n)*ZeroDivisionError: bug"),
    ],
)
def test_what_ends_a_run_is_the_last_thing_in_its_log(
    tiny: Config, tmp_path: Path, error: Exception, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(title: str, done: int, total: int, unit: str) -> None:
        if unit == "iterations":
            raise error

    with observed_by(fail), pytest.raises(type(error)):
        pipeline.run(tiny, tmp_path / "run", share=IMAGES)
    last = (tmp_path / "run" / "logs" / "teacher-distill.log").read_text()
    assert re.search(rf"^\S+ \S+ {expected}\n\Z", last, re.MULTILINE)
    assert str(error) not in capfd.readouterr().err, "whoever catches it shows it"


def test_a_folder_of_another_run_is_not_written_to(tiny: Config, tmp_path: Path) -> None:
    pipeline.run(tiny, tmp_path / "run", share=IMAGES)
    before = lines_of(tmp_path / "run", "teacher-distill")
    with pytest.raises(InputError, match="belongs to another config"):
        pipeline.run(tiny.model_copy(update={"ipc": 1}), tmp_path / "run", share=IMAGES)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        pipeline.run(tiny, tmp_path / "other", share=IMAGES)
    assert lines_of(tmp_path / "run", "teacher-distill") == before
    assert not (tmp_path / "other" / "logs").exists()


def test_logs_that_are_deleted_or_cannot_be_written_change_nothing(tiny: Config, tmp_path: Path) -> None:
    pipeline.run(tiny, tmp_path / "run", share=IMAGES)
    sha = DistilledSet.load(tmp_path / "run").sha256
    for path in (tmp_path / "run" / "logs").iterdir():
        path.unlink()
    (tmp_path / "run" / "logs").rmdir()
    assert DistilledSet.load(tmp_path / "run").sha256 == sha
    (tmp_path / "run" / "logs").touch()  # a file, where a folder is wanted
    (tmp_path / "run" / "blocks" / "block-00000.json").unlink()  # so that there is something to say
    pipeline.run(tiny, tmp_path / "run", share=IMAGES)
    assert DistilledSet.load(tmp_path / "run").sha256 == sha


def test_loggers_of_the_caller_hear_nothing_twice_and_rule_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    try:
        with log.on_screen(), log.on_screen(logging.WARNING):
            logger.info("not now")
            logger.warning("now")
        with log.on_screen():
            logger.info("now")
        logging.getLogger("wmdd").setLevel(logging.ERROR)
        with log.on_screen():
            logger.warning("the caller wants none")
        assert logging.getLogger("wmdd").level == logging.ERROR
    finally:
        logging.getLogger("wmdd").setLevel(logging.NOTSET)
        logging.getLogger().removeHandler(handler)
    assert capfd.readouterr().err == "now\nnow\n" and heard.getvalue() == ""
    assert logging.getLogger("wmdd").handlers == [] and logging.getLogger("wmdd").propagate


def test_messages_stand_on_lines_of_their_own_above_the_bars_of_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=seen, force_terminal=True, width=200, highlight=False))
    with log.on_screen(), log.in_file(tmp_path / "logs" / "run.log") as open_file:
        open_file()
        with progress("work", 3, "steps") as advance:
            advance(1)
            logger.info("[bold]a message")
            advance(2)
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", seen.getvalue())
    assert re.search(r"^\[bold\]a message$", bare, re.MULTILINE) and "━" in bare
    assert "work: 3 steps ..." not in bare
    kept = [line.partition("rank 0: ")[2] for line in lines_of(tmp_path)]
    assert kept[:2] == ["work: 3 steps ...", "[bold]a message"] and kept[2].startswith("work: 3 steps in ")
