"""Profiles: the resources that tasks request from a cluster, as TOML files that are checked like every config."""

from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from wmdd.config.schema import Count, Positive, Rate
from wmdd.config.section import Strict
from wmdd.errors import InputError, complaint, nearest
from wmdd.storage.files import read_toml

Stage = Literal["teacher", "distill", "students", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Resources(Strict):
    """What one task of an array asks SLURM for, and what happens around it."""

    partition: str | None = None
    """Partition; None takes the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have, such as ``a100``."""
    reservation: str | None = None
    """Reservation to run in."""
    exclude: str | None = None
    """Nodes to stay away from."""
    nodes: Positive = 1
    """Nodes of one task of the array; with ``ranks_per_node`` the ranks of torch.distributed."""
    ranks_per_node: Positive = 1
    """Processes on each node, one GPU each."""
    gpus_per_rank: Count = 1
    """GPUs of each process: 1, or 0 on CPUs."""
    gpu_type: str | None = None
    """Type of the GPUs as the cluster names it in ``--gpus-per-node=TYPE:N``, such as ``a100``."""
    cpus_per_rank: Positive = 8
    """CPUs of each process: ``compute.threads`` run on them, and as many processes that decode images."""
    memory_gb: Rate = 32
    """Memory on each node, in GB."""
    minutes: Positive = 60
    """Time limit of one task. A task that reaches it writes a checkpoint, is requeued and resumes."""
    signal_seconds: Positive = 120
    """Number of seconds before the time limit at which SLURM warns a task. It must suffice to write a checkpoint."""
    parallel: Positive = 32
    """Tasks of an array that run at the same time."""
    requeue: bool = True
    """Whether a task that was warned, preempted, killed or that failed goes back into the queue."""
    retries: Count = 2
    """Number of times that a task which failed or was killed starts again; wrong input is not tried again."""
    env: dict[str, str] = Field({})
    """Environment variables that a task sets before it imports torch; ``$NAME`` stands for a variable of the task."""
    setup: tuple[str, ...] = ()
    """Shell lines run before the task, such as ``module load cuda``."""
    container: tuple[str, ...] = ()
    """Words put before the interpreter, such as ``["apptainer", "exec", "--nv", "image.sif"]``."""
    python: str | None = None
    """Interpreter of the task; None is the one that submits. Inside a container, the container's."""
    srun_args: tuple[str, ...] = ()
    """Further options of srun."""
    sbatch: dict[str, str | int | bool] = Field({})
    """Further options of sbatch without their dashes, such as ``mail-type = "FAIL"``."""

    @model_validator(mode="after")
    def _time_to_work(self) -> "Resources":
        # SLURM may warn a minute early; a task that is warned while it starts would come back for ever.
        if self.minutes * 60 < self.signal_seconds + 75:
            least = -(-(self.signal_seconds + 75) // 60)
            raise ValueError(f"minutes = {self.minutes} leaves no time before the warning; use {least} or more")
        return self

    @property
    def ranks(self) -> int:
        """Processes of one task."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus(self) -> int:
        """GPUs of one task."""
        return self.ranks * self.gpus_per_rank


class Profile(Strict):
    """A cluster: the resources of each stage, and what is known of its speed."""

    name: str
    """Name of the profile or path of its file."""
    stages: dict[Stage, Resources]
    """What each stage asks for."""
    node_ranks: Positive | None = None
    """Ranks that fill a node, one a GPU: a scaling study takes whole nodes; None: ``ranks_per_node``."""
    rate: Rate | None = None
    """Image-iterations per second of one rank in synthesis, measured; decides the default number of blocks."""
    update_seconds: Rate | None = None
    """Seconds of one update of a student, measured; decides how many students go into one task."""


def profile_names() -> list[str]:
    """Return the names of the profiles that ship."""
    folder = resources.files("slurm") / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


_KEYS = [*Resources.model_fields, "node_ranks", "rate", "update_seconds", *STAGES]
"""What a profile may say at its top"""


def load_profile(source: str) -> Profile:
    """Read a profile by name (``a100``) or by the path of a TOML file.

    Keys at the top hold for every stage; a table ``[teacher]``, ``[distill]``, ``[students]`` or ``[report]`` changes
    some of them for its stage.  Teacher and report are one process whatever the top says, unless their tables say
    otherwise.

    Raises:
        InputError: no such profile or file, not TOML, unknown key or value out of range; the message names it.
    """
    values = _read(source)
    tables = {stage: values.pop(stage, {}) for stage in STAGES}
    own = {key: values.pop(key) for key in ("node_ranks", "rate", "update_seconds") if key in values}
    alone = {"nodes": 1, "ranks_per_node": 1}
    stages = {}
    for stage, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(f"profile {source}: {stage} is a table of keys, as in [{stage}]")
        merged = values | (alone if stage in ("teacher", "report") else {}) | table
        try:
            stages[stage] = Resources.model_validate(merged)
        except ValidationError as error:
            raise InputError(
                f"profile {source}: {complaint(error.errors()[0], _KEYS, stage if table else '')}"
            ) from None
    try:
        return Profile(name=source, stages=stages, **own)
    except ValidationError as error:
        raise InputError(f"profile {source}: {complaint(error.errors()[0], _KEYS)}") from None


def is_file(source: str) -> bool:
    """Return whether a profile is named by the path of its file."""
    return source.endswith(".toml") or "/" in source


def _read(source: str) -> dict[str, Any]:
    if is_file(source):
        place: Any = Path(source)
    elif source in profile_names():
        place = resources.files("slurm") / "profiles" / f"{source}.toml"
    else:
        hint = nearest(source, profile_names())
        raise InputError(f"--profile {source}: no such profile; {hint} (a file's name ends in .toml)")
    return read_toml(place, f"--profile {source}")


def parse_blocks(text: str) -> tuple[int, ...]:
    """Return the blocks that a list such as ``0-3,7`` names.

    Raises:
        InputError: it is no such list.
    """
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = (word.strip() for word in part.partition("-"))
        if not low.isdigit() or not (high.isdigit() if dash else not high):
            raise InputError(f"--only-blocks {text}: expected numbers and ranges, such as 0-3,7")
        found += range(int(low), int(high or low) + 1)
    return tuple(found)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Return the stages that a list such as ``teacher,distill`` names, in their order.

    Raises:
        InputError: one of them does not exist.
    """
    wanted = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in STAGES:
            raise InputError(f"stage {name!r}: no such stage; {nearest(name, list(STAGES))}")
    return tuple(stage for stage in STAGES if stage in wanted)
