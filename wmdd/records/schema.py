"""Records: what was measured, in which circumstances."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from wmdd.config.schema import Count, Positive, View
from wmdd.records.correct_bitmaps import unpack

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
    view: View = "epochs"
    """How long the student trained and on what (``student.views``)."""
    distillation_seed: Count | None = None
    """Seed of the distilled images."""
    student_seed: Count | None = None
    """Seed of the student."""
    seeded: bool = True
    """Whether another distillation seed gives other images; False for a selection that no seed changes."""
    evaluated_on: Literal["test", "holdout"]
    """The images that it was measured on."""
    test_images: tuple[Count, ...] | None = None
    """Number of images of each class that it was measured on."""
    correct: str | None = None
    """Which of them it got right at the last epoch, class by class: a bit each (``correct_bitmaps.pack``)."""
    convergence: Literal["converged", "improving", "not checked"] | None = None
    """Whether students of this row improve when they train twice as long (``wmdd bench check --mark``)."""
    tuned_on: Literal["unknown", "published", "holdout", "test"] | None = None
    """What the recipe of the images was chosen on (``tuning.on``)."""
    trials: Count | None = None
    """Trials that the choice took (``tuning.trials``)."""
    metrics: dict[str, float]
    """``top1`` and ``top5`` as fractions, ``loss`` in nats, and whatever else was measured."""
    best_epoch: Positive | None = None
    """Epoch of the highest top-1 among those that ``student.validate_every`` validated, and the last one."""
    best_top1: Annotated[float, Field(ge=0, le=1)] | None = None
    """Top-1 after that epoch, as a fraction. The images that measure a student chose it, so it is never compared."""
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
    """What it took (``Meter.read``): seconds, device_seconds, peak_bytes, joules; of a student also updates,
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
        if self.correct is not None:
            if self.test_images is None:
                raise ValueError("correct needs test_images, the number of images of each class")
            unpack(self.correct, sum(self.test_images))
        return self


class SpeedRecord(Measurement):
    """A speed: one stage of the work, on a number of ranks, by one engine."""

    kind: Literal["throughput", "scaling"]
    """One engine on one set of ranks, or one point of a study over their number."""
    stage: Literal["synthesis", "statistics", "students", "barycenters"]
    """What was timed."""
    engine: str
    """``wmdd``, or what it is compared with: ``reference`` (the method written plainly), ``pot``."""
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
    step, in seconds), ``peak_bytes``, ``joules`` (of a repeat, where a counter is readable), ``product_share`` (of a
    matrix product measured beside it), ``mfu`` (against the data sheet's peak; GPUs only); ``ratio``, ``ratio_low``,
    ``ratio_high`` to the engine that the same command timed as its baseline; ``efficiency`` of a scaling study."""
    setup: dict[str, Any]
    """What two speeds must share to be compared: batch, precision, threads, compile, iterations, classes, ipc."""


Line = TypeVar("Line", Record, SpeedRecord)


LINE: TypeAdapter[Record | SpeedRecord] = TypeAdapter(Annotated[Record | SpeedRecord, Field(discriminator="kind")])
