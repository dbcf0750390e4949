"""Teachers and students by name, and the frozen network that reports the moments of its BatchNorm inputs."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wmdd.errors import InputError, nearest

AUXILIARY = ("aux1", "aux2", "AuxLogits")
"""Heads of GoogLeNet and Inception that only their own training recipe uses; no network here has them."""

_CONVNET = re.compile(r"convnet(\d+)(?:x(\d+))?")


class ConvNet(nn.Sequential):
    """The ConvNet-BN of the distillation papers: blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 average pooling.

    Args:
        classes: outputs.
        channels: of the images.
        resolution: of the images, in pixels; at least 2**depth.
        depth: number of blocks.
        width: channels of every block.
    """

    def __init__(self, classes: int, channels: int, resolution: int, depth: int = 3, width: int = 128) -> None:
        blocks: list[nn.Module] = []
        for index in range(depth):
            convolution = nn.Conv2d(width if index else channels, width, 3, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)]
        side = resolution >> depth
        super().__init__(*blocks, nn.Flatten(), nn.Linear(width * side * side, classes))


def create(name: str, classes: int, channels: int, resolution: int, stem: str = "auto") -> nn.Module:
    """Return an untrained network in channels-last layout, initialised from torch's global generator.

    Args:
        name: ``convnetD``, ``convnetDxW``, a torchvision classifier (``resnet18``) or, with the extra, ``timm:NAME``.
        classes: outputs.
        channels: of the images.
        resolution: of the images, in pixels.
        stem: first layers of a ResNet, as in ``teacher.stem``.

    Raises:
        InputError: no such network, or it cannot take images that small.
    """
    # Channels-last halves the time of small networks on a CPU and feeds the tensor cores of a GPU.
    return _create(name, classes, channels, resolution, stem).to(memory_format=torch.channels_last)


def _create(name: str, classes: int, channels: int, resolution: int, stem: str) -> nn.Module:
    if match := _CONVNET.fullmatch(name):
        depth, width = int(match[1]), int(match[2] or 128)
        if not depth or not width or resolution >> depth < 1:
            raise InputError(f"network {name!r}: {depth} poolings do not fit images of {resolution} px")
        return ConvNet(classes, channels, resolution, depth, width)
    if name.startswith("timm:"):
        return _from_timm(name.removeprefix("timm:"), classes, channels, resolution)
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        hint = (
            nearest(name, [*known, "convnet3"]) if nearest(name, known).startswith("did") else "see torchvision.models"
        )
        raise InputError(f"no network {name!r}: {hint}; or convnetD, convnetDxW, timm:NAME")
    # With auxiliary heads these two return a tuple in training; the initialisation is the default, which warns.
    plain = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **plain)
    if isinstance(network, torchvision.models.ResNet):
        _set_stem(network, channels, _resolve_stem(stem, resolution))
    elif channels != 3:
        _set_channels(network, channels)
    return network


def _from_timm(name: str, classes: int, channels: int, resolution: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise InputError(f"network 'timm:{name}' needs the extra: pip install 'wmdd[timm]'") from None
    if name not in timm.list_models():
        raise InputError(f"timm has no network {name!r}: {nearest(name, timm.list_models('*' + name[:3] + '*')[:40])}")
    sized = {"img_size": resolution} if "vit" in name or "deit" in name or "swin" in name else {}
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **sized)
    return network


def _resolve_stem(stem: str, resolution: int) -> str:
    if stem != "auto":
        return stem
    return "small" if resolution <= 32 else "stride2" if resolution <= 64 else "standard"


def _set_stem(network: Any, channels: int, stem: str) -> None:
    width = network.conv1.out_channels
    if stem == "standard":
        _set_channels(network, channels)
        return
    network.conv1 = nn.Conv2d(channels, width, 3, stride=2 if stem == "stride2" else 1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def _set_channels(network: nn.Module, channels: int) -> None:
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            if layer.in_channels != channels:
                shape: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding")}
                bias = layer.bias is not None
                _replace(network, path, nn.Conv2d(channels, layer.out_channels, bias=bias, **shape))
            return


def _replace(network: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, layer)


@dataclass(frozen=True)
class Observation:
    """What a frozen network saw in N images.

    ``means`` and ``variances`` are those of each image over its positions (biased), at the input of every BatchNorm
    layer, all layers side by side: M channels, fp32.
    """

    logits: Tensor
    """[N, C]"""
    features: Tensor
    """[N, D], the input of the last linear layer"""
    means: Tensor
    """[N, M]"""
    variances: Tensor
    """[N, M]"""


def _full(values: Tensor) -> Tensor:
    """Return bf16 values as fp32, and leave fp32 and fp64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _ImageMoments(torch.autograd.Function):
    """Mean and biased variance of each image and channel over its positions: [N, C, h, w] -> two [N, C], fp32.

    Two passes, because a variance by E[x²] − E[x]² loses digits.  The gradient, (g_mean + 2 g_var (x − mean)) / hw, is
    affine in x: one pass over memory, where autograd's own formula takes four.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        values = _full(inputs)  # also under autocast: a variance of bf16 values in bf16 is useless
        mean = values.mean((2, 3))
        variance = values.sub(mean[..., None, None]).square_().mean((2, 3))
        ctx.save_for_backward(inputs, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        inputs, mean = ctx.saved_tensors
        positions = inputs.shape[2] * inputs.shape[3]
        slope = gradients[1] * (2 / positions)
        offset = gradients[0] / positions - slope * mean
        gradient = torch.addcmul(offset[..., None, None], _full(inputs), slope[..., None, None])
        return gradient.to(inputs.dtype)


class _ReportingBatchNorm(nn.Module):
    """BatchNorm by running statistics that keeps the moments of its last input until the network collects them."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = layer
        self.reporting = True
        """Off while only the network's answer is asked for"""
        self.of_batch = False
        """Whether it normalises by the statistics of its input instead, all images together; nothing is updated"""
        self._moments: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.reporting:
            self._moments = _ImageMoments.apply(inputs)
        if self.of_batch:
            layer = self.layer
            return functional.batch_norm(inputs, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
        outputs: Tensor = self.layer(inputs)
        return outputs

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the moments and forget them, so that no graph outlives its step."""
        if self._moments is None:
            raise InputError("the teacher has a BatchNorm layer that takes no part in its forward pass")
        moments, self._moments = self._moments, None
        return moments


class FrozenNetwork(nn.Module):
    """A classifier in evaluation mode, without gradients for its weights, that returns an ``Observation``.

    Args:
        network: the classifier; it is copied.
        outputs: which of its outputs to keep, in the order of the data's classes; None keeps all.

    Raises:
        InputError: the network has no BatchNorm2d or no final linear layer.
    """

    def __init__(self, network: nn.Module, outputs: list[int] | None = None) -> None:
        super().__init__()
        network = copy.deepcopy(network)
        for auxiliary in AUXILIARY:
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
        linear = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        norms = [path for path, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        if not norms:
            raise InputError(
                f"teacher {type(network).__name__} has no BatchNorm2d layer: its moments cannot be matched"
            )
        if not linear:
            raise InputError(f"teacher {type(network).__name__} has no linear layer to take features from")
        head = network.get_submodule(linear[-1])
        assert isinstance(head, nn.Linear)  # noqa: S101 - tells the type checker what the line above selected
        self.head = head if outputs is None else _rows(head, outputs)
        _replace(network, linear[-1], nn.Identity())
        for path in norms:
            layer = network.get_submodule(path)
            assert isinstance(layer, nn.BatchNorm2d)  # noqa: S101 - likewise
            _replace(network, path, _ReportingBatchNorm(layer))
        self.body = network
        self.eval().requires_grad_(False)
        self._norms = [module for module in network.modules() if isinstance(module, _ReportingBatchNorm)]

    @property
    def layer_sizes(self) -> list[int]:
        """Channels of each BatchNorm layer; they sum to M."""
        return [norm.layer.num_features for norm in self._norms]

    @property
    def feature_size(self) -> int:
        """D, the dimension of the features."""
        return self.head.in_features

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def predict(self, images: Tensor, of_batch: bool = False) -> Tensor:
        """Return the logits [N, C] alone; nothing is measured on the way.

        Args:
            images: [N, channels, H, W], normalised.
            of_batch: whether every BatchNorm2d goes by the statistics of these images, and not by its running ones.
        """
        for norm in self._norms:
            norm.reporting, norm.of_batch = False, of_batch
        try:
            return _full(self.head(self.body(images).flatten(1)))
        finally:
            for norm in self._norms:
                norm.reporting, norm.of_batch = True, False

    def running_moments(self) -> tuple[Tensor, Tensor]:
        """Return the running means and variances of all layers, each [M]: the global BatchNorm target."""
        layers = [norm.layer for norm in self._norms]
        means = [layer.running_mean for layer in layers if layer.running_mean is not None]
        variances = [layer.running_var for layer in layers if layer.running_var is not None]
        return torch.cat(means), torch.cat(variances)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    def forward(self, images: Tensor) -> Observation:
        """Observe normalised images [N, channels, H, W]."""
        features = self.body(images).flatten(1)
        logits = self.head(features)
        means, variances = zip(*(norm.take() for norm in self._norms), strict=True)
        return Observation(_full(logits), _full(features), torch.cat(means, 1), torch.cat(variances, 1))


def _rows(head: nn.Linear, outputs: list[int]) -> nn.Linear:
    chosen = nn.Linear(head.in_features, len(outputs), bias=head.bias is not None)
    with torch.no_grad():
        chosen.weight.copy_(head.weight[outputs])
        if head.bias is not None:
            chosen.bias.copy_(head.bias[outputs])
    return chosen
