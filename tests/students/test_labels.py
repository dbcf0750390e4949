"""Batches replay, labels can be stored, and what is stored is what would have been computed."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from wmdd.config.loading import load_config
from wmdd.config.schema import ComputeConfig, Config, LabelsConfig, View
from wmdd.errors import InputError
from wmdd.networks.accuracy import Judgement
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.team import SINGLE, Team
from wmdd.session import Session
from wmdd.storage.files import read_tensors, write_tensors
from wmdd.students import batches as batches_module
from wmdd.students import logit_files, losses, soft_labels, tasks
from wmdd.students import train as train_module
from wmdd.students.tasks import StudentTask
from wmdd.teacher.obtain import Teacher


@pytest.fixture
def alone() -> Any:
    with ranks(ComputeConfig(device="cpu")) as job:
        yield job


@pytest.fixture
def config() -> Config:
    return load_config(
        "digits",
        [
            "data.channels=3",
            "data.mean=[0.5, 0.5, 0.5]",
            "data.std=[0.5, 0.5, 0.5]",
            "student.epochs=3",
            "student.batch_size=4",
            "compute.threads=1",
        ],
    )


@pytest.fixture
def distilled(config: Config) -> DistilledSet:
    torch.manual_seed(5)
    images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    return DistilledSet(images, torch.arange(10) % 5, torch.ones(10), tuple("abcde"), config.data, "set")


@pytest.fixture
def teacher(classifier: nn.Module) -> Teacher:
    return Teacher(FrozenNetwork(classifier), "teacher", {})


def plan(seed: int = 0, epoch: int = 0, count: int = 10, size: int = 4, **changes: Any) -> list[batches_module.Batch]:
    return batches_module.batches(seed, epoch, count, 16, size, LabelsConfig(**changes))


def test_an_epoch_visits_every_image_once_and_replays() -> None:
    first, again = plan(), plan()
    assert torch.cat([batch.images for batch in first]).sort().values.tolist() == list(range(10))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.draws.boxes, two.draws.boxes)
        assert torch.equal(one.partners, two.partners) and one.share == two.share
    assert [batch.share for batch in plan(seed=1)] != [batch.share for batch in first]
    assert not torch.equal(plan(epoch=1)[0].images, first[0].images)


@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4, 2]), (9, [4, 5]), (3, [3]), (1, [1]), (8, [4, 4])])
def test_no_batch_of_one_image_is_left_over(count: int, sizes: list[int]) -> None:
    assert [len(batch.images) for batch in plan(count=count)] == sizes
    config = load_config("digits", ["student.batch_size=4", "student.epochs=2"])
    assert tasks.update_count(config, "epochs", count) == 2 * len(sizes)


def test_cutmix_share_is_the_area_that_is_kept(config: Config) -> None:
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = torch.tensor([0, 60, 120, 180], dtype=torch.uint8)[:, None, None]
    for epoch in range(5):
        (batch,) = plan(epoch=epoch, count=4, size=4, crop_scale=1.0, flip=False)
        seen = batches_module.augmented_batch(images, batch, config)[:, 0] * 0.5 + 0.5
        own = images[batch.images, 0].float() / 255
        partner = own[batch.partners]
        for image, pixels, other in zip(seen, own, partner, strict=True):
            if not torch.equal(pixels, other):
                kept = torch.isclose(image, pixels, atol=1e-3).float().mean()
                assert kept.item() == pytest.approx(batch.share, abs=1e-6)


def test_mixup_is_the_weighted_mean(config: Config) -> None:
    config = config.model_copy(update={"labels": LabelsConfig(mix="mixup", crop_scale=1.0, flip=False)})
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    (batch,) = batches_module.batches(0, 0, 4, 16, 4, config.labels)
    own = (images[batch.images].float() / 255 - 0.5) / 0.5
    expected = batch.share * own + (1 - batch.share) * own[batch.partners]
    assert 0 < batch.share < 1
    torch.testing.assert_close(batches_module.augmented_batch(images, batch, config), expected, atol=1e-5, rtol=1e-5)


def test_stored_labels_are_the_online_ones_rounded_to_fp16(
    config: Config, distilled: DistilledSet, teacher: Teacher, alone: Ranks, tmp_path: Path
) -> None:
    soft = soft_labels.SoftLabels(config, distilled, teacher, "stored", 3, alone, tmp_path)
    soft.store(distilled.images, 1)
    batches = batches_module.batches(3, 1, len(distilled), 16, 4, config.labels)
    online = [soft.online(batches_module.augmented_batch(distilled.images, batch, config)) for batch in batches]
    for stored, computed in zip(soft.read(1), online, strict=True):
        assert torch.equal(stored, computed.half().float())


@pytest.mark.parametrize("encoding", get_args(LabelsConfig.model_fields["encoding"].annotation))
def test_stored_labels_stay_encoded_until_their_batch_is_used(
    config: Config, distilled: DistilledSet, teacher: Teacher, alone: Ranks, tmp_path: Path, encoding: str
) -> None:
    config = config.replace({"labels.encoding": encoding})
    soft = soft_labels.SoftLabels(config, distilled, teacher, "stored", 3, alone, tmp_path)
    soft.store(distilled.images, 1)
    stored = soft.read(1)
    assert str(soft.file(1)) in Path("/proc/self/maps").read_text(), "the file is read whole"
    assert [len(part) for part in stored] == [4, 4, 2] and {part.dtype for part in stored} == {torch.float32}
    whole = logit_files.decode(read_tensors(soft.file(1)), 5)
    assert torch.equal(torch.cat(list(stored)), whole)


def test_labels_of_another_set_seed_or_recipe_lie_elsewhere(
    config: Config, distilled: DistilledSet, teacher: Teacher, alone: Ranks, tmp_path: Path
) -> None:
    warmer = config.model_copy(update={"labels": config.labels.model_copy(update={"crop_scale": 0.5})})
    other = DistilledSet(**{**vars(distilled), "sha256": "other"})
    folders = {
        soft_labels.SoftLabels(one, images, teacher, "stored", seed, alone, tmp_path).folder
        for one, images, seed in [
            (config, distilled, 0),
            (config, distilled, 1),
            (config, other, 0),
            (warmer, distilled, 0),
        ]
    }
    assert len(folders) == 4


def test_a_student_on_stored_labels_equals_one_on_rounded_online_labels(
    config: Config,
    distilled: DistilledSet,
    teacher: Teacher,
    alone: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights: list[torch.Tensor] = []

    def judge(network: nn.Module, team: object) -> Judgement:
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
        return Judgement({"top1": 0.0, "top5": 0.0, "loss": 0.0})

    def train(regime: str) -> None:
        session = Session(config, None, judge, teacher, alone, lambda: False)  # type: ignore[arg-type]
        train_module.train(session, StudentTask("convnet2x8", regime, 0), distilled, SINGLE, tmp_path)

    train("stored")
    online = soft_labels.SoftLabels.online
    monkeypatch.setattr(soft_labels.SoftLabels, "online", lambda self, *seen: online(self, *seen).half().float())
    train("soft")
    assert torch.equal(weights[0], weights[1])


def test_soft_loss_is_the_kl_divergence_at_the_temperature() -> None:
    student_logits, teacher_logits = torch.randn(3, 5), torch.randn(3, 5)
    p, q = (torch.softmax(logits / 4, 1) for logits in (teacher_logits, student_logits))
    expected = 16 * (p * (p / q).log()).sum()
    torch.testing.assert_close(losses.soft_loss(student_logits, teacher_logits, 4.0), expected)


def test_topk_keeps_the_largest_logits_and_the_mass_of_the_rest_at_the_temperature() -> None:
    logits = 5 * torch.randn(6, 40)
    settings = LabelsConfig(encoding="topk", top_k=3, temperature=4.0)
    found = logit_files.decode(logit_files.encode(logits, settings), 40)
    places = logits.topk(3).indices
    torch.testing.assert_close(found.gather(1, places), logits.gather(1, places), atol=2e-2, rtol=1e-3)
    wanted, kept = (torch.softmax(values / 4, 1) for values in (logits, found))
    torch.testing.assert_close(kept.gather(1, places), wanted.gather(1, places), atol=1e-3, rtol=5e-3)
    others = kept.scatter(1, places, torch.nan)
    assert all(row[~row.isnan()].unique().numel() == 1 for row in others), "the rest is spread evenly"


def test_topk_of_all_classes_and_8_bits_lose_only_digits() -> None:
    logits = 5 * torch.randn(6, 10)
    everything = logit_files.decode(logit_files.encode(logits, LabelsConfig(encoding="topk", top_k=10)), 10)
    torch.testing.assert_close(everything, logits.half().float())
    found = logit_files.decode(logit_files.encode(logits, LabelsConfig(encoding="int8")), 10)
    span = logits.amax(1) - logits.amin(1)
    assert ((found - logits).abs() <= span[:, None] * (0.5 / 255 + 2e-3)).all()
    constant = torch.full((2, 10), 3.0)
    torch.testing.assert_close(
        logit_files.decode(logit_files.encode(constant, LabelsConfig(encoding="int8")), 10), constant
    )


@pytest.mark.parametrize(("name", "row"), [("fp16", 600), ("topk", 16 + 16 + 2), ("int8", 304)])
def test_the_size_of_stored_logits_is_known_beforehand(name: str, row: int, tmp_path: Path) -> None:
    settings = LabelsConfig(encoding=name, top_k=8)  # type: ignore[arg-type]
    assert logit_files.row_bytes(300, settings) == row
    write_tensors(tmp_path / "epoch", logit_files.encode(torch.randn(50, 300), settings), {"labels": "0" * 64})
    size = (tmp_path / "epoch").stat().st_size
    assert 50 * row < size <= soft_labels.epoch_bytes(settings, 50, 300)


def spent(
    config: Config, regime: str, view: str = "epochs", *, teacher: Teacher, ranks: Ranks, **parts: Any
) -> train_module.Result:
    """Train a student; its judge is content with anything."""

    def judge(network: nn.Module, team: object) -> Judgement:
        return Judgement({"top1": float(sum(parameter.detach().double().sum() for parameter in network.parameters()))})

    session = Session(config, None, judge, teacher, ranks, lambda: False)  # type: ignore[arg-type]
    return train_module.train(session, StudentTask("convnet2x8", regime, 0, view), team=SINGLE, **parts)


def test_a_budget_buys_the_first_epochs_of_the_stored_labels_and_no_more(
    config: Config, distilled: DistilledSet, teacher: Teacher, alone: Ranks, tmp_path: Path
) -> None:
    parts = {"distilled": distilled, "teacher": teacher, "ranks": alone, "folder": tmp_path}
    epoch = soft_labels.epoch_bytes(config.labels, 10, 5)
    pixels = 10 * 3 * 16 * 16
    two = config.model_copy(update={"labels": LabelsConfig(budget=2.5 * epoch / pixels)})
    few = spent(two, "budget", **parts)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2 < config.student.epochs
    assert few.cost["label_bytes"] == sum(file.stat().st_size for file in files) <= 2.5 * epoch
    everything = spent(two, "stored", **parts)
    assert sorted(tmp_path.rglob("*.safetensors"))[:2] == files, "the same files serve both regimes"
    assert everything.cost["label_bytes"] == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert few.metrics != everything.metrics, "its third epoch saw the views of the first again"
    assert few.updates == everything.updates
    with pytest.raises(InputError, match=r"labels.budget = 0.001 allows 8 bytes, but one epoch of logits takes 612"):
        spent(config.model_copy(update={"labels": LabelsConfig(budget=0.001)}), "budget", **parts)


def test_online_labels_cost_no_bytes_but_a_teacher_and_its_flops(
    config: Config, distilled: DistilledSet, teacher: Teacher, alone: Ranks, tmp_path: Path
) -> None:
    known = Teacher(teacher.network, "teacher", {"bytes": 1234})
    parts = {"distilled": distilled, "teacher": known, "ranks": alone, "folder": tmp_path}
    online, stored, hard = (spent(config, regime, **parts).cost for regime in ("soft", "stored", "hard"))
    assert online["label_bytes"] == hard["label_bytes"] == 0 < stored["label_bytes"]
    assert (online["teacher_bytes"], stored["teacher_bytes"]) == (1234, 0)
    convolutions = 2 * 9 * 8 * (3 * 16**2 + 8 * 8**2 + 8 * 4**2)  # three blocks of 8 channels, halved each time
    assert online["labelling_flops"] == stored["labelling_flops"] == 30 * (convolutions + 2 * 5 * 8 * 2 * 2)
    assert "labelling_flops" not in hard
    for mode, passes in (("eval", 1), ("batch", 2)):
        recipe = config.labels.model_copy(update={"teacher_mode": mode})
        asked = config.model_copy(update={"labels": recipe})
        soft = soft_labels.SoftLabels(asked, distilled, known, "soft", 0, alone, tmp_path)
        assert soft.cost(30, Team(0, 1, 0, 2))["labelling_flops"] == passes * online["labelling_flops"]


def test_views_fix_the_updates_or_leave_out_the_augmentation(
    config: Config, distilled: DistilledSet, teacher: Teacher, alone: Ranks, tmp_path: Path
) -> None:
    parts = {"distilled": distilled, "teacher": teacher, "ranks": alone, "folder": tmp_path}
    longer = config.model_copy(update={"student": config.student.model_copy(update={"updates": 7})})
    assert spent(longer, "hard", **parts).updates == 9, "3 epochs of 3 batches"
    assert spent(longer, "hard", "updates", **parts).updates == 7
    plain = tasks.config_for_view(config, "plain", 10)
    for epoch in range(3):
        for batch in batches_module.batches(0, epoch, 10, 16, 4, plain.labels):
            shown = batches_module.augmented_batch(distilled.images, batch, plain)
            torch.testing.assert_close(shown, (distilled.images[batch.images] / 255 - 0.5) / 0.5)


def test_a_view_that_trains_twice_as_long_does_twice_the_updates(
    config: Config, distilled: DistilledSet, teacher: Teacher, alone: Ranks, tmp_path: Path
) -> None:
    parts = {"distilled": distilled, "teacher": teacher, "ranks": alone, "folder": tmp_path}
    config = config.model_copy(update={"student": config.student.model_copy(update={"updates": 5})})
    done = {view: spent(config, "hard", view, **parts).updates for view in get_args(View)}

    assert done["epochs-twice"] == 2 * done["epochs"]
    assert (done["updates"], done["updates-twice"]) == (5, 10)
