"""What is timed in each stage: the engine through its public functions, beside the same work done plainly."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from bench import reference, reference_statistics, reference_student
from bench.timing import Run, Stopwatch, flops, fresh_store
from bench.workloads import OWN, Bench, Checks, Workload, difference
from wmdd import barycenter, distill, labels, methods, networks, rundir, statistics, student, synthesis
from wmdd.data import Dataset, pixel_range
from wmdd.distilled import DistilledSet
from wmdd.distributed import ALONE, Team, seed_of
from wmdd.errors import InputError, WmddError


def first_group(bench: Bench) -> tuple[distill.Prepared, synthesis.Target]:
    """Return the first group of classes as the run would begin it, and what its images are matched to.

    Raises:
        InputError: the method optimises nothing.
    """
    method = methods.create(bench.config)
    if method.objective() is None:
        raise InputError(f"method = {bench.config.method!r} optimises no images: there is no synthesis to time")
    with TemporaryDirectory() as folder:
        place = rundir.RunFolder(Path(folder))
        job = distill.Job(bench.config, bench.dataset, bench.teacher, bench.ranks, place, lambda: False)
        prepared = distill.prepare(job, method, bench.groups[0], bench.measured)
    if prepared.target is None:
        raise InputError(f"method = {bench.config.method!r} sets no target: there is no synthesis to time")
    return prepared, prepared.target


def synthesis_of(bench: Bench, with_reference: bool) -> Workload:
    """Iterations of the first group."""
    config, job = bench.config, bench.ranks
    method = methods.create(config)
    prepared, target = first_group(bench)
    objective, settings = method.objective() or synthesis.Objective.of(config.synthesis), method.synthesis()
    limits = pixel_range(config.data)
    count = len(prepared.images)

    def engine(
        chosen: Any, images: Tensor, iterations: int, advance: Callable[[int], None] = lambda iterations: None
    ) -> synthesis.State:
        return synthesis.synthesise(
            bench.teacher.network,
            synthesis.State(images),
            target,
            objective,
            chosen.model_copy(update={"iterations": iterations}),
            limits,
            (config.seed, *prepared.seed),
            job,
            compiled=config.compute.compile,
            advance=advance,
        )

    def own(steps: int, watch: Stopwatch) -> None:
        engine(settings, prepared.images, steps, watch)

    def model_flops() -> float:
        images = prepared.images.to(job.device, copy=True).requires_grad_(True)
        with job.autocast():
            return flops(lambda: bench.teacher.network.predict(images).sum().backward())

    contestants: dict[str, Run] = {OWN: own}
    check: Callable[[], Checks] = dict
    if with_reference:
        probe = reference.Probe(bench.classifier)
        loss_of = reference_loss(objective, target.weights)
        plain_targets = reference_targets(target, probe, job.device)
        views = reference.Views(settings.crop_scale, settings.flip, settings.jitter, settings.augment == "image")
        edges = (limits[0].to(job.device), limits[1].to(job.device)) if settings.clamp else None

        def plainly(steps: int, watch: Stopwatch) -> None:
            start = prepared.images.to(job.device)
            lr, betas = settings.lr, settings.betas
            reference.synthesise(probe, start, plain_targets, loss_of, views, steps, lr, betas, edges, watch)

        def check() -> Checks:
            return {
                OWN: start_differences(engine, settings, prepared.images, probe, plain_targets, loss_of, job.device)
            }

        contestants["reference"] = plainly
    return Workload(
        stage="synthesis",
        unit="img·iter/s",
        contestants=contestants,
        work=lambda steps: steps * count,
        most=10**9,
        warm=1,
        device=job.device,
        check=check,
        setup={"batch": count, "classes": len(bench.groups[0].classes), "ipc": config.ipc, "method": config.method},
        network=config.teacher.network,
        step_flops=model_flops,
    )


def start_differences(
    engine: Callable[[Any, Tensor, int], synthesis.State],
    settings: Any,
    images: Tensor,
    probe: reference.Probe,
    targets: list[reference.ClassTarget],
    loss_of: reference.LossOf,
    device: torch.device,
) -> dict[str, float]:
    """Return the relative differences of the engine's loss and image gradient from the reference's, at ``images``.

    Both see whole images.  The engine takes one step: Adam's first moment is then (1 − β1) times its gradient.
    """
    whole = settings.model_copy(
        update={"crop_scale": (1.0, 1.0), "flip": False, "jitter": 0, "crop_curriculum": 0.0, "betas": (0.5, 0.9)}
    )
    state = engine(whole, images, 1)
    pixels = images.to(device, copy=True).requires_grad_(True)
    loss = loss_of(probe, pixels, targets)
    (gradient,) = torch.autograd.grad(loss, pixels)
    if state.first is None:
        raise WmddError("the engine returned no gradient")
    own = torch.tensor(state.curve["total"][0])
    return {"loss_difference": difference(own, loss), "gradient_difference": difference(2 * state.first, gradient)}


def reference_loss(objective: synthesis.Objective, weights: Tensor) -> reference.LossOf:
    """Return the plain loss for an objective.

    Raises:
        InputError: the reference has no such objective.
    """
    common = objective.per_class and objective.feature == 1 and objective.bn_first == 1
    if common and objective.squared and not objective.ce:
        return partial(reference.paper_loss, bn_weight=objective.bn)
    if common and not objective.squared and torch.allclose(weights, weights[0, 0]):
        return partial(reference.upstream_loss, bn_weight=objective.bn, ce_weight=objective.ce)
    raise InputError(
        "the plain reference computes the published objective and the public code's alone (config variants +paper and"
        " +upstream): time this one with --no-reference"
    )


def reference_targets(
    target: synthesis.Target, probe: reference.Probe, device: torch.device
) -> list[reference.ClassTarget]:
    """Return the engine's target as the reference wants it: class by class, layer by layer."""
    norms = [layer for layer in probe.network.modules() if isinstance(layer, nn.BatchNorm2d)]
    sizes = [layer.num_features for layer in norms]
    target = target.to(device)
    if target.atoms is None:
        raise InputError("the plain reference needs atoms to match: time this method with --no-reference")
    owners = target.labels.view(target.weights.shape)[:, 0].tolist()
    return [
        reference.ClassTarget(
            label,
            target.atoms[row],
            target.weights[row],
            list(target.mean[row].split(sizes)),
            list(target.variance[row].split(sizes)),
        )
        for row, label in enumerate(owners)
    ]


