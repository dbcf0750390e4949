"""Distilled images as a page shows them: class by class, each above the real image that is nearest to it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from wmdd.errors import WmddError
from wmdd.report.comparison import REFERENCE
from wmdd.report.runs import Run
from wmdd.storage.files import read_tensors

MAX_SETS, MAX_METHODS, MAX_CLASSES, MAX_IMAGES, MAX_PIXELS = 4, 8, 20, 10, 128
"""Groups of distilled sets, methods of each, classes, images of a class, pixels of an image."""
EXACT_PIXELS = 64
"""Images up to this size are shown without loss."""
OWN = "wmdd"
"""The method whose images come first."""
MAX_REAL = 5000
"""Real images that one group is compared with: a page is written in seconds."""


@dataclass(frozen=True)
class Strip:
    """Images of one class in a row."""

    name: str
    images: list[tuple[str, str]]
    """(data URI, what it is)."""


@dataclass(frozen=True)
class Grid:
    """The distilled sets of one data set and IPC, side by side."""

    title: str
    classes: list[tuple[str, list[Strip]]]
    total: int
    """Classes of the sets."""
    methods: int
    """Distilled sets of the group, of which ``MAX_METHODS`` are shown."""
    compared: int
    """Classes whose nearest real images were looked for."""


def grids(runs: Sequence[Run], problems: list[str]) -> tuple[list[Grid], int]:
    """Return the first grids, and how many there are; of several seeds the first is shown."""
    groups: dict[tuple[Any, ...], dict[tuple[str, str], Run]] = {}

    def order(run: Run) -> tuple[Any, ...]:
        return not run.optimized, run.method not in (OWN, REFERENCE), run.method, run.config.get("seed", 0)

    for run in sorted(runs, key=order):
        if run.blocks:
            data = run.config.get("data", {})
            key = (run.dataset, data.get("resolution"), run.config.get("ipc"))
            groups.setdefault(key, {}).setdefault((run.method, "" if run.baseline else run.name), run)
    found = sorted(groups.items(), key=lambda item: tuple(map(str, item[0])))
    return [_grid(key, list(group.values()), problems) for key, group in found[:MAX_SETS]], len(found)


def _grid(key: tuple[Any, ...], runs: list[Run], problems: list[str]) -> Grid:
    # The baseline of all comparisons is always among them.
    shown = sorted(runs, key=lambda run: run.method != REFERENCE)[:MAX_METHODS]
    shown.sort(key=runs.index)
    tensors = [_images(run, problems) for run in shown]
    names = list(dict.fromkeys(name for found in tensors for name in found))[:MAX_CLASSES]
    optimized = [(run, found) for run, found in zip(shown, tensors, strict=True) if run.optimized]
    nearest = _nearest(optimized, names, problems) if optimized else {}
    classes = []
    for name in names:
        strips = []
        for run, found in zip(shown, tensors, strict=True):
            title = f"{run.method} ({run.name})" if sum(r.method == run.method for r in shown) > 1 else run.method
            images = [(_png(image), f"{title}, class {name}") for image in found.get(name, ())]
            strips.append(Strip(title, images))
            if (run.label, name) in nearest:
                strips.append(Strip("nearest real", nearest[run.label, name]))
        classes.append((name, [strip for strip in strips if strip.images]))
    total = max((sum(len(s.get("classes", ())) for s in run.blocks.values()) for run in shown), default=0)
    title = ", ".join(f"{part}{unit}" for part, unit in zip((key[0], key[1]), ("", " px"), strict=True) if part)
    compared = len({name for _, name in nearest})
    return Grid(f"{title}, IPC {key[2]}", classes, total, len(runs), compared)


def _images(run: Run, problems: list[str]) -> dict[str, Any]:
    """Return the first images of the first classes, by class: uint8 [n, channels, H, W]."""
    found: dict[str, Any] = {}
    for index, sidecar in sorted(run.blocks.items()):
        try:
            tensors = read_tensors(run.folder / "blocks" / f"block-{index:05d}.safetensors")
        except WmddError as error:
            problems.append(str(error).replace(str(run.folder), run.label))
            continue
        for name, label in zip(sidecar.get("classes", ()), sidecar.get("class_indices", ()), strict=True):
            if len(found) == MAX_CLASSES:
                return found
            found[name] = tensors["images"][tensors["labels"] == label][:MAX_IMAGES]
    return found


def _nearest(
    runs: Sequence[tuple[Run, dict[str, Any]]], names: Sequence[str], problems: list[str]
) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Return for each run and class the nearest real training image of each distilled one.

    Nearest: least Euclidean distance between normalised pixels. Without the data there is none, and a problem told.
    """
    from pydantic import ValidationError

    from wmdd.config.schema import Config
    from wmdd.data.dataset import load_dataset

    first = runs[0][0]
    try:
        data = Config.model_validate(first.config).data
        dataset = load_dataset(data.replace({"classes": tuple(names)}))
        found: dict[tuple[str, str], list[tuple[str, str]]] = {}
        left = MAX_REAL
        for index, name in enumerate(dataset.classes):
            left -= len(dataset.train.of_class(index))
            if left < 0:
                break
            made = {run.label: images[name] for run, images in runs if name in images}
            if made:  # or else only selections of real images have this class so far
                strips = _closest(dataset, index, list(made.values()))
                found |= {(label, name): strip for label, strip in zip(made, strips, strict=True)}
    except (WmddError, ValidationError) as error:
        problems.append(f"{first.label}: nearest real images are left out: {str(error).splitlines()[0]}")
        return {}
    return found


def _closest(dataset: Any, index: int, made: Sequence[Any]) -> list[list[tuple[str, str]]]:
    """Return for each set of images [n, channels, H, W] of one class its nearest real images."""
    import torch

    from wmdd.data.pixels import normalize

    train = dataset.train
    wanted = normalize(torch.cat(list(made)), train.config).flatten(1)
    least = torch.full((len(wanted),), torch.inf)
    best = torch.zeros(len(wanted), dtype=torch.int64)
    members = train.of_class(index)
    for start in range(members.start, members.stop, 64):
        positions = range(start, min(start + 64, members.stop))
        distances = torch.cdist(wanted, normalize(train.decode(positions), train.config).flatten(1))
        nearer, which = distances.min(1)
        best = torch.where(nearer < least, which + start, best)
        least = torch.minimum(least, nearer)
    images = train.decode(best.tolist())
    strips = []
    for image, position, distance in zip(images, best.tolist(), least.tolist(), strict=True):
        rms = distance / wanted.shape[1] ** 0.5
        strips.append((_png(image), f"{train.name(position)}, at {rms:.2f} standard deviations a pixel"))
    bounds = torch.tensor([0, *map(len, made)]).cumsum(0).tolist()
    return [strips[low:high] for low, high in pairwise(bounds)]


def _png(image: Any) -> str:
    """Return a uint8 image [C, H, W], grey or RGB, as a data URI; large ones are made smaller."""
    from PIL import Image

    picture = Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
    content = io.BytesIO()
    form = "PNG" if max(picture.size) <= EXACT_PIXELS else "WEBP"
    picture.save(content, form, **({"quality": 85} if form == "WEBP" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
