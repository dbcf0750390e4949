"""What lies in run folders and files of records, read once for a report; nothing is computed here.

A report may name run folders, folders that hold them, sweeps (their best run), protocols, files of records, and folders
of such files.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wmdd.errors import InputError, WmddError
from wmdd.records.files import read_records
from wmdd.records.schema import Record, SpeedRecord
from wmdd.report.comparison import REFERENCE
from wmdd.storage.files import read_json

_INSIDE = {"blocks", "groups", "labels", "locks", "logs", "progress", "records", "superseded", "trials"}
"""Folders of a run or a sweep that hold no run."""


@dataclass(frozen=True)
class Run:
    """What one run folder, or one run in a file of records, holds; parts that are absent or damaged are empty."""

    folder: Path
    """The folder, or the file."""
    label: str
    """Its place below the folder that holds all runs of the report."""
    name: str
    """Name in the config; a baseline goes by the name of its owner."""
    owner: Path | None = None
    """Folder of the run that this one is a baseline of."""
    config: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    """What is known of the teacher (``teacher.json``)."""
    blocks: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Sidecars of the blocks whose tensors are there."""
    records: list[Record] = field(default_factory=list)
    speeds: list[SpeedRecord] = field(default_factory=list)

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.config.get("method") or (self.records[0].method if self.records else self.folder.name))

    @property
    def dataset(self) -> str:
        """Name of the dataset, as in records; of a folder, its name."""
        if self.records:
            return self.records[0].dataset
        data = self.config.get("data", {})
        source = str(data.get("source", "?"))
        return Path(data["root"]).name or source if source == "folder" and data.get("root") else source

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the classes by their position, as far as blocks are there."""
        blocks = self.blocks.values()
        return {i: name for one in blocks for i, name in zip(one["class_indices"], one["classes"], strict=False)}

    @property
    def baseline(self) -> bool:
        """Whether other methods are compared with it."""
        return self.owner is not None or self.method == REFERENCE

    @property
    def groups(self) -> list[dict[str, Any]]:
        """What the sidecars say about groups: classes, curve and cost."""
        return [group for _, sidecar in sorted(self.blocks.items()) for group in sidecar.get("groups", ())]

    @property
    def optimized(self) -> bool:
        """Whether the images were optimised; a selection of real images has no loss curve."""
        return any(group.get("curve") for group in self.groups)


@dataclass(frozen=True)
class MissingRun:
    """A run that a protocol asks for and that has not begun."""

    label: str
    method: str
    seed: int | None


def read(places: Sequence[Path], problems: list[str]) -> tuple[list[Run], list[MissingRun]]:
    """Read runs and what protocols still miss; what cannot be read is told in ``problems``, one sentence each.

    Raises:
        InputError: a place does not exist or holds nothing to report.
    """
    folders: dict[Path, None] = {}
    files: dict[Path, None] = {}
    protocols: dict[Path, None] = {}
    for place in places:
        if place.is_file():
            files[place.resolve()] = None
            continue
        if not place.is_dir():
            raise InputError(f"{place}: no such run folder, nor file of records")
        found = list(_find(place.resolve()))
        own_files = [] if found else sorted(place.resolve().glob("*.jsonl"))
        files |= dict.fromkeys(own_files)
        if not found and not own_files:
            sweep = (place / "sweep.json").exists()
            remedy = f"its best trial was not run yet: wmdd sweep best {place}" if sweep else "name the --out of a run"
            raise InputError(f"{place}: holds no run (no config.json, no records/*.jsonl) and no *.jsonl; {remedy}")
        folders |= {folder: None for folder, kind in found if kind == "run"}
        protocols |= {folder: None for folder, kind in found if kind == "protocol"}
    base = _base([*folders, *files, *protocols])
    runs: dict[Path, Run] = {}
    for folder in sorted(folders):  # an owner comes before its baselines
        owner = runs.get(folder.parent.parent) if folder.parent.name == "baselines" else None
        runs[folder] = _read_folder(folder, str(folder.relative_to(base)), owner, problems)
    loose = [run for file in sorted(files) for run in _read_file(file, str(file.relative_to(base)), problems)]
    waiting = [cell for folder in sorted(protocols) for cell in _waiting(folder, base, problems)]
    if not runs and not loose and not waiting:
        remedy = f"; {problems[0]}" if problems else ""
        raise InputError(f"{', '.join(map(str, places))}: no measurement could be read{remedy}")
    # Places below the runs say enough, and a published page should not show a user's home folder.
    problems[:] = [problem.replace(f"{base}{os.sep}", "") for problem in problems]
    return [*runs.values(), *loose], waiting


def _find(top: Path) -> Iterator[tuple[Path, str]]:
    for place, below, files in os.walk(top):
        folder = Path(place)
        run = "config.json" in files or any((folder / "records").glob("*.jsonl"))
        if run:
            yield folder, "run"
        if "protocol.json" in files:
            yield folder, "protocol"
        if run or "sweep.json" in files:
            below[:] = [name for name in below if name not in _INSIDE]


def _base(found: Sequence[Path]) -> Path:
    common = Path(os.path.commonpath(found))
    return common.parent if common in found else common


def _read_folder(folder: Path, label: str, owner: Run | None, problems: list[str]) -> Run:
    config = _load(folder / "config.json", problems).get("config") or {}
    records: list[Record] = []
    speeds: list[SpeedRecord] = []
    if (folder / "records").is_dir():
        records, speeds = _measurements(folder / "records", problems)
    sidecars = [
        path for path in sorted(folder.glob("blocks/block-*.json")) if path.with_suffix(".safetensors").exists()
    ]
    blocks = {int(path.stem.removeprefix("block-")): found for path in sidecars if (found := _load(path, problems))}
    name = owner.name if owner else config.get("name") or (records[0].run if records else folder.name)
    teacher = _load(folder / "teacher.json", problems)
    return Run(folder, label, name, owner.folder if owner else None, config, teacher, blocks, records, speeds)


def _read_file(file: Path, label: str, problems: list[str]) -> Iterator[Run]:
    """Yield the runs of a file of records; a baseline is called RUN/METHOD there, as in its config."""
    records, speeds = _measurements(file, problems)
    by_run: dict[str, list[Record]] = {}
    for record in records:
        by_run.setdefault(record.run, []).append(record)
    for run, own in sorted(by_run.items()):
        name = run.removesuffix(f"/{own[0].method}")
        yield Run(file, f"{label}: {run}", name, file if name != run else None, records=own)
    if speeds:
        yield Run(file, label, file.stem, speeds=speeds)


def _measurements(place: Path, problems: list[str]) -> tuple[list[Record], list[SpeedRecord]]:
    records, unread = read_records(place)
    speeds, _ = read_records(place, SpeedRecord)
    for file in [place] if place.is_file() else sorted(place.glob("*.jsonl")):
        if not file.stat().st_size:
            unread.append(f"{file}: is empty")
    problems += unread
    return records, speeds


def _waiting(folder: Path, base: Path, problems: list[str]) -> Iterator[MissingRun]:
    cells = _load(folder / "protocol.json", problems).get("cells")
    for number, cell in enumerate(cells if isinstance(cells, list) else ()):
        if not isinstance(cell, dict) or not isinstance(cell.get("folder"), str):
            problems.append(f"{folder / 'protocol.json'}: cells.{number}: names no folder")
        elif not (folder / cell["folder"] / "config.json").exists():
            label = os.path.relpath(folder / cell["folder"], base)
            method, name = cell.get("method", "?"), cell.get("name")
            yield MissingRun(label, f"{method} ({name})" if name and name != method else method, cell.get("seed"))


def _load(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = read_json(path) if path.exists() else {}
    except WmddError as error:
        problems.append(str(error))
        return {}
    return value if isinstance(value, dict) else {}
