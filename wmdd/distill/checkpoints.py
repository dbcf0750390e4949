"""The checkpoint of a group in synthesis, and the file of a finished group."""

import json
from collections.abc import Mapping
from typing import Any

from wmdd.distill.synthesis.engine import State
from wmdd.networks.checkpoint import is_of, marked
from wmdd.runs.class_partition import Group
from wmdd.runs.folder import RunFolder
from wmdd.runtime.arithmetic import ENGINE
from wmdd.session import Session
from wmdd.storage.files import digest, read_metadata, read_tensors, write_tensors


def identity(session: Session) -> dict[str, str]:
    """Return the marks of this run for groups and checkpoints: ``run`` and arithmetic.

    ``run`` is a digest of config, dataset, teacher and version of the engine.
    """
    images = session.config.fingerprint("images")
    run = digest([images, session.dataset.fingerprint, session.teacher.sha256, ENGINE])
    return {"run": run, "arithmetic": marked(session.ranks.arithmetic)}


def write_checkpoint(
    session: Session, folder: RunFolder, group: Group, state: State, spent: Mapping[str, float]
) -> None:
    """Write the state of a group in synthesis, and its cost so far."""
    tensors = {"images": state.images}
    if state.first is not None and state.second is not None:
        tensors |= {"first": state.first, "second": state.second}
    reached = {"iteration": str(state.iteration), "curve": json.dumps(state.curve), "spent": json.dumps(spent)}
    meta = reached | identity(session)
    write_tensors(folder.checkpoint_file(group.index), tensors, meta)


def read_checkpoint(session: Session, folder: RunFolder, group: Group) -> tuple[State | None, dict[str, float]]:
    """Return the state of a group in synthesis, and its cost so far; (None, {}) without a checkpoint of this run."""
    path = folder.checkpoint_file(group.index)
    meta = read_metadata(path)
    if "run" not in meta or not is_of(session.ranks.arithmetic, meta, f"group {group.index} starts again"):
        return None, {}
    if meta["run"] != identity(session)["run"]:
        return None, {}
    tensors, curve = read_tensors(path), json.loads(meta["curve"])
    moments = tensors.get("first"), tensors.get("second")
    return State(tensors["images"], int(meta["iteration"]), *moments, curve), json.loads(meta.get("spent", "{}"))


def finished_group(session: Session, folder: RunFolder, group: Group) -> dict[str, Any] | None:
    """Return the metadata of a finished group whose block is not complete; None if the group is not finished."""
    meta = read_metadata(folder.group_file(group.index))
    return json.loads(meta["group"]) if "group" in meta and identity(session).items() <= meta.items() else None
