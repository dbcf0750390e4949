"""The workload of each stage: the engine through its public functions, and the same work by a plain reference."""

from collections.abc import Callable
from dataclasses import replace

import torch

from bench import reference, reference_statistics
from bench.stage_students import students_of
from bench.stage_synthesis import synthesis_of
from bench.timing import Run, Stopwatch, flops, fresh_store
from bench.workloads import OWN, BenchSession, Checks, Workload, difference
from wmdd.data.dataset import Dataset
from wmdd.distill import groups, statistics
from wmdd.distill.barycenter import solve
from wmdd.errors import InputError
from wmdd.runtime.cpus import processes


def statistics_of(bench: BenchSession, with_reference: bool) -> Workload:
    """Return the workload of class statistics, in batches of real images. Every repeat decodes its images again."""
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
            return dict(statistics.measure(replace(bench, dataset=dataset), classes, advance))

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
        if config.statistics.augment:
            raise InputError("statistics.augment: the plain reference uses whole images; use --no-reference")
        probe = reference.Probe(bench.classifier)
        data = config.data
        transform = reference_statistics.transform_of(
            data.resolution, data.crop_ratio, data.channels, data.mean, data.std
        )

        def plainly_measure(dataset: Dataset, advance: Callable[[int], None]) -> list[reference_statistics.ClassSums]:
            found = []
            for index in sorted(set(dataset.train.labels.tolist())):
                files = reference_statistics.Files(dataset.train.read, dataset.train.of_class(index), transform)
                workers = processes(config.compute.workers)
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
        setup={"batch": size, "workers": processes(config.compute.workers)},
        network=config.teacher.network,
        step_flops=model_flops,
        step_work=float(size),
    )


def part(dataset: Dataset, batches: list[list[int]]) -> Dataset:
    """Return the dataset with the training images of these batches alone. They are its first images."""
    count = sum(len(batch) for batch in batches)
    return replace(dataset, train=dataset.train.first(count))


def barycenters_of(bench: BenchSession, with_reference: bool) -> Workload:
    """Return the workload of barycenters, class by class in one process. The baseline is POT's solver."""
    config = bench.config
    features = [found.features for found in bench.measured.values()]
    names = [bench.dataset.classes[index] for index in bench.measured]
    found: dict[str, dict[int, float]] = {OWN: {}, "pot": {}}
    cpu = torch.device("cpu")

    def own(steps: int, watch: Stopwatch) -> None:
        for step in range(steps):
            row = step % len(features)
            seed = groups.barycenter_seed(config, names[row])
            found[OWN][row] = solve.barycenter(features[row], config.ipc, config.barycenter, seed).w2
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


STAGES: dict[str, Callable[[BenchSession, bool], Workload]] = {
    "synthesis": synthesis_of,
    "statistics": statistics_of,
    "students": students_of,
    "barycenters": barycenters_of,
}
"""Stage -> function that returns its workload. The second argument says whether to time the reference too."""
