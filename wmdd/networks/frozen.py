"""The frozen network: logits, features and the moments of its BatchNorm inputs."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class _Reductions(NamedTuple):
    """Reductions of the inputs of one BatchNorm layer."""

    first: Tensor
    """[N, C], as ``_reductions`` returns them"""
    second: Tensor
    """[N, C], likewise"""
    token: Tensor
    """[2, N, C] without values, through which the gradient goes back"""
    positions: int
    """Number of positions of each channel"""
    kind: str
    """How mean and variance follow from the reductions"""


_MOMENTS_EPS = 1e-12
"""Added to variances before their reciprocal square root, so that a constant channel has a finite one."""


def _kind(inputs: Tensor) -> str:
    """Return which reductions of [N, C, h, w] give the mean and the variance without a copy in another precision.

    - ``moments``: mean and variance, of fp32 and fp64.  A compiler fuses the conversion of bf16 with them too.
    - ``sums``: sum and 2-norm, of bf16 on a GPU.
    - ``scales``: mean and reciprocal standard deviation, of bf16 on a CPU, by group normalization.

    The last two compute E[x²] − E[x]² from sums in fp32, which loses digits where a mean is many standard deviations.
    There the rounding of the inputs to bf16 changes the variance about as much.
    """
    if inputs.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return "moments"
    return "scales" if inputs.device.type == "cpu" else "sums"


def _reductions(inputs: Tensor, layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return two reductions of the inputs [N, C, h, w] of a layer over the positions, each [N, C] in fp32 or fp64."""
    kind = _kind(inputs)
    if kind == "moments":
        values = _full(inputs)
        if values.device.type == "cpu" and not torch.compiler.is_compiling():  # torch's Welford is slower there
            mean = values.mean((2, 3))
            return mean, values.sub(mean[..., None, None]).square_().mean((2, 3))
        variance, mean = torch.var_mean(values, (2, 3), correction=0)
        return mean, variance
    if kind == "sums":
        total = inputs.sum((2, 3), dtype=torch.float32)
        return total, torch.linalg.vector_norm(inputs, 2, (2, 3), dtype=torch.float32)
    count, channels, height, width = inputs.shape
    if height * width < 1024:  # torch is slow there for channels-last inputs with one channel in a group
        inputs = inputs.contiguous()
    # Any weights in fp32 make torch return the statistics in fp32; the normalized values are not used.
    weights = layer.running_mean, layer.running_var
    _, mean, scale = torch.native_group_norm(inputs, *weights, count, channels, height * width, channels, _MOMENTS_EPS)
    return mean, scale


