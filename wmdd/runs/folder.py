"""The run folder: what is done, what is missing, and where it lies.

RUN/config.json                  the resolved config, its fingerprint, and the data that it is bound to
RUN/arithmetic.json              the arithmetic of its images: that of the first group that was finished
RUN/teacher.json                 the teacher that its images are made with, and what is known of it
RUN/blocks/block-00007.*         one file and one sidecar of each block, written whole
RUN/groups/group-00012.*         finished groups of a block that is not yet whole, and checkpoints of the others
RUN/students/*                   checkpoints of students in training
RUN/manifest.json                derived from the sidecars, never the truth
RUN/records/*.jsonl              what was measured
RUN/logs/*                       what processes said: for people, read by nothing, deleted at any time
RUN/baselines/METHOD/            a run folder of its own
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmdd.config.schema import DECIDES, DEFAULTS, Config, decides
from wmdd.errors import InputError, WmddError
from wmdd.runtime.arithmetic import Arithmetic
from wmdd.storage.files import FORMAT, digest, flatten, locked, read_json, sha256, sweep, write_json


@dataclass(frozen=True)
class RunFolder:
    """Paths and state of one run."""

    path: Path

    def block_file(self, block: int) -> Path:
        """Return the tensors of a block."""
        return self.path / "blocks" / f"block-{block:05d}.safetensors"

    def sidecar_file(self, block: int) -> Path:
        """Return the sidecar of a block."""
        return self.path / "blocks" / f"block-{block:05d}.json"

    def group_file(self, group: int) -> Path:
        """Return the finished images of a group whose block is not yet whole."""
        return self.path / "groups" / f"group-{group:05d}.safetensors"

    def checkpoint_file(self, group: int) -> Path:
        """Return the checkpoint of a group in synthesis."""
        return self.path / "groups" / f"group-{group:05d}.checkpoint.safetensors"

    def student_checkpoint(self, name: str) -> Path:
        """Return the checkpoint of a student in training."""
        return self.path / "students" / f"{name}.checkpoint.safetensors"

    def log_file(self, name: str) -> Path:
        """Return the log of a share of the run."""
        return self.path / "logs" / f"{name}.log"

    def epoch_log(self, name: str) -> Path:
        """Return the log of the epochs of a teacher or a student."""
        return self.path / "logs" / f"{name}.jsonl"

    def locked(self, name: str, stop: Callable[[], bool] = lambda: False) -> AbstractContextManager[None]:
        """Hold a lock of this run (``files.locked``): one process works on a thing, others wait and find it done."""
        return locked(self.path / "locks" / name, stop)

    def sweep(self) -> None:
        """Delete what killed writers have left (``files.sweep``)."""
        sweep(self.path, *(self.path / name for name in ("blocks", "groups", "students", "records", "progress")))

    def bind(self, config: Config, data: str) -> None:
        """Bind the folder to a config and a data set, or check that it is bound to these.

        Raises:
            InputError: the folder belongs to another config, or to something else.
        """
        self.check(config, data)
        path, wanted = self.path / "config.json", _binding(config, data)
        try:
            if path.exists() and read_json(path) == wanted:
                return
        except WmddError:
            pass  # damaged, and nothing was distilled yet
        if not any(self.path.rglob("*.safetensors")):
            (self.path / "arithmetic.json").unlink(missing_ok=True)
        write_json(path, wanted)

    def check(self, config: Config, data: str) -> None:
        """Refuse a folder that cannot be bound to a config and a data set.

        A folder in which nothing was distilled yet may be bound anew: its first config was perhaps a wrong one.

        Raises:
            InputError: the folder belongs to another config; the message names the keys that differ.
        """
        path, wanted = self.path / "config.json", _binding(config, data)
        if path.exists() and any(self.path.rglob("*.safetensors")):
            found = self.bound()
            if found.get("data") != data and found.get("fingerprint") == wanted["fingerprint"]:
                raise InputError(f"{self.path}: was made from other images than those in data.root; use another --out")
            if found.get("fingerprint") != wanted["fingerprint"] or found["config"]["blocks"] != config.blocks:
                keys = ", ".join(_differences(found.get("config", {}), wanted["config"])) or "version"
                raise InputError(f"{self.path}: belongs to another config (differs in {keys}); use another --out")
        elif self.path.exists() and not path.exists() and {entry.name for entry in self.path.iterdir()} - {"locks"}:
            raise InputError(f"{self.path}: is not empty and holds no run (no config.json); use another --out")

    def bound(self) -> dict[str, Any]:
        """Return what the folder is bound to: ``config``, its ``fingerprint``, the fingerprint of the ``data``.

        Raises:
            InputError: it holds no run, or one of another version of the package.
        """
        path = self.path / "config.json"
        if not path.exists():
            raise InputError(f"{self.path}: holds no run (no config.json)")
        found: dict[str, Any] = read_json(path)
        if (written := found.get("format", 1)) != FORMAT:
            raise InputError(
                f"{self.path}: was written by {'an earlier' if written < FORMAT else 'a later'} version of wmdd (format"
                f" {written}, this one has {FORMAT}); use that version for it, or another --out. `wmdd report` reads it"
            )
        return found

    def bind_arithmetic(self, own: Arithmetic) -> None:
        """Bind the folder's images to an arithmetic, unless another process was first, and check that it is this one.

        Raises:
            InputError: they are computed in another one.
        """
        with suppress(FileExistsError):
            write_json(self.path / "arithmetic.json", own.facts, new=True)
        self.check_arithmetic(own)

    def check_arithmetic(self, own: Arithmetic) -> None:
        """Refuse to add images that are computed in another arithmetic.

        Raises:
            InputError: the folder is bound to another one; the message names both.
        """
        path = self.path / "arithmetic.json"
        found = Arithmetic.from_facts(read_json(path)) if path.exists() else own
        if found is None:
            raise InputError(f"{path}: names no arithmetic of this version; use another --out")
        if found != own:
            raise InputError(
                f"{self.path}: its images are computed in {found}, and this process computes in {own}; set"
                f" {found.keys_unlike(own)} on such a device, or use another --out"
            )

    def bound_teacher(self) -> dict[str, Any] | None:
        """Return what is known of the teacher that images here were made with; None if there are none yet."""
        path = self.path / "teacher.json"
        if not path.exists() or not (self.path / "arithmetic.json").exists():
            return None
        found: dict[str, Any] = read_json(path)
        return found

    def sidecar(self, block: int) -> dict[str, Any] | None:
        """Return the sidecar of a finished block, or None when the block is missing or its sidecar is damaged."""
        try:
            found: dict[str, Any] = read_json(self.sidecar_file(block))
        except WmddError:
            return None
        return found if isinstance(found, dict) and {"sha256", "class_sha256"} <= found.keys() else None

    def damaged(self, block: int) -> str | None:
        """Return why the files of a block cannot be believed, or None: they are whole, or the block is missing."""
        path, sidecar = self.block_file(block), self.sidecar(block)
        if sidecar is None:
            return f"{self.sidecar_file(block)}: is not a whole sidecar" if self.sidecar_file(block).exists() else None
        if not path.exists():
            return f"{path}: is gone, its sidecar is there"
        if sha256(path) != sidecar["sha256"]:
            return f"{path}: its SHA-256 is not the one in its sidecar"
        return None

    def merge(self) -> None:
        """Write ``manifest.json`` for people and tools; nothing here reads it, the sidecars are the truth."""
        write_json(self.path / "manifest.json", self.manifest())

    def manifest(self) -> dict[str, Any]:
        """Derive the manifest from the sidecars.

        ``sha256`` names the distilled set: it hangs on the images, labels and weights of each class and not on how
        they were spread over blocks.
        """
        config = self.bound()
        expected = config["config"]["blocks"]
        sidecars = {index: self.sidecar(index) for index in range(expected)}
        present = [sidecar for sidecar in sidecars.values() if sidecar is not None]
        contents = {name: sha for sidecar in present for name, sha in sidecar["class_sha256"].items()}
        return {
            "fingerprint": config["fingerprint"],
            "classes": list(contents),
            "blocks": {f"{index:05d}": sidecar["sha256"] for index, sidecar in sidecars.items() if sidecar},
            "missing": [index for index, sidecar in sidecars.items() if sidecar is None],
            "sha256": digest(list(contents.items())) if len(present) == expected else None,
        }


def _binding(config: Config, data: str) -> dict[str, Any]:
    """Return what ``config.json`` holds."""
    settings = {"config": config.model_dump(mode="json"), "fingerprint": config.fingerprint("images")}
    return {"format": FORMAT, **settings, "data": data}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the keys of two configs that differ and that a folder is bound to: what decides images, and the blocks."""
    one, other = flatten(old), flatten(new)
    keys = [key for key in {**one, **other} if one.get(key, DEFAULTS.get(key)) != other.get(key, DEFAULTS.get(key))]
    return [key for key in keys if key == "blocks" or key not in DECIDES or decides(key, "images")]
