"""Schema of the config: frozen models with a description of every field, validated before any work starts."""

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
    """Device, precision and processes of the computation."""

    device: str = "auto"
    """Device: ``auto`` (CUDA if available, else CPU), ``cpu``, ``cuda`` or ``cuda:N``."""
    threads: Positive = 1
    """Number of CPU threads of each rank. It is a config key because launchers would otherwise choose it."""
    workers: Annotated[Count, Decides("nothing")] = 2
    """Number of processes that decode images, and number of processes that compute barycenters. 0: the main process
    does both. A rank starts at most one of each for every CPU that it may use."""
    precision: Literal["fp32", "tf32", "bf16", "auto"] = "fp32"
    """Precision. ``fp32``: IEEE single precision on every device. ``tf32``: convolutions and matrix products with a
    10-bit mantissa, on NVIDIA GPUs from Ampere on. ``bf16``: networks run under autocast; moments, losses and images
    stay fp32. ``auto``: bf16 where the hardware supports it natively, else fp32."""
    compile: bool = False
    """Compile the steps of synthesis, students and teacher with torch.compile. Compilation takes minutes; then steps
    are faster. Use it for long runs."""
    deterministic: bool = True
    """Allow only deterministic algorithms of cuDNN. false: cuDNN chooses the fastest algorithm, and results on a GPU
    differ slightly between runs."""
    checkpoint_seconds: Annotated[Weight, Decides("nothing")] = 600.0
    """Seconds between two checkpoints of a group in synthesis, or of a teacher or student in training."""


class DataConfig(Section, decides=Decides("data")):
    """The dataset to distill."""

    source: Literal["digits", "cifar10", "imagenette", "tiny-imagenet", "imagenet-1k", "folder"] = "folder"
    """Dataset. ``folder``: your own images, in ``train/CLASS/`` and ``val/CLASS/``."""
    root: Annotated[str | None, Decides("nothing")] = None
    """Folder of the dataset; ``wmdd data fetch`` fills it. None: ``data/SOURCE`` in the working folder."""
    format: Annotated[Literal["auto", "folder", "tiny-imagenet"], Decides("nothing")] = "auto"
    """Layout of the dataset's folder. ``folder``: ``train/CLASS/`` and ``val/CLASS/``. ``tiny-imagenet``: with
    ``val_annotations.txt``. ``auto``: detected."""
    packed: Annotated[str | None, Decides("nothing")] = None
    """Folder of packed images from ``wmdd data pack``. The run reads decoded pixels there instead of ``root``."""
    stage: Annotated[str | None, Decides("nothing")] = None
    """Folder on a local disk of the node. Each node copies the packed images that it needs there once."""
    memory_gb: Annotated[Weight, Decides("nothing")] = 8.0
    """Largest size of a set of decoded images that the ranks of a node hold in memory, in GB (10⁹ bytes). A teacher
    reads a larger training set batch by batch, from packed images or by the decoders. A larger validation set is read
    from packed images, or from one file in the cache."""
    classes: int | str | tuple[str, ...] | None = None
    """Classes to use: all (None), the first N (10), a range of positions ("10:20"), or a list of names."""
    resolution: Annotated[int, Field(ge=8)] = 224
    """Height and width of every image, in pixels."""
    channels: Literal[1, 3] = 3
    """Color channels. 3: gray images get three equal channels. 1: color images become gray."""
    crop_ratio: CropScale = 1.0
    """The shorter side is resized to ``resolution / crop_ratio``; then the center is cropped (ImageNet: 0.875)."""
    mean: Annotated[tuple[float, ...], Decides("teacher")] = (0.485, 0.456, 0.406)
    """Mean of each channel on the scale 0 to 1. It is subtracted before the network."""
    std: Annotated[tuple[Rate, ...], Decides("teacher")] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel. Pixels are divided by it before the network."""
    holdout_per_class: Count = 0
    """Number of training images of each class to hold out. If it is not 0, students are validated on these images
    instead of the test set. Use it to choose a recipe."""
    on_error: Annotated[Literal["fail", "skip"], Decides("nothing")] = "fail"
    """What to do with an unreadable image. ``fail``: end the run. ``skip``: leave the image out and count it; the
    dataset's fingerprint then covers only the remaining images."""

    @model_validator(mode="after")
    def _stage_has_shards(self) -> "DataConfig":
        if self.stage is not None and self.packed is None:
            raise ValueError("data.stage copies packed images; set their folder with data.packed=...")
        return self

    @model_validator(mode="after")
    def _channels_agree(self) -> "DataConfig":
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(f"data.{key} has {len(getattr(self, key))} values, data.channels is {self.channels}")
        return self


