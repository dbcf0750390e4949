"""The partition of a run: classes into groups, groups into blocks."""

import itertools
from dataclasses import dataclass

from wmdd.config.schema import Config
from wmdd.errors import InputError


@dataclass(frozen=True)
class Group:
    """Classes that are synthesized together."""

    index: int
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Contiguous classes, a whole number of groups: one file, one array task."""

    index: int
    groups: tuple[Group, ...]

    @property
    def classes(self) -> list[int]:
        """Class indices of the block, in order."""
        return [index for group in self.groups for index in group.classes]


def group_size(config: Config) -> int:
    """Return the number of classes in a group: the config's, or by default as many as make up 100 images."""
    return config.synthesis.classes_per_group or max(1, 100 // config.ipc)


def plan(config: Config, classes: int) -> list[Block]:
    """Split the classes into blocks of groups. The result depends on the config and the number of classes alone.

    Raises:
        InputError: the config has more blocks than groups.
    """
    size = group_size(config)
    groups = [
        Group(index, tuple(range(start, min(start + size, classes))))
        for index, start in enumerate(range(0, classes, size))
    ]
    if config.blocks > len(groups):
        raise InputError(
            f"blocks = {config.blocks}: {classes} classes in groups of {size} make {len(groups)} groups, and a block"
            f" needs at least one; use blocks <= {len(groups)} or a smaller synthesis.classes_per_group"
        )
    bounds = [index * len(groups) // config.blocks for index in range(config.blocks + 1)]
    return [Block(index, tuple(groups[low:high])) for index, (low, high) in enumerate(itertools.pairwise(bounds))]
