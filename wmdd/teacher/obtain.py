"""The frozen teacher: trained here or imported, kept in the cache, identified by the SHA-256 of its weights."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset
from wmdd.errors import InputError, WmddError
from wmdd.networks import weights
from wmdd.networks.accuracy import Validation
from wmdd.networks.checkpoint import Checkpoint
from wmdd.networks.frozen import FrozenNetwork, Observation
from wmdd.runtime.arithmetic import Arithmetic
from wmdd.runtime.meter import Meter
from wmdd.runtime.ranks import Ranks
from wmdd.storage import cache
from wmdd.storage.files import digest, expect, locked, read_json, read_tensors, sha256, sweep, write_json, write_tensors
from wmdd.teacher.train import create_network, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier whose outputs are the dataset's classes in order."""

    network: FrozenNetwork
    sha256: str
    """SHA-256 of the weights file in the cache, which identifies the teacher"""
    facts: dict[str, Any]
    """Network, origin, top-1 and top-5 (fractions), the images of that accuracy, seconds of training, bytes"""
    epochs: Path | None = None
    """Log of its training in the cache (``EpochLog``); it may be missing"""

    def observe(self, images: Tensor, ranks: Ranks, batch_size: int) -> Observation:
        """Return the network's observation of normalized images [N, channels, H, W], on the CPU."""
        seen = self.observe_on_device(images, ranks, batch_size)
        return Observation(**{key: value.cpu() for key, value in vars(seen).items()})

    def observe_on_device(self, images: Tensor, ranks: Ranks, batch_size: int) -> Observation:
        """Return the network's observation of normalized images [N, channels, H, W], on the device of the rank.

        The host does not wait for the device.
        """
        parts = []
        for part in images.split(batch_size):
            shown = part.to(ranks.device).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), ranks.autocast():
                parts.append(self.network(shown))
        return Observation(**{key: torch.cat([getattr(seen, key) for seen in parts]) for key in vars(parts[0])})


def get_or_train_teacher(
    config: Config,
    dataset: Dataset,
    validation: Validation,
    ranks: Ranks,
    stop: Callable[[], bool],
    bound: Mapping[str, Any] | None = None,
) -> Teacher:
    """Return the teacher from the cache. A teacher that the cache lacks is trained or imported first.

    Args:
        config: config of the run, with the teacher's network, weights and training.
        dataset: dataset of the run, to train on.
        validation: measures the teacher's accuracy.
        ranks: ranks of the job, with device and arithmetic.
        stop: whether a stop was requested.
        bound: facts (``Teacher.facts``) of the teacher of existing images, the same on all ranks. This teacher is used
            whatever its arithmetic.

    Raises:
        InputError: the network does not exist, the weights do not fit it, or the teacher is not that of ``bound``.
        Interrupted: a stop was requested. Training resumes from its checkpoint next time.
    """
    kept = ranks.broadcast_from_main(_kept(config, dataset, bound) if ranks.main and bound else None)
    if kept:
        folder = cache.folder("teachers", kept)
    else:
        if bound and (trained := Arithmetic.from_facts(bound.get("arithmetic"))) not in (None, ranks.arithmetic):
            raise InputError(
                f"the images were made with the teacher {bound['sha256'][:12]}, which is not in the cache; it was"
                f" trained in {trained}, and cannot be trained again in {ranks.arithmetic}; restore it (WMDD_CACHE)"
            )
        folder, origin = _entry(config, dataset, ranks.arithmetic)
        if not ranks.broadcast_from_main(ranks.main and _is_complete(folder)):
            with _to_be_filled(folder, ranks, stop) as missing:
                if missing:
                    _make(config, dataset, validation, ranks, folder, origin, stop)
                ranks.barrier()
    if ranks.main:
        cache.note_use(folder)
    file, facts = folder / _FILE, folder / _FACTS
    expect([file, facts], stop)
    known = read_json(facts)
    if bound and bound["sha256"] != known["sha256"]:
        raise InputError(
            f"the images were made with the teacher {bound['sha256'][:12]}, the cache now holds"
            f" {known['sha256'][:12]}; restore the first teacher (WMDD_CACHE), or use another --out"
        )
    network = create_network(config, known["all_outputs"])
    weights.restore(network, read_tensors(file))
    frozen = FrozenNetwork(network, known["outputs"])
    if ranks.precision == "bf16":
        frozen.round_once()
    return Teacher(frozen.to(ranks.device), known["sha256"], known, folder / _EPOCHS)


