"""Training that is interrupted and goes on ends in the same weights, whatever the recipe draws or averages."""

import contextlib
import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, UNREPORTED
from rank_processes import in_ranks
from safetensors.torch import save
from torch import Tensor, nn

from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import ComputeConfig, Config
from wmdd.data.dataset import load_dataset
from wmdd.errors import Interrupted, WmddError
from wmdd.networks import checkpoint, create
from wmdd.networks.accuracy import Judgement, Validation
from wmdd.networks.checkpoint import Checkpoint
from wmdd.networks.frozen import FrozenNetwork
from wmdd.records.files import read_records
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime.meter import Meter
from wmdd.runtime.progress_bars import observed_by
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.team import SINGLE, Team
from wmdd.session import Session
from wmdd.students import tasks
from wmdd.students import train as train_module
from wmdd.teacher import obtain

fork = multiprocessing.get_context("fork")
EPOCHS = 6
UPDATES = 3 * EPOCHS
"""Of the students here: 20 images in batches of 7, 7 and 6"""
OPTIONS = ["data.channels=3", "data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]", "student.ema=0.8"]
OPTIONS += [f"student.epochs={EPOCHS}", "student.batch_size=7", "labels.mix=cutmix"]
JUDGED = (0.0, 0.1, 0.3, 0.2, 0.4, 0.1, 0.2)
"""Top-1 after each epoch, the initial weights included"""
Stop = Callable[[], bool]


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a network that draws random numbers and averages, as torchvision's do, in a fraction of their time."""
    known = create.create

    def created(name: str, classes: int, channels: int, resolution: int, stem: str = "auto") -> nn.Module:
        if name != "dropout":
            return known(name, classes, channels, resolution, stem)
        layers = [nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes))

    monkeypatch.setattr(create, "create", created)


def never() -> bool:
    return False


@pytest.fixture
def alone() -> Iterator[Ranks]:
    with ranks(ComputeConfig(device="cpu")) as job:
        yield job


def after(checks: int) -> Stop:
    """Return a request to stop that comes at the check after so many."""
    left = iter([False] * checks)
    return lambda: next(left, True)


