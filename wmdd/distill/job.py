"""What the distillation of a run needs at hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset
from wmdd.distill import statistics
from wmdd.runs.folder import RunFolder
from wmdd.runtime.ranks import Ranks
from wmdd.teacher.obtain import Teacher

StatisticsByClass = Mapping[int, statistics.ClassStatistics]
"""Statistics of each class, by index; empty for methods that use none."""


@dataclass(frozen=True)
class Job:
    """All that distilling needs, for one run folder."""

    config: Config
    dataset: Dataset
    teacher: Teacher
    ranks: Ranks
    folder: RunFolder
    stop: Callable[[], bool]
