"""What was measured: one JSON line a measurement, one schema, and the circumstances under which it was taken."""

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from wmdd.arithmetic import Arithmetic
from wmdd.config import DEFAULTS, Compute, Count, Positive, decides
from wmdd.errors import InputError
from wmdd.files import digest, flatten, write_bytes
from wmdd.placement import placement_of

Sha = Annotated[str, Field(min_length=1)]


class Measurement(BaseModel):
    """What every line of a file of records has."""

    # A student that diverged has a loss of NaN; as a string it stays JSON and is read back as a float.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")

    schema_version: Literal[1] = 1
    """Version of these fields."""
    time: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    """When it was finished, UTC."""
    provenance: dict[str, Any] = {}
    """Code, versions, hardware and job (``provenance``)."""


class Record(Measurement):
    """An accuracy, with all that is needed to trace it and to know what it may be compared with."""

    kind: Literal["student", "teacher", "distillation"]
    """What was measured."""
    run: str
    """Name of the run, as in its config."""
    dataset: str
    """Name of the data set."""
    classes: Positive
    """Number of classes that were told apart."""
    resolution: Positive
    """Height and width of the images, in pixels."""
    method: str
    """Name of the method in the registry."""
    ipc: Positive | None = None
    """Images per class; None on the whole training set."""
    network: str
    """The network that was measured; for a distillation, the teacher's."""
    regime: Literal["hard", "soft", "stored", "budget"] | None = None
    """Labels that the student learned from (``labels.regimes``)."""
    view: Literal["epochs", "updates", "plain"] = "epochs"
    """How long the student trained and on what (``student.views``)."""
    distillation_seed: Count | None = None
    """Seed of the distilled images."""
    student_seed: Count | None = None
    """Seed of the student."""
    evaluated_on: Literal["test", "holdout"]
    """The images that it was measured on."""
    metrics: dict[str, float]
    """``top1`` and ``top5`` as fractions, ``loss`` in nats, and whatever else was measured."""
    recipe: dict[str, Any]
    """What must agree before two records are averaged or compared: epochs, updates, batch_size, checkpoint, lr,
    temperature, the teacher's SHA-256, the student's arithmetic."""
    protocol: Sha
    """Fingerprint of ``recipe`` (``protocol_of``)."""
    config: Sha
    """Fingerprint of the distillation's config (``Config.fingerprint``)."""
    artefact: Sha | None = None
    """SHA-256 of the distilled set's manifest, or of the teacher's weights."""
    cost: dict[str, float] = {}
    """What it took (``wmdd.cost``): seconds, device_seconds, peak_bytes, joules; of a student also updates,
    labelling_flops and the bytes on disk of what it learned from: image_bytes, label_bytes, teacher_bytes (online)."""

    @model_validator(mode="after")
    def _complete(self) -> "Record":
        for key in ("top1", "top5"):
            if self.metrics.get(key, 0) < 0 or self.metrics.get(key, 0) > 1:
                raise ValueError(f"metrics.{key} is {self.metrics[key]}; accuracies are fractions from 0 to 1")
        if self.kind == "student":
            for field in ("ipc", "regime", "distillation_seed", "student_seed"):
                if getattr(self, field) is None:
                    raise ValueError(f"a student's record needs {field}")
            if "top1" not in self.metrics:
                raise ValueError("a student's record needs metrics.top1")
        return self


class Speed(Measurement):
    """A speed: one stage of the work on so many ranks, by one engine."""

    kind: Literal["throughput", "scaling"]
    """One engine on one set of ranks, or one point of a study over their number."""
    stage: Literal["synthesis", "statistics", "students", "barycenters"]
    """What was timed."""
    engine: str
    """``wmdd``, or what it is held against: ``reference`` (the method written plainly), ``pot``."""
    dataset: str
    """Name of the data set; generated images are called ``synthetic``."""
    network: str | None = None
    """The network that computed."""
    resolution: Positive | None = None
    """Height and width of the images, in pixels."""
    ranks: Positive = 1
    """Processes that worked together."""
    mode: Literal["strong", "weak"] | None = None
    """Of a scaling study: the same work on every number of ranks, or as much for each rank."""
    unit: str
    """Of ``rate``: ``img·iter/s``, ``img/s``, ``students/h``, ``classes/s``."""
    metrics: dict[str, float]
    """``rate`` (median over repeats), ``rate_low``, ``rate_high``, ``repeats``, ``seconds``, ``p50``, ``p90`` (of a
    step, in seconds), ``peak_bytes``, ``mfu`` (against a measured peak); ``ratio``, ``ratio_low``, ``ratio_high`` to
    the engine that the same command timed as its baseline; ``efficiency`` of a scaling study."""
    setup: dict[str, Any]
    """What two speeds must share to be compared: batch, precision, threads, compile, iterations, classes, ipc."""


Line = TypeVar("Line", Record, Speed)
_LINE: TypeAdapter[Record | Speed] = TypeAdapter(Annotated[Record | Speed, Field(discriminator="kind")])


