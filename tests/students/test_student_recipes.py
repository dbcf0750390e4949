"""Options of the students' recipe: each trains as a plain loop does, and is off unless asked for."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY
from rank_processes import in_ranks
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import bench
from bench.protocol import cells, load_protocol
from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import ComputeConfig, Config
from wmdd.errors import InputError
from wmdd.networks import create
from wmdd.networks.accuracy import Judgement
from wmdd.networks.frozen import FrozenNetwork
from wmdd.records.comparability import protocol_of
from wmdd.records.files import read_records
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.seeding import seed_of
from wmdd.runtime.team import SINGLE, Team
from wmdd.session import Session
from wmdd.students import batches, evaluate, soft_labels, tasks, train
from wmdd.teacher.obtain import Teacher

ALL = ["labels.teacher_mode=batch", "labels.loss=mse-ce", "student.ema=0.9"]


@pytest.fixture
def alone() -> Iterator[Ranks]:
    with ranks(ComputeConfig(device="cpu")) as job:
        yield job


@pytest.fixture
def distilled() -> DistilledSet:
    torch.manual_seed(5)
    images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    return DistilledSet(images, torch.arange(10) % 5, torch.rand(10), tuple("abcde"), asked().data, "set")


@pytest.fixture
def teacher(classifier: nn.Module) -> Teacher:
    return Teacher(FrozenNetwork(classifier), "teacher", {})


def asked(*options: str) -> Config:
    """Return the config of students of 9 updates with some options."""
    data = ["data.channels=3", "data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]"]
    return load_config("digits", [*data, "student.epochs=3", "student.batch_size=4", *options])


def engines(
    config: Config, distilled: DistilledSet, teacher: Teacher, job: Ranks, folder: Path, team: Team = SINGLE
) -> dict[str, Tensor]:
    """Return the state of the student that the engine would have judged."""
    judged: dict[str, Tensor] = {}

    def judge(network: nn.Module, team: object) -> Judgement:
        judged.update(network.state_dict())
        return Judgement({"training": float(network.training)})

    task = tasks.StudentTask("convnet2x8", "soft", 0)
    session = Session(config, None, judge, teacher, job, lambda: False)  # type: ignore[arg-type]
    result = train.train(session, task, distilled, team, folder)
    assert result.metrics == {"training": 0}
    return judged


def plainly(config: Config, distilled: DistilledSet, classifier: nn.Module) -> dict[str, Tensor]:
    """Return the same state from a loop that spells out the recipe, image by image; it shares batches and views."""
    chosen, settings = config.labels, config.student
    torch.manual_seed(seed_of("student", 0))
    network = create.create("convnet2x8", 5, 3, 16).to(memory_format=torch.contiguous_format).train()
    expert = copy.deepcopy(classifier).train(chosen.teacher_mode == "batch")
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=settings.weight_decay)
    counts = distilled.weights / distilled.weights.mean() if chosen.weighted else torch.ones(len(distilled))
    average = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    for epoch in range(settings.epochs):
        position = epoch / (settings.epochs * settings.cosine_stretch)
        optimizer.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * position)) / 2
        for batch in batches.batches(0, epoch, len(distilled), 16, settings.batch_size, chosen):
            views = batches.augmented_batch(distilled.images, batch, config)
            logits, wanted = network(views), expert(views).detach()
            loss = torch.zeros(())
            for row, (own, other) in enumerate(zip(batch.images, batch.images[batch.partners], strict=True)):
                kept, taken = batch.share * counts[own], (1 - batch.share) * counts[other]
                if chosen.loss == "kl":
                    p, q = (torch.softmax(values[row] / chosen.temperature, 0) for values in (wanted, logits))
                    loss = loss + (kept + taken) * chosen.temperature**2 * (p * (p / q).log()).sum()
                elif chosen.loss == "gift":
                    mix = torch.full((5,), 0.1 / 5)
                    mix[distilled.labels[own]] += 0.9 * batch.share
                    mix[distilled.labels[other]] += 0.9 * (1 - batch.share)
                    goal = wanted[row] / wanted[row].norm() + 0.1 * mix / mix.norm()
                    cosine = (logits[row] @ goal) / (logits[row].norm() * goal.norm())
                    loss = loss + (kept + taken) * (1 - cosine)
                else:
                    loss = loss + (kept + taken) * ((logits[row] - wanted[row]) ** 2).sum() / 5
                    of_class = -torch.log_softmax(logits[row], 0)[distilled.labels[torch.stack([own, other])]]
                    loss = loss + chosen.ce_weight * (kept * of_class[0] + taken * of_class[1])
            optimizer.zero_grad()
            (loss / len(views)).backward()
            optimizer.step()
            for name, weight in network.named_parameters():
                average[name] = settings.ema * average[name] + (1 - settings.ema) * weight.detach()
    return network.state_dict() | average


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([values.flatten() for values in state.values() if values.is_floating_point()])


@pytest.mark.parametrize(
    "options",
    [
        ["labels.teacher_mode=batch"],
        ["labels.loss=mse-ce", "labels.ce_weight=0.3"],
        ["labels.loss=gift"],
        ["student.ema=0.7"],
        [*ALL, "labels.weighted=true", "labels.mix=mixup"],
    ],
)
def test_an_option_trains_the_student_of_a_plain_loop(
    options: list[str], distilled: DistilledSet, classifier: nn.Module, teacher: Teacher, alone: Ranks, tmp_path: Path
) -> None:
    config = asked(*options)
    found = flat(engines(config, distilled, teacher, alone, tmp_path))
    expected, without = flat(plainly(config, distilled, classifier)), flat(plainly(asked(), distilled, classifier))
    assert (found - expected).norm() < 1e-3 * (expected - without).norm()


def test_a_teacher_by_the_statistics_of_a_batch_is_the_network_in_training_mode(classifier: nn.Module) -> None:
    images = torch.randn(6, 3, 16, 16)
    frozen = FrozenNetwork(classifier)
    state, usual = copy.deepcopy(frozen.state_dict()), frozen.predict(images)
    expected = copy.deepcopy(classifier).train()(images)
    torch.testing.assert_close(frozen.predict(images, of_batch=True), expected)
    assert all(torch.equal(values, state[name]) for name, values in frozen.state_dict().items()), "nothing is learned"
    assert torch.equal(frozen(images).logits, usual) and torch.equal(frozen.predict(images), usual)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(frozen.predict(images, of_batch=True), expected, atol=0.1, rtol=0.1)


def test_statistics_are_of_the_whole_batch_in_files_and_on_every_rank(
    distilled: DistilledSet, classifier: nn.Module, teacher: Teacher, alone: Ranks, tmp_path: Path
) -> None:
    config, expert = asked("labels.teacher_mode=batch"), copy.deepcopy(classifier).train()
    soft = soft_labels.SoftLabels(config, distilled, teacher, "stored", 3, alone, tmp_path)
    soft.store(distilled.images, 1)
    plan = batches.batches(3, 1, len(distilled), 16, 4, config.labels)
    for batch, stored in zip(plan, soft.read(1), strict=True):
        views = batches.augmented_batch(distilled.images, batch, config)
        expected = expert(views)
        torch.testing.assert_close(stored, expected, atol=1e-3, rtol=1e-3)
        for rank in range(2):
            torch.testing.assert_close(soft.online(views, Team(0, 1, rank, 2)), expected[rank::2])


def test_stored_labels_are_named_by_what_makes_them(distilled: DistilledSet, teacher: Teacher, alone: Ranks) -> None:
    usual, batch, squared, averaged = (
        soft_labels.SoftLabels(asked(*options), distilled, teacher, "stored", 0, alone, Path()).identity
        for options in ([], *([option] for option in ALL))
    )
    assert usual == squared == averaged != batch


def test_ranks_judge_the_average_of_the_student_they_train_together(
    distilled: DistilledSet, teacher: Teacher, tmp_path: Path
) -> None:
    config = asked(*ALL)

    def work() -> tuple[list[float], list[float]]:
        torch.manual_seed(seed_of("student", 0))
        average = list(create.create("convnet2x8", 5, 3, 16).parameters())

        def follow(optimizer: torch.optim.Optimizer, *_: object) -> None:
            now = optimizer.param_groups[0]["params"]
            average[:] = [(0.9 * mean + 0.1 * weight).detach() for mean, weight in zip(average, now, strict=True)]

        with ranks(ComputeConfig(device="cpu")) as job:
            hook = register_optimizer_step_post_hook(follow)
            judged = engines(config, distilled, teacher, job, tmp_path, job.team(2, "student.ranks"))
            hook.remove()
        weights = {name: values for name, values in judged.items() if "running" not in name}
        return flat(weights).tolist(), torch.cat([mean.flatten() for mean in average]).tolist()

    (first, expected), (second, _) = in_ranks(2, work)
    assert first == second
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected))


@pytest.mark.slow
def test_a_run_with_every_option_ends_and_its_records_tell(tmp_path: Path) -> None:
    regimes = "labels.regimes=['hard', 'soft', 'stored']"
    pipeline.run("digits", tmp_path / "run", [*TINY, *ALL, regimes, "student.seeds=1", "student.baselines=[]"])
    recipes = [record.recipe for record in read_records(tmp_path / "run" / "records")[0]]
    told = {"teacher_mode": "batch", "loss": "mse-ce", "ce_weight": 0.025, "ema": 0.9}
    assert len(recipes) == 3 and all(recipe.items() >= told.items() for recipe in recipes)


def test_records_from_before_these_options_are_of_the_same_recipe(tmp_path: Path) -> None:
    path = Path(bench.__file__).parent / "results" / "digits-wmdd.jsonl"
    known = next(record for record in read_records(path)[0] if (record.ipc, record.regime) == (10, "soft"))
    (cell, *_) = (cell for cell in cells(load_protocol("digits-wmdd"), tmp_path) if cell.config.ipc == 10)
    assert evaluate.is_of_recipe(known, cell.config, 100)
    assert not known.recipe.keys() & {"teacher_mode", "loss", "ema"}
    for option in ALL:
        key, _, value = option.partition("=")
        assert not evaluate.is_of_recipe(known, cell.config.replace({key: value}), 100), option


def test_the_fingerprint_of_a_recipe_outlasts_new_keys() -> None:
    recipe = evaluate.recipe_settings(load_config("digits"), "soft", "epochs", 100)
    older = {key: value for key, value in recipe.items() if key not in ("teacher_mode", "loss", "ema")}
    assert older.keys() < recipe.keys() and protocol_of(older) == protocol_of(recipe)
    assert protocol_of(recipe | {"ema": 0.5}) != protocol_of(recipe)


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(InputError, match=r"mse-ce needs all logits; use labels.encoding=fp16 or int8"):
        asked("labels.loss=mse-ce", "labels.encoding=topk")
    with pytest.raises(InputError, match="ema"):
        asked("student.ema=1")
    for single in ("student.batch_size=1", "ipc=1"):
        with pytest.raises(InputError, match="teacher_mode = batch: one image has no batch statistics"):
            tasks.check(asked("labels.teacher_mode=batch", single), 1)
    tasks.check(asked("labels.teacher_mode=batch", "ipc=2"), 1)