def statistics_of(bench: Bench, with_reference: bool) -> Workload:
    """Batches of real images: decoded, seen by the teacher, summed up.  Every repeat decodes anew."""
    config, job = bench.config, bench.ranks
    size = config.statistics.batch_size
    plan = [
        list(images)[start : start + size]
        for index in range(len(bench.dataset.classes))
        for images in [bench.dataset.train.of_class(index)]
        for start in range(0, len(images), size)
    ]

    def measure(dataset: Dataset, advance: Callable[[int], None]) -> dict[int, statistics.ClassStatistics]:
        classes = sorted(set(dataset.train.labels.tolist()))
        with fresh_store():
            return dict(statistics.measure(config, dataset, bench.teacher, job, classes, advance))

    def own(steps: int, watch: Stopwatch) -> None:
        measure(part(bench.dataset, plan[:steps]), watch)

    def model_flops() -> float:
        shape = (size, config.data.channels, config.data.resolution, config.data.resolution)
        images = torch.zeros(shape, device=job.device)
        with torch.no_grad(), job.autocast():
            return flops(lambda: bench.teacher.network.predict(images))

    contestants: dict[str, Run] = {OWN: own}
    check: Callable[[], Checks] = dict
    if with_reference:
        probe = reference.Probe(bench.classifier)
        data = config.data
        transform = reference_statistics.transform_of(
            data.resolution, data.crop_ratio, data.channels, data.mean, data.std
        )

        def plainly_measure(dataset: Dataset, advance: Callable[[int], None]) -> list[reference_statistics.ClassSums]:
            found = []
            for index in sorted(set(dataset.train.labels.tolist())):
                names = [dataset.train.names[image] for image in dataset.train.of_class(index)]
                files = reference_statistics.Files(dataset.train.source.read, names, transform)
                workers = config.compute.workers
                found.append(reference_statistics.class_statistics(probe, files, size, workers, job.device, advance))
            return found

        def plainly(steps: int, watch: Stopwatch) -> None:
            plainly_measure(part(bench.dataset, plan[:steps]), watch)

        def check() -> Checks:
            first = part(bench.dataset, plan[:1])
            (own,) = measure(first, lambda images: None).values()
            (other,) = plainly_measure(first, lambda batches: None)
            moments = torch.cat([own.mean, own.within + own.between])
            features = difference(own.features, other.features)
            return {
                OWN: {
                    "feature_difference": features,
                    "moment_difference": difference(moments, torch.cat([*other.means, *other.variances])),
                }
            }

        contestants["reference"] = plainly
    return Workload(
        stage="statistics",
        unit="img/s",
        contestants=contestants,
        work=lambda steps: sum(len(batch) for batch in plan[:steps]),
        most=len(plan),
        warm=0,
        device=job.device,
        check=check,
        setup={"batch": size, "workers": config.compute.workers},
        network=config.teacher.network,
        step_flops=model_flops,
    )


def part(dataset: Dataset, batches: list[list[int]]) -> Dataset:
    """Return the data set with the training images of these batches alone, which lie at its beginning."""
    count = sum(len(batch) for batch in batches)
    train = replace(dataset.train, names=dataset.train.names[:count], labels=dataset.train.labels[:count])
    return replace(dataset, train=train)


