"""Verdicts: every image is decoded once, to know which cannot be."""

from collections.abc import Sequence
from functools import partial

from wmdd.data.decoding import in_order
from wmdd.data.listing import Catalogue
from wmdd.data.sources import BrokenImage, Split
from wmdd.errors import Interrupted
from wmdd.runtime import signals
from wmdd.runtime.progress_bars import progress

_CHUNK_IMAGES = 256
"""Files that one process takes at a time."""


Chunk = tuple[Split, int, int, int]
"""Split, position of a class, and rows from where to where"""


def chunks(catalogue: Catalogue, split: Split, places: Sequence[int]) -> list[Chunk]:
    """Return (split, place of the class, first row, end) of parts of classes, each small enough for one process."""
    counts = catalogue.counts(split)
    return [
        (split, place, start, min(start + _CHUNK_IMAGES, int(counts[place])))
        for place in places
        for start in range(0, int(counts[place]), _CHUNK_IMAGES)
    ]


def decode_verdicts(
    workers: int, catalogue: Catalogue, split: Split, places: Sequence[int]
) -> dict[int, dict[int, str]]:
    """Return why images of these classes cannot be decoded, by class and row."""
    found: dict[int, dict[int, str]] = {}
    for (_, place, row), reason in decoding_faults(catalogue, chunks(catalogue, split, places), workers, False).items():
        found.setdefault(place, {})[row] = reason
    return found


def decoding_faults(
    catalogue: Catalogue, chunks: Sequence[Chunk], workers: int, observed: bool = True
) -> dict[tuple[Split, int, int], str]:
    """Decode images that have no fault yet; return by split, class and row why some cannot be."""
    faults: dict[tuple[Split, int, int], str] = {}
    counts = [
        stop - start - sum(start <= row < stop for row in known_faults(catalogue, split, place))
        for split, place, start, stop in chunks
    ]
    with progress("decoding every image once", sum(counts), "images", observed) as advance:
        for count, found in zip(counts, in_order(partial(faults_of_chunk, catalogue), chunks, workers), strict=True):
            if signals.requested():
                raise Interrupted("stopped while images were checked")
            faults |= found
            advance(count)
    return faults


def known_faults(catalogue: Catalogue, split: Split, place: int) -> set[int]:
    """Return the rows of a class that a look has shown to be faulty."""
    return {row for row, fault in catalogue.faults(split).get(place, {}).items() if not fault.decoded}


def faults_of_chunk(catalogue: Catalogue, chunk: Chunk) -> dict[tuple[Split, int, int], str]:
    """Decode one chunk, and return the reason of each image that cannot be decoded."""
    split, place, start, stop = chunk
    known = known_faults(catalogue, split, place)
    faults: dict[tuple[Split, int, int], str] = {}
    for row in range(start, stop):
        if row in known:
            continue
        try:
            catalogue.read(split, place, row)
        except BrokenImage as error:
            faults[split, place, row] = error.reason
    return faults