def provenance(compute: Compute, arithmetic: Arithmetic | None = None) -> dict[str, Any]:
    """Return the circumstances of a measurement taken now in this process; the host's name is left out.

    ``precision`` is what was resolved if ``arithmetic`` is given, else what was asked for.

    ``revision`` is the commit of the checkout that the package runs from and ``dirty`` whether tracked files differ
    from it; both are None for an installed package.
    """
    import torch

    cuda = torch.cuda.is_available() and compute.device != "cpu"
    revision, dirty = _checkout()
    job = {
        "job": os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID")),
        "task": os.environ.get("SLURM_ARRAY_TASK_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT"),
    }
    return {
        "revision": revision,
        "dirty": dirty,
        "wmdd": metadata.version("wmdd"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(compute.device if ":" in compute.device else None) if cuda else "cpu",
        "cpu": _cpu(),
        "world_size": placement_of(os.environ).size,
        "threads": compute.threads,
        "precision": arithmetic.precision if arithmetic else compute.precision,
        "slurm": {key: value for key, value in job.items() if value is not None} or None,
    }


def append(path: Path, record: Record | Speed) -> None:
    """Add one line to a file; the whole file is written anew, so that a reader never meets half a line.

    One process writes a file: give each task a file of its own.

    Raises:
        WmddError: the file cannot be written.
    """
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_bytes(path, before + _line(record))


def write_records(path: Path, records: Iterable[Record | Speed]) -> None:
    """Write a file of records, whole or not at all.

    Raises:
        WmddError: the file cannot be written.
    """
    write_bytes(path, b"".join(_line(record) for record in records))


def read_records(
    path: Path,
    kind: type[Line] = Record,  # type: ignore[assignment]  # a default narrower than its type variable
) -> tuple[list[Line], list[str]]:
    """Read a file of records, or all files ``records/*.jsonl`` in and below a folder, in the order of their names.

    Args:
        path: file or folder.
        kind: accuracies or speeds; the others are passed over.

    Returns:
        The records, and for each line or file that could not be read one sentence ``file:line: reason``.

    Raises:
        InputError: there is no such file or folder.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*.jsonl") if f.parent.name == "records")
    records: list[Line] = []
    problems: list[str] = []
    for file in files:
        try:
            lines = file.read_bytes().split(b"\n")
        except OSError as error:
            problems.append(f"{file}: cannot be read: {error.strerror}")
            continue
        if not lines[-1]:  # what follows the last line's end
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                record = _LINE.validate_json(line)
            except ValidationError as error:
                reason = _reason(error) if line.strip() else "the line is empty"
                problems.append(f"{file}:{number}: {reason}")
            else:
                if isinstance(record, kind):
                    records.append(record)
    return records, problems


def refuse_unlike(what: str, measured: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Refuse to average or compare what was measured under unlike conditions.

    Args:
        what: the subject of the message.
        measured: (run or file, conditions) of each; conditions may be nested.

    Raises:
        InputError: two differ; the message names the keys, both values and both places.
    """
    first: tuple[str, dict[str, Any]] | None = None
    for place, conditions in measured:
        if first is None or conditions == first[1]:
            first = first or (place, conditions)
            continue
        one, other = flatten(first[1]), flatten(conditions)
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        differ = "; ".join(
            f"{key} is {shorten(one.get(key))} in {first[0]} and {shorten(other.get(key))} in {place}" for key in keys
        )
        raise InputError(f"{what} are unlike and are neither averaged nor compared: {differ}")


_RECIPE_DEFAULTS = {
    key.partition(".")[2]: value
    for key, value in DEFAULTS.items()
    if decides(key, "students") and not decides(key, "images")
}


def complete(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with every key of the config that decides students: one from before a key was at its default."""
    return {**_RECIPE_DEFAULTS, **recipe}


def protocol_of(recipe: Mapping[str, Any]) -> str:
    """Return the fingerprint of a recipe; keys at their defaults are left out, so that it outlasts new keys."""
    return digest({key: value for key, value in recipe.items() if value != _RECIPE_DEFAULTS.get(key)})


def shorten(value: Any) -> str:
    """Return a value as text, a SHA-256 by its first 12 digits."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text[:12] if len(text) == 64 and not set(text) - set("0123456789abcdef") else text


def _line(record: Record | Speed) -> bytes:
    return record.model_dump_json().encode() + b"\n"


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"][1:])  # after the kind of the line
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


@functools.lru_cache(maxsize=1)
def _checkout() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that holds this package, and whether its tracked files were changed."""
    git = shutil.which("git")
    here = Path(__file__).parent

    def ask(*arguments: str) -> str:
        # No optional locks: hundreds of tasks may ask the same checkout at once.  Without GIT_*: inside a hook these
        # name another repository.
        command = [str(git), "--no-optional-locks", "-C", str(here), *arguments]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=clean)  # noqa: S603
        return done.stdout.strip()

    if git is None:
        return None, None
    try:
        # A package installed below somebody else's checkout is in its folder, but not in its index.
        ask("ls-files", "--error-unmatch", "__init__.py")
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (subprocess.SubprocessError, OSError):
        return None, None


@functools.lru_cache(maxsize=1)
def _cpu() -> str:
    from torch.utils import collect_env

    for line in (collect_env.get_cpu_info(collect_env.run) or "").splitlines():
        if line.lower().startswith("model name:"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
