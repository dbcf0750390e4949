"""The frozen teacher: trained here or loaded strictly, kept in the store, named by the SHA-256 of its weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wmdd import augment, networks, store, weights
from wmdd.arithmetic import Arithmetic
from wmdd.checkpoint import Checkpoint, StopCheck
from wmdd.config import Config
from wmdd.console import progress, say
from wmdd.cost import Meter
from wmdd.data import Dataset, normalise
from wmdd.distributed import Ranks, Team, generator, seed_of
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.files import digest, expect, locked, read_json, read_tensors, sha256, sweep, write_json, write_tensors
from wmdd.networks import FrozenNetwork, Observation
from wmdd.validation import Validation, decode_all


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier whose outputs are the data's classes in order."""

    network: FrozenNetwork
    sha256: str
    """Of its weights file in the store: the teacher's name"""
    facts: dict[str, Any]
    """Network, origin, top-1 and top-5 (fractions) and what they were measured on, seconds of training, bytes"""

    def observe(self, images: Tensor, ranks: Ranks, batch_size: int) -> Observation:
        """Return what the network sees in normalised images [N, channels, H, W], batch by batch, on the CPU."""
        parts = []
        for part in images.split(batch_size):
            shown = part.to(ranks.device).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), ranks.autocast():
                parts.append(self.network(shown))
        joined = {key: torch.cat([getattr(seen, key) for seen in parts]).cpu() for key in vars(parts[0])}
        return Observation(**joined)


def obtain(
    config: Config,
    dataset: Dataset,
    validation: Validation,
    ranks: Ranks,
    stop: Callable[[], bool],
    bound: Mapping[str, Any] | None = None,
) -> Teacher:
    """Return the teacher from the cache; it is trained or imported there first if it is not yet known.

    Args:
        config: network, weights or training.
        dataset: what it is trained on.
        validation: measures it.
        ranks: device and arithmetic.
        stop: whether to leave between two epochs of training.
        bound: what is known of the teacher that images were made with (``Teacher.facts``); it is taken in whatever
            arithmetic it was trained. The same on all ranks.

    Raises:
        InputError: no such network, or weights that do not fit it, or the teacher is not the one that ``bound`` names.
        Interrupted: a stop was requested; training goes on from its checkpoint next time.
    """
    kept = ranks.agree(_kept(bound["sha256"]) if ranks.main and bound else None)
    if kept:
        folder = store.folder("teachers", kept)
    else:
        if bound and (trained := Arithmetic.of(bound.get("arithmetic"))) not in (None, ranks.arithmetic):
            raise InputError(
                f"the images were made with the teacher {bound['sha256'][:12]}, which the cache does not hold; it was"
                f" trained in {trained}, and cannot be trained again in {ranks.arithmetic}; bring it back (WMDD_CACHE)"
            )
        folder, origin = _entry(config, dataset, ranks.arithmetic)
        if not ranks.agree(ranks.main and _whole(folder)):
            _add(config, dataset, validation, ranks, folder, origin, stop)
    if ranks.main:
        store.note_use(folder)
    file, facts = folder / _FILE, folder / _FACTS
    expect([file, facts], stop)
    known = read_json(facts)
    if bound and bound["sha256"] != known["sha256"]:
        raise InputError(
            f"the images were made with the teacher {bound['sha256'][:12]}, the cache now holds"
            f" {known['sha256'][:12]}; bring the first one back (WMDD_CACHE), or use another --out"
        )
    network = _create(config, known["all_outputs"])
    weights.restore(network, read_tensors(file))
    frozen = FrozenNetwork(network, known["outputs"]).to(ranks.device)
    return Teacher(frozen, known["sha256"], known)


def _add(
    config: Config,
    dataset: Dataset,
    validation: Validation,
    ranks: Ranks,
    folder: Path,
    origin: Path | None,
    stop: Callable[[], bool],
) -> None:
    """Put the teacher into the cache, unless another process is faster."""
    if ranks.main:
        store.prepare(folder)
    with locked(folder / ".lock", stop) if ranks.main else nullcontext():
        if ranks.main:
            expect([folder / _FACTS], stop, seconds=0.1)
            sweep(folder)
        if ranks.agree(ranks.main and not _whole(folder)):
            _make(config, dataset, validation, ranks, folder, origin, stop)
        ranks.barrier()


def is_stored(
    config: Config, dataset: Dataset, arithmetics: Sequence[Arithmetic], bound: Mapping[str, Any] | None = None
) -> bool:
    """Return whether the cache holds this teacher in one of these arithmetics; if ``bound`` (``obtain``), that one."""
    if bound:
        return _kept(bound["sha256"]) is not None
    return any(_whole(_entry(config, dataset, arithmetic)[0]) for arithmetic in arithmetics)


def name_of_stored(config: Config, dataset: Dataset, arithmetic: Arithmetic) -> tuple[Path, str | None]:
    """Return the teacher's folder in the store, and the SHA-256 of its weights if it is there."""
    folder, _ = _entry(config, dataset, arithmetic)
    return folder, read_json(folder / _FACTS)["sha256"] if _whole(folder) else None


def _entry(config: Config, dataset: Dataset, arithmetic: Arithmetic) -> tuple[Path, Path | None]:
    """Return the teacher's folder in the cache, and the file it is imported from if it is not trained here."""
    settings = config.teacher
    origin = weights.locate(settings.weights, settings.network)
    made = arithmetic.facts if origin is None else sha256(origin)
    return store.folder("teachers", digest([config.fingerprint("teacher"), dataset.fingerprint, made])), origin


