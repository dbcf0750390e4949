"""Networks by name, and what the frozen one reports."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from wmdd.errors import InputError
from wmdd.networks import create, weights
from wmdd.networks.frozen import FrozenNetwork


def slow(*values: object) -> Any:
    """Return the values of a network that takes a second to create."""
    return pytest.param(*values, marks=pytest.mark.slow)


def test_reported_moments_are_those_of_the_batchnorm_inputs(classifier: nn.Module) -> None:
    images = torch.randn(4, 3, 16, 16)
    seen = FrozenNetwork(classifier)(images)
    inputs: list[torch.Tensor] = []
    for layer in classifier.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0]))
    logits = classifier.eval()(images)
    torch.testing.assert_close(seen.logits, logits)
    torch.testing.assert_close(seen.means, torch.cat([x.mean((2, 3)) for x in inputs], 1))
    torch.testing.assert_close(seen.variances, torch.cat([x.var((2, 3), correction=0) for x in inputs], 1))


def observed(network: FrozenNetwork, images: torch.Tensor, weights: tuple[float, float]) -> torch.Tensor:
    """Return a number that depends on features and moments, for gradients."""
    seen = network(images)
    return weights[0] * seen.features.square().sum() + weights[1] * (seen.means * seen.variances).square().sum()


def test_a_loss_without_moments_or_without_features_has_a_gradient(classifier: nn.Module) -> None:
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    seen = FrozenNetwork(classifier)(images)
    (alone,) = torch.autograd.grad(seen.features.sum(), images, retain_graph=True)
    (plain,) = torch.autograd.grad(FrozenNetwork(classifier).predict(images).sum(), images)
    assert alone.abs().sum() > 0 and plain.abs().sum() > 0
    last = seen.means[:, -1].sum()
    assert torch.autograd.grad(last, images)[0].abs().sum() > 0


def test_moments_in_bf16_are_those_of_the_rounded_inputs_in_float64() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).eval()
    network = FrozenNetwork(nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))
    # Means of 0, 5 and 50 standard deviations, and a constant channel below.
    images = torch.randn(4, 3, 24, 24) + torch.tensor([0.0, 5.0, 50.0])[:, None, None]
    images[1, 0] = 3.0
    for layout in (torch.contiguous_format, torch.channels_last):
        rounded = images.bfloat16().contiguous(memory_format=layout)
        exact = rounded.double()
        with torch.autocast("cpu", torch.bfloat16):
            seen = network(rounded)
        assert seen.means.dtype == seen.variances.dtype == torch.float32
        torch.testing.assert_close(seen.means.double(), exact.mean((2, 3)), rtol=1e-5, atol=1e-6)
        # The error grows with mean²/variance. At 50 standard deviations the rounding of the inputs alone costs 0.5 %.
        rtol = torch.tensor([1e-5, 1e-4, 1e-2], dtype=torch.float64)
        wanted = exact.var((2, 3), correction=0)
        assert ((seen.variances.double() - wanted).abs() <= rtol * wanted + 1e-5).all()


def test_weights_that_are_rounded_once_give_the_same_bytes_under_autocast(classifier: nn.Module) -> None:
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    plain, rounded = FrozenNetwork(classifier), FrozenNetwork(classifier).round_once()
    for precise in (False, True):
        results = []
        for network in (plain, rounded):
            pixels = images.clone().requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
                results.append(torch.autograd.grad(observed(network, pixels, (1.0, 1.0)), pixels)[0])
        assert torch.equal(*results)
    assert rounded.state_dict().keys() == FrozenNetwork(classifier).round_once().state_dict().keys()


def test_a_teacher_without_running_statistics_is_refused() -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="without running statistics"):
        FrozenNetwork(nn.Sequential(*layers))


def test_a_subset_of_outputs_is_the_map_from_classes_to_logits(classifier: nn.Module) -> None:
    images = torch.randn(2, 3, 16, 16)
    whole, part = FrozenNetwork(classifier), FrozenNetwork(classifier, [3, 0])
    torch.testing.assert_close(part.predict(images), whole.predict(images)[:, [3, 0]])
    assert (part.classes, part.feature_size) == (2, whole.feature_size)


def test_it_stays_frozen(classifier: nn.Module) -> None:
    frozen = FrozenNetwork(classifier)
    frozen.train()
    assert not frozen.training and not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet", slow("vgg11_bn")])
def test_torchvision_classifiers_with_batchnorm_serve_as_teachers(name: str) -> None:
    frozen = FrozenNetwork(create.create(name, 4, 3, 64))
    with torch.inference_mode():
        seen = frozen(torch.randn(2, 3, 64, 64))
    assert seen.logits.shape == (2, 4) and seen.features.shape == (2, frozen.feature_size)
    assert seen.means.shape == (2, sum(frozen.layer_sizes))


@pytest.mark.parametrize(("stem", "side"), [("standard", 16), ("small", 64), ("stride2", 32), ("auto", 32)])
def test_stem_of_a_resnet_decides_the_resolution_of_its_first_stage(stem: str, side: int) -> None:
    network = create.create("resnet18", 10, 1, 64, stem)
    sides: list[int] = []
    network.layer1.register_forward_hook(lambda module, arguments, output: sides.append(arguments[0].shape[-1]))
    network.eval()(torch.randn(1, 1, 64, 64))
    assert sides == [side]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "did you mean 'resnet18'"),
        ("convnet5", "5 pooling layers do not fit images of 16 px"),
        ("timm:nothing", "timm"),
    ],
)
def test_wrong_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        create.create(name, 10, 3, 16)


@pytest.mark.slow
def test_a_teacher_without_batchnorm_is_refused() -> None:
    with pytest.raises(InputError, match="no BatchNorm2d"):
        FrozenNetwork(create.create("alexnet", 4, 3, 64))


@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), slow("inception_v3", 75)])
def test_networks_with_auxiliary_heads_train_like_the_others(
    name: str, side: int, recwarn: pytest.WarningsRecorder
) -> None:
    network = create.create(name, 3, 1, side).train()
    logits = network(torch.randn(2, 1, side, side))
    functional.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
    assert logits.shape == (2, 3) and all(weight.grad is not None for weight in network.parameters())
    assert not [warning for warning in recwarn if "initialization" in str(warning.message)]


@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), slow("inception_v3", 75)])
def test_weights_with_auxiliary_heads_fit_without_them(name: str, side: int, tmp_path: Path) -> None:
    published = torchvision.models.get_model(name, weights=None, num_classes=3, aux_logits=True, init_weights=False)
    network = create.create(name, 3, 3, side)
    weights.fit(network, published.state_dict(), tmp_path)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), published.eval()(images))
    broken = {key: value for key, value in published.state_dict().items() if not key.startswith("fc")}
    with pytest.raises(InputError, match=r"missing fc\.bias, fc\.weight"):
        weights.fit(network, broken, tmp_path)
