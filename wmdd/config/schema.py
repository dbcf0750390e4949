"""What a run is: frozen models whose every field is documented, checked before any work starts."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from wmdd.config.section import SCOPES, Decides, Section
from wmdd.storage.files import FORMAT, digest, flatten

Positive = Annotated[int, Field(ge=1)]


Count = Annotated[int, Field(ge=0)]


Weight = Annotated[float, Field(ge=0)]


Rate = Annotated[float, Field(gt=0)]


Fraction = Annotated[float, Field(ge=0, le=1)]


CropScale = Annotated[float, Field(gt=0, le=1)]


View = Literal["epochs", "updates", "plain", "epochs-twice", "updates-twice"]


class ComputeConfig(Section, decides=Decides("arithmetic")):
    """Where and how the arithmetic runs."""

    device: str = "auto"
    """``auto`` (CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:N``."""
    threads: Positive = 1
    """CPU threads of each rank; fixed here because launchers would otherwise choose."""
    workers: Annotated[Count, Decides("nothing")] = 2
    """Number of processes that decode images, and of those that compute barycenters; 0 does both in the main process.
    At most one of each starts for every CPU that a rank may use."""
    precision: Literal["fp32", "tf32", "bf16", "auto"] = "fp32"
    """``fp32``: IEEE single precision on every device. ``tf32``: convolutions and matrix products of NVIDIA GPUs from
    Ampere on, with 10 bits of mantissa. ``bf16``: the networks run under autocast; moments, losses and images stay
    fp32. ``auto``: bf16 where the hardware has it natively, else fp32."""
    compile: bool = False
    """Run the steps of synthesis, students and teacher through torch.compile: a minute or more of compilation for each,
    then faster steps; for long runs."""
    deterministic: bool = True
    """Let cuDNN take deterministic algorithms only. false lets it try several and keep the fastest (GPUs only):
    results then differ a little from run to run."""
    checkpoint_seconds: Annotated[Weight, Decides("nothing")] = 600.0
    """Seconds between two checkpoints of a group in synthesis, or of a teacher or student in training."""


class DataConfig(Section, decides=Decides("data")):
    """The images to distill."""

    source: Literal["digits", "cifar10", "imagenette", "tiny-imagenet", "imagenet-1k", "folder"] = "folder"
    """Which data set; ``folder`` is any tree with ``train/CLASS/`` and ``val/CLASS/``."""
    root: Annotated[str | None, Decides("nothing")] = None
    """Folder of the data set; ``wmdd data fetch`` fills it. None: ``data/SOURCE`` below the working folder."""
    format: Annotated[Literal["auto", "folder", "tiny-imagenet"], Decides("nothing")] = "auto"
    """How the images are stored: ``folder`` (``train/CLASS/``, ``val/CLASS/``), ``tiny-imagenet`` (with
    ``val_annotations.txt``), or whichever is found (``auto``)."""
    packed: Annotated[str | None, Decides("nothing")] = None
    """Folder that ``wmdd data pack`` filled: images are read from there, already decoded, instead of ``root``."""
    stage: Annotated[str | None, Decides("nothing")] = None
    """Folder on this node's own disk, to which the packed shards that a process needs are copied, once a node."""
    classes: int | str | tuple[str, ...] | None = None
    """All classes (None), the first N (10), a range of positions ("10:20"), or a list of names."""
    resolution: Annotated[int, Field(ge=8)] = 224
    """Height and width of every image, in pixels."""
    channels: Literal[1, 3] = 3
    """3 turns grey images into three equal channels; 1 turns colour images grey."""
    crop_ratio: CropScale = 1.0
    """The shorter side is resized to ``resolution / crop_ratio``, then the centre is cut out (ImageNet: 0.875)."""
    mean: Annotated[tuple[float, ...], Decides("teacher")] = (0.485, 0.456, 0.406)
    """Mean of each channel, on the scale 0 to 1, subtracted before the network."""
    std: Annotated[tuple[Rate, ...], Decides("teacher")] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, divided by before the network."""
    holdout_per_class: Count = 0
    """Images of each training class kept apart to choose recipes on; students are then validated on these."""
    on_error: Annotated[Literal["fail", "skip"], Decides("nothing")] = "fail"
    """An image that cannot be read ends the run (``fail``) or is left out and counted (``skip``). The identity of
    the data set names those that are left."""

    @model_validator(mode="after")
    def _stage_has_shards(self) -> "DataConfig":
        if self.stage is not None and self.packed is None:
            raise ValueError("data.stage copies packed shards; give their folder with data.packed=...")
        return self

    @model_validator(mode="after")
    def _channels_agree(self) -> "DataConfig":
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(f"data.{key} has {len(getattr(self, key))} values, data.channels is {self.channels}")
        return self


class TeacherConfig(Section, decides=Decides("teacher")):
    """The frozen network whose features and BatchNorm statistics are matched."""

    network: str = "resnet18"
    """``resnet18`` and any other torchvision classifier with BatchNorm, or ``convnetD`` / ``convnetDxW``: D blocks
    of W channels (convnet3x64)."""
    stem: Literal["auto", "standard", "small", "stride2"] = "auto"
    """First layers of a ResNet: ``small`` (3x3, stride 1), ``stride2`` (3x3, stride 2), both without max-pool;
    ``auto``: small up to 32 px, stride2 up to 64 px, standard above."""
    weights: str | None = None
    """None trains the teacher here; ``torchvision:NAME`` or the path of a weights file loads it, strictly."""
    outputs: tuple[Count, ...] | None = None
    """For weights of more classes that do not name them: the output that stands for each class of the data set."""
    seed: Count = 0
    """Seed of its initialisation and training; apart from the run's, so that distillation seeds share a teacher."""
    ranks: Positive = 1
    """Ranks that train it under DistributedDataParallel; another number is another teacher."""
    epochs: Positive = 50
    """Passes over the training set."""
    batch_size: Positive = 32
    """Images of one update, over all ranks."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW; both under a cosine schedule to zero."""
    lr: Rate = 0.025
    """Peak learning rate."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    weight_decay: Weight = 1e-4
    """Weight decay."""
    label_smoothing: Fraction = 0.0
    """Label smoothing of the cross-entropy."""
    crop_scale: CropScale = 0.25
    """Smallest share of the area that a random resized crop keeps."""
    flip: bool = True
    """Mirror half of the images; wrong for digits."""


class StatisticsConfig(Section, decides=Decides("statistics")):
    """The pass over the real images of each class."""

    batch_size: Positive = 100
    """Images of one class in one forward pass."""
    between: Literal["exact", "batchwise"] = "exact"
    """Variance between images: over the class, or the mean over batches that the public code computes."""
    augment: bool = False
    """Show the teacher the crops and flips of synthesis instead of the whole images."""


class BarycenterConfig(Section, decides=Decides("images")):
    """The K = IPC atoms that stand for a class in feature space."""

    weights: Literal["uniform", "free", "alternating"] = "uniform"
    """``uniform``: every atom weighs 1/K. ``free``: optimal quantisation (Lloyd), weights are the cell masses.
    ``alternating``: the paper's algorithm (Cuturi & Doucet 2014)."""
    atoms: Literal["means", "medoids"] = "means"
    """Points in feature space, or the features of the real images nearest to them."""
    starts: Positive = 4
    """Seeded starts; the one with the least W2² is kept."""
    rounds: Positive = 100
    """Most rounds of a start; it ends earlier once W2² stands still."""


class SynthesisConfig(Section, decides=Decides("images")):
    """How images are optimised against their targets: L = f·L_feature + λ·L_BN + c·CE."""

    classes_per_group: Count = 0
    """Classes synthesised together; 0 takes as many as make up 100 images. Part of the recipe, never of the machine."""
    split_class: Positive = 1
    """Ranks that share the images of every class of a group and all-reduce its moments, for classes that do not fit one
    device; a number of ranks that divides the IPC."""
    iterations: Count = 2000
    """Optimiser steps."""
    lr: Rate = 0.25
    """Adam's learning rate on the normalised images, cosine to zero."""
    betas: tuple[Fraction, Fraction] = (0.5, 0.9)
    """Adam's betas."""
    start: Literal["noise", "real"] = "noise"
    """Gaussian noise, or the real image nearest to each atom."""
    norm: Literal["squared", "euclidean"] = "squared"
    """Squared distances summed over classes (the paper), or the plain norms of the public code: one over the group
    for features, per class and averaged for BatchNorm."""
    feature_weight: Weight = 1.0
    """Weight f of the distance between features and atoms."""
    bn_weight: Weight = 100.0
    """Weight λ of the BatchNorm term; useful from 10 to 1000."""
    bn_first_weight: Weight = 1.0
    """Extra factor on the first BatchNorm layer."""
    bn_target: Literal["class", "global"] = "class"
    """Match each class's own moments (PCBN), or the teacher's running statistics over the whole group."""
    bn_variance: Literal["total", "matched"] = "total"
    """Target variance: of the class, or what K images can have: within + between·(1 − Σ w²)."""
    bn_weighted: bool = True
    """Images count by their barycenter weights in the moments of their class, or all alike."""
    ce_weight: Weight = 0.0
    """Weight c of the teacher's cross-entropy, averaged over images."""
    augment: Literal["group", "image"] = "group"
    """One crop and flip for all images of a group each iteration, or one for each image."""
    crop_scale: tuple[CropScale, CropScale] = (0.08, 1.0)
    """Range of the area that a random resized crop keeps."""
    crop_curriculum: Fraction = 0.0
    """Share of the iterations over which the smallest crop shrinks from the whole image to its final scale (CDA)."""
    flip: bool = True
    """Mirror with probability one half."""
    jitter: Count = 0
    """Images are rolled by up to this many pixels along each axis."""
    clamp: bool = True
    """Keep pixels in the valid range after each step."""

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"the smallest crop {value[0]} exceeds the largest {value[1]}")
        return value


