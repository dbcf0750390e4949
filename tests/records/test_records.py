import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from wmdd.config.schema import ComputeConfig
from wmdd.errors import InputError
from wmdd.records import provenance as provenance_module
from wmdd.records.comparability import refuse_unlike
from wmdd.records.files import append, read_records, write_records
from wmdd.records.provenance import provenance
from wmdd.records.schema import Record
from wmdd.records.system import driver_version
from wmdd.storage.files import digest

RECIPE = {"epochs": 150, "updates": 300, "batch_size": 50, "checkpoint": "last"}


def make_record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "kind": "student",
        "run": "digits",
        "dataset": "digits",
        "classes": 10,
        "resolution": 16,
        "method": "wmdd",
        "ipc": 10,
        "network": "convnet3x32",
        "regime": "soft",
        "distillation_seed": 0,
        "student_seed": 0,
        "evaluated_on": "test",
        "metrics": {"top1": 0.97, "top5": 0.999, "loss": 0.1},
        "recipe": RECIPE,
        "protocol": digest(RECIPE),
        "config": "c" * 64,
        "artefact": "a" * 64,
    }
    return Record(**values | changes)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = [make_record(), make_record(student_seed=1, metrics={"top1": 0.1, "loss": math.nan})]
    path = tmp_path / "records" / "students.jsonl"

    write_records(path, written)
    found, problems = read_records(path)

    assert problems == []
    assert found[0] == written[0]
    assert math.isnan(found[1].metrics["loss"])
    assert all(json.loads(line)["time"].endswith("Z") for line in path.read_text().splitlines())


def test_appending_keeps_what_is_there_even_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "records" / "students.jsonl"
    append(path, make_record())
    with open(path, "ab") as file:
        file.write(b'{"kind": "stu')

    append(path, make_record(student_seed=1))

    found, problems = read_records(tmp_path)
    assert [record.student_seed for record in found] == [0, 1]
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:2: Invalid JSON")


def test_each_bad_line_is_named_with_its_reason_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "records" / "students.jsonl"
    good = make_record().model_dump(mode="json")
    lines = ["", json.dumps(good | {"colour": 1}), json.dumps(good), json.dumps(good | {"schema_version": 2}), "\udcff"]
    path.parent.mkdir()
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))

    found, problems = read_records(tmp_path)

    assert len(found) == 1
    assert problems[0] == f"{path}:1: the line is empty"
    assert problems[1].startswith(f"{path}:2: colour: Extra inputs are not permitted")
    assert problems[2].startswith(f"{path}:4: schema_version: ")
    assert problems[3].startswith(f"{path}:5: Invalid JSON")


def test_a_folder_gives_the_records_of_nested_runs_and_nothing_else(tmp_path: Path) -> None:
    write_records(tmp_path / "records" / "b.jsonl", [make_record()])
    write_records(tmp_path / "baselines" / "random" / "records" / "a.jsonl", [make_record(method="random")])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text("{}\n")

    found, problems = read_records(tmp_path)

    assert [record.method for record in found] == ["random", "wmdd"]
    assert problems == []
    with pytest.raises(InputError, match="no such file or folder"):
        read_records(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"top1": 97.0}}, "fractions from 0 to 1"),
        ({"metrics": {"top1": -0.1}}, "fractions from 0 to 1"),
        ({"metrics": {"loss": 1.0}}, "needs metrics.top1"),
        ({"student_seed": None}, "needs student_seed"),
        ({"regime": None}, "needs regime"),
        ({"protocol": ""}, "protocol"),
        ({"evaluated_on": "train"}, "evaluated_on"),
    ],
)
def test_a_record_that_would_mislead_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_record(**changes)


def test_a_teacher_needs_no_seeds_of_students() -> None:
    nothing = {"ipc": None, "regime": None, "distillation_seed": None, "student_seed": None}
    assert make_record(kind="teacher", **nothing).metrics["top1"] == 0.97


def test_the_work_of_reading_records_grows_with_their_number_and_not_with_its_square(tmp_path: Path) -> None:
    def calls(count: int) -> int:
        folder, made = tmp_path / str(count), 0
        write_records(folder / "records" / "all.jsonl", [make_record(student_seed=seed) for seed in range(count)])

        def tally(frame: object, event: str, argument: object) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(tally)
        try:
            found, _ = read_records(folder)
        finally:
            sys.setprofile(None)
        assert len(found) == count
        return made

    assert calls(1000) < 2.1 * calls(500)


def test_unlike_conditions_are_refused_with_both_values_and_both_places() -> None:
    like = ("runs/a", {"epochs": 150, "data": {"resolution": 16}})
    unlike = ("runs/c", {"epochs": 150, "data": {"resolution": 32}, "mix": "none"})

    refuse_unlike("students", [like, ("runs/b", like[1])])
    with pytest.raises(InputError) as raised:
        refuse_unlike("students", [like, unlike])

    assert "data.resolution is 16 in runs/a and 32 in runs/c" in str(raised.value)
    assert "mix is None in runs/a and none in runs/c" in str(raised.value)
    assert "epochs" not in str(raised.value)


def test_provenance_tells_versions_hardware_and_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():  # as torchrun does
        monkeypatch.setenv(name, value)

    found = provenance(ComputeConfig(device="cpu", threads=2))

    assert found["slurm"] == {"job": "12", "task": "3"}
    assert (found["world_size"], found["threads"], found["precision"]) == (4, 2, "fp32")
    assert found["device"] == "cpu"
    assert found["cuda"] is None
    assert found["cpu"]
    assert {"wmdd", "torch", "python", "revision", "dirty"} <= found.keys()
    json.dumps(found)


def test_provenance_describes_the_system_and_leaves_out_its_name() -> None:
    found = provenance(ComputeConfig(device="cpu"))["system"]

    assert found["kernel"] == f"{platform.system()} {platform.release()}"
    assert found["cores"] >= found["usable_cores"] >= 1
    assert found["ram_bytes"] > 1e8
    lock = Path(__file__).parents[2] / "uv.lock"
    assert found["lock_sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    assert platform.node() not in json.dumps(found)


def test_the_driver_is_read_from_the_kernel_module() -> None:
    text = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (someone)\nGCC version: 12"
    )

    assert driver_version(text) == "580.65.06"
    assert driver_version("nothing of the kind") is None


def test_the_revision_is_that_of_a_checkout_of_this_package_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that lies in another project's checkout without being part of it has no revision."""
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)  # inside a hook they would lead the commits below into the project's own repository
    package = tmp_path / "site" / "wmdd"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "other.txt").write_text("")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def checkout() -> tuple[str | None, bool | None]:
        provenance_module._checkout.cache_clear()
        return provenance_module._checkout()

    monkeypatch.setattr(provenance_module, "__file__", str(package / "records" / "provenance.py"))
    try:
        git("init", "-q")
        git("add", "other.txt")
        git("commit", "-qm", "one", "--no-verify")
        assert checkout() == (None, None)

        git("add", ".")
        git("commit", "-qm", "two", "--no-verify")
        assert checkout() == (git("rev-parse", "HEAD"), False)

        (package / "__init__.py").write_text("changed = True\n")
        revision = git("rev-parse", "HEAD")
        assert checkout() == (revision, True)

        monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
        assert checkout() == (revision, True)
    finally:
        provenance_module._checkout.cache_clear()
