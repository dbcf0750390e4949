"""A tree of generated JPEG files in ImageNet's shape, for speed tests where no photographs are at hand.

Each image is noise of many scales, as rough as a photograph, under the grating and the tint of its class: its file is
as large and as slow to decode as a photograph's of that size, and its class can be learned a little.  The folder says
what it is (``synthetic.json``), and every measurement on it is recorded under the name ``synthetic``.
"""

import io
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wmdd.config.schema import DataConfig
from wmdd.errors import InputError, WmddError
from wmdd.storage.files import read_json, write_bytes, write_json

MARKER = "synthetic.json"
"""File that marks a generated tree, with the settings it was made from."""

_VERSION = 1
"""Of the way images are drawn: another version draws other images."""


_JPEG_QUALITY = 93
"""Of the JPEG files: with it an image of 500×375 takes about 100 kB, as ImageNet's do."""


_OCTAVE_AMPLITUDE = 22.0
"""Standard deviation of the noise of each scale, in grey levels.  Equal for all scales: the spectrum of photographs
falls with the square of the frequency, which leaves every octave the same variance (Field 1987)."""


_GRAIN_AMPLITUDE = 5.0
"""Standard deviation of the noise of single pixels, in grey levels."""


_GRATING_AMPLITUDE = 16.0
"""Amplitude of the grating of a class, in grey levels."""


_FILES_PER_CHUNK = 16
"""Images that a process draws at a time."""

Split = Literal["train", "val"]


Item = tuple[Split, int, int]
"""Split, class and number of an image."""


def generate(
    out: Path,
    classes: int,
    images: int,
    pixels: int,
    val: int,
    seed: int = 0,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Write ``OUT/train/CLASS/*.JPEG`` and ``OUT/val/CLASS/*.JPEG``, or what is missing of them.

    The bytes of an image follow from seed, split, class, number and ``pixels`` (and the version of Pillow), never from
    who draws it.

    Args:
        out: a new folder, or one that this function began with the same settings.
        classes: number of classes C.
        images: training images of each class.
        pixels: length of the shorter side; the longer one is 1 to 1.5 times as long.
        val: validation images of each class.
        seed: of all images.
        workers: processes; as many as this process may use CPUs by default.
        advance: called with the number of images done.

    Raises:
        InputError: the folder holds something else, or a tree of other settings.
        WmddError: a file cannot be written, or a process died.
    """
    settings = {"version": _VERSION, "classes": classes, "images": images, "pixels": pixels, "val": val, "seed": seed}
    _claim(out, settings)
    items = iter(_items(classes, images, val))
    chunks = iter(lambda: list(islice(items, _FILES_PER_CHUNK)), [])
    write = partial(_write, out, pixels, seed)
    workers = workers or len(os.sched_getaffinity(0))
    # A forked child may inherit a lock that one of the parent's threads held.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # A few chunks ahead: a list of a million futures would take more memory than the images.
        waiting = [pool.submit(write, chunk) for chunk in islice(chunks, 4 * workers)]
        try:
            while waiting:
                advance(waiting.pop(0).result())
                waiting += [pool.submit(write, chunk) for chunk in islice(chunks, 1)]
        except BrokenProcessPool:
            raise WmddError(f"{out}: a process that draws images died; the same command goes on") from None


def name_of(data: DataConfig) -> str:
    """Return what records call a data set: its source, or ``synthetic`` for a generated tree."""
    root = Path(data.root or f"data/{data.source}")
    return "synthetic" if (root / MARKER).exists() else data.source


def draw(split: Split, label: int, number: int, pixels: int, seed: int) -> Image.Image:
    """Draw one image.

    Args:
        split: train or val.
        label: of its class, which decides the grating and the tint.
        number: within the class.
        pixels: length of the shorter side.
        seed: of all images.
    """
    source = np.random.default_rng([seed, label, number, split == "val"])
    longer = round(pixels * source.uniform(1.0, 1.5))
    height, width = (pixels, longer) if source.random() < 0.75 else (longer, pixels)
    image = _noise(source, height, width)
    tint, grating = _class_marks(np.random.default_rng([seed, label]), source, height, width)
    image += tint + grating[..., None] + _GRAIN_AMPLITUDE * source.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _noise(source: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Return noise around middle grey with the same variance at every scale: [height, width, 3].

    From coarse to fine: each scale is stretched to the next, which adds noise of its own.
    """
    planes = np.full((3, 2, 2), 128, dtype=np.float32)
    cells = 2
    while cells < min(height, width):
        rows, columns = (max(2, round(cells * side / min(height, width))) for side in (height, width))
        planes = _stretched(planes, rows, columns)
        planes += _OCTAVE_AMPLITUDE * source.standard_normal((rows, columns), dtype=np.float32)
        if cells <= 32:  # colour varies less than brightness, and mostly at coarse scales
            planes += 0.5 * _OCTAVE_AMPLITUDE * source.standard_normal((3, rows, columns), dtype=np.float32)
        cells *= 2
    return np.ascontiguousarray(_stretched(planes, height, width).transpose(1, 2, 0))


def _stretched(planes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Return planes [3, h, w] at another size, bilinearly."""
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in planes])


def _class_marks(
    owner: np.random.Generator, source: np.random.Generator, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the tint [3] and the grating [height, width] of a class; its phase is each image's own."""
    tint = owner.uniform(-24, 24, 3).astype(np.float32)
    angle, waves = owner.uniform(0, math.pi), math.exp(owner.uniform(math.log(4), math.log(24)))
    step = 2 * math.pi * waves / min(height, width)
    rows = (np.arange(height, dtype=np.float32) * (step * math.sin(angle)))[:, None]
    columns = (np.arange(width, dtype=np.float32) * (step * math.cos(angle)))[None, :]
    phase = np.float32(source.uniform(0, 2 * math.pi))
    return tint, np.float32(_GRATING_AMPLITUDE) * np.sin(rows + columns + phase)


def _items(classes: int, images: int, val: int) -> Iterator[Item]:
    counts: tuple[tuple[Split, int], ...] = (("train", images), ("val", val))
    return ((split, label, number) for split, count in counts for label in range(classes) for number in range(count))


def _write(out: Path, pixels: int, seed: int, items: list[Item]) -> int:
    """Write the images that are missing, each whole or not at all; return the number of those now there."""
    for split, label, number in items:
        path = out / split / f"class-{label:05d}" / f"{number:06d}.JPEG"
        if not path.exists():
            buffer = io.BytesIO()
            draw(split, label, number, pixels, seed).save(buffer, "jpeg", quality=_JPEG_QUALITY)
            write_bytes(path, buffer.getvalue())
    return len(items)


def _claim(out: Path, settings: dict[str, int]) -> None:
    """Mark a folder as a generated tree, or check that it is one of these settings."""
    marker = out / MARKER
    for key in ("classes", "images", "val"):
        if settings[key] < 1:
            raise InputError(f"--{key} {settings[key]}: a tree needs at least one")
    if settings["pixels"] < 8:
        raise InputError(f"--pixels {settings['pixels']}: images have at least 8 pixels a side")
    if not marker.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: is not empty and holds no generated tree (no {MARKER}); name a new folder")
        write_json(marker, settings)
        return
    try:
        found = dict(read_json(marker))
    except (WmddError, TypeError, ValueError):
        raise InputError(f"{marker}: is damaged; delete {out} to draw the images anew") from None
    differ = [
        f"{key} {found.get(key)} instead of {value}" for key, value in settings.items() if found.get(key) != value
    ]
    if differ:
        raise InputError(f"{out}: holds a generated tree with {', '.join(differ)}; name a new folder")
