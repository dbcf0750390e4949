"""A protocol is a table of runs: complete, paired by seed, shared out, resumable, refused when it is unfair."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

from bench import protocol as protocols
from bench.protocol import Cell, Protocol
from wmdd.errors import InputError
from wmdd.files import read_json
from wmdd.launchers import Local
from wmdd.records import read_records

BASE = {
    "name": "tiny",
    "config": "digits",
    "overrides": TINY,
    "methods": ["random", "herding", {"method": "wmdd", "name": "noise", "overrides": ["synthesis.start=noise"]}],
    "ipc": [1],
    "regimes": ["hard", "soft"],
    "distillation_seeds": 2,
}

SCRIPT = """
import json, sys
from pathlib import Path
from bench import protocol
from wmdd.errors import WmddError
from wmdd.launchers import Local
if __name__ == "__main__":
    cells = protocol.cells(protocol.Protocol.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]))
    try:
        Local(2).launch([(cell.config, cell.folder) for cell in cells], "tiny")
    except WmddError as error:
        sys.exit(error.exit_code)
"""


def table(out: Path, **changes: object) -> list[Cell]:
    return protocols.cells(Protocol.model_validate(BASE | changes), out)


def do(cells: list[Cell], jobs: int = 1) -> None:
    Local(jobs).launch([(cell.config, cell.folder) for cell in cells], "tiny")


def measured(out: Path) -> dict[tuple[object, ...], object]:
    """Return the accuracies and losses of a protocol's students by what they are."""
    return {
        (r.run, r.ipc, r.regime, r.distillation_seed, r.student_seed): (r.metrics, r.artefact)
        for r in read_records(out)[0]
    }


def alive(group: int) -> bool:
    """Return whether a process group has members."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("protocol")
    do(table(out))
    return out


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


def test_two_processes_measure_what_one_does_and_a_finished_protocol_does_nothing(
    finished: Path, tmp_path: Path
) -> None:
    cells = table(tmp_path)
    do(cells, jobs=2)
    assert measured(tmp_path) == measured(finished)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    do(cells)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}


def test_the_plan_lists_every_cell(tmp_path: Path) -> None:
    protocols.write_plan(Protocol.model_validate(BASE), table(tmp_path), tmp_path)
    plan = read_json(tmp_path / "protocol.json")
    assert plan["name"] == "tiny" and len(plan["cells"]) == 6
    assert {"folder": "ipc-001/noise/seed-001", "method": "wmdd", "name": "noise", "ipc": 1, "seed": 1} in plan["cells"]


def test_a_stop_reaches_every_process_and_the_same_protocol_goes_on(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "go.py").write_text(SCRIPT)
    # So many runs do not fit the pipe to the processes at once: those left over must not keep the first one waiting.
    longer = json.dumps(BASE | {"overrides": [*TINY, "student.epochs=2000"], "distillation_seeds": 30})
    command = [sys.executable, str(tmp_path / "go.py"), longer, str(out)]
    process = subprocess.Popen(command, start_new_session=True, env=os.environ)
    deadline = time.monotonic() + 120
    while not list(out.rglob("manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    deadline = time.monotonic() + 30
    while alive(process.pid):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)
    do(table(out))
    assert measured(out) == measured(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["randm"]}, "no such method; did you mean 'random'"),
        ({"methods": ["random", {"method": "random", "name": "random"}]}, "two entries are called 'random'"),
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
    with pytest.raises(InputError, match=r"mine.toml: methods.0.variants: did you mean 'variant'"):
        protocols.load_protocol(str(file))
    with pytest.raises(InputError, match=r"digts: no protocol of that name; did you mean 'digits'"):
        protocols.load_protocol("digts")