class TeacherConfig(Section, decides=Decides("teacher")):
    """The teacher: a frozen network. Synthesis matches its features and BatchNorm statistics."""

    network: str = "resnet18"
    """Architecture: ``resnet18`` or another torchvision classifier with BatchNorm, or ``convnetD`` / ``convnetDxW``
    with D blocks of W channels (convnet3x64)."""
    stem: Literal["auto", "standard", "small", "stride2"] = "auto"
    """First layers of a ResNet. ``small``: 3x3, stride 1. ``stride2``: 3x3, stride 2. Neither has max-pooling.
    ``auto``: small up to 32 px, stride2 up to 64 px, standard above."""
    weights: str | None = None
    """Weights of the teacher: ``torchvision:NAME`` or the path of a weights file. None: the run trains the teacher."""
    outputs: tuple[Count, ...] | None = None
    """Index of the network output for each class of the dataset. Needed for weights with more outputs and without class
    names."""
    seed: Count = 0
    """Random seed of the teacher. It is separate from the run's seed, so that distillation seeds share a teacher."""
    ranks: Positive = 1
    """Number of ranks that train the teacher (DistributedDataParallel). Another number gives another teacher."""
    epochs: Positive = 50
    """Number of passes over the training set."""
    batch_size: Positive = 32
    """Number of images in one update, over all ranks."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: SGD with Nesterov momentum, or AdamW. Both use a cosine schedule to zero."""
    lr: Rate = 0.025
    """Peak learning rate."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    weight_decay: Weight = 1e-4
    """Weight decay."""
    label_smoothing: Fraction = 0.0
    """Label smoothing of the cross-entropy."""
    crop_scale: CropScale = 0.25
    """Smallest share of the image area that a random resized crop keeps."""
    flip: bool = True
    """Mirror images with probability one half. Wrong for digits."""


class StatisticsConfig(Section, decides=Decides("statistics")):
    """The class statistics: one pass over the real images of each class."""

    batch_size: Positive = 100
    """Number of images of one class in one forward pass."""
    between: Literal["exact", "batchwise"] = "exact"
    """Variance between images. ``exact``: over the class. ``batchwise``: mean over batches, as in the public code."""
    augment: bool = False
    """Apply the crops and flips of synthesis to the real images, instead of using whole images."""


class BarycenterConfig(Section, decides=Decides("images")):
    """The Wasserstein barycenter: K = IPC atoms that represent a class in feature space."""

    weights: Literal["uniform", "free", "alternating", "tempered"] = "uniform"
    """Weights of the atoms. ``uniform``: every atom has weight 1/K. ``free``: optimal quantization (Lloyd), with the
    cell masses as weights. ``alternating``: the paper's algorithm (Cuturi & Doucet 2014). ``tempered``: between
    ``uniform`` and ``free``, see ``temper``."""
    temper: Fraction = 0.5
    """Share τ of the cell masses in ``tempered`` weights (1 − τ)/K + τ·(cell masses). 0 is ``uniform``, 1 is ``free``.
    Other weights ignore it."""
    weight_power: Weight = 1.0
    """Power γ of the weights w wherever they count: ``synthesis.bn_weighted`` and ``labels.weighted`` use w^γ,
    normalized. 0: all images count equally. The atoms and the distilled set keep w."""
    epsilon: Weight = 0.0
    """Entropic regularization ε of the plans (Sinkhorn), as a share of the variance of the class's features. It draws
    the atoms towards the mean of the class. 0: optimal plans. W2² is exact in both cases."""
    atoms: Literal["means", "medoids"] = "means"
    """Atoms. ``means``: any points in feature space. ``medoids``: the features of the nearest real images."""
    starts: Positive = 4
    """Number of random starts. The result with the smallest W2² is kept."""
    rounds: Positive = 100
    """Maximum number of iterations of one start. It ends earlier when W2² no longer changes."""

    @model_validator(mode="after")
    def _alternation_is_exact(self) -> "BarycenterConfig":
        if self.epsilon and self.weights == "alternating":
            raise ValueError("barycenter.epsilon needs weights uniform, free or tempered; alternating has exact plans")
        return self


class SynthesisConfig(Section, decides=Decides("images")):
    """The optimization of the images. Its loss is L = f·L_feature + λ·L_BN + c·CE."""

    classes_per_group: Count = 0
    """Number of classes synthesized together as a group. 0: as many as give 100 images. It is part of the recipe and
    changes the images."""
    grouping: Literal["method", "classes", "spread"] = "method"
    """``classes``: all images of a few classes make up a group. ``spread``: 100 images of as many classes as there are,
    which is what global BatchNorm statistics describe; blocks then hold whole spans of 100 classes. ``method``: spread
    for methods with a global target, else by classes."""
    split_class: Positive = 1
    """Number of ranks that share the images of each class, for classes too large for one device. The ranks all-reduce
    the moments. The number must divide the IPC."""
    iterations: Count = 2000
    """Number of optimizer steps."""
    lr: Rate = 0.25
    """Peak learning rate of Adam on the normalized images, under a cosine schedule to zero."""
    betas: tuple[Fraction, Fraction] = (0.5, 0.9)
    """Adam's betas."""
    start: Literal["noise", "real", "patch"] = "noise"
    """Initial images. ``noise``: Gaussian noise. ``real``: the real image nearest to each atom. ``patch``: the crops of
    real images that the teacher finds most typical, chosen as by ``rded``, one crop for each image."""
    injections: Count = 0
    """Number of residual injections (FADRM): they cut the iterations into ``injections`` + 1 equal parts. At the end of
    each part but the last, the images become α·images + (1 − α)·start images, and Adam begins afresh."""
    injection_keep: Fraction = 0.5
    """Share α of the images that an injection keeps."""
    norm: Literal["squared", "euclidean"] = "squared"
    """Distance. ``squared``: squared distances, summed over classes (the paper). ``euclidean``: norms as in the public
    code, one over the group for features, and the mean over classes for BatchNorm."""
    feature_weight: Weight = 1.0
    """Weight f of the feature term: the distance between features and atoms."""
    feature_target: Literal["atoms", "mean"] = "atoms"
    """Target of the features. ``atoms``: each image matches one atom. ``mean``: the weighted mean of a class's images
    matches the weighted mean of its atoms."""
    bn_weight: Weight = 100.0
    """Weight λ of the BatchNorm term; usually 10 to 1000."""
    bn_first_weight: Weight = 1.0
    """Extra factor on the first BatchNorm layer."""
    bn_target: Literal["class", "global"] = "class"
    """BatchNorm target. ``class``: the moments of each class (PCBN). ``global``: the teacher's running statistics,
    matched over the whole group."""
    bn_class_share: Fraction = 0.0
    """Share of the classes' own moments in the global BatchNorm target (EDC: 0.5). The target is then
    (1 − share)·running moments + share·mean of the class moments; the variance of a class is the mean of its images'
    variances. It has no effect on the target ``class``."""
    bn_variance: Literal["total", "matched"] = "total"
    """Target variance. ``total``: the variance of the class. ``matched``: the variance that K images can have,
    within + between·(1 − Σ w²)."""
    bn_weighted: bool = True
    """Weight the images by their barycenter weights in the moments of their class. false: all images count equally."""
    ce_weight: Weight = 0.0
    """Weight c of the cross-entropy term: the teacher's loss, averaged over images."""
    augment: Literal["group", "image"] = "group"
    """Crop and flip in each iteration. ``group``: one for all images of a group. ``image``: one for each image."""
    crop_scale: tuple[CropScale, CropScale] = (0.08, 1.0)
    """Smallest and largest share of the image area that a random resized crop keeps."""
    crop_curriculum: Fraction = 0.0
    """Share of the iterations during which the smallest crop shrinks from the whole image to its final scale (CDA)."""
    flip: bool = True
    """Mirror images with probability one half."""
    jitter: Count = 0
    """Largest cyclic shift of the images along each axis, in pixels."""
    clamp: bool = True
    """Clamp the pixels to the valid range after each step."""

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"the smallest crop {value[0]} exceeds the largest {value[1]}")
        return value


