"""A protocol is a table of runs: complete, paired by seed, shared out, resumable, refused when it is unfair."""

import io
import json
import os
import re
import shutil
import signal
import sys
from importlib import resources
from pathlib import Path

import pytest
from conftest import TINY, members, wait_until
from rank_processes import fork
from rich.console import Console
from typer.testing import CliRunner

from bench import protocol as protocols
from bench import remaining
from bench.protocol import Protocol, ProtocolRun
from bench.remaining import Remaining
from wmdd.cli import app
from wmdd.errors import InputError, Interrupted
from wmdd.launchers import Local
from wmdd.records.files import read_records, write_records
from wmdd.storage.files import read_json, write_json

BASE = {
    "name": "tiny",
    "config": "digits",
    "overrides": TINY,
    "methods": ["random", "herding", {"method": "wmdd", "name": "noise", "overrides": ["synthesis.start=noise"]}],
    "ipc": [1],
    "regimes": ["hard", "soft"],
    "distillation_seeds": 2,
}

SHIPPED = sorted(path.name.removesuffix(".toml") for path in (resources.files("bench") / "protocols").iterdir())


def table(out: Path, **changes: object) -> list[ProtocolRun]:
    return protocols.cells(Protocol.model_validate(BASE | changes), out)


def do(cells: list[ProtocolRun], jobs: int = 1) -> None:
    Local(jobs).launch([(cell.config, cell.folder) for cell in cells], "tiny")


