"""The images of batches, in a given order: held in memory, read from mapped shards, or decoded ahead of use.

All three return the same bytes.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from wmdd.config.schema import Config
from wmdd.data.dataset import ImageSet
from wmdd.data.image_parts import near, to_device
from wmdd.data.shards import Shards
from wmdd.runtime.cpus import ranks_on_node

GB = 10**9
_BATCHES_AHEAD = 2
"""Number of batches that a thread reads ahead of use."""

Fetch = Callable[[Tensor, Sequence[slice]], Iterator[Tensor]]
"""Returns the images at some rows of an order of positions, batch by batch: uint8 [b, channels, H, W], on the device"""


def is_held(images: ImageSet, config: Config, copies: int) -> bool:
    """Return whether a node holds ``copies`` copies of the decoded images in memory (``data.memory_gb``)."""
    return copies * images.nbytes <= config.data.memory_gb * GB


def copies_on_node(ranks: int) -> int:
    """Return how many of ``ranks`` ranks that share their work are on this node."""
    return min(ranks, ranks_on_node(os.environ))


@contextmanager
def batch_source(
    images: ImageSet, config: Config, device: torch.device, held: Callable[[], Tensor] | None = None
) -> Iterator[Fetch]:
    """Yield a function that returns batches of images on a device.

    Args:
        images: images of the batches.
        config: config with the number of decoders.
        device: device of the batches.
        held: decodes all images into memory; None reads or decodes each batch ahead of its use.

    Raises:
        BrokenImage: an image cannot be decoded; the message names the file.
    """
    if held is not None:
        pixels = near(held(), device)
        if isinstance(pixels, Tensor) and pixels.device.type == device.type:
            yield partial(_from_memory, pixels)
            return
        with _reader() as ahead:
            yield partial(_read_ahead, lambda positions: pixels[torch.from_numpy(positions)], device, ahead)
    elif isinstance(images.catalogue, Shards):
        with _reader() as ahead:
            yield partial(_read_ahead, images.decode, device, ahead)
    else:
        with images.decoders(config.compute.workers) as decode:

            def decoded(order: Tensor, rows: Sequence[slice]) -> Iterator[Tensor]:
                positions = order.numpy()
                return (to_device(batch, device) for batch in decode([positions[own] for own in rows]))

            yield decoded


def _from_memory(pixels: Tensor, order: Tensor, rows: Sequence[slice]) -> Iterator[Tensor]:
    places = order.to(pixels.device)
    return (pixels[places[own]] for own in rows)


Ahead = Callable[[Sequence[Callable[[], Tensor]]], Iterator[Tensor]]


@contextmanager
def _reader() -> Iterator[Ahead]:
    """Yield a function that computes batches in a thread, ahead of their use."""
    with ThreadPoolExecutor(1, "reader") as thread:
        waiting: deque[Future[Tensor]] = deque()

        def ahead(calls: Sequence[Callable[[], Tensor]]) -> Iterator[Tensor]:
            for call in calls:
                waiting.append(thread.submit(call))
                if len(waiting) > _BATCHES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield ahead
        finally:
            for future in waiting:
                future.cancel()


def _read_ahead(
    read: Callable[[np.ndarray], Tensor], device: torch.device, ahead: Ahead, order: Tensor, rows: Sequence[slice]
) -> Iterator[Tensor]:
    positions = order.numpy()

    def pinned(own: slice) -> Tensor:
        found = read(positions[own])
        return found.pin_memory() if device.type == "cuda" else found

    return (to_device(batch, device) for batch in ahead([partial(pinned, own) for own in rows]))
