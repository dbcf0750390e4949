"""The objects that every stage of a run needs."""

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
    """A config with its dataset, its teacher, and the ranks that work on it.

    A baseline uses the session of its run with another config: ``dataclasses.replace(session, config=...)``.
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
    """Return the session of a config.  If the teacher is not in the cache, train or import it first.

    Args:
        config: resolved config.
        dataset: images that ``config.data`` selects.
        ranks: ranks of the job.
        stop: returns whether a stop was requested.
        bound: facts of the teacher that made the existing images; see ``get_or_train_teacher``.

    Raises:
        InputError: the teacher's network or weights are wrong, or ``bound`` describes another teacher.
        Interrupted: a stop was requested; the next call resumes the teacher from its checkpoint.
    """
    validation = Validation(config, dataset, ranks, stop)
    with within_memory(ranks.device, "lower teacher.batch_size"):
        teacher = get_or_train_teacher(config, dataset, validation, ranks, stop, bound)
    return Session(config, dataset, validation, teacher, ranks, stop)
