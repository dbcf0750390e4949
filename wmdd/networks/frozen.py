"""The frozen network: logits, features and the moments of its BatchNorm inputs."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wmdd.errors import InputError
from wmdd.networks.create import AUXILIARY, replace_module


@dataclass(frozen=True)
class Observation:
    """Outputs of a frozen network for N images.

    ``means`` and ``variances`` (biased) are over the positions of each image, at the input of every BatchNorm layer.
    All layers are concatenated: M channels, fp32.
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
    """Return bf16 values as fp32; leave fp32 and fp64 unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _ImageMoments(torch.autograd.Function):
    """Mean and biased variance of each image and channel over its positions: [N, C, h, w] -> two [N, C], fp32.

    It takes two passes, because E[x²] − E[x]² loses digits.  The gradient, (g_mean + 2 g_var (x − mean)) / hw, is
    affine in x and needs one pass over memory; autograd's formula needs four.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        values = _full(inputs)  # also under autocast: a variance computed in bf16 is useless
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
    """BatchNorm with running statistics.  It keeps the moments of its last input until the network takes them."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = layer
        self.reporting = True
        """Whether to record moments; false while only logits are needed"""
        self.of_batch = False
        """Whether to normalize with the statistics of the input batch; running statistics are not updated"""
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
        """Return the moments and drop them, so that no autograd graph outlives its step."""
        if self._moments is None:
            raise InputError("the teacher has a BatchNorm layer that its forward pass does not use")
        moments, self._moments = self._moments, None
        return moments


class FrozenNetwork(nn.Module):
    """A classifier in evaluation mode without weight gradients.  It returns an ``Observation``.

    Args:
        network: classifier; it is copied.
        outputs: indices of the outputs to keep, in the order of the dataset's classes; None: all.

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
        replace_module(network, linear[-1], nn.Identity())
        for path in norms:
            layer = network.get_submodule(path)
            assert isinstance(layer, nn.BatchNorm2d)  # noqa: S101 - likewise
            replace_module(network, path, _ReportingBatchNorm(layer))
        self.body = network
        self.eval().requires_grad_(False)
        self._norms = [module for module in network.modules() if isinstance(module, _ReportingBatchNorm)]

    @property
    def layer_sizes(self) -> list[int]:
        """Number of channels of each BatchNorm layer; their sum is M."""
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
        """Return only the logits [N, C], without moments.

        Args:
            images: normalized images [N, channels, H, W].
            of_batch: whether every BatchNorm2d uses the statistics of these images instead of its running statistics.
        """
        for norm in self._norms:
            norm.reporting, norm.of_batch = False, of_batch
        try:
            return _full(self.head(self.body(images).flatten(1)))
        finally:
            for norm in self._norms:
                norm.reporting, norm.of_batch = True, False

    def running_moments(self) -> tuple[Tensor, Tensor]:
        """Return the running means and variances of all layers, each [M].  They are the global BatchNorm target."""
        layers = [norm.layer for norm in self._norms]
        means = [layer.running_mean for layer in layers if layer.running_mean is not None]
        variances = [layer.running_var for layer in layers if layer.running_var is not None]
        return torch.cat(means), torch.cat(variances)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stay in evaluation mode for any ``mode``."""
        return super().train(False)

    def forward(self, images: Tensor) -> Observation:
        """Return the observation of normalized images [N, channels, H, W]."""
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
