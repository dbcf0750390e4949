"""Encodings of stored logits: all in fp16, the k largest and the mass of the rest, or all in 8 bits.

Logits are stored instead of probabilities. At a temperature of 20 a softmax is nearly flat, so its k largest values
contain little of its mass.
"""

import math

import torch
from torch import Tensor

from wmdd.config.schema import LabelsConfig


def encode(logits: Tensor, settings: LabelsConfig) -> dict[str, Tensor]:
    """Return logits [N, C] as encoded tensors.

    - ``fp16``: ``logits`` [N, C].
    - ``topk``: the k largest as ``values`` [N, k] fp16 at ``places`` [N, k], and ``rest`` [N] fp16. ``rest`` is the one
      logit that preserves the mass of all other classes at the student's temperature T: T log(Σ exp(z / T) / (C − k)).
    - ``int8``: ``steps`` [N, C] uint8 between ``low`` [N] and ``high`` [N], both fp16.
    """
    if settings.encoding == "fp16":
        return {"logits": logits.half()}
    if settings.encoding == "topk":
        count = min(settings.top_k, logits.shape[1])
        values, places = logits.topk(count)
        others = logits.scatter(1, places, -torch.inf) / settings.temperature
        spread = math.log(max(1, logits.shape[1] - count))
        rest = settings.temperature * (others.logsumexp(1) - spread)
        return {"values": values.half(), "places": places.to(_index_type(logits.shape[1])), "rest": rest.half()}
    low, high = (bound.half() for bound in logits.aminmax(dim=1))
    span = (high.float() - low.float()).clamp_min(1e-6)
    steps = ((logits - low.float()[:, None]) / span[:, None] * 255).round().clamp(0, 255)
    return {"steps": steps.to(torch.uint8), "low": low, "high": high}


def decode(stored: dict[str, Tensor], classes: int) -> Tensor:
    """Return logits [N, C] float32 from the tensors of ``encode``."""
    if "logits" in stored:
        return stored["logits"].float()
    if "values" in stored:
        spread = stored["rest"].float()[:, None].repeat(1, classes)
        return spread.scatter(1, stored["places"].long(), stored["values"].float())
    low, high = stored["low"].float()[:, None], stored["high"].float()[:, None]
    return low + stored["steps"].float() * ((high - low) / 255)


def row_bytes(classes: int, settings: LabelsConfig) -> int:
    """Return the size of one image's logits, in bytes."""
    row = encode(torch.zeros(1, classes), settings)
    return sum(part.numel() * part.element_size() for part in row.values())


def _index_type(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32
