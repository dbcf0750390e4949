"""Decode every image once, to find the images that cannot be decoded."""

from collections.abc import Sequence
from functools import partial

from wmdd.data.decoding import in_order
from wmdd.data.listing import Catalogue
from wmdd.data.sources import BrokenImage, Split
from wmdd.errors import Interrupted
from wmdd.runtime import signals
from wmdd.runtime.progress_bars import progress

_CHUNK_IMAGES = 256
"""Number of images that a process decodes at a time."""


Chunk = tuple[Split, int, int, int]
"""Split, position of the class, first row and end row"""


def chunks(catalogue: Catalogue, split: Split, places: Sequence[int]) -> list[Chunk]:
    """Divide classes into chunks, each small enough for one process."""
    counts = catalogue.counts(split)
    return [
        (split, place, start, min(start + _CHUNK_IMAGES, int(counts[place])))
        for place in places
        for start in range(0, int(counts[place]), _CHUNK_IMAGES)
    ]


def decode_verdicts(
    workers: int, catalogue: Catalogue, split: Split, places: Sequence[int]
) -> dict[int, dict[int, str]]:
    """Return the reason for each undecodable image of these classes, by class and row."""
    found: dict[int, dict[int, str]] = {}
    for (_, place, row), reason in decoding_faults(catalogue, chunks(catalogue, split, places), workers, False).items():
        found.setdefault(place, {})[row] = reason
    return found


def decoding_faults(
    catalogue: Catalogue, chunks: Sequence[Chunk], workers: int, observed: bool = True
) -> dict[tuple[Split, int, int], str]:
    """Decode the images without a known fault; return the reasons of failures by split, class and row."""
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
    """Return the rows of a class that the check without decoding has found faulty."""
    return {row for row, fault in catalogue.faults(split).get(place, {}).items() if not fault.decoded}


def faults_of_chunk(catalogue: Catalogue, chunk: Chunk) -> dict[tuple[Split, int, int], str]:
    """Decode one chunk, and return the reason for each image that cannot be decoded."""
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
