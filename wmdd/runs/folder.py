"""The run folder: its files, and what they say about the state of the run.

RUN/config.json                  resolved config, its fingerprint, and the fingerprint of the dataset
RUN/arithmetic.json              arithmetic of the images, bound by the first finished group
RUN/teacher.json                 SHA-256, accuracy and cost of the teacher
RUN/blocks/block-00007.*         one file and one sidecar for each block, written whole
RUN/groups/group-00012.*         finished groups of incomplete blocks, and checkpoints of the others
RUN/students/*                   checkpoints of students in training
RUN/manifest.json                derived from the sidecars; nothing reads it
RUN/records/*.jsonl              results of the students
RUN/progress/*                   what each process is doing, for ``wmdd status``
RUN/locks/*                      one lock for each block, group and student at work
RUN/logs/*                       logs for people; no program reads them, and they may be deleted at any time
RUN/baselines/METHOD/            run folder of a baseline
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmdd.config.schema import DECIDES, DEFAULTS, Config, decides
from wmdd.errors import InputError, WmddError
from wmdd.runtime.arithmetic import ENGINE, Arithmetic
from wmdd.storage.files import FORMAT, digest, flatten, locked, read_json, sha256, sweep, write_json


@dataclass(frozen=True)
class RunFolder:
    """Paths and state of one run."""

    path: Path

    def block_file(self, block: int) -> Path:
        """Return the path of a block's tensors."""
        return self.path / "blocks" / f"block-{block:05d}.safetensors"

    def sidecar_file(self, block: int) -> Path:
        """Return the path of a block's sidecar."""
        return self.path / "blocks" / f"block-{block:05d}.json"

    def group_file(self, group: int) -> Path:
        """Return the path of a finished group, which exists until its block is complete."""
        return self.path / "groups" / f"group-{group:05d}.safetensors"

    def checkpoint_file(self, group: int) -> Path:
        """Return the path of the checkpoint of a group in synthesis."""
        return self.path / "groups" / f"group-{group:05d}.checkpoint.safetensors"

    def student_checkpoint(self, name: str) -> Path:
        """Return the path of the checkpoint of a student in training."""
        return self.path / "students" / f"{name}.checkpoint.safetensors"

    def log_file(self, name: str) -> Path:
        """Return the path of the log of a share of the run."""
        return self.path / "logs" / f"{name}.log"

    def epoch_log(self, name: str) -> Path:
        """Return the log of the epochs of a teacher or a student."""
        return self.path / "logs" / f"{name}.jsonl"

    def locked(self, name: str, stop: Callable[[], bool] = lambda: False) -> AbstractContextManager[None]:
        """Hold a lock of this run (``files.locked``): one process does the work, the others wait and find it done."""
        return locked(self.lock_file(name), stop)

    def lock_file(self, name: str) -> Path:
        """Return the path of a lock file."""
        return self.path / "locks" / name

    def sweep(self) -> None:
        """Delete the temporary files of killed processes (``files.sweep``)."""
        sweep(self.path, *(self.path / name for name in ("blocks", "groups", "students", "records", "progress")))

    def bind(self, config: Config, data: str) -> None:
        """Bind the folder to a config and a dataset, or check that it is bound to them.

        Raises:
            InputError: the folder belongs to another config or dataset, or contains something else.
        """
        self.check(config, data)
        path, wanted = self.path / "config.json", _binding(config, data)
        if _contains(path, wanted):
            return
        if not self._has_images():
            (self.path / "arithmetic.json").unlink(missing_ok=True)
        write_json(path, wanted)

    def _has_images(self) -> bool:
        """Return whether a block, a group or a checkpoint of a group exists.  Only their two folders are listed."""
        for name in ("blocks", "groups"):
            with suppress(FileNotFoundError), os.scandir(self.path / name) as entries:
                if any(entry.name.endswith(".safetensors") for entry in entries):
                    return True
        return False

    def _has_files(self) -> bool:
        """Return whether the folder has files other than locks and those that a process is writing."""
        names = [entry.name for entry in self.path.iterdir()]
        return any(name != "locks" and not name.endswith(".tmp") for name in names)

    def check(self, config: Config, data: str) -> None:
        """Check that the folder can be bound to a config and a dataset.

        A folder without distilled images may be bound again: its first config was perhaps a mistake.

        Raises:
            InputError: the folder belongs to another config. The message names the differing keys.
        """
        path, wanted = self.path / "config.json", _binding(config, data)
        if path.exists() and self._has_images():
            found = self.bound()
            if found.get("data") != data and found.get("fingerprint") == wanted["fingerprint"]:
                raise InputError(f"{self.path}: was made from other images than those of data.root; use another --out")
            if found.get("fingerprint") != wanted["fingerprint"] or found["config"]["blocks"] != config.blocks:
                keys = ", ".join(_differences(found.get("config", {}), wanted["config"])) or "version"
                raise InputError(f"{self.path}: belongs to another config (differs in {keys}); use another --out")
        # Another process may bind the folder right now. Its binding is its first file, so it is looked for last.
        elif self.path.exists() and self._has_files() and not path.exists():
            raise InputError(f"{self.path}: is not empty and holds no run (no config.json); use another --out")

    def bound(self) -> dict[str, Any]:
        """Return the folder's binding: ``config``, its ``fingerprint``, and ``data``, the fingerprint of the dataset.

        Raises:
            InputError: the folder contains no run, or a run of another version of the package.
        """
        path = self.path / "config.json"
        if not path.exists():
            raise InputError(f"{self.path}: holds no run (no config.json)")
        found: dict[str, Any] = read_json(path)
        if (written := found.get("format", 1)) != FORMAT:
            raise InputError(
                f"{self.path}: was written by {'an earlier' if written < FORMAT else 'a later'} version of wmdd (format"
                f" {written}, this version has {FORMAT}); use that version, or another --out. `wmdd report` can read it"
            )
        return found

    def bind_arithmetic(self, own: Arithmetic) -> None:
        """Bind the folder's images to an arithmetic, or check that they are bound to it.

        Raises:
            InputError: the images are computed in another arithmetic.
        """
        with suppress(FileExistsError):
            write_json(self.path / "arithmetic.json", own.facts | {"engine": ENGINE}, new=True)
        self.check_arithmetic(own)

    def check_arithmetic(self, own: Arithmetic) -> None:
        """Check that the folder's images have this arithmetic, or none yet.

        Raises:
            InputError: the folder is bound to another arithmetic, or to another engine. The message names both.
        """
        path = self.path / "arithmetic.json"
        facts = read_json(path) if path.exists() else own.facts | {"engine": ENGINE}
        if (engine := facts.pop("engine", 1)) != ENGINE:
            raise InputError(
                f"{self.path}: its first images were made by another version of wmdd, whose engine rounds differently"
                f" (engine {engine}, this version has {ENGINE}); use that version, or another --out"
            )
        found = Arithmetic.from_facts(facts)
        if found is None:
            raise InputError(f"{path}: contains no arithmetic of this version; use another --out")
        if found != own:
            raise InputError(
                f"{self.path}: its images are computed in {found}, and this process computes in {own}; set"
                f" {found.keys_unlike(own)} on such a device, or use another --out"
            )

    def keep_teacher(self, facts: dict[str, Any]) -> None:
        """Write ``teacher.json``, unless it has these facts already."""
        _keep(self.path / "teacher.json", facts)

    def bound_teacher(self) -> dict[str, Any] | None:
        """Return the facts of the teacher of this folder's images; None without images."""
        path = self.path / "teacher.json"
        if not path.exists() or not (self.path / "arithmetic.json").exists():
            return None
        found: dict[str, Any] = read_json(path)
        return found

    def sidecar(self, block: int) -> dict[str, Any] | None:
        """Return the sidecar of a finished block; None if the block is missing or its sidecar is damaged."""
        try:
            found: dict[str, Any] = read_json(self.sidecar_file(block))
        except WmddError:
            return None
        return found if isinstance(found, dict) and {"sha256", "class_sha256"} <= found.keys() else None

    def damaged(self, block: int) -> str | None:
        """Return the damage of a block's files; None if they are intact or the block is missing."""
        path, sidecar = self.block_file(block), self.sidecar(block)
        if sidecar is None:
            return f"{self.sidecar_file(block)}: is damaged" if self.sidecar_file(block).exists() else None
        if not path.exists():
            return f"{path}: is missing, but its sidecar exists"
        if sha256(path) != sidecar["sha256"]:
            return f"{path}: its SHA-256 differs from the one in its sidecar"
        return None

    def merge(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest to ``manifest.json``, unless the file has this content already.

        The file is for people and other tools. This package reads only the sidecars.
        """
        _keep(self.path / "manifest.json", manifest)

    def manifest(self) -> dict[str, Any]:
        """Derive the manifest from the sidecars, each of which is read once.

        ``sha256`` identifies the distilled set. It depends on the images, labels and weights of each class, not on the
        blocks. ``seeded`` says whether another seed gives other images, ``arithmetics`` which blocks were computed how.
        """
        config = self.bound()
        expected = config["config"]["blocks"]
        sidecars = {index: self.sidecar(index) for index in range(expected)}
        present = [sidecar for sidecar in sidecars.values() if sidecar is not None]
        contents = {name: sha for sidecar in present for name, sha in sidecar["class_sha256"].items()}
        arithmetics: dict[str, list[int]] = {}
        for index, sidecar in sidecars.items():
            if sidecar is not None:
                used = Arithmetic.from_facts(sidecar.get("arithmetic"))
                arithmetics.setdefault(str(used or "an unknown arithmetic"), []).append(index)
        return {
            "fingerprint": config["fingerprint"],
            "classes": list(contents),
            "blocks": {f"{index:05d}": sidecar["sha256"] for index, sidecar in sidecars.items() if sidecar},
            "missing": [index for index, sidecar in sidecars.items() if sidecar is None],
            "seeded": all(sidecar.get("seeded", True) for sidecar in present),
            "arithmetics": arithmetics,
            "sha256": digest(list(contents.items())) if len(present) == expected else None,
        }


def _contains(path: Path, value: Mapping[str, Any]) -> bool:
    """Return whether a JSON file has this content; False if it is absent or damaged."""
    try:
        return bool(read_json(path) == value)
    except WmddError:
        return False


def _keep(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, unless it has this content already: a thousand tasks share the folder."""
    if not _contains(path, value):
        write_json(path, value)


def _binding(config: Config, data: str) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    settings = {"config": config.model_dump(mode="json"), "fingerprint": config.fingerprint("images")}
    return {"format": FORMAT, **settings, "data": data}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differing keys of two configs that bind a folder: ``blocks``, and the keys that decide images."""
    one, other = flatten(old), flatten(new)
    keys = [key for key in {**one, **other} if one.get(key, DEFAULTS.get(key)) != other.get(key, DEFAULTS.get(key))]
    return [key for key in keys if key == "blocks" or key not in DECIDES or decides(key, "images")]