def students_of(bench: Bench, with_reference: bool) -> Workload:
    """Updates of a student on a set of the run's size; a student's validation is not among them.

    The images are noise, which takes as long as any.
    """
    config, job = bench.config, bench.ranks
    name = config.student.networks[0]
    regime = "hard" if set(config.labels.regimes) == {"hard"} else "soft"
    data, classes = config.data, len(bench.dataset.classes)
    source = torch.Generator().manual_seed(seed_of("bench", "students"))
    shape = (classes * config.ipc, data.channels, data.resolution, data.resolution)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    owners = torch.arange(classes).repeat_interleave(config.ipc)
    even = torch.full((len(images),), 1 / config.ipc)
    distilled = DistilledSet(images, owners, even, bench.dataset.classes, data, "noise")
    task = student.Task(name, regime, 0, "updates")

    def engine(updates: int, judge: Callable[..., dict[str, float]], advance: Callable[[int], None]) -> None:
        settings = config.student.model_copy(update={"updates": updates})
        limited = config.model_copy(update={"student": settings})
        with TemporaryDirectory() as folder:
            student.train(limited, task, distilled, bench.teacher, judge, job, ALONE, Path(folder), advance)  # type: ignore[arg-type]  # any judge will do

    def own(steps: int, watch: Stopwatch) -> None:
        engine(steps, lambda predict, team: {}, watch)

    def fresh() -> nn.Module:
        torch.manual_seed(seed_of("student", task.seed))
        return networks.create(name, classes, data.channels, data.resolution).to(job.device)

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
        workers = config.compute.workers
        reference_student.train(network, bench.classifier, pictures, recipe, workers, job.device, steps, watch)

    def check() -> Checks:
        return {OWN: {"student_difference": student_difference(bench, engine, fresh, distilled, recipe)}}

    updates = student.update_count(config, config.student.views[0], len(images))
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
    bench: Bench,
    engine: Callable[..., None],
    fresh: Callable[[], nn.Module],
    distilled: DistilledSet,
    recipe: reference_student.Recipe,
) -> float:
    """Return how far the engine's student is from the plain one after the same batches, by what both say of images.

    ‖logits − plain logits‖ / ‖plain logits − logits of an untrained student‖: the share of what was learned that
    differs.  The batches are the engine's, because random crops of two programs are never the same ones.
    """
    config, device = bench.config, bench.ranks.device
    images = distilled.images.to(device)
    # Two updates if they lie in the first epoch: in the second one the learning rate is another.
    plan = labels.batches(0, 0, len(images), images.shape[-1], config.student.batch_size, config.labels)[:2]
    shown = labels.view(images, plan[0], config)
    seen: list[Tensor] = []

    def judge(predict: Callable[[Tensor], Tensor], team: Team | None = None) -> dict[str, float]:
        with torch.no_grad():
            seen.append(predict(shown).float())
        return {}

    engine(len(plan), judge, lambda updates: None)
    network = fresh().to(memory_format=torch.contiguous_format)
    network.eval()
    judge(network)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    for batch in plan:
        classes = distilled.labels[batch.images].to(device)
        views = labels.view(images, batch, config)
        others = classes[batch.partners.to(device)]
        reference_student.update(network, bench.classifier, optimizer, recipe, views, classes, others, batch.share)
    network.eval()
    judge(network)
    own, untrained, plain = seen
    return float((own - plain).norm() / (plain - untrained).norm())


def barycenters_of(bench: Bench, with_reference: bool) -> Workload:
    """Classes whose atoms are found, one after the other in one process, beside POT's solver from one start."""
    config = bench.config
    features = [found.features for found in bench.measured.values()]
    names = [bench.dataset.classes[index] for index in bench.measured]
    found: dict[str, dict[int, float]] = {OWN: {}, "pot": {}}
    cpu = torch.device("cpu")

    def own(steps: int, watch: Stopwatch) -> None:
        for step in range(steps):
            row = step % len(features)
            seed = seed_of(config.seed, "barycenter", names[row])
            found[OWN][row] = barycenter.barycenter(features[row], config.ipc, config.barycenter, seed).w2
            watch()

    def pot(steps: int, watch: Stopwatch) -> None:
        for step in range(steps):
            row = step % len(features)
            found["pot"][row] = reference.pot_barycenter(features[row], config.ipc, seed=row)
            watch()

    def check() -> Checks:
        for run in contestants.values():
            run(len(features), Stopwatch(cpu))
        return {name: {"w2": sum(found[name].values()) / len(features)} for name in contestants}

    contestants: dict[str, Run] = {OWN: own}
    if with_reference:
        contestants["pot"] = pot
    return Workload(
        stage="barycenters",
        unit="classes/s",
        contestants=contestants,
        work=float,
        most=10**9,
        warm=0,
        device=cpu,
        check=check,
        setup={
            "ipc": config.ipc,
            "images": round(sum(map(len, features)) / len(features)),
            "dimension": features[0].shape[1],
            "weights": config.barycenter.weights,
            "starts": config.barycenter.starts,
            "rounds": config.barycenter.rounds,
            "teacher": "trained" if bench.trained else "untrained",
        },
        network=config.teacher.network,
    )


STAGES: dict[str, Callable[[Bench, bool], Workload]] = {
    "synthesis": synthesis_of,
    "statistics": statistics_of,
    "students": students_of,
    "barycenters": barycenters_of,
}
"""Stage -> what is timed; called with the bench and whether to time the reference as well."""