class LabelsConfig(Section, decides=Decides("labels")):
    """What students learn from, and the augmentation under which the teacher labels (FKD)."""

    regimes: Annotated[tuple[Literal["hard", "soft", "stored", "budget"], ...], Decides("selection")] = Field(
        ("soft",), min_length=1
    )
    """``hard``: the class of each image. ``soft``: the teacher's logits for each augmented batch, computed online.
    ``stored``: the same logits, written once per student seed, one file an epoch, and read back. ``budget``: as many
    stored epochs as ``budget`` pays for, visited in turn."""
    encoding: Literal["fp16", "topk", "int8"] = "fp16"
    """How logits are stored: all in fp16, the ``top_k`` largest with the mass of the rest, or all in 8 bits."""
    top_k: Positive = 10
    """Logits of each image that ``topk`` keeps."""
    budget: Annotated[Rate, Decides("students")] = 1.0
    """Bytes of stored logits that ``budget`` may spend, as a multiple of the bytes of the images' pixels."""
    weighted: Annotated[bool, Decides("students")] = False
    """Images count by their barycenter weights in the student's loss, or all alike."""
    teacher_mode: Literal["eval", "batch"] = "eval"
    """BatchNorm statistics under which the teacher labels: its running ones (``eval``), or those of each mixed
    batch, all its images together on however many ranks (``batch``: the batch-specific labels of CV-DD and FADRM)."""
    loss: Annotated[Literal["kl", "mse-ce"], Decides("students")] = "kl"
    """Loss of soft labels. ``kl``: KL divergence at ``temperature``, times T². ``mse-ce``: squared error of the logits,
    mean over classes, plus ``ce_weight`` times the cross-entropy with both classes of a mix (EDC, whose code takes the
    image's own class alone); it needs all logits, hence no ``topk``."""
    ce_weight: Annotated[Weight, Decides("students")] = 0.025
    """Weight of the cross-entropy in ``mse-ce``."""
    temperature: Annotated[Rate, Decides("students")] = 20.0
    """Temperature of the KL divergence."""
    crop_scale: CropScale = 0.08
    """Smallest share of the area that a random resized crop keeps."""
    flip: bool = True
    """Mirror half of the images."""
    mix: Literal["cutmix", "mixup", "none"] = "cutmix"
    """How the images of a batch are mixed."""
    mix_alpha: Rate = 1.0
    """Beta(α, α) of the mixing ratio."""

    @model_validator(mode="after")
    def _squared_errors_need_all_logits(self) -> "LabelsConfig":
        if self.loss == "mse-ce" and self.encoding == "topk":
            raise ValueError("labels.loss = mse-ce needs all logits; use labels.encoding=fp16 or int8, not topk")
        return self


