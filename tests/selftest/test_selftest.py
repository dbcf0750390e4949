"""The self-test fails on a wrong gradient, a rank on the wrong device and a checkpoint that is not resumed."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import Forked
from rank_processes import free_port, in_ranks
from torch import Tensor
from typer.testing import CliRunner

from wmdd.cli import app
from wmdd.distill import groups
from wmdd.distill.synthesis import engine
from wmdd.errors import InputError, WmddError
from wmdd.networks.frozen import FrozenNetwork, Observation
from wmdd.runtime import team
from wmdd.selftest import losses, many_ranks, rank_worker, runs, speeds, table
from wmdd.selftest.rows import REASONS, Check, Machine, RowResult, Workplace, judge, machine_of, workplace
from wmdd.storage.files import write_bytes, write_json

CPU = Machine("cpu", 0, bf16=True, tf32=False, compiler=True)
GPUS = Machine("cuda", 8, bf16=True, tf32=True, compiler=True)
CUDA = re.compile(r"torch\.cuda\.|device\.type|pin_memory|torch\.compile\(")
"""Code that a GPU decides about"""
FP32 = Check("loss and gradient", partial(losses.compare, precision="fp32"))


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(CPU, tmp_path, tmp_path)


def scaled_moments(patch: pytest.MonkeyPatch) -> None:
    """Make the backward pass of the moments wrong, in every precision and on every device; values stay right."""
    right = FrozenNetwork.forward

    def forward(self: FrozenNetwork, images: Tensor) -> Observation:
        seen = right(self, images)
        return replace(seen, means=seen.means + 0.01 * (seen.means - seen.means.detach()))

    patch.setattr(FrozenNetwork, "forward", forward)


def one_wrong_image(patch: pytest.MonkeyPatch) -> None:
    """Make the gradient of one image wrong in fp32 only, as a broken kernel of a device would."""
    right = torch.autograd.grad

    def grad(output: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        found = right(output, images)
        if images.dtype == torch.float32:
            found[0][0] *= 1.01
        return found

    patch.setattr(engine.torch.autograd, "grad", grad)


def rounded_like_tf32(patch: pytest.MonkeyPatch) -> None:
    """Round what the network sees in fp32 to 11 bits, as a device does that uses TF32 without being asked."""
    right = engine.augment.warp

    def warp(images: Tensor, draws: Any) -> Tensor:
        seen = right(images, draws)
        return seen + (seen.detach().bfloat16().float() - seen.detach()) / 8 if seen.dtype == torch.float32 else seen

    patch.setattr(engine.augment, "warp", warp)


@pytest.mark.parametrize("fault", [scaled_moments, one_wrong_image, rounded_like_tf32])
def test_a_wrong_gradient_fails(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    found = judge(FP32, place)
    assert found.state == "fail" and found.trace is None, found


def test_right_losses_and_gradients_pass_in_every_precision_of_this_machine(place: Workplace) -> None:
    assert judge(FP32, place).state == "pass"
    assert judge(Check("bf16", partial(losses.compare, precision="bf16")), place).state == "pass"


def report(rank: int, device: str, gpu: str | None = None, used: str | None = None) -> dict[str, Any]:
    return {"rank": rank, "local": rank, "device": device, "used": used or device, "gpu": gpu}


@pytest.mark.parametrize(
    "reports, wrong",
    [
        ([report(0, "cuda:0", "a"), report(1, "cuda:1", "b")], []),
        ([report(0, "cuda:0", "a"), report(1, "cuda:0", "a")], ["rank 1 is on cuda:0 instead of cuda:1", "share one"]),
        ([report(0, "cuda:0", "a"), report(1, "cuda:1", "a")], ["ranks 0 and 1 share one GPU"]),
        ([report(0, "cuda:0", "a"), report(1, "cuda:1", "a", used="cuda:0")], ["rank 1 is on cuda:0", "share one GPU"]),
        ([report(0, "cpu"), report(1, "cuda:1", "b")], ["rank 0 is on cpu instead of cuda:0"]),
    ],
)
def test_a_rank_on_the_wrong_device_is_named(reports: list[dict[str, Any]], wrong: list[str]) -> None:
    found = many_ranks.misplaced("cuda", reports)
    assert len(found) == len(wrong) and all(part in one for part, one in zip(wrong, found, strict=True)), found


def test_ranks_on_a_wrong_device_or_with_a_wrong_sum_fail_their_rows(place: Workplace) -> None:
    folder = place.folder / "ranks-cpu"
    place.memory["job cpu"] = folder
    sums = {"sum": [3.0] * 8, "bytes": 8, "seconds": {"4": 1e-5, "8": 1e-5}, "backend": "gloo"}
    reports = [report(rank, "cpu") | sums for rank in range(2)]

    def states() -> list[str]:
        for one in reports:
            write_json(folder / f"rank-{one['rank']:05d}.json", one)
        works = (many_ranks.placement, many_ranks.all_reduce)
        return [judge(Check("ranks", partial(work, kind="cpu")), place).state for work in works]

    assert states() == ["pass", "pass"]
    reports[1] |= {"used": "cuda:0", "sum": [3.0] * 7 + [2.0]}
    assert states() == ["fail", "fail"]


def test_a_job_of_ranks_that_fails_is_started_once_and_fails_each_of_its_rows(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def job(place: Workplace, kind: many_ranks.Kind) -> Path:
        starts.append(kind)
        raise WmddError("a job of 2 ranks failed: NCCL error")

    monkeypatch.setattr(many_ranks, "_job", job)
    found = [judge(Check("ranks", partial(work, kind="cpu")), place) for work in table._OF_RANKS.values()]
    assert {(one.state, one.detail) for one in found} == {("fail", "a job of 2 ranks failed: NCCL error")}
    assert starts == ["cpu"]


def test_rows_say_what_the_machine_lacks() -> None:
    gpu = Machine("cuda", 1, bf16=False, tf32=False, compiler=False)
    states = {row.name: [machine.lacks(row.needs, False) for machine in (CPU, gpu, GPUS)] for row in table.rows()}
    assert len(states) == len(table.rows()) and all(found[2] is None for found in states.values())
    assert states["run, tf32"][0] == REASONS["tf32"] and states["run, bf16"][1] == REASONS["bf16"]
    assert states["GPU ranks, NCCL: placement"][:2] == [REASONS["cuda"], REASONS["gpus"]]
    assert states["run, fp32, compiled"] == [None, REASONS["compiler"], None]
    quick = [row.name for row in table.rows() if GPUS.lacks(row.needs, True)]
    assert quick and all("compiled" in name or name in ("report", "runs at the same time (--jobs)") for name in quick)


def test_an_error_of_a_row_is_its_failure_with_a_traceback_for_a_bug_report(place: Workplace) -> None:
    def broken(place: Workplace) -> RowResult:
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    found = judge(Check("broken", broken), place)
    assert (found.state, found.detail) == ("fail", "RuntimeError: CUDA error: an illegal memory access")
    assert found.trace and "in broken" in found.trace
    content = table.as_json({"broken": found}, CPU, False, 1.0)
    assert not content["passed"] and content["rows"][0]["trace"] == found.trace and content["provenance"]["system"]
    infinite = RowResult("fail", "no losses", {"loss": float("inf"), "gradient": 0.5})
    rows = table.as_json({"run": infinite}, CPU, False, 1.0)["rows"]
    assert rows[0]["figures"] == {"loss": None, "gradient": 0.5}
    json.dumps([content, rows], allow_nan=False)


def test_a_device_far_below_its_data_sheet_fails() -> None:
    assert speeds.of_sheet(400e12, "400 TFLOP/s", 989e12).state == "pass"
    assert speeds.of_sheet(100e12, "100 TFLOP/s", 989e12).state == "fail"
    assert speeds.of_sheet(1e9, "1 GFLOP/s", None).state == "pass"
    assert speeds.sheet_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert speeds.sheet_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert speeds.sheet_of("", "bf16") is None


def test_the_selftest_is_started_once_and_not_as_one_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="this is rank 1 of 8; start it once on each node"):
        machine_of("cpu")


def test_losses_that_are_not_finite_or_missing_are_infinitely_different() -> None:
    assert runs.difference([1.0, 2.0], [1.0, 4.0]) == 0.5
    for found in ([1.0, float("nan")], [1.0], []):
        assert runs.difference(found, [1.0, 2.0]) == float("inf")


def test_runs_whose_images_or_students_differ_fail_and_the_difference_is_named() -> None:
    one = {"images": "ab", "students": {"hard 0": {"top1": 0.5}}}
    assert runs.equal(dict(one), one, "twice").state == "pass"
    found = runs.equal(one | {"images": "ac"}, one, "the same run twice")
    assert (found.state, found.detail) == ("fail", "the same run twice: images differ")
    assert runs.equal(one | {"students": {}}, one, "twice").detail == "twice: students differ"


@pytest.fixture
def shared() -> Iterator[Workplace]:
    with workplace(CPU, quick=True) as place:
        yield place


@pytest.mark.slow
@pytest.mark.ranks
def test_a_wrong_gradient_of_split_classes_or_of_ddp_fails(shared: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_ranks, "PARTS", ("split",))
    monkeypatch.setattr(team._TeamSum, "backward", staticmethod(lambda ctx, *gradients: (2 * gradients[0], None)))
    # DDP without its average, as when a launcher has started ranks that do not know each other.
    monkeypatch.setattr(team.Team, "wrap", lambda self, network, example: network)
    folder = shared.folder / "ranks-cpu"
    write_bytes(folder / "split.toml", runs.to_toml(many_ranks.configs(shared, "cpu")["split"]).encode())
    write_json(folder / "job.json", {"device": "cpu", "ports": {"meeting": free_port(), "split": free_port()}})
    in_ranks(2, lambda: rank_worker.main(folder))
    shared.memory["job cpu"] = folder
    found = {name: judge(Check(name, partial(work, kind="cpu")), shared) for name, work in table._OF_RANKS.items()}
    assert found["split_class"].state == "fail" and "gradient 1e+00" in found["split_class"].detail
    assert (
        found["DDP teacher and student"].state == "fail" and "DDP gradient" in found["DDP teacher and student"].detail
    )
    assert found["placement"].state == found["all-reduce"].state == "pass"


class ForkedPopen(Forked):
    """``wmdd run`` as the self-test starts it, in a fork of this process."""

    def __init__(self, command: list[str], **options: Any) -> None:
        super().__init__(*command[1:])

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.end()

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode


@pytest.mark.slow
@pytest.mark.ranks
def test_the_whole_command_fails_by_the_name_of_the_one_row_whose_checkpoint_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranks_in_forks(self: Any, size: int, module: str, arguments: list[str]) -> None:
        in_ranks(size, lambda: rank_worker.main(Path(arguments[0])))

    # What is broken here, is broken in the forks: they begin every group again.
    monkeypatch.setattr(groups, "read_checkpoint", lambda session, folder, group: (None, {}))
    forks = SimpleNamespace(Popen=ForkedPopen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(runs, "subprocess", forks)
    monkeypatch.setattr(many_ranks.Local, "job", ranks_in_forks)
    written = tmp_path / "selftest.json"
    done = CliRunner().invoke(app, ["selftest", "--quick", "--device", "cpu", "--json", str(written)])
    found = {row["name"]: row for row in json.loads(written.read_text())["rows"]}
    failed = [name for name, row in found.items() if row["state"] == "fail"]
    assert failed == ["stop, kill and resume"], {name: found[name]["detail"] for name in failed}
    assert done.exit_code == 1 and "failed: stop, kill and resume" in done.stdout
    assert sum(row["state"] == "pass" for row in found.values()) >= 15


def test_every_module_with_code_for_cuda_stands_in_the_table_of_what_covers_it() -> None:
    root = Path(__file__).parents[2]
    modules = [file for name in ("wmdd", "bench", "slurm", "sweeps") for file in (root / name).rglob("*.py")]
    own = [str(file.relative_to(root)) for file in modules if CUDA.search(file.read_text())]
    table = (root / "docs" / "guides" / "selftest.md").read_text().partition("## Code that only a GPU runs")[2]
    assert len(own) > 12 and [name for name in own if not name.startswith("wmdd/selftest/") and name not in table] == []