class Students:
    """Trains one student, with dropout and an average, again and again."""

    def __init__(self, regime: str, classifier: nn.Module, *options: str) -> None:
        self.config = load_config("digits", [*OPTIONS, *options])
        torch.manual_seed(5)
        pixels = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
        labels, names = torch.arange(20) % 5, tuple("abcde")
        self._set = DistilledSet(pixels, labels, torch.full((20,), 0.5), names, self.config.data, "set")
        self._teacher = obtain.Teacher(FrozenNetwork(classifier), "teacher", {})
        self._task = tasks.StudentTask("dropout", regime, 0)
        self.updates = 0
        """Updates that the student has, those before a checkpoint included"""

    def train(
        self,
        where: Path,
        job: Ranks,
        stop: Stop = never,
        team: Team = SINGLE,
        of: str = "this",
        seconds: float = 1e6,
        advance: Callable[[int], None] = lambda count: None,
        judging: Stop = never,
    ) -> tuple[dict[str, Tensor], train_module.Result]:
        """Return the state of the student that was judged, and its result."""
        judged: dict[str, Tensor] = {}
        self.updates = 0

        def judge(network: nn.Module, team: Team) -> Judgement:
            if judging():
                raise Interrupted
            torch.rand(3)  # as decoding may
            judged.update(network.state_dict())
            return Judgement({"top1": JUDGED[self.updates // 3]})

        def count(updates: int) -> None:
            self.updates += updates
            advance(self.updates)

        saved = Checkpoint(where / "student.safetensors", of, seconds)
        session = Session(self.config, None, judge, self._teacher, job, stop)  # type: ignore[arg-type]
        log_file = where / "logs" / "student.jsonl"
        result = train_module.train(session, self._task, self._set, team, where / "labels", count, saved, log_file)
        return judged, result


def reached(where: Path, of: str = "this") -> tuple[int, int]:
    """Return epoch and position of a student's checkpoint."""
    facts = Checkpoint(where / "student.safetensors", of, 1e6).load({}, torch.device("cpu"), SINGLE)
    return facts["epoch"], facts["position"]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def epochs_of(where: Path) -> dict[int, dict[str, Any]]:
    """Read a log of epochs as its writer says: the last value of each field holds, and what is no JSON is skipped."""
    found: dict[int, dict[str, Any]] = {}
    for line in where.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            found.setdefault(entry["epoch"], {}).update(entry)
    return found


TIMES = {"seconds", "images_per_second"}


def without_times(epochs: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {epoch: {key: facts[key] for key in facts.keys() - TIMES} for epoch, facts in epochs.items()}


def test_a_training_that_is_stopped_or_killed_anywhere_leaves_the_epochs_of_one_that_is_not(
    classifier: nn.Module, alone: Ranks, tmp_path: Path
) -> None:
    students = Students("hard", classifier, "student.validate_every=2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for place in (whole, cut):
        (place / "logs").mkdir(parents=True)
    _, uncut = students.train(whole, alone)
    expected = epochs_of(whole / "logs" / "student.jsonl")
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert [facts["updates"] for facts in expected.values()] == [3, 6, 9, 12, 15, 18]
    assert {epoch: facts.get("validation_top1") for epoch, facts in expected.items()} == {
        1: None, 2: 0.3, 3: None, 4: 0.4, 5: None, 6: 0.2
    }  # fmt: skip
    assert all(facts["loss"] > 0 and facts["lr"] > 0 and facts.keys() > TIMES for facts in expected.values())
    log = cut / "logs" / "student.jsonl"
    log.write_text('{"epoch": 99}\n')  # of another recipe
    for stop in (after(2), after(3), never):  # in the first epoch, in the second, and while the second is validated
        with pytest.raises(Interrupted):
            students.train(cut, alone, stop, judging=after(0))
    assert list(epochs_of(log)) == [1, 2]

    def kill(updates: int) -> None:
        if updates == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        students.train(cut, alone, advance=kill)
    log.write_text(log.read_text() + '{"epoch": 3, "upd')
    with pytest.raises(Interrupted):
        students.train(cut, alone, judging=after(2))  # after the last update
    _, resumed = students.train(cut, alone)
    assert without_times(epochs_of(log)) == without_times(expected)
    assert resumed.best == uncut.best == {"epoch": 4, "top1": 0.4}


@pytest.mark.parametrize(("regime", "average"), [("hard", 0.0), ("soft", 0.8)])
def test_validation_on_the_way_changes_no_weight(
    regime: str, average: float, classifier: nn.Module, alone: Ranks, tmp_path: Path
) -> None:
    found = []
    for every in (0, 1, 4):
        options = [f"student.ema={average}", f"student.validate_every={every}"]
        found.append(Students(regime, classifier, *options).train(tmp_path / str(every), alone))
    (plain, result), (often, best), (seldom, _) = found
    assert same(plain, often) and same(plain, seldom)
    assert best.metrics == result.metrics and (result.best, best.best) == ({}, {"epoch": 4, "top1": 0.4})


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["hard", "soft", "stored", "budget"])
def test_a_student_that_is_stopped_inside_an_epoch_ends_in_the_weights_of_one_that_is_not(
    regime: str, classifier: nn.Module, alone: Ranks, tmp_path: Path
) -> None:
    students = Students(regime, classifier, "labels.budget=0.1")
    whole, uncut = students.train(tmp_path / "whole", alone)
    assert not (tmp_path / "whole").joinpath("student.safetensors").exists(), "it was not due"
    cut = tmp_path / "cut"
    for updates in (1, 2, 5, 9, 16):
        with pytest.raises(Interrupted, match=f"checkpointed after {updates} of {UPDATES} updates"):
            students.train(cut, alone, lambda updates=updates: students.updates >= updates)  # type: ignore[misc]
        assert reached(cut) == divmod(updates, 3)
    with pytest.raises(Interrupted, match=f"after {UPDATES} of {UPDATES} updates"):
        students.train(cut, alone, judging=lambda: True)
    resumed, result = students.train(cut, alone, after(1))
    assert students.updates == uncut.updates == result.updates == UPDATES
    assert same(resumed, whole)
    assert result.cost.get("labelling_flops") == uncut.cost.get("labelling_flops")

    with pytest.raises(Interrupted):
        students.train(cut, alone, after(0), of="another recipe")
    assert reached(cut, "another recipe") == (0, 0), "a student went on from one of another recipe"


def test_a_stop_while_an_epoch_of_labels_is_stored_is_heeded_between_batches(
    classifier: nn.Module, alone: Ranks, tmp_path: Path
) -> None:
    students = Students("stored", classifier)
    # Each epoch asks thrice while it labels, and thrice while it trains.
    with pytest.raises(Interrupted, match=f"checkpointed after 3 of {UPDATES} updates"):
        students.train(tmp_path / "cut", alone, after(7))
    assert [file.name for file in (tmp_path / "cut").rglob("epoch-*")] == ["epoch-00000.safetensors"]
    resumed, _ = students.train(tmp_path / "cut", alone)
    assert same(resumed, students.train(tmp_path / "whole", alone)[0])


def test_a_student_that_is_killed_after_a_checkpoint_inside_an_epoch_ends_in_the_same_weights(
    classifier: nn.Module, alone: Ranks, tmp_path: Path
) -> None:
    students = Students("soft", classifier)
    here, there = multiprocessing.Pipe()

    def pause(updates: int) -> None:
        if updates == 8:
            there.send(updates)
            signal.pause()

    process = fork.Process(target=lambda: students.train(tmp_path / "cut", alone, seconds=0, advance=pause))
    process.start()
    try:
        assert here.poll(120) and here.recv() == 8
    finally:
        process.kill()
        process.join()
    assert reached(tmp_path / "cut") == divmod(7, 3), "the last checkpoint is from before the eighth update"
    resumed, _ = students.train(tmp_path / "cut", alone)
    assert same(resumed, students.train(tmp_path / "whole", alone)[0])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_one_of_them_stops_end_in_the_weights_of_those_that_are_not(
    size: int, classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_CHECK_SECONDS", 0.0)  # before every update
    students = Students("soft", classifier, "student.batch_size=10")

    def train(folder: str, until: int) -> str:
        def stop() -> bool:
            return bool(job.rank) and students.updates >= until

        with ranks(ComputeConfig(device="cpu")) as job:
            try:
                judged, _ = students.train(tmp_path / folder, job, stop, job.team(size, "student.ranks"))
            except Interrupted as reason:
                return str(reason)
            return hashlib.sha256(save({name: values.contiguous() for name, values in judged.items()})).hexdigest()

    whole = in_ranks(size, lambda: train("whole", 10**6))
    assert len(set(whole)) == 1, "ranks judge different networks"
    for until in (1, 6, 9):
        said = in_ranks(size, lambda until=until: train("cut", until))  # type: ignore[misc]
        assert said == [f"student checkpointed after {until} of 12 updates"] * size
        assert reached(tmp_path / "cut") == divmod(until, 2)
    assert in_ranks(size, lambda: train("cut", 10**6)) == whole


def teach(store: Path, job: Ranks, until: tuple[str, int] | None, *options: str) -> str:
    """Return the SHA-256 of a teacher with dropout, or why it was stopped.

    Args:
        store: the cache.
        job: this rank.
        until: title and position of the progress at which this rank is asked to stop; None: never.
        options: of the config.
    """
    words = ["data.resolution=16", "teacher.network=dropout", "teacher.epochs=4", "teacher.batch_size=128"]
    config = load_config("digits", [*TINY, *words, *options])
    dataset = load_dataset(config.data, 0)
    progress: dict[str, int] = {}

    def observe(title: str, done: int, total: int, unit: str) -> None:
        progress[title] = done

    def stop() -> bool:
        return until is not None and progress.get(until[0], -1) >= until[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WMDD_CACHE", str(store))
        try:
            with observed_by(observe):
                return obtain.get_or_train_teacher(
                    config, dataset, Validation(config, dataset, job, stop), job, stop
                ).sha256
        except Interrupted as reason:
            return str(reason)


DECODING, TRAINING, JUDGING = "decoding the training images", "teacher: training", "decoding the test images"


@pytest.mark.slow
def test_a_teacher_that_is_stopped_anywhere_ends_in_the_weights_of_one_that_is_not(
    alone: Ranks, tmp_path: Path
) -> None:
    whole = teach(tmp_path / "whole", alone, None)
    for until, reason in (
        ((DECODING, 32), "stopped while decoding the training images"),
        ((TRAINING, 7), "teacher checkpointed after 7 of 20 updates"),
        ((TRAINING, 7), "teacher checkpointed after 7 of 20 updates"),
        ((TRAINING, 13), "teacher checkpointed after 13 of 20 updates"),
        ((JUDGING, 142), "stopped while a network was validated on the test images"),
        (None, whole),
    ):
        assert teach(tmp_path / "cut", alone, until) == reason
    assert not list((tmp_path / "cut").rglob("checkpoint*"))


@pytest.mark.slow
def test_ranks_that_train_a_teacher_stop_together_and_end_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_CHECK_SECONDS", 0.0)  # before every update

    def train(folder: str, until: tuple[str, int] | None) -> str:
        with ranks(ComputeConfig(device="cpu")) as job:
            return teach(tmp_path / folder, job, until if job.rank else None, "teacher.ranks=2")

    whole = in_ranks(2, lambda: train("whole", None))
    assert len(set(whole)) == 1
    first, second = in_ranks(2, lambda: train("cut", (DECODING, 32)))
    assert (
        first == "stopped because another rank was stopped" and second == "stopped while decoding the training images"
    )
    assert in_ranks(2, lambda: train("cut", (TRAINING, 7))) == ["teacher checkpointed after 7 of 20 updates"] * 2
    assert in_ranks(2, lambda: train("cut", None)) == whole


def test_a_team_looks_about_once_a_second_at_positions_that_its_first_rank_sets() -> None:
    assert [checkpoint.until_next_look(*looked) for looked in ((1, 60.0), (1, 0.0), (8, 0.01))] == [1, 2, 16]
    assert checkpoint.until_next_look(100, 2.0) == 50, "half a second at half the speed"
    assert checkpoint.until_next_look(100, 1.0) == 100

    def work() -> tuple[int, list[int]]:
        looks: list[int] = []
        with ranks(ComputeConfig(device="cpu")) as job:
            check = checkpoint.StopCheck(job.team(2, "test"), lambda: bool(looks.append(position)), never)
            for position in range(400):  # noqa: B007 - the look notes it
                assert check() == (False, False)
        return len(looks), looks

    first, second = in_ranks(2, work)
    assert first == second and first[0] < 40


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
    plain = train_module._smoothed_cosine

    def counted(epoch: int, settings: object) -> float:
        epochs.append(epoch)
        if len(epochs) == 4:
            raise KeyboardInterrupt  # a kill, between two checkpoints
        return plain(epoch, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(train_module, "_smoothed_cosine", counted)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, run, share=UNREPORTED)
    assert list((run / "students").iterdir()) == [RunFolder(run).student_checkpoint("student-convnet2x8-hard-000")]
    pipeline.run(config, run, share=UNREPORTED)
    assert epochs == [0, 1, 2, 3, 2, 3, 4, 5], "it resumes before the last update of the third epoch"
    assert not list((run / "students").iterdir())
    pipeline.run(config, tmp_path / "whole", share=UNREPORTED)
    (found,), (expected,) = (read_records(one / "records")[0] for one in (run, tmp_path / "whole"))
    assert found.metrics == expected.metrics


def test_a_damaged_checkpoint_is_named_and_training_begins_anew(tmp_path: Path, said: list[str]) -> None:
    network, device = nn.Linear(2, 2), torch.device("cpu")
    saved = Checkpoint(tmp_path / "student.safetensors", "this", 1e6)
    assert saved.load({"network": network}, device, SINGLE) == {}
    saved.save({"network": network}, device, SINGLE, epoch=3)
    assert saved.load({"network": network}, device, SINGLE) == {"epoch": 3}
    whole = (tmp_path / "student.safetensors").read_bytes()
    (tmp_path / "student.safetensors").write_bytes(whole[: len(whole) // 2])
    assert saved.load({"network": network}, device, SINGLE) == {}
    assert said == [f"{tmp_path / 'student.safetensors'}: is damaged; training starts again"]


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_go_on_together_or_not_at_all(tiny: Config, tmp_path: Path) -> None:
    # Dropout, and a batch of which one rank gets more: their random numbers part.
    settings = {"seeds": 1, "epochs": EPOCHS, "baselines": (), "ranks": 2, "networks": ("dropout",), "batch_size": 9}
    recipe = {"student": tiny.student.model_copy(update=settings)}
    recipe |= {"labels": tiny.labels.model_copy(update={"regimes": ("soft",)})}
    config = tiny.model_copy(update={**recipe, "ipc": 7})
    plain = train_module._smoothed_cosine

    def train(folder: str, until: int) -> tuple[str, list[int]]:
        epochs: list[int] = []

        def counted(epoch: int, settings: object) -> float:
            if epoch == until:
                raise ZeroDivisionError  # a failure of all ranks, between two checkpoints
            epochs.append(epoch)
            return plain(epoch, settings)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoint, "due", lambda self: True)
            patch.setattr(checkpoint, "_CHECK_SECONDS", 0.0)  # before every update
            patch.setattr(train_module, "_smoothed_cosine", counted)
            try:
                pipeline.run(config, tmp_path / folder, share=UNREPORTED)
            except ZeroDivisionError:
                return "cut", epochs
        return "whole", epochs

    def different() -> str:
        with ranks(ComputeConfig(device="cpu")) as job:
            saved, team = Checkpoint(tmp_path / f"{job.rank}.safetensors", "this", 1e6), job.team(2, "student.ranks")
            if job.main:
                saved.save({}, job.device, SINGLE, epoch=3)
            try:
                return str(saved.load({}, job.device, team))
            except WmddError as error:
                return str(error)

    assert in_ranks(2, lambda: train("whole", EPOCHS)) == [("whole", [0, 1, 2, 3, 4, 5])] * 2
    assert in_ranks(2, lambda: train("cut", 3)) == [("cut", [0, 1, 2])] * 2
    assert in_ranks(2, lambda: train("cut", EPOCHS)) == [("whole", [2, 3, 4, 5])] * 2
    (cut,), (whole,) = (read_records(tmp_path / name / "records")[0] for name in ("cut", "whole"))
    assert cut.metrics == whole.metrics
    assert all("not every rank sees the same checkpoint" in said for said in in_ranks(2, different))


def test_what_was_spent_before_an_interruption_counts() -> None:
    meter = Meter(torch.device("cpu"), 2)
    meter.add_previous({"seconds": 1000.0, "device_seconds": 2000.0, "joules": 5.0, "peak_bytes": 1e15})
    found = meter.read()
    assert 1000 <= found["seconds"] < 1100 and 2000 <= found["device_seconds"] < 2200
    assert found["peak_bytes"] == 1e15
