"""The training of a student: the engine, the plain reference, and the difference of their students."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from bench import reference_student
from bench.timing import Stopwatch, flops
from bench.workloads import OWN, BenchSession, Checks, Workload
from wmdd.errors import InputError
from wmdd.networks import create
from wmdd.networks.accuracy import Judgement
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime.cpus import processes
from wmdd.runtime.seeding import seed_of
from wmdd.runtime.team import SINGLE, Team
from wmdd.students import batches, tasks, train


def students_of(bench: BenchSession, with_reference: bool) -> Workload:
    """Return the workload of a student's updates on a set of the run's size, without validation.

    The images are noise, which changes no speed.

    Raises:
        InputError: the reference does not support the config.
    """
    config, job = bench.config, bench.ranks
    if with_reference and (config.labels.teacher_mode, config.labels.loss, config.student.ema) != ("eval", "kl", 0):
        raise InputError(
            "labels.teacher_mode, labels.loss, student.ema: the plain reference has none of them; use --no-reference"
        )
    name = config.student.networks[0]
    regime = "hard" if set(config.labels.regimes) == {"hard"} else "soft"
    data, classes = config.data, len(bench.dataset.classes)
    source = torch.Generator().manual_seed(seed_of("bench", "students"))
    shape = (classes * config.ipc, data.channels, data.resolution, data.resolution)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    owners = torch.arange(classes).repeat_interleave(config.ipc)
    even = torch.full((len(images),), 1 / config.ipc)
    distilled = DistilledSet(images, owners, even, bench.dataset.classes, data, "noise")
    task = tasks.StudentTask(name, regime, 0, "updates")

    def engine(updates: int, judge: Callable[..., Judgement], advance: Callable[[int], None]) -> None:
        session = replace(bench, config=config.replace({"student.updates": updates}), validation=judge)  # type: ignore[arg-type]  # any judge will do
        with TemporaryDirectory() as folder:
            train.train(session, task, distilled, SINGLE, Path(folder), advance)

    def own(steps: int, watch: Stopwatch) -> None:
        engine(steps, lambda predict, team: Judgement({}), watch)

    def fresh() -> nn.Module:
        torch.manual_seed(seed_of("student", task.seed))
        return create.create(name, classes, data.channels, data.resolution).to(job.device)

    size = min(config.student.batch_size, len(images))

    def model_flops() -> float:
        network = fresh()
        batch = torch.zeros(size, *shape[1:], device=job.device)
        with job.autocast():
            taught = flops(lambda: bench.teacher.network.predict(batch)) if regime == "soft" else 0.0
            return taught + flops(lambda: network(batch).sum().backward())

    recipe = reference_student.Recipe(
        epochs=config.student.epochs,
        batch_size=config.student.batch_size,
        lr=config.student.lr,
        weight_decay=config.student.weight_decay,
        stretch=config.student.cosine_stretch,
        soft=regime == "soft",
        temperature=config.labels.temperature,
        crop_scale=config.labels.crop_scale,
        flip=config.labels.flip,
        mix=config.labels.mix,
        mix_alpha=config.labels.mix_alpha,
        mean=data.mean,
        std=data.std,
    )

    def plainly(steps: int, watch: Stopwatch) -> None:
        network = fresh().to(memory_format=torch.contiguous_format)
        pictures = reference_student.Pictures(images, owners, recipe)
        workers = processes(config.compute.workers)
        reference_student.train(network, bench.classifier, pictures, recipe, workers, job.device, steps, watch)

    def check() -> Checks:
        return {OWN: {"student_difference": student_difference(bench, engine, fresh, distilled, recipe)}}

    updates = tasks.update_count(config, config.student.views[0], len(images))
    return Workload(
        stage="students",
        unit="students/h",
        contestants={OWN: own} | ({"reference": plainly} if with_reference else {}),
        work=lambda steps: 3600 * steps / updates,
        most=10**9,
        warm=1,
        device=job.device,
        check=check if with_reference else dict,
        setup={"batch": size, "images": len(images), "updates": updates, "regime": regime},
        network=name,
        step_flops=model_flops,
    )


def student_difference(
    bench: BenchSession,
    engine: Callable[..., None],
    fresh: Callable[[], nn.Module],
    distilled: DistilledSet,
    recipe: reference_student.Recipe,
) -> float:
    """Return the relative difference of the engine's student from the plain one after the same batches.

    It is ‖logits − plain logits‖ / ‖plain logits − logits of an untrained student‖. Both use the engine's batches,
    because random crops of two programs are never the same.
    """
    config, device = bench.config, bench.ranks.device
    images, owners = distilled.images.to(device), distilled.labels.to(device)
    # Two updates at most, and only from the first epoch: the second epoch has another learning rate.
    side, size = images.shape[-1], config.student.batch_size
    plan = batches.batches(0, 0, len(images), side, size, config.labels, device)[:2]
    shown = batches.augmented_batch(images, plan[0], config)
    seen: list[Tensor] = []

    def judge(predict: Callable[[Tensor], Tensor], team: Team | None = None) -> Judgement:
        with torch.no_grad():
            seen.append(predict(shown).float())
        return Judgement({})

    engine(len(plan), judge, lambda updates: None)
    network = fresh().to(memory_format=torch.contiguous_format)
    network.eval()
    judge(network)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    for batch in plan:
        classes = owners[batch.images]
        views = batches.augmented_batch(images, batch, config)
        others = classes[batch.partners]
        reference_student.update(network, bench.classifier, optimizer, recipe, views, classes, others, batch.share)
    network.eval()
    judge(network)
    own, untrained, plain = seen
    return float((own - plain).norm() / (plain - untrained).norm())
