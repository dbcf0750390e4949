"""Pack a dataset into shards (``wmdd data pack``).  ``shards.py`` reads them."""

import hashlib
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from wmdd.config.schema import DataConfig
from wmdd.data.dataset import Dataset, ImageSet, load_dataset
from wmdd.data.listing import DECODED, Fault, Listing, Part
from wmdd.data.shards import INDEX, VERSION, Shard, settings_of
from wmdd.data.sources import SPLITS, Split
from wmdd.errors import InputError, WmddError
from wmdd.runtime.progress_bars import progress
from wmdd.storage.files import digest, locked, read_json, sha256, write_json, write_tensors

SHARD_BYTES = 256 * 2**20
"""Maximum size of a shard of several classes, in bytes.  A larger class has a separate shard."""
_DECODE_BATCH = 64


def pack(config: DataConfig, out: Path, workers: int, shard_bytes: int = SHARD_BYTES) -> tuple[int, int]:
    """Decode and resize all images of a config, and write them to shards of whole classes.

    Existing intact shards of the same images are kept.  The hold-out is packed like the other training images, so that
    one packed folder serves any ``data.holdout_per_class``.

    Args:
        config: data section of the config; its images are packed.
        out: folder for the shards.
        workers: number of processes that decode.
        shard_bytes: maximum size of a shard of several classes, in bytes.

    Returns:
        Number of images, and total size of the shards in bytes.

    Raises:
        InputError: ``load_dataset`` refuses the dataset, the folder contains another dataset, or the disk is too full.
    """
    config = config.replace({"packed": None, "stage": None, "holdout_per_class": 0})
    dataset = load_dataset(config, workers)
    each = config.channels * config.resolution**2
    out = out.expanduser()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock"):
        shards = _shards(dataset, config, out, max(1, shard_bytes // each))
        counts = {path: sum(_count(dataset, index) for index in classes) for path, classes in shards.items()}
        stale = sorted(set(out.glob("*.safetensors")) - set(shards))
        if stale:
            raise InputError(f"{stale[0]}: is a shard of other images; use another --out, or delete that folder")
        hashes = _hashes(out)
        todo = [path for path in shards if not path.is_file() or sha256(path) != hashes.get(path.name, sha256(path))]
        images = sum(counts[path] for path in todo)
        free = shutil.disk_usage(out).free
        if free < images * each:
            raise InputError(
                f"{out}: the packed images need {images * each / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            )
        with progress(f"packing to {out}", images, "images") as advance:
            decoded = {split: _decoded(dataset, split, [shards[path] for path in todo], workers) for split in SPLITS}
            for path in todo:
                _write(path, _listing(dataset, shards[path]), {split: next(decoded[split]) for split in SPLITS})
                advance(counts[path])
        entries = [asdict(_entry(path, _listing(dataset, classes))) for path, classes in shards.items()]
        index = {"version": VERSION, "data": settings_of(config), "fingerprint": dataset.fingerprint}
        write_json(out / INDEX, index | {"classes": list(dataset.all_classes), "shards": entries})
    return sum(counts.values()), sum(path.stat().st_size for path in shards)


def _shards(dataset: Dataset, config: DataConfig, out: Path, most: int) -> dict[Path, list[int]]:
    """Divide the classes into shards of at most ``most`` images.  A shard's name contains the digest of its source."""
    parts: list[list[int]] = []
    held = 0
    for index in range(len(dataset.classes)):
        count = _count(dataset, index)
        if not parts or held + count > most:
            parts.append([])
            held = 0
        parts[-1].append(index)
        held += count
    shards = {}
    for number, part in enumerate(parts):
        listing = _listing(dataset, part)
        key = digest([VERSION, settings_of(config), listing.metadata(), _content(listing)])
        shards[out / f"{number:05d}-{key[:12]}.safetensors"] = part
    return shards


def _content(listing: Listing) -> list[str]:
    """Return the SHA-256 of each array of a listing."""
    return [hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in listing.tensors().values()]


def _listing(dataset: Dataset, classes: Sequence[int]) -> Listing:
    """Return the listing of some classes for a shard, without times and absolute paths."""
    parts = {}
    for split in SPLITS:
        images = _of(dataset, split)
        every = []
        for index in classes:
            rows = images.catalogue.rows(split, int(images.places[index]))
            faults = {
                int(row): Fault("was left out when the dataset was packed") for row in images.left_out.get(index, ())
            }
            folder, _ = rows.folders[0]
            every.append(replace(rows, folders=((folder, 0),), faults=faults, state=DECODED))
        parts[split] = Part.from_classes(every)
    return Listing(tuple(dataset.classes[index] for index in classes), parts)


def _entry(path: Path, listing: Listing) -> Shard:
    """Return the index entry of a shard."""
    return Shard(
        path.name,
        path.stat().st_size,
        sha256(path),
        listing.classes,
        {split: tuple(np.diff(part.starts).tolist()) for split, part in listing.parts.items()},
        {split: tuple(row.tobytes().hex() for row in part.digests) for split, part in listing.parts.items()},
        {
            split: {
                listing.classes[index]: {str(row): fault.reason for row, fault in rows.items()}
                for index, rows in part.faults.items()
            }
            for split, part in listing.parts.items()
        },
    )


def _of(dataset: Dataset, split: Split) -> ImageSet:
    return dataset.train if split == "train" else dataset.test


def _count(dataset: Dataset, index: int) -> int:
    return sum(len(_of(dataset, split).of_class(index)) for split in SPLITS)


def _hashes(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each shard in the index, by file; {} without a readable index."""
    if not (out / INDEX).is_file():
        return {}
    try:
        return {entry["file"]: entry["sha256"] for entry in read_json(out / INDEX)["shards"]}
    except (WmddError, KeyError, TypeError):
        return {}


def _decoded(dataset: Dataset, split: Split, shards: list[list[int]], workers: int) -> Iterator[torch.Tensor]:
    """Yield the pixels of one split for each shard, from one stream of decoders."""
    images = _of(dataset, split)
    plan: list[range] = []
    lengths = []
    for shard in shards:
        before = len(plan)
        for index in shard:
            own = images.of_class(index)
            plan += [
                range(start, min(start + _DECODE_BATCH, own.stop))
                for start in range(own.start, own.stop, _DECODE_BATCH)
            ]
        lengths.append(len(plan) - before)
    stream = images.batches(plan, workers)
    for length in lengths:
        yield torch.cat([next(stream) for _ in range(length)])


def _write(path: Path, listing: Listing, pixels: dict[Split, torch.Tensor]) -> None:
    """Write a shard: the listing, the pixels and the CRC of each image."""
    tensors = listing.tensors()
    for split, images in pixels.items():
        tensors[f"{split}.pixels"] = images
        tensors[f"{split}.crcs"] = torch.tensor([zlib.crc32(image.numpy().data) for image in images])
    write_tensors(path, tensors, listing.metadata())
