"""Resize images to the config's resolution, normalize them for networks, and convert them back to pixels."""

from functools import cache

import numpy as np
import torch
from PIL import Image

from wmdd.config.schema import DataConfig


def normalize(images: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """Normalize pixels 0 to 255 ([..., channels, H, W]) to float32: (x / 255 - mean) / std."""
    mean, std = _constants(config.mean, config.std, images.device)
    return (images.to(torch.float32) / 255 - mean) / std


def quantize(images: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """Convert normalized images ([..., channels, H, W]) to the nearest uint8 pixels: the inverse of ``normalize``."""
    mean, std = _constants(config.mean, config.std, images.device)
    return ((images.to(torch.float32) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def pixel_range(config: DataConfig, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalized values of black and of white, each [channels, 1, 1]."""
    black = torch.zeros((config.channels, 1, 1), dtype=torch.uint8, device=device)
    return normalize(black, config), normalize(black + 255, config)


@cache  # each copy to the device would make the host wait
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # the first caller may be in inference mode
        first, second = torch.tensor([mean, std], device=device).reshape(2, -1, 1, 1)
    return first, second


def fit(image: Image.Image, config: DataConfig) -> torch.Tensor:
    """Resize the shorter side to ``resolution / crop_ratio`` and crop the center: uint8 [channels, H, W].

    Sizes are rounded as in torchvision's Resize and CenterCrop.
    """
    image = image.convert("L" if config.channels == 1 else "RGB")
    side, short = round(config.resolution / config.crop_ratio), min(image.size)
    width, height = (side if length == short else int(side * length / short) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - config.resolution) / 2), round((height - config.resolution) / 2)
    image = image.crop((left, top, left + config.resolution, top + config.resolution))
    pixels = np.array(image).reshape(config.resolution, config.resolution, config.channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)