def _kept(sha: str) -> str | None:
    """Return the key under which the cache holds a teacher, whole; None if it does not."""
    for entry in store.entries("teachers"):
        if not entry.current:
            continue
        try:
            found = read_json(entry.path / _FACTS)["sha256"] == sha
        except (WmddError, KeyError, TypeError):
            continue
        if found and _whole(entry.path):
            return entry.key
    return None


def _create(config: Config, classes: int) -> nn.Module:
    data, settings = config.data, config.teacher
    return networks.create(settings.network, classes, data.channels, data.resolution, settings.stem)


_FILE, _FACTS = "teacher.safetensors", "teacher.json"


def _whole(folder: Path) -> bool:
    try:
        return bool(read_json(folder / _FACTS)["sha256"] == sha256(folder / _FILE))
    except (WmddError, OSError, KeyError, TypeError):
        return False


def _import(config: Config, dataset: Dataset, path: Path) -> tuple[nn.Module, list[int] | None]:
    state, names = weights.read(path)
    outputs = weights.output_count(state, path)
    network = _create(config, outputs)
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
    """Train or import the teacher and put it into the store, with what is to be known of it."""
    meter = Meter(ranks.device)
    checkpoint = Checkpoint(folder / "checkpoint.safetensors", folder.name, config.compute.checkpoint_seconds)
    outputs = None
    if origin is None:
        team = ranks.team(config.teacher.ranks, "teacher.ranks")
        if ranks.main and (old := store.of_other_versions()):
            say(f"{store.cache_root()}: {old} entries of another version of wmdd are not used (`wmdd cache list`)")
        if team.index:
            return  # one team trains, the others wait
        network = _train(config, dataset, ranks, team, checkpoint, meter, stop)
    elif ranks.main:
        network, outputs = _import(config, dataset, origin)
    if not ranks.main:
        return
    seconds = meter.read()["seconds"]
    state = network.state_dict()
    accuracy = validation(FrozenNetwork(network, outputs).to(ranks.device).predict)
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
    write_json(folder / _FACTS, facts)  # last: it is what makes the entry count
    checkpoint.remove()
    say(f"teacher {name}: top-1 {accuracy['top1']:.1%} ({validation.on}), SHA-256 {facts['sha256'][:12]}")


def _train(
    config: Config,
    dataset: Dataset,
    ranks: Ranks,
    team: Team,
    checkpoint: Checkpoint,
    meter: Meter,
    stop: Callable[[], bool],
) -> nn.Module:
    """Train on the decoded images with crops and flips, cosine to zero.

    Checkpoints are written when they are due, at a stop, and after the last update: a stop while the teacher is judged
    costs no training.
    """
    settings, data = config.teacher, config.data
    torch.manual_seed(seed_of(settings.seed, "teacher"))
    network = _create(config, len(dataset.classes)).to(ranks.device)
    FrozenNetwork(network)  # refuses a network without BatchNorm before it is trained
    optimizer = _optimizer(network, config)
    batches = -(-len(dataset.train) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    found = checkpoint.load(parts, ranks.device, team)
    done = int(found.get("epoch", 0)) * batches + int(found.get("position", 0))
    meter.include(found.get("spent", {}))
    if done == settings.epochs * batches:
        return network.cpu()

    def decoded() -> Tensor:
        return decode_all(dataset.train, config, "decoding the training images", stop)

    def save() -> None:
        epoch, position = divmod(done, batches)
        checkpoint.save(parts, ranks.device, team, epoch=epoch, position=position, spent=meter.read())

    images = _near(team.together(decoded), ranks.device)
    labels = dataset.train.labels.to(ranks.device)
    example = torch.zeros(2, data.channels, data.resolution, data.resolution, device=ranks.device)
    parallel = ranks.compiled(team.wrap(network.train(), example))
    check = StopCheck(team, stop, checkpoint.due)
    with progress("teacher: training", settings.epochs * batches, "updates") as advance:
        advance(done)
        for epoch in range(done // batches, settings.epochs):
            source = generator(settings.seed, "teacher", epoch)
            order = torch.randperm(len(images), generator=source)
            size, scale = data.resolution, (settings.crop_scale, 1.0)
            draws = augment.draw((len(images),), size, scale, settings.flip, 0, source).to(ranks.device)
            places, classes = order.to(images.device), labels[order.to(ranks.device)]
            for position in range(done % batches, batches):
                stopping, saving = check()
                if stopping or saving:
                    save()
                if stopping:
                    raise Interrupted(f"teacher checkpointed after {done} of {settings.epochs * batches} updates")
                done += 1
                start = position * settings.batch_size
                end = min(start + settings.batch_size, len(images))
                if end - start < 2 * team.size:
                    continue  # BatchNorm cannot train on one image
                own = team.own(start, end)
                shown = augment.warp(normalise(images[places[own]].to(ranks.device), data), draws[own])
                with ranks.autocast():
                    logits = parallel(shown)
                wanted = classes[own]
                smoothing = settings.label_smoothing
                loss = functional.cross_entropy(logits.float(), wanted, label_smoothing=smoothing, reduction="sum")
                optimizer.zero_grad(set_to_none=True)
                (loss * (team.size / (end - start))).backward()
                optimizer.step()
                schedule.step()
                advance(1)
    save()
    return network.cpu()


def _near(images: Tensor, device: torch.device) -> Tensor:
    """Return the images on a GPU if they take up no more than a quarter of its free memory, else where they are.

    Else every batch is copied there, for which the host waits.
    """
    if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4:
        return images.to(device)
    return images


def _optimizer(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    settings = config.teacher
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        network.parameters(),
        settings.lr,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
