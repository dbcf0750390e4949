"""A protocol: methods × IPC × distillation seeds × students with one recipe, as a table of runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config, Count, DataConfig, Positive
from wmdd.data.dataset import Dataset, load_dataset
from wmdd.distill.methods import registry
from wmdd.errors import InputError, WmddError, complaint, nearest
from wmdd.records.convergence import with_twice
from wmdd.records.files import read_records
from wmdd.runs.folder import RunFolder
from wmdd.storage.files import read_json, read_toml, write_json
from wmdd.students import evaluate, tasks


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ProtocolRow(_Part):
    """One row of the comparison: a method, and its changes to the common config."""

    method: str
    """Name of the method in the registry."""
    name: str
    """Name of the row in the tables; distinguishes recipes of one method."""
    variant: str | None = None
    """Variant of the config (``paper``, ``upstream``)."""
    overrides: tuple[str, ...] = ()
    """``key=value`` strings for the distillation. Keys that decide the students are an error here: all rows share
    them."""


def _entry(value: Any) -> Any:
    """Return an entry as a table; the name of a method alone is a short form."""
    if isinstance(value, str):
        return {"method": value, "name": value}
    return {"name": value.get("variant") or value.get("method"), **value} if isinstance(value, dict) else value


class Protocol(_Part):
    """A comparison of methods. All methods share the recipe of the students, which comes from the config."""

    name: str
    """Name of the protocol; the default folder of its runs is ``runs/NAME``."""
    config: str
    """Preset, preset with variants, or TOML file: the config that all runs start from."""
    overrides: tuple[str, ...] = ()
    """``key=value`` strings for this config."""
    methods: tuple[Annotated[ProtocolRow, BeforeValidator(_entry)], ...] = Field(min_length=1)
    """Methods of the registry by name, or tables ``{method, name, variant, overrides}``. Other methods are compared
    with ``random``, if it is among them."""
    ipc: tuple[Positive, ...] = Field((1, 10), min_length=1)
    """Images per class."""
    networks: tuple[str, ...] | None = None
    """Architectures of the students; those of the config by default."""
    regimes: tuple[str, ...] | None = None
    """Label regimes of the students; those of the config by default."""
    views: tuple[str, ...] | None = None
    """Views of the students, by default the config's: ``epochs`` (equal number of passes), ``updates`` (equal number of
    optimizer steps), ``plain`` (no augmentation)."""
    distillation_seeds: Positive = 5
    """Number of independent distillations of each method; their seeds are 0 to N−1."""
    convergence_sets: Count = 0
    """Number of sets of each method, from the first, whose students also train twice as long. With three such students
    or more, the report says whether they have converged."""
    teacher_seeds: Positive = 1
    """Number of teachers: 1, or as many as ``distillation_seeds``. With 1, all sets share one teacher, and the results
    hold for this teacher alone. Otherwise each set has its own teacher, the intervals include the variation between
    teachers, and methods are paired by teacher."""
    student_seeds: Positive = 1
    """Number of students for each distilled set, architecture, regime and view. All students of a method have different
    seeds. A method that always selects the same images thus has as many different students as the others."""

    @model_validator(mode="after")
    def _teachers_are_one_or_one_for_each_set(self) -> "Protocol":
        if self.teacher_seeds not in (1, self.distillation_seeds):
            raise ValueError(
                f"teacher_seeds = {self.teacher_seeds}: sets that share one of several teachers are not independent;"
                f" use 1, or one for each of the {self.distillation_seeds} distillation_seeds"
            )
        return self


@dataclass(frozen=True)
class ProtocolRun:
    """One run of the protocol: a method at one IPC and distillation seed, with all its students."""

    folder: Path
    config: Config


def load_protocol(source: str) -> Protocol:
    """Read a shipped protocol by name, or a TOML file.

    Raises:
        InputError: the protocol does not exist, or a key or value is wrong.
    """
    shipped = resources.files("bench") / "protocols"
    names = sorted(entry.name.removesuffix(".toml") for entry in shipped.iterdir())
    if source.endswith(".toml"):
        place: Traversable = Path(source)
    elif source in names:
        place = shipped / f"{source}.toml"
    else:
        raise InputError(f"{source}: no protocol of that name; {nearest(source, names)} (a file's name ends in .toml)")
    try:
        return Protocol.model_validate(read_toml(place, source))
    except ValidationError as error:
        first = error.errors()[0]
        valid = list(ProtocolRow.model_fields if first["loc"][:1] == ("methods",) else Protocol.model_fields)
        raise InputError(f"{source}: {complaint(first, valid)}") from None


def folders(protocols: Sequence[Protocol], out: Path | None) -> list[Path]:
    """Return the folder of each protocol's runs: ``out`` for a single protocol, else ``out/NAME``.

    Raises:
        InputError: two protocols have the same name, and would share a folder.
    """
    if twice := [name for name, count in Counter(one.name for one in protocols).items() if count > 1]:
        raise InputError(f"two protocols have the name {twice[0]!r}; rename one")
    if out and len(protocols) == 1:
        return [out]
    return [(out or Path("runs")) / one.name for one in protocols]


def cells(protocol: Protocol, out: Path, overrides: Sequence[str] = ()) -> list[ProtocolRun]:
    """Return the runs of a protocol, sorted by IPC, then seed, then method.

    A stopped protocol thus compares all methods, with the sets that are done.

    Args:
        protocol: protocol to run.
        out: folder of the runs.
        overrides: ``key=value`` strings for all runs, such as ``data.root=...``.

    Raises:
        InputError: a config or a method is wrong, or an entry changes a key that decides the students.
    """
    if twice := [name for name, count in Counter(entry.name for entry in protocol.methods).items() if count > 1]:
        raise InputError(f"methods: two entries have the name {twice[0]!r}; rename one")
    common = [*protocol.overrides, *overrides, "student.baselines=[]"]
    for key, chosen in (
        ("student.networks", protocol.networks),
        ("labels.regimes", protocol.regimes),
        ("student.views", protocol.views),
    ):
        common += [f"{key}={list(chosen)}"] if chosen else []
    made = []
    for ipc, seed, entry in product(protocol.ipc, range(protocol.distillation_seeds), protocol.methods):
        students = f"student.seeds={protocol.student_seeds}", f"student.first_seed={seed * protocol.student_seeds}"
        varied = [f"ipc={ipc}", f"seed={seed}", *students]
        if protocol.teacher_seeds > 1:
            varied.append(f"teacher.seed={load_config(protocol.config, common).teacher.seed + seed}")
        if seed < protocol.convergence_sets:
            own_views = load_config(protocol.config, common).student.views
            varied += [f"student.views={list(with_twice(own_views))}"]
        source = f"{protocol.config}+{entry.variant}" if entry.variant else protocol.config
        own = [*entry.overrides, f"method={entry.method}", f"name={entry.name}"]
        config = load_config(source, [*common, *own, *varied])
        _check(entry, config, load_config(protocol.config, [*common, *varied]))
        made.append(ProtocolRun(out / f"ipc-{ipc:03d}" / entry.name / f"seed-{seed:03d}", config))
    for entry in protocol.methods:
        registry.create(made[0].config, entry.method)
    return made


def _check(entry: ProtocolRow, config: Config, plain: Config) -> None:
    """Check that an entry changes neither dataset, teacher, labels, students nor compute."""
    for section in ("data", "teacher", "labels", "student", "compute"):
        ours, theirs = (getattr(one, section).model_dump() for one in (config, plain))
        if unlike := [key for key in ours if ours[key] != theirs[key]]:
            raise InputError(
                f"methods: {entry.name}: changes {section}.{unlike[0]}, which all methods share; set it in the"
                " overrides of the protocol"
            )


def check(table: Sequence[ProtocolRun]) -> list[ProtocolRun]:
    """Check all runs, and return those that are not finished.

    Args:
        table: runs of one or several protocols, in the order of the work.

    Raises:
        InputError: the dataset is missing, a class has too few images, or a network or method does not exist.
    """
    datasets: dict[DataConfig, Dataset] = {}
    for cell in table:
        if cell.config.data not in datasets:
            datasets[cell.config.data] = load_dataset(cell.config.data, cell.config.compute.workers)
        if cell.config.seed == 0:
            pipeline.check(cell.config, datasets[cell.config.data])
    return [cell for cell in table if not _finished(cell, datasets[cell.config.data])]


def _finished(cell: ProtocolRun, dataset: Dataset) -> bool:
    """Return whether a run has all its records, which are all that a comparison needs.

    Images that stayed on another machine are thus not distilled again.
    """
    try:
        bound = read_json(cell.folder / "config.json")["data"]
    except (WmddError, KeyError, TypeError):
        return False
    return bound == dataset.fingerprint and not students_left(cell, len(dataset.classes))


def students_left(cell: ProtocolRun, classes: int) -> list[tasks.StudentTask]:
    """Return the students of a run, with ``classes`` classes, that have no record of this config."""
    config, folder = cell.config, RunFolder(cell.folder)
    images = classes * config.ipc

    def known(task: tasks.StudentTask) -> bool:
        file = evaluate.record_file(folder, task)
        records = read_records(file)[0] if file.exists() else []
        own = [one for one in records if one.config == config.fingerprint("images")]
        return any(evaluate.is_of_recipe(one, config, images) for one in own)

    return [task for task in tasks.student_tasks(config.student, config.labels.regimes) if not known(task)]


def write_plan(protocol: Protocol, table: Sequence[ProtocolRun], out: Path) -> None:
    """Write the list of runs of a protocol, so that a report can name missing ones."""
    rows = [
        {
            "folder": str(cell.folder.relative_to(out)),
            "method": cell.config.method,
            "name": cell.config.name,
            "ipc": cell.config.ipc,
            "seed": cell.config.seed,
        }
        for cell in table
    ]
    write_json(out / "protocol.json", {"name": protocol.name, "protocol": protocol.model_dump(), "cells": rows})
