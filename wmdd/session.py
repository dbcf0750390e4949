"""What every stage of a run needs at hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset
from wmdd.networks.accuracy import Validation
from wmdd.runtime.memory import within_memory
from wmdd.runtime.ranks import Ranks
from wmdd.teacher.obtain import Teacher, get_or_train_teacher


@dataclass(frozen=True)
class Session:
    """One config with its images, its teacher, and the ranks that work on it.

    A baseline has the session of its run with another config: ``dataclasses.replace(session, config=...)``.
    """

    config: Config
    dataset: Dataset
    validation: Validation
    """Measures classifiers on the hold-out or on the test set"""
    teacher: Teacher
    ranks: Ranks
    stop: Callable[[], bool]
    """Whether the user or the scheduler asked the process to stop"""


def open_session(
    config: Config,
    dataset: Dataset,
    ranks: Ranks,
    stop: Callable[[], bool],
    bound: Mapping[str, Any] | None = None,
) -> Session:
    """Return the session of a config; its teacher is trained or imported first if the cache does not hold it.

    Args:
        config: resolved config.
        dataset: images that ``config.data`` chooses.
        ranks: ranks of the job.
        stop: whether to stop.
        bound: facts of the teacher that existing images were made with; see ``get_or_train_teacher``.

    Raises:
        InputError: the teacher's network or weights are wrong, or ``bound`` names another teacher.
        Interrupted: a stop was requested; the training of the teacher resumes from its checkpoint next time.
    """
    validation = Validation(config, dataset, ranks, stop)
    with within_memory(ranks.device, "lower teacher.batch_size"):
        teacher = get_or_train_teacher(config, dataset, validation, ranks, stop, bound)
    return Session(config, dataset, validation, teacher, ranks, stop)
