"""Training that is interrupted and goes on ends in the same weights, whatever the recipe draws or averages."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_ranks import in_ranks
from torch import Tensor, nn

from wmdd import console, pipeline, student, teacher
from wmdd.checkpoint import Checkpoint
from wmdd.config import Compute, Config, load_config
from wmdd.cost import Meter
from wmdd.data import load_dataset
from wmdd.distilled import DistilledSet
from wmdd.distributed import ALONE, Ranks, ranks
from wmdd.errors import Interrupted, WmddError
from wmdd.networks import FrozenNetwork
from wmdd.records import read_records
from wmdd.rundir import RunFolder
from wmdd.validation import Validation

EPOCHS = 6


@pytest.fixture
def alone() -> Iterator[Ranks]:
    with ranks(Compute(device="cpu")) as job:
        yield job


def after(checks: int) -> Callable[[], bool]:
    """Return a request to stop that comes at the check after so many."""
    left = iter([False] * checks)
    return lambda: next(left, True)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["hard", "soft", "stored"])
def test_a_student_that_is_stopped_goes_on_to_the_weights_of_one_that_is_not(
    regime: str, classifier: nn.Module, alone: Ranks, tmp_path: Path
) -> None:
    options = ["data.channels=3", "data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]", "student.ema=0.8"]
    config = load_config("digits", [*options, f"student.epochs={EPOCHS}", "student.batch_size=5"])
    torch.manual_seed(5)
    pixels = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    distilled = DistilledSet(pixels, torch.arange(10) % 5, torch.full((10,), 0.5), tuple("abcde"), config.data, "set")
    labeller = teacher.Teacher(FrozenNetwork(classifier), "teacher", {})
    task = student.Task("mnasnet0_5", regime, 0)  # it has dropout
    updates = 0

    def train(where: Path, stop: Callable[[], bool], of: str = "this") -> tuple[dict[str, Tensor], student.Result]:
        judged: dict[str, Tensor] = {}

        def judge(network: nn.Module, team: object) -> dict[str, float]:
            judged.update(network.state_dict())
            return {}

        def advance(count: int) -> None:
            nonlocal updates
            updates += count

        saved = Checkpoint(where / "student.safetensors", of, 1e6)
        result = student.train(
            config, task, distilled, labeller, judge, alone, ALONE, where / "labels", advance, stop, saved
        )
        return judged, result

    whole, uncut = train(tmp_path / "whole", lambda: False)
    assert not (tmp_path / "whole").joinpath("student.safetensors").exists(), "it was not due"
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted, match=f"checkpointed after 2 of {EPOCHS} epochs"):
        train(cut, after(2))
    with pytest.raises(Interrupted, match=f"checkpointed after 3 of {EPOCHS} epochs"):
        train(cut, after(1))
    updates = 0
    resumed, result = train(cut, lambda: False)
    assert updates == uncut.updates == result.updates == 2 * EPOCHS
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert result.cost.get("labelling_flops") == uncut.cost.get("labelling_flops")

    with pytest.raises(Interrupted):
        train(cut, after(0), "another recipe")
    begun = Checkpoint(cut / "student.safetensors", "another recipe", 1e6).load({}, alone.device, ALONE)
    assert begun["epoch"] == 0, "a student went on from one of another recipe"


@pytest.mark.slow
def test_a_teacher_that_is_stopped_goes_on_to_the_weights_of_one_that_is_not(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("digits", [*TINY, "data.resolution=16", "teacher.network=mnasnet0_5", "teacher.epochs=4"])
    dataset = load_dataset(config.data, 0)
    validation = Validation(config, dataset, alone)

    def train(store: str, stop: Callable[[], bool]) -> teacher.Teacher:
        monkeypatch.setenv("WMDD_CACHE", str(tmp_path / store))
        return teacher.obtain(config, dataset, validation, alone, stop)

    whole = train("whole", lambda: False)
    with pytest.raises(Interrupted, match="checkpointed after 3 of 4 epochs"):
        train("cut", after(3))
    resumed = train("cut", lambda: False)
    assert resumed.sha256 == whole.sha256
    assert not list((tmp_path / "cut").rglob("checkpoint*"))


@pytest.mark.slow
def test_a_stopped_run_keeps_its_student_and_the_same_command_finishes_it(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.student.model_copy(update={"seeds": 1, "epochs": EPOCHS, "baselines": ()})
    config = tiny.model_copy(
        update={"student": settings, "labels": tiny.labels.model_copy(update={"regimes": ("hard",)})}
    )
    run = tmp_path / "run"
    epochs: list[int] = []
    plain = student._smoothed_cosine

    def counted(epoch: int, settings: object) -> float:
        epochs.append(epoch)
        if len(epochs) == 4:
            raise KeyboardInterrupt  # a kill, between two checkpoints
        return plain(epoch, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(student, "_smoothed_cosine", counted)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, run)
    assert list((run / "students").iterdir()) == [RunFolder(run).student_checkpoint("student-convnet2x8-hard-000")]
    pipeline.run(config, run)
    assert epochs == [0, 1, 2, 3, 3, 4, 5]
    assert not list((run / "students").iterdir())
    pipeline.run(config, tmp_path / "whole")
    (found,), (expected,) = (read_records(one / "records")[0] for one in (run, tmp_path / "whole"))
    assert found.metrics == expected.metrics


def test_a_damaged_checkpoint_is_named_and_training_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    network, device = nn.Linear(2, 2), torch.device("cpu")
    saved = Checkpoint(tmp_path / "student.safetensors", "this", 1e6)
    assert saved.load({"network": network}, device, ALONE) == {}
    saved.save({"network": network}, device, ALONE, epoch=3)
    assert saved.load({"network": network}, device, ALONE) == {"epoch": 3}
    whole = (tmp_path / "student.safetensors").read_bytes()
    (tmp_path / "student.safetensors").write_bytes(whole[: len(whole) // 2])
    assert saved.load({"network": network}, device, ALONE) == {}
    said = "".join(capsys.readouterr().err.split())
    assert "student.safetensors:isdamaged" in said and "beginsanew" in said


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_go_on_together_or_not_at_all(tiny: Config, tmp_path: Path) -> None:
    # Dropout, and a batch of which one rank gets more: their random numbers part.
    settings = {"seeds": 1, "epochs": EPOCHS, "baselines": (), "ranks": 2, "networks": ("mnasnet0_5",), "batch_size": 9}
    recipe = {"student": tiny.student.model_copy(update=settings)}
    recipe |= {"labels": tiny.labels.model_copy(update={"regimes": ("soft",)})}
    config = tiny.model_copy(update={**recipe, "ipc": 7})
    plain = student._smoothed_cosine

    def train(folder: str, until: int) -> tuple[str, list[int]]:
        epochs: list[int] = []

        def counted(epoch: int, settings: object) -> float:
            if epoch == until:
                raise ZeroDivisionError  # a failure of all ranks, between two checkpoints
            epochs.append(epoch)
            return plain(epoch, settings)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoint, "due", lambda self: True)
            patch.setattr(student, "_smoothed_cosine", counted)
            try:
                pipeline.run(config, tmp_path / folder)
            except ZeroDivisionError:
                return "cut", epochs
        return "whole", epochs

    def different() -> str:
        with ranks(Compute(device="cpu")) as job:
            saved, team = Checkpoint(tmp_path / f"{job.rank}.safetensors", "this", 1e6), job.team(2, "student.ranks")
            if job.main:
                saved.save({}, job.device, ALONE, epoch=3)
            try:
                return str(saved.load({}, job.device, team))
            except WmddError as error:
                return str(error)

    assert in_ranks(2, lambda: train("whole", EPOCHS)) == [("whole", [0, 1, 2, 3, 4, 5])] * 2
    assert in_ranks(2, lambda: train("cut", 3)) == [("cut", [0, 1, 2])] * 2
    assert in_ranks(2, lambda: train("cut", EPOCHS)) == [("whole", [3, 4, 5])] * 2
    (cut,), (whole,) = (read_records(tmp_path / name / "records")[0] for name in ("cut", "whole"))
    assert cut.metrics == whole.metrics
    assert all("not every rank sees the same checkpoint" in said for said in in_ranks(2, different))


def test_what_was_spent_before_an_interruption_counts() -> None:
    meter = Meter(torch.device("cpu"), 2)
    meter.include({"seconds": 1000.0, "device_seconds": 2000.0, "joules": 5.0, "peak_bytes": 1e15})
    found = meter.read()
    assert 1000 <= found["seconds"] < 1100 and 2000 <= found["device_seconds"] < 2200
    assert found["peak_bytes"] == 1e15