class Sre2lConfig(Section, decides=Decides("images")):
    """The published constants of ``sre2l`` and its descendants ``cda``, ``sre2l++``, ``fadrm`` and ``edc``; iterations,
    learning rate and mirroring are ``synthesis``'s."""

    bn_weight: Weight | None = None
    """Weight of the BatchNorm term. None: as published, 0.01, but on Tiny-ImageNet 1 for ``sre2l`` and 0.05 for
    ``cda``. It belongs to the 20 BatchNorm layers of a ResNet-18; other networks want another."""
    bn_first_weight: Weight = 10.0
    """Extra factor on the first BatchNorm layer."""
    norm: Literal["squared", "euclidean"] = "euclidean"
    """Squared distances, or plain norms as in the public code."""
    ce_weight: Weight = 1.0
    """Weight of the teacher's cross-entropy."""
    betas: tuple[Fraction, Fraction] = (0.5, 0.9)
    """Adam's betas."""
    augment: Literal["group", "image"] = "group"
    """One crop for all images of a group each iteration, or one for each image."""
    crop_scale: tuple[CropScale, CropScale] = (0.08, 1.0)
    """Range of the area that a random resized crop keeps."""
    crop_curriculum: Fraction = 1.0
    """Of ``cda``: share of the iterations over which the smallest crop shrinks from the whole image."""
    jitter: Count | None = None
    """Images are rolled by up to this many pixels. None: a seventh of the side, 32 px of 224."""
    injections: Count = 3
    """``fadrm``: number of residual injections, published as 3 (4 parts) or 1."""
    injection_keep: Fraction = 0.5
    """``fadrm``: share of the images that an injection keeps."""
    class_share: Fraction = 0.5
    """``edc``: share of the classes' own moments in the BatchNorm target."""


