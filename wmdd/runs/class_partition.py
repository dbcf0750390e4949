"""The partition of a run: classes into groups, groups into blocks."""

import itertools
from dataclasses import dataclass

from wmdd.config.schema import Config
from wmdd.errors import InputError

SPREAD_CLASSES = 100
"""Number of classes in a span of spread groups: that of a published batch (SRe2L, CDA)."""
GROUP_IMAGES = 100
"""Number of images in a group, unless the config sets the number of classes."""
GLOBAL_TARGETS = frozenset({"barycenter-global", "ce-global", "sre2l", "cda", "sre2l++", "fadrm", "edc"})
"""Shipped methods that match the teacher's running statistics, which belong to all classes together."""


@dataclass(frozen=True)
class Group:
    """Images that are synthesized together."""

    index: int
    classes: tuple[int, ...]
    images: tuple[int, int] | None = None
    """First image of each class, and the one after the last; None for all images."""


@dataclass(frozen=True)
class Block:
    """Contiguous classes, a whole number of groups: one file, one array task."""

    index: int
    groups: tuple[Group, ...]

    @property
    def classes(self) -> list[int]:
        """Class indices of the block, in order."""
        return list(dict.fromkeys(index for group in self.groups for index in group.classes))


def is_spread(config: Config) -> bool:
    """Return whether a group has a few images of many classes, instead of all images of a few classes."""
    chosen = config.synthesis.grouping
    is_global = config.method in GLOBAL_TARGETS or (
        config.method in ("wmdd", "dm") and config.synthesis.bn_target == "global"
    )
    return is_global if chosen == "method" else chosen == "spread"


def group_size(config: Config) -> int:
    """Return the number of classes in a group that is not spread: the config's, or as many as make up 100 images."""
    return config.synthesis.classes_per_group or max(1, GROUP_IMAGES // config.ipc)


def group_images(config: Config, classes: int) -> int:
    """Return the largest number of images in a group, in a run of ``classes`` classes."""
    if is_spread(config):
        return min(SPREAD_CLASSES, classes) * _images_of_class(config, min(SPREAD_CLASSES, classes))
    return min(group_size(config), classes) * config.ipc


def plan(config: Config, classes: int) -> list[Block]:
    """Split the classes into spans of one or several groups, and the spans into blocks.

    Usually a span is one group. For a global target, a span has 100 classes, and each of its groups has one image per
    class. With fewer than 100 classes, such a group has as many images per class as make up 100 images. The result
    depends on the config and the number of classes alone.

    Raises:
        InputError: the config has more blocks than spans, or ``split_class`` with spread groups.
    """
    spread = is_spread(config)
    size = SPREAD_CLASSES if spread else group_size(config)
    spans = [tuple(range(start, min(start + size, classes))) for start in range(0, classes, size)]
    if spread and config.synthesis.split_class > 1:
        raise InputError(
            f"synthesis.split_class = {config.synthesis.split_class}: a group of {config.method} has few images of each"
            " class, so ranks cannot share a class; use split_class=1, or synthesis.grouping=classes"
        )
    if config.blocks > len(spans):
        remedy = "" if spread else " or a smaller synthesis.classes_per_group"
        parts = "spans" if spread else "groups"
        raise InputError(
            f"blocks = {config.blocks}: {classes} classes in {parts} of {size} make {len(spans)} {parts}, and a block"
            f" needs at least one; use blocks <= {len(spans)}{remedy}"
        )
    bounds = [index * len(spans) // config.blocks for index in range(config.blocks + 1)]
    count = itertools.count()
    return [
        Block(
            block,
            tuple(Group(next(count), span, part) for span in spans[low:high] for part in _parts(config, span, spread)),
        )
        for block, (low, high) in enumerate(itertools.pairwise(bounds))
    ]


def _parts(config: Config, span: tuple[int, ...], spread: bool) -> list[tuple[int, int] | None]:
    """Return the range of images per class in each group of a span."""
    if not spread:
        return [None]
    step = _images_of_class(config, len(span))
    return [(low, min(low + step, config.ipc)) for low in range(0, config.ipc, step)]


def _images_of_class(config: Config, classes: int) -> int:
    return min(config.ipc, max(1, GROUP_IMAGES // classes))
