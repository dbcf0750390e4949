"""Networks by name (torchvision, timm, or defined here), for given classes, channels and resolution."""

import re
from typing import Any

import torch
from torch import nn

from wmdd.errors import InputError, nearest

AUXILIARY = ("aux1", "aux2", "AuxLogits")
"""Auxiliary heads of GoogLeNet and Inception.  Only their own training recipes use them; networks here omit them."""

_CONVNET = re.compile(r"convnet(\d+)(?:x(\d+))?")


class ConvNet(nn.Sequential):
    """The ConvNet-BN of the distillation papers: blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 average pooling.

    Args:
        classes: number of outputs.
        channels: number of image channels.
        resolution: height and width of the images, in pixels; at least 2**depth.
        depth: number of blocks.
        width: number of channels of every block.
    """

    def __init__(self, classes: int, channels: int, resolution: int, depth: int = 3, width: int = 128) -> None:
        blocks: list[nn.Module] = []
        for index in range(depth):
            convolution = nn.Conv2d(width if index else channels, width, 3, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)]
        side = resolution >> depth
        super().__init__(*blocks, nn.Flatten(), nn.Linear(width * side * side, classes))


def create(name: str, classes: int, channels: int, resolution: int, stem: str = "auto") -> nn.Module:
    """Return an untrained network in channels-last layout, initialized from torch's global generator.

    Args:
        name: ``convnetD``, ``convnetDxW``, a torchvision classifier (``resnet18``) or, with the extra, ``timm:NAME``.
        classes: number of outputs.
        channels: number of image channels.
        resolution: height and width of the images, in pixels.
        stem: first layers of a ResNet, as in ``teacher.stem``.

    Raises:
        InputError: the network does not exist, or the images are too small for it.
    """
    # Channels-last is the faster layout for CPUs and for the tensor cores of GPUs.
    return _create(name, classes, channels, resolution, stem).to(memory_format=torch.channels_last)


def _create(name: str, classes: int, channels: int, resolution: int, stem: str) -> nn.Module:
    if match := _CONVNET.fullmatch(name):
        depth, width = int(match[1]), int(match[2] or 128)
        if not depth or not width or resolution >> depth < 1:
            raise InputError(f"network {name!r}: {depth} pooling layers do not fit images of {resolution} px")
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
    # With auxiliary heads these two return a tuple in training.  Setting init_weights to its default avoids a warning.
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
                replace_module(network, path, nn.Conv2d(channels, layer.out_channels, bias=bias, **shape))
            return


def replace_module(network: nn.Module, path: str, layer: nn.Module) -> None:
    """Replace a named module of a network by a layer."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, layer)