class RdedConfig(Section, decides=Decides("images")):
    """The published constants of ``rded``."""

    candidates: Positive = 300
    """Most real images of a class whose crops are scored (``mipc``)."""
    crops: Positive = 5
    """Crops of each of them (``num_crop``); more only where a class has too few images to fill all canvases."""
    smallest_crop: CropScale = 0.08
    """Smallest share of the area that a crop keeps."""
    stitched_from: Positive = 128
    """Side in pixels from which four crops share a canvas."""


class LabelsConfig(Section, decides=Decides("labels")):
    """The labels of the students, and the augmentation under which the teacher computes them (FKD)."""

    regimes: Annotated[tuple[Literal["hard", "soft", "stored", "budget"], ...], Decides("selection")] = Field(
        ("soft",), min_length=1
    )
    """Label regimes. ``hard``: the class of each image. ``soft``: the teacher's logits for each augmented batch,
    computed during training. ``stored``: the same logits, saved once per student seed, one file per epoch. ``budget``:
    only as many stored epochs as fit ``budget``, used in turn."""
    encoding: Literal["fp16", "topk", "int8"] = "fp16"
    """Format of stored logits. ``fp16``: all logits in fp16. ``topk``: the ``top_k`` largest, and the mass of the rest.
    ``int8``: all logits in 8 bits."""
    top_k: Positive = 10
    """Number of logits that ``topk`` keeps for each image."""
    budget: Annotated[Rate, Decides("students")] = 1.0
    """Maximum size of the stored logits in the regime ``budget``, as a multiple of the size of the images' pixels."""
    weighted: Annotated[bool, Decides("students")] = False
    """Weight the images by their barycenter weights in the student's loss. false: all images count equally."""
    teacher_mode: Literal["eval", "batch"] = "eval"
    """BatchNorm statistics of the teacher when it labels. ``eval``: its running statistics. ``batch``: the statistics
    of each mixed batch over all ranks (batch-specific labels of CV-DD and FADRM)."""
    loss: Annotated[Literal["kl", "mse-ce", "gift"], Decides("students")] = "kl"
    """Loss of soft labels. ``kl``: KL divergence at ``temperature``, times T². ``mse-ce`` (EDC): squared error of the
    logits, mean over classes, plus ``ce_weight`` times the cross-entropy with both classes of a mix. EDC's code uses
    only the image's own class. ``gift`` (GIFT): one minus the cosine between the student's logits and the teacher's,
    refined by the smoothed classes. ``mse-ce`` and ``gift`` need all logits, so they do not work with ``topk``."""
    ce_weight: Annotated[Weight, Decides("students")] = 0.025
    """Weight of the cross-entropy in the loss ``mse-ce``."""
    temperature: Annotated[Rate, Decides("students")] = 20.0
    """Temperature of the KL divergence."""
    crop_scale: CropScale = 0.08
    """Smallest share of the image area that a random resized crop keeps."""
    flip: bool = True
    """Mirror images with probability one half."""
    mix: Literal["cutmix", "mixup", "none"] = "cutmix"
    """Mixing of the images of a batch."""
    mix_alpha: Rate = 1.0
    """Parameter α of the mixing ratio's distribution, Beta(α, α)."""

    @model_validator(mode="after")
    def _losses_of_logits_need_all_logits(self) -> "LabelsConfig":
        if self.loss != "kl" and self.encoding == "topk":
            raise ValueError(f"labels.loss = {self.loss} needs all logits; use labels.encoding=fp16 or int8, not topk")
        return self


