"""A generated dataset of JPEG files in ImageNet's shape, for speed tests without photographs.

Each image is noise of many scales, with a grating and a tint that depend on its class.  Its file is as large, and as
slow to decode, as a photograph of that size.  A network can learn the classes a little.  The file ``synthetic.json``
marks the folder, and records of measurements call the dataset ``synthetic``.
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
"""File that marks a generated dataset and contains its settings."""

_VERSION = 1
"""Version of the drawing: another version draws other images."""


_JPEG_QUALITY = 93
"""Quality of the JPEG files.  An image of 500×375 pixels then takes about 100 kB, like ImageNet's."""


_OCTAVE_AMPLITUDE = 22.0
"""Standard deviation of the noise of each scale, in gray levels.  It is equal for all scales: the spectrum of
photographs falls with the square of the frequency, so every octave has the same variance (Field 1987)."""


_GRAIN_AMPLITUDE = 5.0
"""Standard deviation of the noise of single pixels, in gray levels."""


_GRATING_AMPLITUDE = 16.0
"""Amplitude of a class's grating, in gray levels."""


_FILES_PER_CHUNK = 16
"""Number of images that a process draws at a time."""

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
    """Write the missing files of ``OUT/train/CLASS/*.JPEG`` and ``OUT/val/CLASS/*.JPEG``.

    The bytes of an image depend on seed, split, class, number, ``pixels`` and the version of Pillow.  They do not
    depend on the process that draws it.

    Args:
        out: new folder, or a folder that this function has begun with the same settings.
        classes: number of classes C.
        images: number of training images of each class.
        pixels: length of the shorter side; the longer one is 1 to 1.5 times as long.
        val: number of validation images of each class.
        seed: random seed of the images.
        workers: number of processes; None: the number of usable CPUs.
        advance: called with the number of new images after each chunk.

    Raises:
        InputError: the folder contains something else, or a dataset with other settings.
        WmddError: a file cannot be written, or a worker process died.
    """
    settings = {"version": _VERSION, "classes": classes, "images": images, "pixels": pixels, "val": val, "seed": seed}
    _claim(out, settings)
    items = iter(_items(classes, images, val))
    chunks = iter(lambda: list(islice(items, _FILES_PER_CHUNK)), [])
    write = partial(_write, out, pixels, seed)
    workers = workers or len(os.sched_getaffinity(0))
    # A forked child could inherit a lock that a thread of the parent holds.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # Only a few chunks ahead: a million futures would take more memory than the images.
        waiting = [pool.submit(write, chunk) for chunk in islice(chunks, 4 * workers)]
        try:
            while waiting:
                advance(waiting.pop(0).result())
                waiting += [pool.submit(write, chunk) for chunk in islice(chunks, 1)]
        except BrokenProcessPool:
            raise WmddError(f"{out}: a process that draws images died; the same command resumes") from None


def name_of(data: DataConfig) -> str:
    """Return the name of a dataset in records: its source, of a folder its name, or ``synthetic`` if generated."""
    root = Path(data.root or f"data/{data.source}")
    if (root / MARKER).exists():
        return "synthetic"
    return root.resolve().name or data.source if data.source == "folder" else data.source


def draw(split: Split, label: int, number: int, pixels: int, seed: int) -> Image.Image:
    """Draw one image.

    Args:
        split: split of the image, train or val.
        label: index of its class, which decides the grating and the tint.
        number: number of the image within its class.
        pixels: length of the shorter side, in pixels.
        seed: random seed of the dataset.
    """
    source = np.random.default_rng([seed, label, number, split == "val"])
    longer = round(pixels * source.uniform(1.0, 1.5))
    height, width = (pixels, longer) if source.random() < 0.75 else (longer, pixels)
    image = _noise(source, height, width)
    tint, grating = _class_marks(np.random.default_rng([seed, label]), source, height, width)
    image += tint + grating[..., None] + _GRAIN_AMPLITUDE * source.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _noise(source: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Return noise around middle gray with the same variance at every scale: [height, width, 3].

    It is drawn from coarse to fine: each scale is resized to the next, finer one, which adds its own noise.
    """
    planes = np.full((3, 2, 2), 128, dtype=np.float32)
    cells = 2
    while cells < min(height, width):
        rows, columns = (max(2, round(cells * side / min(height, width))) for side in (height, width))
        planes = _stretched(planes, rows, columns)
        planes += _OCTAVE_AMPLITUDE * source.standard_normal((rows, columns), dtype=np.float32)
        if cells <= 32:  # color varies less than brightness, and mostly at coarse scales
            planes += 0.5 * _OCTAVE_AMPLITUDE * source.standard_normal((3, rows, columns), dtype=np.float32)
        cells *= 2
    return np.ascontiguousarray(_stretched(planes, height, width).transpose(1, 2, 0))


def _stretched(planes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Return planes [3, h, w] at another size, interpolated bilinearly."""
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in planes])


def _class_marks(
    owner: np.random.Generator, source: np.random.Generator, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the tint [3] and the grating [height, width] of a class.  The phase differs between images."""
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
    """Write the missing images, each atomically; return the number of items."""
    for split, label, number in items:
        path = out / split / f"class-{label:05d}" / f"{number:06d}.JPEG"
        if not path.exists():
            buffer = io.BytesIO()
            draw(split, label, number, pixels, seed).save(buffer, "jpeg", quality=_JPEG_QUALITY)
            write_bytes(path, buffer.getvalue())
    return len(items)


def _claim(out: Path, settings: dict[str, int]) -> None:
    """Mark a folder as a generated dataset, or check that its settings are the same."""
    marker = out / MARKER
    for key in ("classes", "images", "val"):
        if settings[key] < 1:
            raise InputError(f"--{key} {settings[key]}: must be at least 1")
    if settings["pixels"] < 8:
        raise InputError(f"--pixels {settings['pixels']}: must be at least 8")
    if not marker.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: is not empty and contains no generated dataset (no {MARKER}); use a new folder")
        write_json(marker, settings)
        return
    try:
        found = dict(read_json(marker))
    except (WmddError, TypeError, ValueError):
        raise InputError(f"{marker}: is damaged; delete {out} to draw the images again") from None
    differ = [
        f"{key} {found.get(key)} instead of {value}" for key, value in settings.items() if found.get(key) != value
    ]
    if differ:
        raise InputError(f"{out}: contains a generated dataset with {', '.join(differ)}; use a new folder")
