"""Methods: selections equal plain loops, published settings are the published ones, plug-ins join from outside."""

import re
from pathlib import Path

import pytest
import torch
from conftest import blocks_of
from PIL import Image
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from wmdd import pipeline
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.config.schema import Config, RdedConfig
from wmdd.data.dataset import load_dataset
from wmdd.data.pixels import quantize
from wmdd.distill import statistics
from wmdd.distill.barycenter.solve import barycenter, w2_squared
from wmdd.distill.groups import prepare
from wmdd.distill.methods import rded, registry
from wmdd.distill.methods.base import ClassData
from wmdd.distill.methods.selection import Herding, KCenter, Medoids
from wmdd.distill.synthesis.objective import Objective
from wmdd.errors import InputError
from wmdd.networks import create
from wmdd.networks.frozen import FrozenNetwork, Observation
from wmdd.records.files import read_records
from wmdd.runs import class_partition
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime.ranks import ranks
from wmdd.session import open_session


def features_of_a_class(seed: int, images: int = 60, size: int = 6) -> Tensor:
    """Return clustered features with a few doubles, as a class has them."""
    source = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(4, size, generator=source)
    found = centres[torch.randint(0, 4, (images,), generator=source)] + torch.randn(images, size, generator=source)
    found[images // 2] = found[3]
    return found


def herded(features: Tensor, count: int) -> list[int]:
    """Return the choice of herding by trying every image in every step."""
    centre = features.double().mean(0)
    chosen: list[int] = []
    for _ in range(count):
        gaps = {}
        for image in range(len(features)):
            if image not in chosen:
                gaps[image] = float((features[[*chosen, image]].double().mean(0) - centre).norm())
        least = min(gaps.values())
        chosen.append(min(image for image, gap in gaps.items() if gap <= least + 1e-12))
    return chosen


def spread(features: Tensor, count: int) -> list[int]:
    """Return the choice of greedy k-center by trying every image in every step."""
    points = features.double()
    chosen = [min(range(len(points)), key=lambda image: float((points[image] - points.mean(0)).norm()))]
    while len(chosen) < count:
        gaps = {
            image: min(float((points[image] - points[other]).norm()) for other in chosen)
            for image in range(len(points))
            if image not in chosen
        }
        chosen.append(max(gaps, key=lambda image: (gaps[image], -image)))
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_herding_and_k_center_equal_the_plain_loop(seed: int) -> None:
    features = features_of_a_class(seed, images=24)
    assert Herding.choose(features, 24) == herded(features, 24)
    assert KCenter.choose(features, 24) == spread(features, 24)


def test_equal_images_are_taken_by_position_and_never_twice() -> None:
    same = torch.ones(5, 3)
    assert Herding.choose(same, 5) == KCenter.choose(same, 5) == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def chosen_config() -> Config:
    return load_config("digits", ["compute.threads=1", "data.classes=4"])


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_medoids_stand_for_a_class_better_than_other_selections(chosen_config: Config, count: int) -> None:
    config = chosen_config.model_copy(update={"ipc": count})
    for seed in range(3):
        features = features_of_a_class(seed)
        found = barycenter(features, count, Medoids(config).barycenter(), seed)
        assert len(set(found.images.tolist())) == count
        assert torch.equal(found.positions, features[found.images])
        random = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        for others in (random, KCenter.choose(features, count), Herding.choose(features, count)):
            # The best weights of any selection are the masses of its cells.
            distances = torch.cdist(features.double(), features[others].double()).square()
            assert found.w2 <= float(distances.min(1).values.mean()) + 1e-9
        assert found.w2 == pytest.approx(w2_squared(features, features[found.images], found.weights))


def test_every_method_is_listed_with_a_summary_of_its_own() -> None:
    lines = CliRunner().invoke(app, ["methods"]).output.splitlines()
    summaries = dict(line.split(maxsplit=1) for line in lines)
    assert set(summaries) >= set(registry.REGISTRY)
    assert len(set(summaries.values())) == len(summaries) and min(map(len, summaries.values())) > 30


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sre2l", "cda", "fadrm", "edc", "herding", "k-center", "medoids", "rded"])
def test_blocks_change_no_byte_of_any_method(
    tiny: Config, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_partition, "SPREAD_CLASSES", 2)  # spans of two classes, in groups of one image of each
    monkeypatch.setattr(class_partition, "GROUP_IMAGES", 2)
    synthesis = tiny.synthesis.model_copy(update={"classes_per_group": 2})
    tiny = tiny.model_copy(update={"method": method, "synthesis": synthesis})
    for name, blocks in (("one", 1), ("two", 2)):
        share = pipeline.Share(("teacher", "distill"))
        pipeline.run(tiny.model_copy(update={"blocks": blocks}), tmp_path / name, share=share)
    assert blocks_of(tmp_path / "one") == blocks_of(tmp_path / "two")
    found = DistilledSet.load(tmp_path / "one")
    train = load_dataset(tiny.data).train
    real = {image.numpy().tobytes() for image in train.decode(range(len(train)))}
    own = [image.numpy().tobytes() for image in found.images]
    assert len(set(own)) == 8
    if method in ("herding", "k-center", "medoids"):
        assert set(own) <= real
    elif method != "rded":  # whose largest crops are whole images
        assert not set(own) & real
    weights = found.weights.view(4, 2)
    assert torch.allclose(weights.sum(1), torch.ones(4)) and bool((weights == 0.5).all()) == (method != "medoids")


@pytest.mark.parametrize(
    ("ipc", "classes", "parts"),
    [(10, 200, [(j, j + 1) for j in range(10)] * 2), (10, 10, [(0, 10)]), (50, 10, [(0, 10), (10, 20), (20, 30)])],
)
def test_a_method_with_a_global_target_has_100_images_of_as_many_classes_as_there_are_in_a_group(
    ipc: int, classes: int, parts: list[tuple[int, int]]
) -> None:
    for method in ("sre2l", "cda", "ce-global", "barycenter-global"):
        config = load_config("tiny-imagenet", [f"ipc={ipc}", f"method={method}", "synthesis.classes_per_group=5"])
        groups = [group for block in class_partition.plan(config, classes) for group in block.groups]
        assert [group.images for group in groups][: len(parts)] == parts
        assert {len(group.classes) for group in groups} == {min(100, classes)}
        assert class_partition.group_images(config, classes) == 100
    by_classes = class_partition.plan(config.model_copy(update={"method": "wmdd"}), classes)
    assert {group.images for block in by_classes for group in block.groups} == {None}


def test_the_shipped_methods_with_a_global_target_are_those_whose_groups_are_spread() -> None:
    found = set()
    for name in registry.REGISTRY:
        objective = registry.create(load_config("digits", [f"method={name}"])).objective()
        if objective is not None and not objective.per_class:
            found.add(name)

    assert found == class_partition.GLOBAL_TARGETS
    assert class_partition.is_spread(load_config("digits", ["synthesis.bn_target=global"]))


def test_the_images_of_a_spread_group_are_of_many_classes_and_a_block_has_them_class_by_class(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_partition, "GROUP_IMAGES", 4)
    folder = pipeline.run(
        tiny.replace({"method": "sre2l"}), tmp_path / "run", share=pipeline.Share(("teacher", "distill"))
    )

    sidecar = RunFolder(folder).sidecar(0)
    assert sidecar is not None and sidecar["classes"] == ["0", "1", "2", "3"]
    assert [group["classes"] for group in sidecar["groups"]] == [["0", "1", "2", "3"]] * 2
    whole = DistilledSet.load(folder)
    assert whole.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # Which images share a group shows in the result: alone, every class has other images.
    alone = tiny.replace({"method": "sre2l", "synthesis.grouping": "classes"})
    other = pipeline.run(alone, tmp_path / "alone", share=pipeline.Share(("teacher", "distill")))
    assert not torch.equal(DistilledSet.load(other).images, whole.images)


def test_what_spread_groups_cannot_do_is_refused(tiny: Config) -> None:
    with pytest.raises(InputError, match=r"blocks = 2: 4 classes in spans of 100 make 1 spans"):
        class_partition.plan(tiny.replace({"method": "sre2l", "blocks": 2}), 4)
    with pytest.raises(InputError, match=r"split_class = 2: a group of sre2l has few images of each class"):
        class_partition.plan(tiny.replace({"method": "sre2l", "synthesis.split_class": 2}), 4)
    dataset = load_dataset(tiny.data)
    with pytest.raises(InputError, match=r"grouping = spread: wmdd matches the moments of each class"):
        pipeline.check(tiny.replace({"synthesis.grouping": "spread"}), dataset)
    with pytest.raises(InputError, match=r"student.baselines: sre2l groups images over many classes and wmdd does not"):
        pipeline.check(tiny.replace({"student.baselines": ("sre2l",)}), dataset)


@pytest.mark.slow
def test_all_cells_of_the_ablation_start_from_the_same_images(tiny: Config, tmp_path: Path) -> None:
    still = {"synthesis.iterations": 1, "synthesis.lr": 1e-9, "synthesis.clamp": False}
    found = {}
    for method in ("start", "wmdd", "ce-pcbn", "barycenter-global", "ce-global"):
        config = tiny.replace({**still, "method": method, "synthesis.start": "real"})
        share = pipeline.Share(("teacher", "distill"))
        found[method] = DistilledSet.load(pipeline.run(config, tmp_path / method, share=share)).images
    assert all(torch.equal(images, found["start"]) for images in found.values())


def test_noise_is_the_start_of_a_method_that_begins_from_noise(tiny: Config, tmp_path: Path) -> None:
    share = pipeline.Share(("teacher", "distill"))
    noise = DistilledSet.load(pipeline.run(tiny.replace({"method": "noise"}), tmp_path / "noise", share=share))
    still = {"synthesis.iterations": 1, "synthesis.lr": 1e-9, "method": "sre2l"}
    start = DistilledSet.load(pipeline.run(tiny.replace(still), tmp_path / "sre2l", share=share))

    assert torch.equal(noise.images, start.images)
    assert noise.seeded


def test_the_published_constants_of_sre2l_and_rded_are_keys() -> None:
    keys = ["sre2l.bn_weight=3", "sre2l.jitter=1", "sre2l.crop_curriculum=0.5", "sre2l.crop_scale=[0.5,1]"]
    own = registry.create(load_config("digits", ["method=cda", *keys])).synthesis()

    assert (own.bn_weight, own.jitter, own.crop_curriculum, own.crop_scale) == (3.0, 1, 0.5, (0.5, 1.0))


@pytest.mark.slow
def test_students_learn_from_a_selection_as_from_any_method(tiny: Config, tmp_path: Path) -> None:
    student = tiny.student.model_copy(update={"baselines": ("random", "medoids"), "seeds": 1})
    config = tiny.model_copy(update={"method": "k-center", "student": student})
    folder = pipeline.run(config, tmp_path / "run", share=pipeline.Share(("teacher", "distill", "students")))
    records = [
        record for place in (folder, *folder.glob("baselines/*")) for record in read_records(place / "records")[0]
    ]
    assert sorted(record.method for record in records) == ["k-center"] * 2 + ["medoids"] * 2 + ["random"] * 2
    assert len({record.artefact for record in records}) == 3


@pytest.mark.parametrize(
    ("method", "source", "weight", "curriculum"),
    [
        ("sre2l", "imagenet-1k", 0.01, 0.0),
        ("sre2l", "tiny-imagenet", 1.0, 0.0),
        ("cda", "imagenet-1k", 0.01, 1.0),
        ("cda", "tiny-imagenet", 0.05, 1.0),
    ],
)
def test_sre2l_and_cda_have_their_published_settings(
    method: str, source: str, weight: float, curriculum: float
) -> None:
    config = load_config(source, ["synthesis.iterations=77", "synthesis.lr=0.5", "synthesis.flip=false"])
    made = registry.create(config, method)
    settings = made.synthesis()
    assert made.objective() == Objective(0.0, weight, 1.0, per_class=False, squared=False, bn_first=10.0)
    assert (settings.start, settings.crop_scale, settings.crop_curriculum) == ("noise", (0.08, 1.0), curriculum)
    assert settings.jitter == {"imagenet-1k": 32, "tiny-imagenet": 9}[source]
    assert (settings.iterations, settings.lr, settings.flip) == (77, 0.5, False)
    assert not made.uses_statistics


def test_the_descendants_of_sre2l_differ_from_it_as_published() -> None:
    config = load_config("tiny-imagenet", ["synthesis.iterations=77"])
    made = {name: registry.create(config, name) for name in ("sre2l", "sre2l++", "fadrm", "edc")}
    settings = {name: one.synthesis().model_dump() for name, one in made.items()}
    unlike = {
        name: {key: value for key, value in own.items() if value != settings["sre2l"][key]}
        for name, own in settings.items()
    }
    assert unlike["sre2l++"] == {"start": "patch"}
    assert unlike["fadrm"] == {"start": "patch", "injections": 3}
    assert unlike["edc"] == {"start": "patch", "bn_class_share": 0.5}
    assert len({one.objective() for one in made.values()}) == 1
    assert made["edc"].uses_statistics and not made["fadrm"].uses_statistics


def test_edc_blends_the_running_moments_with_those_of_the_classes(tiny: Config) -> None:
    config = tiny.replace({"method": "edc", "sre2l.class_share": 0.25})
    dataset = load_dataset(config.data)
    with ranks(config.compute, lambda: False) as job:
        session = open_session(config, dataset, job, lambda: False)
        classes = tuple(range(len(dataset.classes)))
        found = dict(statistics.measure(session, classes))
        group = class_partition.Group(0, classes, (0, 1))
        problem = prepare(session, registry.create(config), group, found).problem
        assert problem is not None
        target, running = problem.target, session.teacher.network.running_moments()
    shown = {"mean": [found[index].mean for index in classes], "within": [found[index].within for index in classes]}
    for got, before, own in ((target.mean, running[0], shown["mean"]), (target.variance, running[1], shown["within"])):
        expected = 0.75 * before.double() + 0.25 * sum(one.double() for one in own) / len(own)
        assert got.shape == (1, len(before)) and torch.allclose(got[0].double(), expected, rtol=1e-5, atol=1e-6)


def class_of_shades(folder: Path, resolution: int, shades: int, ipc: int) -> ClassData:
    """Return a class whose images are of one shade each, so that a tile tells the image that it was cut from."""
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (folder / place).mkdir(parents=True)
        for position in range(shades):
            Image.new("L", (resolution, resolution), 100 + position).save(folder / place / f"{position:03d}.png")
    size = f"data.resolution={resolution}"
    given = ["data.source=folder", f"data.root={folder}", "data.classes=None", size, f"ipc={ipc}", "method=rded"]
    config = load_config("digits", given)
    torch.manual_seed(0)
    network = FrozenNetwork(create.create("convnet3x8", 2, 1, resolution))

    def observe(images: Tensor) -> Observation:
        with torch.inference_mode():
            seen: Observation = network(images)
        return seen

    return ClassData(1, "b", config, load_dataset(config.data), None, observe)


@pytest.mark.parametrize("shades", [12, 30, 5])
def test_four_tiles_of_rded_come_from_four_real_images(tmp_path: Path, shades: int) -> None:
    """From twelve distinct ones where the class has so many; from a class of five, two or three tiles each."""
    data = class_of_shades(tmp_path, 128, shades, 3)
    images = quantize(registry.create(data.config).prepare(data).images, data.config.data)
    assert images.shape == (3, 1, 128, 128)
    tiles = [images[:, :, row : row + 64, left : left + 64] for row in (0, 64) for left in (0, 64)]
    shown = [tile.unique().tolist() for tile in torch.cat(tiles)]
    assert all(len(values) == 1 for values in shown)
    taken = [values[0] - 100 for values in shown]
    assert set(taken) <= set(range(shades)) and len(set(taken)) == min(12, shades)
    assert max(map(taken.count, taken)) <= -(-12 // shades)


@pytest.mark.parametrize("resolution", [16, 129])
def test_rded_keeps_one_crop_an_image_where_two_do_not_fit(tmp_path: Path, resolution: int) -> None:
    data = class_of_shades(tmp_path, resolution, 6, 4)
    images = quantize(registry.create(data.config).prepare(data).images, data.config.data)
    assert images.shape == (4, 1, resolution, resolution)
    assert len({tuple(image.unique().tolist()) for image in images}) == 4
    assert all(len(image.unique()) == 1 for image in images)


def test_rded_takes_the_best_crop_of_the_images_with_the_least_cross_entropy(chosen_config: Config) -> None:
    torch.manual_seed(0)
    network = FrozenNetwork(create.create("convnet3x8", 4, 1, 16))
    scores = []

    def observe(images: Tensor) -> Observation:
        with torch.inference_mode():
            seen: Observation = network(images)
        scores.append(functional.cross_entropy(seen.logits, torch.full((len(images),), 2), reduction="none"))
        return seen

    config = chosen_config.model_copy(update={"ipc": 6, "method": "rded"})
    data = ClassData(2, "2", config, load_dataset(config.data), None, observe)
    images = registry.create(config).prepare(data).images
    assert len(scores) == RdedConfig().crops and {len(seen) for seen in scores} == {data.count}
    best_of_each = torch.stack(scores).min(0).values
    observe(images)
    torch.testing.assert_close(scores[-1], best_of_each.sort().values[:6])


def test_crops_are_ranked_image_by_image() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.5]])
    # Best of each: image 1 (0.1), image 0 (0.2, its second crop), image 2 (0.5); then the others, 0.3, 0.5 and 0.9.
    assert rded.rank(scores).tolist() == [1, 3, 2, 4, 5, 0]