class StudentConfig(Section, decides=Decides("students")):
    """The students: networks trained on the distilled set to measure it."""

    networks: Annotated[tuple[str, ...], Decides("selection")] = Field(("resnet18",), min_length=1)
    """Architectures of the students, named as in ``teacher.network``."""
    seeds: Annotated[Positive, Decides("selection")] = 3
    """Number of students of each architecture, label regime and training length."""
    first_seed: Annotated[Count, Decides("selection")] = 0
    """Random seed of the first student; the others have the following seeds."""
    views: Annotated[tuple[View, ...], Decides("selection")] = Field(("epochs",), min_length=1)
    """Training lengths. ``epochs``: ``student.epochs`` passes. ``updates``: ``student.updates`` optimizer steps, for a
    set of any size. ``plain``: ``student.epochs`` passes over whole images, without crops, flips and mixing.
    ``epochs-twice`` and ``updates-twice``: twice as long, to show whether students have converged."""
    updates: Positive = 3000
    """Number of optimizer steps at training length ``updates``."""
    ranks: Positive = 1
    """Number of ranks that train each student together (DistributedDataParallel). Another number is another recipe."""
    epochs: Positive = 300
    """Number of passes over the distilled set."""
    batch_size: Annotated[Positive, Decides("labels")] = 100
    """Number of images in one update. A smaller set is one batch."""
    lr: Rate = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Weight = 0.01
    """Weight decay of AdamW."""
    cosine_stretch: Annotated[float, Field(ge=1)] = 1.0
    """Stretch ζ of the cosine schedule: a schedule for ζ times as many epochs, cut off at the last epoch."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the exponential moving average (EMA) of the weights (EDC: 0.99). The average starts from the initial
    weights and is validated in place of the weights, with the student's BatchNorm statistics, as in EDC. 0: no EMA."""
    validate_every: Annotated[Count, Decides("nothing")] = 0
    """Number of epochs between two validations during training. They appear in the student's log; its record contains
    the best epoch. Results always come from the last epoch. 0: validate only after the last epoch."""
    baselines: Annotated[tuple[str, ...], Decides("selection")] = ("random",)
    """Methods to compare with: distilled at the same IPC, and measured by the same students."""
    baseline_sets: Annotated[Positive, Decides("selection")] = 5
    """Number of sets of the baseline ``random``, drawn with the seeds from ``seed`` on. With several sets, each set has
    one student of each kind. A single set has as many students as the run. Other baselines have one set."""


