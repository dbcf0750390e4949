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
from wmdd.networks import frozen as frozen_module
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


def test_gradient_through_the_moments_equals_autograds(classifier: nn.Module) -> None:
    values = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frozen_module._ImageMoments.apply, values)
    half = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    means, variances = frozen_module._ImageMoments.apply(half)
    assert means.dtype == variances.dtype == torch.float32
    (gradient,) = torch.autograd.grad(means.sum() + variances.sum(), half)
    assert gradient.dtype == torch.bfloat16


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
