"""The checkpoint of a group in synthesis, and the file of a finished group."""

import json
from collections.abc import Mapping
from typing import Any

from wmdd.distill.job import Job
from wmdd.distill.synthesis.engine import State
from wmdd.networks.checkpoint import is_of, marked
from wmdd.runs.partition import Group
from wmdd.storage.files import digest, read_metadata, read_tensors, write_tensors


def identity(job: Job) -> dict[str, str]:
    """Return what a group and its checkpoint must belong to: config, images and teacher as ``run``; the arithmetic."""
    run = digest([job.config.fingerprint("images"), job.dataset.fingerprint, job.teacher.sha256])
    return {"run": run, "arithmetic": marked(job.ranks.arithmetic)}


def write_checkpoint(job: Job, group: Group, state: State, spent: Mapping[str, float]) -> None:
    """Write where the synthesis of a group stands, and what it took so far."""
    tensors = {"images": state.images}
    if state.first is not None and state.second is not None:
        tensors |= {"first": state.first, "second": state.second}
    reached = {"iteration": str(state.iteration), "curve": json.dumps(state.curve), "spent": json.dumps(spent)}
    meta = reached | identity(job)
    write_tensors(job.folder.checkpoint_file(group.index), tensors, meta)


def read_checkpoint(job: Job, group: Group) -> tuple[State | None, dict[str, float]]:
    """Return where the synthesis of a group stands and what it took so far; None and nothing when it begins."""
    path = job.folder.checkpoint_file(group.index)
    meta = read_metadata(path)
    if "run" not in meta or not is_of(job.ranks.arithmetic, meta, f"group {group.index} begins anew"):
        return None, {}
    if meta["run"] != identity(job)["run"]:
        return None, {}
    tensors, curve = read_tensors(path), json.loads(meta["curve"])
    moments = tensors.get("first"), tensors.get("second")
    return State(tensors["images"], int(meta["iteration"]), *moments, curve), json.loads(meta.get("spent", "{}"))


def finished_group(job: Job, group: Group) -> dict[str, Any] | None:
    """Return what is known of a finished group whose block is not yet whole."""
    meta = read_metadata(job.folder.group_file(group.index))
    return json.loads(meta["group"]) if "group" in meta and identity(job).items() <= meta.items() else None