class TuningConfig(Section, decides=Decides("nothing")):
    """How the recipe of the images was chosen; a report states it, and ``wmdd bench check`` refuses the test set."""

    on: Literal["unknown", "published", "holdout", "test"] = "unknown"
    """``published``: constants of the method's authors. ``holdout``: images held out of the training set
    (``wmdd sweep best`` writes it). ``test``: the test set; such a result is no evidence."""
    trials: Count = 0
    """Number of recipes that were tried."""


class ExternalConfig(Section, decides=Decides("images")):
    """A distilled set from another project, for ``method = "external"`` (``wmdd bench evaluate``)."""

    folder: Annotated[str | None, Decides("nothing")] = None
    """Folder of the images, with one subfolder for each class."""
    layout: Literal["auto", "classes", "numbered"] = "auto"
    """Names of the subfolders. ``classes``: names of the classes. ``numbered``: ``new007`` or ``00007`` for the class
    at position 7 in the sorted list of the dataset's classes. ``auto``: names if all classes are found, else
    numbers."""
    sha256: str | None = None
    """SHA-256 over the names and contents of the files. The run refuses a folder that has changed."""


class Config(Section):
    """The config of one run: a dataset, a method and its settings."""

    name: Annotated[str, Decides("nothing")] = "run"
    """Name of the run. The run folder is ``runs/NAME``, unless ``--out`` names another."""
    seed: Annotated[Count, Decides("images")] = 0
    """Random seed of the distillation: initial images, barycenters, augmentation."""
    ipc: Annotated[Positive, Decides("images")] = 10
    """Images per class."""
    blocks: Annotated[Positive, Decides("nothing")] = 1
    """Number of blocks: parts of the classes, each one file and one array task. It never changes a result."""
    method: Annotated[str, Decides("images")] = "wmdd"
    """Distillation method; ``wmdd methods`` lists the names."""
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    barycenter: BarycenterConfig = BarycenterConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    labels: LabelsConfig = LabelsConfig()
    student: StudentConfig = StudentConfig()
    external: ExternalConfig = ExternalConfig()
    sre2l: Sre2lConfig = Sre2lConfig()
    rded: RdedConfig = RdedConfig()
    tuning: TuningConfig = TuningConfig()

    @model_validator(mode="after")
    def _classes_split_evenly(self) -> "Config":
        if self.ipc % self.synthesis.split_class:
            raise ValueError(f"synthesis.split_class = {self.synthesis.split_class} does not divide ipc = {self.ipc}")
        return self

    def flat(self) -> dict[str, Any]:
        """Return the value of every key in JSON form, by its dotted name."""
        return flatten(self.model_dump(mode="json"))

    def fingerprint(self, scope: str) -> str:
        """Return the SHA-256 of all keys that decide a scope, including the keys of earlier scopes.

        Keys at their defaults are left out, so that new keys do not change fingerprints.  A changed default would give
        other results the same fingerprint; ``tests/config/test_config.py`` therefore pins the defaults.

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
"""The scope that each key decides, by its dotted name"""


DEFAULTS = Config().flat()
"""The default of each key in JSON form, by its dotted name"""


def decides(key: str, scope: str) -> bool:
    """Return whether a key (dotted name) decides this scope or an earlier one."""
    own = DECIDES.get(key)
    return own in SCOPES[: SCOPES.index(scope) + 1]