@contextmanager
def _to_be_filled(folder: Path, ranks: Ranks, stop: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock of a cache entry; yield whether it is still missing, or another process has made it."""
    if ranks.main:
        cache.prepare(folder)
    with locked(folder / ".lock", stop) if ranks.main else nullcontext():
        if ranks.main:
            expect([folder / _FACTS], stop, seconds=0.1)
            sweep(folder)
        yield ranks.broadcast_from_main(ranks.main and not _is_complete(folder))


def is_stored(
    config: Config, dataset: Dataset, arithmetics: Sequence[Arithmetic], bound: Mapping[str, Any] | None = None
) -> bool:
    """Return whether the cache contains the teacher of ``bound``, else the config's in one of these arithmetics."""
    if bound:
        return _kept(config, dataset, bound) is not None
    return any(_is_complete(_entry(config, dataset, arithmetic)[0]) for arithmetic in arithmetics)


def name_of_stored(config: Config, dataset: Dataset, arithmetic: Arithmetic) -> tuple[Path, str | None]:
    """Return the teacher's folder in the cache, and the SHA-256 of its weights; None if it is not there."""
    folder, _ = _entry(config, dataset, arithmetic)
    return folder, read_json(folder / _FACTS)["sha256"] if _is_complete(folder) else None


def _entry(config: Config, dataset: Dataset, arithmetic: Arithmetic) -> tuple[Path, Path | None]:
    """Return the teacher's folder in the cache, and its weights file; None if it is trained here."""
    settings = config.teacher
    origin = weights.locate(settings.weights, settings.network)
    made = arithmetic.facts if origin is None else sha256(origin)
    return cache.folder("teachers", _key(config, dataset, made)), origin


def _key(config: Config, dataset: Dataset, made: Any) -> str:
    """Return the cache key of a teacher.  ``made``: facts of its arithmetic, or SHA-256 of the imported weights."""
    return digest([config.fingerprint("teacher"), dataset.fingerprint, made])


def _kept(config: Config, dataset: Dataset, bound: Mapping[str, Any]) -> str | None:
    """Return the cache key of the complete teacher with these facts; None if the cache lacks it.

    A teacher that was trained for this config and dataset has a known key.  Another one, such as imported weights, is
    searched among all teachers: a cache may hold thousands, so the known key comes first.
    """
    own = cache.folder("teachers", _key(config, dataset, bound.get("arithmetic")))
    for path in chain([own], (cache.cache_root() / "teachers").glob(f"[!.]*{own.suffix}")):
        try:
            found = read_json(path / _FACTS)["sha256"] == bound["sha256"]
        except (WmddError, KeyError, TypeError):
            continue
        if found and _is_complete(path):
            return path.stem
    return None


_FILE, _FACTS, _EPOCHS = "teacher.safetensors", "teacher.json", "epochs.jsonl"


def _is_complete(folder: Path) -> bool:
    try:
        return bool(read_json(folder / _FACTS)["sha256"] == sha256(folder / _FILE))
    except (WmddError, OSError, KeyError, TypeError):
        return False


def _import(config: Config, dataset: Dataset, path: Path) -> tuple[nn.Module, list[int] | None]:
    state, names = weights.read(path)
    outputs = weights.output_count(state, path)
    network = create_network(config, outputs)
    weights.fit(network, state, path)
    return network, weights.class_map(dataset, outputs, names, config.teacher.outputs, path)


def _make(
    config: Config,
    dataset: Dataset,
    validation: Validation,
    ranks: Ranks,
    folder: Path,
    origin: Path | None,
    stop: Callable[[], bool],
) -> None:
    """Train or import the teacher, measure it, and write its weights and facts to the cache."""
    meter = Meter(ranks.device)
    checkpoint = Checkpoint(folder / "checkpoint.safetensors", folder.name, config.compute.checkpoint_seconds)
    outputs = None
    if origin is None:
        team = ranks.team(config.teacher.ranks, "teacher.ranks")
        if ranks.main and (old := cache.of_other_versions()):
            logger.info(
                f"{cache.cache_root()}: {old} entries of another version of wmdd are not used (`wmdd cache list`)"
            )
        if team.index:
            return  # one team trains, the others wait
        network = train(config, dataset, ranks, team, checkpoint, meter, stop, folder / _EPOCHS)
    elif ranks.main:
        network, outputs = _import(config, dataset, origin)
    if not ranks.main:
        return
    seconds = meter.read()["seconds"]
    state = network.state_dict()
    accuracy = validation(FrozenNetwork(network, outputs).to(ranks.device).predict).metrics
    file = folder / _FILE
    name = config.teacher.network
    facts: dict[str, Any] = {
        "sha256": write_tensors(file, state, {"classes": "\n".join(dataset.classes)} if origin is None else None),
        "network": name,
        "origin": config.teacher.weights or "trained here",
        "arithmetic": ranks.arithmetic.facts if origin is None else None,
        **accuracy,
        "evaluated_on": validation.on,
        "seconds": seconds,
        "bytes": file.stat().st_size,
        "all_outputs": weights.output_count(state, file),
        "outputs": outputs,
    }
    write_json(folder / _FACTS, facts)  # written last: this file makes the entry complete
    checkpoint.remove()
    logger.info(f"teacher {name}: top-1 {accuracy['top1']:.1%} ({validation.on}), SHA-256 {facts['sha256'][:12]}")