class StudentConfig(Section, decides=Decides("students")):
    """The networks trained on the distilled set to measure it."""

    networks: Annotated[tuple[str, ...], Decides("selection")] = Field(("resnet18",), min_length=1)
    """Architectures, named as for the teacher."""
    seeds: Annotated[Positive, Decides("selection")] = 3
    """Students of each architecture, label regime and view."""
    first_seed: Annotated[Count, Decides("selection")] = 0
    """Seed of the first of them; the others follow."""
    views: Annotated[tuple[View, ...], Decides("selection")] = Field(("epochs",), min_length=1)
    """``epochs``: as many passes as ``epochs`` says. ``updates``: as many optimiser steps as ``updates`` says, however
    small the set. ``plain``: ``epochs`` passes over whole images, without crops, flips and mixing. ``epochs-twice`` and
    ``updates-twice``: twice as long, which shows whether students have converged."""
    updates: Positive = 3000
    """Optimiser steps of the view ``updates``."""
    ranks: Positive = 1
    """Ranks that train each student together under DistributedDataParallel; another number is another recipe."""
    epochs: Positive = 300
    """Passes over the distilled set."""
    batch_size: Annotated[Positive, Decides("labels")] = 100
    """Images of one update; a smaller set is one batch."""
    lr: Rate = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Weight = 0.01
    """Weight decay of AdamW."""
    cosine_stretch: Annotated[float, Field(ge=1)] = 1.0
    """ζ of the smoothed cosine: the schedule is that of a training ζ times as long, cut off at the last epoch."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the exponential moving average of the weights, from the initial ones on, that is validated in their
    place (EDC: 0.99; after 200 updates that still holds 13 % of the initial weights); the BatchNorm statistics are the
    student's own, as in EDC. 0: none."""
    validate_every: Annotated[Count, Decides("nothing")] = 0
    """Epochs between two validations on the way, for the log of the student and the best epoch in its record, which
    is never compared. Results are those of the last epoch. 0: only after the last one."""
    baselines: Annotated[tuple[str, ...], Decides("selection")] = ("random",)
    """Methods distilled beside the run's own at the same IPC, and measured by the same students."""
    baseline_sets: Annotated[Positive, Decides("selection")] = 5
    """Sets of the baseline ``random``, drawn with the seeds from ``seed`` on. Each of several has one student of each
    kind; a single one has as many as the run. Other baselines have one set, like the run."""