def test_the_methods_of_the_guide_run_as_plug_ins(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples of docs/guides/own-method.md, word for word, as an installed package that wmdd knows nothing of."""
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "own-method.md").read_text()
    package = tmp_path / "site" / "my_package"
    package.mkdir(parents=True)
    for name, code in re.findall(r"```python\n# my_package/(\w+\.py)\n(.*?)```", guide, flags=re.DOTALL):
        (package / name).write_text(code)
    (declared,) = re.findall(r'```toml\n\[project.entry-points."wmdd.methods"\]\n(.*?)```', guide, flags=re.DOTALL)
    info = tmp_path / "site" / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[wmdd.methods]\n" + declared.replace('"', ""))
    own = [line.partition(" =")[0] for line in declared.splitlines()]
    assert len(own) == len(list(package.iterdir())) >= 2 and not set(own) & set(registry.names())

    monkeypatch.syspath_prepend(tmp_path / "site")
    listed = CliRunner().invoke(app, ["methods"]).output
    made: dict[str, DistilledSet] = {}
    for name in own:
        assert name in listed
        config = tiny.model_copy(update={"method": name})
        pipeline.run(config, tmp_path / name, share=pipeline.Share(("teacher", "distill")))
        made[name] = DistilledSet.load(tmp_path / name)
    train = load_dataset(tiny.data).train
    first = torch.cat([train.decode(list(train.of_class(index))[:2]) for index in range(4)])
    assert torch.equal(made["first"].images, first)
    assert len({found.sha256 for found in made.values()}) == len(own)
