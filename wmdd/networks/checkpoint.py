"""Checkpoints: the state that a training loop needs to resume exactly, and the time of the next checkpoint."""

import functools
import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmdd.errors import WmddError
from wmdd.networks.weights import restore
from wmdd.runtime.arithmetic import Arithmetic
from wmdd.runtime.team import Team
from wmdd.storage.files import read_metadata, read_tensors, write_tensors

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0
"""Target time between two checks of a team, in seconds: half of the two seconds within which it must notice a stop."""


class Clock:
    """Decides when a checkpoint is due.  Random jitter keeps a thousand tasks from writing at the same time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Start the time until the next checkpoint."""
        self._next = time.monotonic() + self._seconds * random.uniform(0.9, 1.1)

    def due(self) -> bool:
        """Return whether a checkpoint is due."""
        return time.monotonic() >= self._next


class StopCheck:
    """Decides for all ranks of a team, before the same update, whether to stop and whether to write a checkpoint.

    A single rank checks before every update.  The ranks of a team exchange their flags about once a second.  The first
    rank measures the duration of updates, and announces in each exchange the number of updates until the next one.

    Args:
        team: ranks that call this together, before every update.
        stop: returns whether this rank was asked to stop.
        due: returns whether this rank wants a checkpoint.
    """

    def __init__(self, team: Team, stop: Callable[[], bool], due: Callable[[], bool]) -> None:
        self._team, self._stop, self._due = team, stop, due
        self._every = self._left = 1
        self._looked = time.monotonic()

    def __call__(self) -> tuple[bool, bool]:
        """Return whether to stop, and whether to write a checkpoint; the same on every rank."""
        if self._team.size == 1:
            return self._stop(), self._due()
        self._left -= 1
        if self._left:
            return False, False
        now = time.monotonic()
        wanted = until_next_look(self._every, now - self._looked) if self._team.rank == 0 else 0
        self._looked = now
        flags = torch.tensor([self._stop(), self._due(), wanted], dtype=torch.float64)
        stopping, saving, every = self._team.sum(flags).tolist()
        self._every = self._left = int(every)
        return stopping > 0, saving > 0


def until_next_look(updates: int, seconds: float) -> int:
    """Return the number of updates until a team checks again, if the last ``updates`` took ``seconds``.

    It at most doubles, because the first updates of a process are slow and say little about later ones.
    """
    return max(1, min(2 * updates, int(updates * _CHECK_SECONDS / max(seconds, 1e-6))))


class Checkpoint:
    """The state of a training loop before an update, in one file.

    BatchNorm buffers are the first rank's: those of the others are overwritten before each forward pass.

    Args:
        path: path of the file.
        owner: digest of what is being trained. A checkpoint with another owner is ignored.
        seconds: seconds between two checkpoints.
        arithmetic: arithmetic of the training. A checkpoint of another arithmetic is ignored.
    """

    def __init__(self, path: Path, owner: str, seconds: float, arithmetic: Arithmetic | None = None) -> None:
        self._path, self._owner, self._clock, self._arithmetic = path, owner, Clock(seconds), arithmetic

    def due(self) -> bool:
        """Return whether a checkpoint is due, by this rank's clock."""
        return self._clock.due()

    def save(self, parts: Mapping[str, Any], device: torch.device, team: Team, **facts: Any) -> None:
        """Write the states of networks, optimizers, schedules and torch's random generators, with some facts (numbers).

        All ranks of the team call it; the first rank writes.

        Raises:
            WmddError: the disk is full or the folder is not writable.
        """
        self._clock.restart()
        # Dropout uses these generators; each rank has its own state.
        numbers = [team.gather(torch.get_rng_state())]
        numbers += [team.gather(torch.cuda.get_rng_state(device))] if device.type == "cuda" else []
        if team.rank:
            return
        states = {name: part.state_dict() for name, part in parts.items()}
        tensors: dict[str, Tensor] = {}
        content = _pack({"states": states, "random": numbers, "facts": facts}, tensors)
        meta = {"owner": self._owner, "arithmetic": marked(self._arithmetic), "content": json.dumps(content)}
        write_tensors(self._path, tensors, meta)

    def load(self, parts: Mapping[str, Any], device: torch.device, team: Team) -> dict[str, Any]:
        """Restore the states of the parts and return the saved facts; {} if there is no checkpoint.

        Raises:
            WmddError: the ranks of the team see different files.
        """
        found = self._read()
        facts: dict[str, Any] = found["facts"] if found else {}
        if not all([team.alike(facts.get(key, -1)) for key in ("epoch", "position")]):
            raise WmddError(f"{self._path}: not every rank sees the same checkpoint; start the same command again")
        if not found:
            return {}
        for name, part in parts.items():
            load = functools.partial(restore, part) if isinstance(part, nn.Module) else part.load_state_dict
            load(found["states"][name])
        torch.set_rng_state(found["random"][0][team.rank])
        if device.type == "cuda" and len(found["random"]) > 1:
            torch.cuda.set_rng_state(found["random"][1][team.rank], device)
        return facts

    def remove(self) -> None:
        """Delete the checkpoint of finished work."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        meta = read_metadata(self._path)
        if meta.get("owner") == self._owner and is_of(self._arithmetic, meta, f"{self._path}: training starts again"):
            found: dict[str, Any] = _unpack(json.loads(meta["content"]), read_tensors(self._path))
            return found
        if not meta and self._path.exists():
            logger.warning(f"{self._path}: is damaged; training starts again")
        return {}


def marked(arithmetic: Arithmetic | None) -> str:
    """Return an arithmetic in the form of a file's metadata."""
    return json.dumps(arithmetic and arithmetic.facts, sort_keys=True)


def is_of(arithmetic: Arithmetic | None, meta: Mapping[str, str], otherwise: str) -> bool:
    """Return whether a checkpoint has this arithmetic.  If not, log a warning that begins with ``otherwise``."""
    if meta.get("arithmetic") == marked(arithmetic):
        return True
    other = Arithmetic.from_facts(json.loads(meta.get("arithmetic", "null")))
    logger.warning(
        f"{otherwise}: its checkpoint was computed in {other or 'an unknown arithmetic'}, this is {arithmetic}"
    )
    return False


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a tree of dicts and lists as a JSON value; move its tensors to ``tensors``."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name, "stride": value.stride()}
    if isinstance(value, dict):
        return {"items": [[key, _pack(item, tensors)] for key, item in value.items()]}  # keys may be numbers
    if isinstance(value, list | tuple):
        return [_pack(item, tensors) for item in value]
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {key: _unpack(item, tensors) for key, item in value["items"]}
    # Fused optimizers need a weight and its moments in the same layout.
    stored = tensors[value["tensor"]]
    return torch.empty_strided(stored.shape, value["stride"], dtype=stored.dtype).copy_(stored)
