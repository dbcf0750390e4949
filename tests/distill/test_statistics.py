"""Class statistics are exact whatever the batches, and their parts mean what they say."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bench.reference import Probe, class_moments
from wmdd.config.schema import Config
from wmdd.data.dataset import load_dataset
from wmdd.distill.statistics import ClassStatistics, Moments, copied_at_once, key, measure, summarize
from wmdd.errors import Interrupted
from wmdd.networks import create
from wmdd.networks.accuracy import Validation
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runtime.arithmetic import Hardware, resolve
from wmdd.runtime.ranks import ranks
from wmdd.session import Session
from wmdd.storage import cache
from wmdd.teacher.obtain import Teacher


def measured(network: FrozenNetwork, images: Tensor, size: int, between: str = "exact") -> ClassStatistics:
    seen = [network(batch) for batch in images.split(size)]
    return summarize([one.features for one in seen], [(one.means, one.variances) for one in seen], between)


@pytest.fixture
def images() -> Tensor:
    """Return images whose brightness and contrast differ, so that variance between images matters."""
    torch.manual_seed(1)
    return torch.randn(23, 3, 16, 16) * torch.rand(23, 1, 1, 1) + torch.randn(23, 3, 1, 1)


@pytest.mark.parametrize("size", [1, 7, 23])
def test_moments_equal_a_direct_pass_in_float64(classifier: nn.Module, images: Tensor, size: int) -> None:
    means, variances = class_moments(Probe(classifier.double()), images.double())
    found = measured(FrozenNetwork(classifier.float()), images[torch.randperm(23)], size)
    torch.testing.assert_close(found.mean.double(), torch.cat(means), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((found.within + found.between).double(), torch.cat(variances), rtol=1e-5, atol=1e-6)


def test_within_and_between_are_apart(classifier: nn.Module, images: Tensor) -> None:
    same = measured(FrozenNetwork(classifier), images[:1].expand(8, -1, -1, -1).contiguous(), 3)
    assert same.between.max() < 1e-9
    found = measured(FrozenNetwork(classifier), images, 5)
    assert (found.between / (found.within + found.between)).max() > 0.1


def test_one_image_is_not_asked_for_variance_between_images(classifier: nn.Module, images: Tensor) -> None:
    found = measured(FrozenNetwork(classifier), images, 23)
    one, four = torch.ones(1), torch.full((4,), 0.25)
    torch.testing.assert_close(found.variance(one, matched=True), found.within)
    torch.testing.assert_close(found.variance(four, matched=True), found.within + 0.75 * found.between)
    torch.testing.assert_close(found.variance(one, matched=False), found.within + found.between)
    # What K images have on average: over many draws the biased variance tends to the matched target.
    network = FrozenNetwork(classifier)
    with torch.inference_mode():
        seen = network(images)
    draws = torch.randint(0, 23, (20000, 4))
    average = seen.means[draws].var(1, correction=0).mean(0) + seen.variances[draws].mean((0, 1))
    torch.testing.assert_close(average, found.variance(four, matched=True), rtol=0.03, atol=1e-4)


def test_batchwise_variance_is_the_mean_of_the_batches_variances(classifier: nn.Module, images: Tensor) -> None:
    network = FrozenNetwork(classifier)
    found = measured(network, images[:20], 5, "batchwise")
    batches = [class_moments(Probe(classifier), batch)[1] for batch in images[:20].split(5)]
    expected = torch.stack([torch.cat(variances) for variances in batches]).mean(0)
    torch.testing.assert_close(found.within + found.between, expected, rtol=1e-4, atol=1e-6)


def test_merging_is_exact_in_any_cut() -> None:
    values = torch.randn(50, 3, dtype=torch.float64) + 1e4
    whole = Moments.from_rows(values)
    for cut in (1, 13, 49):
        merged = Moments.from_rows(values[:cut]).merge(Moments.from_rows(values[cut:]))
        torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-9, atol=0)
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)


def test_what_is_stored_is_measured_once_and_a_damaged_file_anew(tiny: Config) -> None:
    dataset = load_dataset(tiny.data)
    network = FrozenNetwork(create.create("convnet2x8", 4, tiny.data.channels, 8))
    teacher = Teacher(network, "of this test", {})

    def measured() -> tuple[dict[int, ClassStatistics], list[int]]:
        """Return the statistics, and the sizes of the batches that the teacher was shown for them."""
        shown: list[int] = []
        hook = network.register_forward_pre_hook(lambda module, images: shown.append(len(images[0])))
        with ranks(tiny.compute) as job:
            session = Session(tiny, dataset, Validation(tiny, dataset, job), teacher, job, lambda: False)
            found = dict(measure(session, [0, 1, 2]))
        hook.remove()
        return found, shown

    first, shown = measured()
    assert sum(shown) == sum(len(dataset.train.of_class(index)) for index in range(3))
    arithmetic = resolve(tiny.compute, Hardware("cpu", bf16=False))
    file = cache.folder("statistics", key(tiny, dataset, teacher.sha256, arithmetic)) / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    second, shown = measured()
    assert sum(shown) == len(dataset.train.of_class(1))
    for index, one in first.items():
        torch.testing.assert_close(second[index].features, one.features, atol=0, rtol=0)
        torch.testing.assert_close(second[index].between, one.between, atol=0, rtol=0)
    assert measured()[1] == []


def test_a_stop_is_heeded_between_batches_and_finished_classes_are_kept(tiny: Config) -> None:
    config = tiny.model_copy(update={"statistics": tiny.statistics.model_copy(update={"batch_size": 50})})
    dataset, network = load_dataset(config.data), FrozenNetwork(create.create("convnet2x8", 4, 1, 8))
    teacher, shown = Teacher(network, "of a stopped test", {}), 0

    def advance(images: int) -> None:
        nonlocal shown
        shown += images

    with ranks(config.compute) as job:
        session = Session(config, dataset, Validation(config, dataset, job), teacher, job, lambda: shown > 200)
        stream = measure(session, [0, 1, 2], advance)
        with pytest.raises(Interrupted, match="stopped while class statistics were measured"):
            dict(stream)
        assert 200 < shown <= 250
        folder = cache.folder("statistics", key(config, dataset, teacher.sha256, job.arithmetic))
        assert [file.name for file in folder.iterdir()] == ["00000.safetensors"]
        before = (folder / "00000.safetensors").read_bytes()
        assert len(dict(measure(replace(session, stop=lambda: False), [0, 1, 2]))) == 3
        assert (folder / "00000.safetensors").read_bytes() == before


def test_one_copy_moves_all_statistics_of_a_class() -> None:
    draw = torch.Generator().manual_seed(0)
    found = ClassStatistics(*(torch.rand(shape, generator=draw) for shape in ((7, 3), (5,), (5,), (5,))))
    copies = 0
    to_cpu = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal copies
        copies += 1
        return to_cpu(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", counted)
        moved = copied_at_once(found)
    assert copies == 1
    for name in ("features", "mean", "within", "between"):
        assert torch.equal(getattr(moved, name), getattr(found, name))