def measured(out: Path) -> dict[tuple[object, ...], object]:
    """Return the accuracies and losses of a protocol's students by what they are."""
    return {
        (r.run, r.ipc, r.regime, r.distillation_seed, r.student_seed): (r.metrics, r.artefact)
        for r in read_records(out)[0]
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("protocol")
    do(table(out))
    return out


@pytest.mark.slow
def test_every_cell_is_there_and_seeds_pair_methods_without_repeating_students(finished: Path) -> None:
    found = measured(finished)
    assert len(found) == 3 * 2 * 2, "3 entries, 2 regimes, 2 seeds"
    for name in ("random", "herding", "noise"):
        seeds = sorted({key[3:] for key in found if key[0] == name})
        assert seeds == [(0, 0), (1, 1)], "each distillation seed has a student seed of its own"
    images = {name: {value[1] for key, value in found.items() if key[0] == name} for name in ("herding", "noise")}
    assert (len(images["herding"]), len(images["noise"])) == (1, 2)
    losses = {value[0]["loss"] for key, value in found.items() if key[0] == "herding"}
    assert len(losses) == 4, "students on one set differ by their seeds"


def test_cells_come_by_ipc_and_seed_so_that_a_stopped_protocol_compares_all_methods(tmp_path: Path) -> None:
    order = [str(cell.folder.relative_to(tmp_path)) for cell in table(tmp_path, ipc=[2, 1])]
    assert order[:3] == ["ipc-002/random/seed-000", "ipc-002/herding/seed-000", "ipc-002/noise/seed-000"]
    assert order[3] == "ipc-002/random/seed-001"
    assert order[6] == "ipc-001/random/seed-000"


@pytest.mark.slow
def test_several_protocols_stop_after_so_many_minutes_and_go_on_to_the_same_results(
    finished: Path, tmp_path: Path
) -> None:
    files = []
    for name, methods in (
        ("first", '"random", "herding"'),
        ("second", '{ method = "wmdd", name = "noise", overrides = ["synthesis.start=noise"] }'),
    ):
        files.append(str(tmp_path / f"{name}.toml"))
        shared = 'config = "digits"\nipc = [1]\nregimes = ["hard", "soft"]\ndistillation_seeds = 2'
        lines = f'name = "{name}"\noverrides = {json.dumps(TINY)}\nmethods = [{methods}]\n{shared}\n'
        Path(files[-1]).write_text(lines)
    out = tmp_path / "out"
    command = ["bench", "protocol", *files, "--out", str(out)]
    for jobs in ("1", "2"):
        longer = ["--set", "student.epochs=3000", "--minutes", "0.05", "--jobs", jobs]
        stopped = CliRunner().invoke(app, [*command, *longer])
        assert isinstance(stopped.exception, Interrupted)
        assert "stopped with 6 of 6 runs left" in str(stopped.exception)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert measured(out) == measured(finished)
    assert {path.name for path in out.iterdir()} == {"first", "second", "report.html"}


def test_a_finished_cell_is_left_alone_without_its_images_and_wherever_the_data_lie(
    finished: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    for file in moved.rglob("*.safetensors"):
        file.unlink()
    assert protocols.check(table(moved, overrides=[*TINY, f"data.root={tmp_path}"])) == []
    assert len(protocols.check(table(moved, overrides=[*TINY, "student.lr=0.1"]))) == 6, "other students"
    assert len(protocols.check(table(moved, overrides=[*TINY, "synthesis.lr=0.1"]))) == 6, "other images"

    other, lost = moved / "ipc-001" / "random" / "seed-000", moved / "ipc-001" / "noise" / "seed-001"
    write_json(other / "config.json", read_json(other / "config.json") | {"data": "other images"})
    next((lost / "records").iterdir()).unlink()
    unfinished = protocols.check(table(moved))
    assert [cell.folder for cell in unfinished] == [other, lost]
    assert remaining.remaining_of(unfinished[1]).sets_left == 1, "a missing student needs the images"

    averaged = moved / "ipc-001" / "random" / "seed-001"
    file = next((averaged / "records").iterdir())
    write_records(file, [one.model_copy(update={"recipe": one.recipe | {"ema": 0.9}}) for one in read_records(file)[0]])
    assert averaged in [cell.folder for cell in protocols.check(table(moved))], "an option that this recipe has not"


def test_the_outlook_counts_what_is_left(finished: Path, tmp_path: Path) -> None:
    done = [remaining.remaining_of(cell) for cell in table(finished)]
    assert sum(done, Remaining()) == Remaining(sets=6, students=12)
    more = [remaining.remaining_of(cell) for cell in table(finished, student_seeds=2) if cell.config.name == "random"]
    assert [(one.sets_left, one.students_left) for one in more] == [(0, 2), (0, 4)], "students of seeds 0, 1 and 2, 3"
    left = [remaining.remaining_of(cell) for cell in table(tmp_path) if cell.config.name == "noise"]
    # Per seed: 4 images, 6 iterations; 2 students of 2 epochs, one batch each.
    assert left == 2 * [Remaining(1, sets_left=1, iterations_left=24, students=2, students_left=2, updates_left=4)]
    shown = Console(file=io.StringIO(), width=120)
    remaining.tell(table(tmp_path / ("long-" * 30)), shown)
    assert isinstance(shown.file, io.StringIO)
    assert re.search(r"all +0 / 6 +0 / 12 +48 +24", shown.file.getvalue())


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_protocol_is_whole(name: str, tmp_path: Path) -> None:
    protocol = protocols.load_protocol(name)
    cells = protocols.cells(protocol, tmp_path)
    assert len(cells) == len(protocol.methods) * len(protocol.ipc) * protocol.distillation_seeds


@pytest.mark.parametrize(("name", "roll"), [("tiny-imagenet", 9), ("tiny-imagenet-224", 32)])
def test_the_paper_and_its_code_keep_their_own_settings_on_tiny_imagenet(name: str, roll: int, tmp_path: Path) -> None:
    found = {cell.config.name: cell.config for cell in protocols.cells(protocols.load_protocol(name), tmp_path)}
    both = {"iterations": 2000, "lr": 0.1, "betas": (0.5, 0.9), "start": "noise", "crop_scale": (0.08, 1.0)}
    both |= {"augment": "group", "jitter": roll}
    paper = {"norm": "squared", "bn_weight": 300, "ce_weight": 0}
    upstream = {"norm": "euclidean", "bn_weight": 500, "ce_weight": 1, "classes_per_group": 0}
    for which, own in (("paper", paper), ("upstream", upstream)):
        settings = found[which].synthesis.model_dump()
        assert {key: settings[key] for key in both | own} == both | own


def test_the_plan_lists_every_cell(tmp_path: Path) -> None:
    protocols.write_plan(Protocol.model_validate(BASE), table(tmp_path), tmp_path)
    plan = read_json(tmp_path / "protocol.json")
    assert plan["name"] == "tiny" and len(plan["cells"]) == 6
    assert {"folder": "ipc-001/noise/seed-001", "method": "wmdd", "name": "noise", "ipc": 1, "seed": 1} in plan["cells"]


@pytest.mark.slow
def test_a_stop_reaches_every_process_and_two_processes_resume_to_what_one_measures(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    longer = ["student.epochs=100000", "compute.checkpoint_seconds=0"]

    def measure() -> None:
        os.setsid()
        try:
            do(table(out, overrides=[*TINY, *longer]), jobs=2)
        except Interrupted as reason:
            sys.exit(reason.exit_code)

    process = fork.Process(target=measure)
    process.start()
    assert process.pid is not None
    try:
        wait_until(lambda: len(list(out.rglob("student-*.checkpoint.safetensors"))) == 2)
        # To all processes, and more than once, as schedulers do.
        for _ in range(3):
            os.killpg(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 75
        wait_until(lambda: not members(process.pid or 0))
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.join()
    do(table(out), jobs=2)
    assert measured(out) == measured(finished)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    do(table(out))
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}, "a finished protocol does nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["randm"]}, "no such method; did you mean 'random'"),
        ({"methods": ["random", {"method": "random", "name": "random"}]}, "two entries have the name 'random'"),
        ({"methods": [{"method": "wmdd", "overrides": ["student.epochs=9"]}]}, "wmdd: changes student.epochs"),
        ({"methods": [{"method": "wmdd", "overrides": ["labels.temperature=1"]}]}, "wmdd: changes labels.temperature"),
        ({"methods": [{"method": "wmdd", "overrides": ["data.resolution=16"]}]}, "wmdd: changes data.resolution"),
        ({"methods": [{"method": "wmdd", "variant": "papers"}]}, "papers"),
        ({"regimes": ["hard", "sotf"]}, "labels.regimes"),
        ({"ipc": [1000]}, "ipc = 1000: class"),
    ],
)
def test_an_unfair_or_impossible_protocol_is_refused_before_anything_is_done(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        protocols.check(table(tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_a_wrong_key_in_a_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "x"\nconfig = "digits"\nmethods = [{ method = "wmdd", variants = "paper" }]\n')
    with pytest.raises(InputError, match=r"mine.toml: unknown key 'methods.0.variants': did you mean 'variant'"):
        protocols.load_protocol(str(file))
    with pytest.raises(InputError, match=r"digts: no protocol of that name; did you mean 'digits'"):
        protocols.load_protocol("digts")


def test_the_first_sets_of_a_method_train_students_that_show_whether_they_have_converged(tmp_path: Path) -> None:
    cells = table(tmp_path, convergence_sets=1, methods=["random"], views=["updates", "plain"])

    assert [cell.config.student.views for cell in cells] == [
        ("updates", "plain", "updates-twice"),
        ("updates", "plain"),
    ]


# digits-tuning compares trials. imagenette trains as long as the paper did, with as many sets as two cores can make.
@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ("digits-tuning", "imagenette")])
def test_every_shipped_protocol_asks_whether_students_have_converged_on_at_least_five_sets(name: str) -> None:
    protocol = protocols.load_protocol(name)

    assert protocol.convergence_sets >= 3
    assert protocol.distillation_seeds >= 5


def test_sre2l_and_cda_are_tuned_on_images_held_out_with_the_same_number_of_trials() -> None:
    protocol = protocols.load_protocol("digits-tuning")
    cells = protocols.cells(protocol, Path("unused"))

    assert all(cell.config.data.holdout_per_class for cell in cells)
    trials = [entry.method for entry in protocol.methods]
    assert trials.count("sre2l") == trials.count("cda") == 8


def test_each_set_may_have_a_teacher_of_its_own_and_sharing_some_is_refused(tmp_path: Path) -> None:
    cells = table(tmp_path, distillation_seeds=3, teacher_seeds=3, methods=["random", "wmdd"])

    assert [(c.config.method, c.config.seed, c.config.teacher.seed) for c in cells] == [
        (method, seed, seed) for seed in range(3) for method in ("random", "wmdd")
    ]
    assert {c.config.teacher.seed for c in table(tmp_path, methods=["random"])} == {0}
    file = tmp_path / "two.toml"
    file.write_text('name = "x"\nconfig = "digits"\nmethods = ["random"]\nteacher_seeds = 2\n')
    with pytest.raises(InputError, match="teacher_seeds = 2: sets that share one of several teachers"):
        protocols.load_protocol(str(file))
