"""Packing a data set into shards (``wmdd data pack``); ``packed.py`` reads them."""

import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import torch

from wmdd.config import Data
from wmdd.console import progress
from wmdd.data import Dataset, ImageSet, load_dataset
from wmdd.errors import InputError, WmddError
from wmdd.files import digest, locked, read_json, sha256, write_json, write_tensors
from wmdd.packed import INDEX, VERSION, Packed, settings_of
from wmdd.sources import SPLITS, Split

SHARD_BYTES = 256 * 2**20
"""A shard takes as many whole classes as fit this; a larger class has one of its own."""
_BATCH = 64

Shard = dict[str, dict[Split, list[Packed]]]
"""Of each class and split the images, without their CRCs."""


def pack(config: Data, out: Path, workers: int, shard_bytes: int = SHARD_BYTES) -> tuple[int, int]:
    """Decode and resize all images of a config, and write them to shards of whole classes.

    Shards that are there already, whole and of these very images, are kept. The hold-out is not told apart: one
    packed folder serves any ``data.holdout_per_class``.

    Args:
        config: which images; ``root`` says where from.
        out: folder of the shards.
        workers: processes that decode.
        shard_bytes: most bytes of a shard of several classes.

    Returns:
        number of images and of bytes.

    Raises:
        InputError: the data are not as ``load_dataset`` wants them, the folder holds another data set, or the disk has
            not enough room.
    """
    config = config.model_copy(update={"packed": None, "stage": None, "holdout_per_class": 0})
    dataset = load_dataset(config, workers)
    each = config.channels * config.resolution**2
    out = out.expanduser()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock"):
        shards = _shards(dataset, config, out, max(1, shard_bytes // each))
        stale = sorted(set(out.glob("*.safetensors")) - set(shards))
        if stale:
            raise InputError(f"{stale[0]}: is a shard of other images; use another --out, or delete that folder")
        hashes = _hashes(out)
        todo = [path for path in shards if not path.is_file() or sha256(path) != hashes.get(path.name, sha256(path))]
        images = sum(_count(shards[path]) for path in todo)
        free = shutil.disk_usage(out).free
        if free < images * each:
            raise InputError(f"{out}: {images * each / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
        with progress(f"packing to {out}", images, "images") as advance:
            decoded = {split: _decoded(dataset, split, [shards[path] for path in todo], workers) for split in SPLITS}
            for path in todo:
                _write(path, shards[path], {split: next(decoded[split]) for split in SPLITS})
                advance(_count(shards[path]))
        entries = [
            {"file": path.name, "classes": list(shard), "bytes": path.stat().st_size, "sha256": sha256(path)}
            for path, shard in shards.items()
        ]
        index = {"version": VERSION, "data": settings_of(config), "fingerprint": dataset.fingerprint}
        write_json(out / INDEX, index | {"classes": list(dataset.all_classes), "shards": entries})
    return sum(_count(shard) for shard in shards.values()), sum(path.stat().st_size for path in shards)


def _shards(dataset: Dataset, config: Data, out: Path, most: int) -> dict[Path, Shard]:
    """Deal the classes to shards of at most so many images; the name of a shard tells what it is made from."""
    listed = {name: _listing(dataset, index) for index, name in enumerate(dataset.classes)}
    parts: list[Shard] = []
    for name, images in listed.items():
        if not parts or _count(parts[-1]) + _count({name: images}) > most:
            parts.append({})
        parts[-1][name] = images
    shards = {}
    for number, part in enumerate(parts):
        rows = [
            [name, split, astuple(image)]
            for name, splits in part.items()
            for split in SPLITS
            for image in splits[split]
        ]
        key = digest([VERSION, settings_of(config), rows])
        shards[out / f"{number:05d}-{key[:12]}.safetensors"] = part
    return shards


def _listing(dataset: Dataset, index: int) -> dict[Split, list[Packed]]:
    source, label = dataset.train.source, dataset.classes[index]
    found: dict[Split, list[Packed]] = {}
    for split in SPLITS:
        images = _of(dataset, split)
        kept = {images.names[position] for position in images.of_class(index)}
        found[split] = [
            Packed(name, source.look(name).identity, 0, None if name in kept else "was left out when it was packed")
            for name in source.members(split, label)
        ]
    return found


def _of(dataset: Dataset, split: Split) -> ImageSet:
    return dataset.train if split == "train" else dataset.test


def _count(shard: Shard) -> int:
    return sum(image.fault is None for splits in shard.values() for images in splits.values() for image in images)


def _hashes(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each shard that a finished index tells, by file."""
    if not (out / INDEX).is_file():
        return {}
    try:
        return {entry["file"]: entry["sha256"] for entry in read_json(out / INDEX)["shards"]}
    except (WmddError, KeyError, TypeError):
        return {}


def _decoded(dataset: Dataset, split: Split, shards: list[Shard], workers: int) -> Iterator[torch.Tensor]:
    """Yield the pixels of one split of each shard, from one stream of decoders."""
    images = _of(dataset, split)
    plan: list[range] = []
    lengths = []
    for shard in shards:
        before = len(plan)
        for name in shard:
            own = images.of_class(dataset.classes.index(name))
            plan += [range(start, min(start + _BATCH, own.stop)) for start in range(own.start, own.stop, _BATCH)]
        lengths.append(len(plan) - before)
    stream = images.batches(plan, workers)
    for length in lengths:
        yield torch.cat([next(stream) for _ in range(length)])


def _write(path: Path, shard: Shard, pixels: dict[Split, torch.Tensor]) -> None:
    """Write a shard, with the CRC of each image."""
    crcs = {split: iter([zlib.crc32(image.numpy().data) for image in pixels[split]]) for split in SPLITS}
    told = {
        name: {
            split: [astuple(image if image.fault else replace(image, crc=next(crcs[split]))) for image in splits[split]]
            for split in SPLITS
        }
        for name, splits in shard.items()
    }
    write_tensors(path, {split: pixels[split] for split in SPLITS}, {"classes": json.dumps(told)})