class TuningConfig(Section, decides=Decides("nothing")):
    """How the recipe of the images was chosen; a report states it, and ``wmdd bench check`` refuses the test set."""

    on: Literal["unknown", "published", "holdout", "test"] = "unknown"
    """``published``: constants of the method's authors. ``holdout``: images held out of the training set
    (``wmdd sweep best`` writes it). ``test``: the test set; such a result is no evidence."""
    trials: Count = 0
    """Number of recipes that were tried."""


class ExternalConfig(Section, decides=Decides("images")):
    """A distilled set that others made, for ``method = "external"`` (``wmdd bench evaluate``)."""

    folder: Annotated[str | None, Decides("nothing")] = None
    """Folder of its images, one sub-folder a class."""
    layout: Literal["auto", "classes", "numbered"] = "auto"
    """``classes``: sub-folders bear the names of the classes. ``numbered``: ``new007`` or ``00007`` holds the class at
    position 7 in the sorted list of the data set's classes. ``auto``: by names if all are there, else by numbers."""
    sha256: str | None = None
    """Names the files, by their names and contents: a changed folder is another distillation, and is refused."""


class Config(Section):
    """One run: a data set, a method and its settings."""

    name: Annotated[str, Decides("nothing")] = "run"
    """Name of the run; the folder is ``runs/NAME`` unless ``--out`` says otherwise."""
    seed: Annotated[Count, Decides("images")] = 0
    """Seed of the distillation: starts, barycenters, augmentation."""
    ipc: Annotated[Positive, Decides("images")] = 10
    """Images per class."""
    blocks: Annotated[Positive, Decides("nothing")] = 1
    """Parts the classes are split into: one file, one array task each. Never changes a result."""
    method: Annotated[str, Decides("images")] = "wmdd"
    """Name in the registry of methods (``wmdd methods``)."""
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    barycenter: BarycenterConfig = BarycenterConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    labels: LabelsConfig = LabelsConfig()
    student: StudentConfig = StudentConfig()
    external: ExternalConfig = ExternalConfig()
    tuning: TuningConfig = TuningConfig()

    @model_validator(mode="after")
    def _classes_split_evenly(self) -> "Config":
        if self.ipc % self.synthesis.split_class:
            raise ValueError(f"synthesis.split_class = {self.synthesis.split_class} does not divide ipc = {self.ipc}")
        return self

    def flat(self) -> dict[str, Any]:
        """Return the value of every key as JSON holds it, under its dotted name."""
        return flatten(self.model_dump(mode="json"))

    def fingerprint(self, scope: str) -> str:
        """Return the SHA-256 of all keys that decide a scope, which are those of the scopes before it too.

        A key at its default is left out, so that fingerprints outlast new keys.  Hence a changed default is a break:
        the same config would name other results (``tests/test_config.py`` pins the defaults).

        Args:
            scope: one of ``SCOPES``.
        """
        values = {key: value for key, value in self.flat().items() if decides(key, scope) and value != DEFAULTS[key]}
        return digest({"format": FORMAT, "scope": scope, "config": values})


def _annotations(section: type[Section], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, own in section._decides.items():
        inner = section.model_fields[name].default
        found |= _annotations(type(inner), f"{prefix}{name}.") if isinstance(inner, Section) else {}
        found |= {f"{prefix}{name}": own.what} if own else {}
    return found


DECIDES = _annotations(Config)
"""What each key decides, by its dotted name"""


DEFAULTS = Config().flat()
"""The default of each key as JSON holds it, by its dotted name"""


def decides(key: str, scope: str) -> bool:
    """Return whether a key, by its dotted name, decides a scope: this one or one before it."""
    own = DECIDES.get(key)
    return own in SCOPES[: SCOPES.index(scope) + 1]