def _moments(first: Tensor, second: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, both [N, M], from the reductions of all layers.

    Args:
        first: first reductions [N, M].
        second: second reductions [N, M].
        positions: number of positions of each channel, [M].
        kind: kind of the reductions.
    """
    if kind == "moments":
        return first, second
    first, second = _full(first), _full(second)  # fake tensors have them in bf16
    if kind == "sums":
        mean = first / positions
        return mean, torch.addcmul(second.square() / positions, mean, mean, value=-1).clamp_min_(0)
    return first, second.pow(-2).sub_(_MOMENTS_EPS).clamp_min_(0)


class _ObservedBatchNorm(torch.autograd.Function):
    """BatchNorm with running statistics, and the reductions of its inputs: [N, C, h, w] -> output, two [N, C], token.

    The gradient of the inputs is ``g·scale + offset + slope·x``: affine in the gradient g of the output and in the
    inputs x.  It takes two passes over memory.  ``offset`` and ``slope`` [N, C] come back as the gradient of the token.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, layer: nn.BatchNorm2d, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(inputs, scale)
        outputs: Tensor = layer(inputs)
        first, second = _reductions(inputs, layer)
        ctx.mark_non_differentiable(first, second)
        ctx.set_materialize_grads(False)
        return outputs, first, second, inputs.new_empty(2, *first.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        inputs, scale = ctx.saved_tensors
        outer, _, _, token = gradients
        # In the precision of the inputs: torch computes each pass in fp32, and a mixture of precisions would copy.
        scale = scale.to(inputs.dtype)[:, None, None]
        if token is None:  # the loss uses no moments
            return outer * scale, None, None
        offset, slope = token[..., None, None]
        own = torch.addcmul(offset, inputs, slope)
        return own if outer is None else own.addcmul_(outer, scale), None, None


class _JoinedMoments(torch.autograd.Function):
    """Mean and biased variance of all layers, two [N, M], from their reductions and tokens.

    All layers are one tensor here, because kernels on [N, C] cost their launch alone.  The gradient of a token has the
    two terms of (g_mean + 2 g_var (x − mean)) / hw: the part without x, and the factor of x.
    """

    @staticmethod
    def forward(ctx: Any, kind: str, positions: Tensor, sizes: list[int], *parts: Tensor) -> tuple[Tensor, Tensor]:
        layers = len(sizes)
        first, second = torch.cat(parts[:layers], 1), torch.cat(parts[layers : 2 * layers], 1)
        mean, variance = _moments(first, second, positions, kind)
        ctx.save_for_backward(positions, mean)
        ctx.sizes, ctx.precision = sizes, parts[-1].dtype
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        positions, mean = ctx.saved_tensors
        slope = gradients[1] * (2 / positions)
        offset = torch.addcmul(gradients[0] / positions, slope, mean, value=-1)
        tokens = torch.stack([offset, slope]).to(ctx.precision).split(ctx.sizes, 2)
        return None, None, None, *[None] * (2 * len(tokens)), *tokens


class _ReportingBatchNorm(nn.Module):
    """BatchNorm with running statistics.  It keeps the reductions of its last input until the network takes them."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = layer
        self.reporting = True
        """Whether to record moments; false while only logits are needed"""
        self.of_batch = False
        """Whether to normalize with the statistics of the input batch; running statistics are not updated"""
        self.scale: Tensor
        assert layer.running_var is not None  # noqa: S101 - the network was checked
        scale = torch.rsqrt(layer.running_var + layer.eps)
        self.register_buffer("scale", scale * layer.weight.detach() if layer.affine else scale, persistent=False)
        self.rounded_scale: Tensor | None
        self.register_buffer("rounded_scale", None, persistent=False)
        self._taken: _Reductions | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        if self.of_batch:
            return functional.batch_norm(inputs, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
        outputs: Tensor
        if not self.reporting:
            outputs = layer(inputs)
            return outputs
        scale = self.scale if self.rounded_scale is None or inputs.dtype != torch.bfloat16 else self.rounded_scale
        outputs, first, second, token = _ObservedBatchNorm.apply(inputs, layer, scale)
        self._taken = _Reductions(first, second, token, inputs.shape[2] * inputs.shape[3], _kind(inputs))
        return outputs

    def take(self) -> _Reductions:
        """Return the reductions and drop them, so that no autograd graph outlives its step."""
        if self._taken is None:
            raise InputError("the teacher has a BatchNorm layer that its forward pass does not use")
        taken, self._taken = self._taken, None
        return taken


class _RoundedOnce(nn.Module):
    """A convolution or linear layer that keeps its weights in bf16 too.

    Autocast would round frozen weights in every forward pass, to the same values.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", layer.weight.detach().bfloat16(), persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().bfloat16(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        if not torch.is_autocast_enabled(inputs.device.type):
            outputs: Tensor = layer(inputs)
            return outputs
        if isinstance(layer, nn.Linear):
            return functional.linear(inputs, self.weight, self.bias)
        return layer._conv_forward(inputs, self.weight, self.bias)


class FrozenNetwork(nn.Module):
    """A classifier in evaluation mode without weight gradients.  It returns an ``Observation``.

    Args:
        network: classifier; it is copied.
        outputs: indices of the outputs to keep, in the order of the dataset's classes; None: all.

    Raises:
        InputError: the network has no BatchNorm2d with running statistics, or no final linear layer.
    """

    def __init__(self, network: nn.Module, outputs: list[int] | None = None) -> None:
        super().__init__()
        network = copy.deepcopy(network)
        for auxiliary in AUXILIARY:
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
        linear = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        norms = [path for path, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        if any(network.get_submodule(path).running_mean is None for path in norms):
            raise InputError(
                f"teacher {type(network).__name__} has a BatchNorm2d layer without running statistics: its outputs"
                " would depend on the batch"
            )
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
        self._positions: dict[Any, Tensor] = {}

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

    def round_once(self) -> "FrozenNetwork":
        """Round the weights of convolutions and linear layers to bf16 now, instead of in each pass under autocast.

        Passes without autocast still use the fp32 weights.
        """
        for path, layer in list(self.named_modules()):
            if type(layer) in (nn.Conv2d, nn.Linear) and layer is not self.head:
                replace_module(self, path, _RoundedOnce(layer))
        for norm in self._norms:
            norm.rounded_scale = norm.scale.bfloat16()
        return self

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

    def _positions_of(self, layers: list[_Reductions]) -> Tensor:
        """Return the number of positions of each channel of some layers, on their device."""
        first = layers[0].first
        precision = torch.promote_types(first.dtype, torch.float32)
        key = (*((one.positions, one.first.shape[1]) for one in layers), first.device, precision)

        def made() -> Tensor:
            counts = [float(one.positions) for one in layers for _ in range(one.first.shape[1])]
            return torch.tensor(counts, device=first.device, dtype=precision)

        if torch.compiler.is_compiling():
            return made()
        if key not in self._positions:  # each copy to the device would make the host wait
            with torch.inference_mode(False):  # the first caller may be in inference mode
                self._positions[key] = made()
        return self._positions[key]

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stay in evaluation mode for any ``mode``."""
        return super().train(False)

    def forward(self, images: Tensor) -> Observation:
        """Return the observation of normalized images [N, channels, H, W]."""
        features = self.body(images).flatten(1)
        logits = self.head(features)
        # All layers at once, unless some of them get inputs of another precision.
        runs: list[list[_Reductions]] = []
        for norm in self._norms:
            one = norm.take()
            if runs and (runs[-1][0].kind, runs[-1][0].token.dtype) == (one.kind, one.token.dtype):
                runs[-1].append(one)
            else:
                runs.append([one])
        joined = []
        for run in runs:
            parts = [*(one.first for one in run), *(one.second for one in run), *(one.token for one in run)]
            sizes = [one.first.shape[1] for one in run]
            joined.append(_JoinedMoments.apply(run[0].kind, self._positions_of(run), sizes, *parts))
        means, variances = joined[0]
        if len(joined) > 1:
            means, variances = (torch.cat([pair[which] for pair in joined], 1) for which in (0, 1))
        return Observation(_full(logits), _full(features), means, variances)


def _rows(head: nn.Linear, outputs: list[int]) -> nn.Linear:
    chosen = nn.Linear(head.in_features, len(outputs), bias=head.bias is not None)
    with torch.no_grad():
        chosen.weight.copy_(head.weight[outputs])
        if head.bias is not None:
            chosen.bias.copy_(head.bias[outputs])
    return chosen
