"""Submit a run as a graph of arrays: held until the whole graph is accepted, then released at once."""

import contextlib
import logging
import os
import secrets
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from slurm import attempts, plan, scheduler, submissions
from slurm.estimate import ClusterSpeed
from slurm.plan import LARGEST_ARRAY, Array, Selection, TaskSize
from slurm.profile import STAGES, Profile, Resources, Stage, is_file
from slurm.submissions import Item, Submitted
from slurm.task import SlurmTask, versions
from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset, load_dataset
from wmdd.errors import InputError, WmddError
from wmdd.runs import class_partition
from wmdd.runs.folder import RunFolder
from wmdd.runtime.placement import SECRET_VARIABLE
from wmdd.storage import cache
from wmdd.storage.files import read_json
from wmdd.students import evaluate

logger = logging.getLogger(f"wmdd.{__name__}")

_NO_NODE = "node configuration is not available"
_REMEDIES = {
    "invalid partition": "sinfo lists the partitions; set partition in the profile",
    "invalid account": "sacctmgr show associations lists yours; set account in the profile",
    "invalid qos": "sacctmgr show qos lists them; set qos in the profile",
    "invalid feature": "sinfo -o %f lists the features; set constraint in the profile",
    _NO_NODE: "no node has that much; ask for fewer CPUs, GPUs or less memory",
    "memory specification": "no node has that much; ask for fewer CPUs, GPUs or less memory",
    "inactive or drain": "the partition takes no jobs now; wait, or set another one in the profile",
    "maxsubmitjob": "the queue takes no more jobs of yours; use fewer --blocks, or wait",
    "job array": "use fewer --blocks",
    "time limit": "set minutes in the profile below the partition's limit",
    "unable to contact": "the controller does not answer; try again, or ask scontrol ping",
}
"""What to do about the complaints of sbatch, by a part of their text."""


@dataclass(frozen=True)
class Request:
    """A run that is to be submitted: what it is and what is missing of it."""

    config: Config
    folder: RunFolder
    dataset: Dataset
    profile: Profile
    size: TaskSize
    selection: Selection
    arrays: list[Array] = field(default_factory=list)
    waiting: dict[Stage, set[str]] = field(default_factory=dict)
    """Jobs of earlier submissions that are still in the queue"""


def prepare(
    config: Config,
    out: Path | None,
    profile: Profile,
    blocks: int | None = None,
    minutes: float = 30,
    speed: ClusterSpeed | None = None,
    selection: Selection | None = None,
    refresh: bool = False,
) -> Request:
    """Check the run as its tasks would, and find out what is missing of it.

    Args:
        config: config of the run.
        out: run folder; ``runs/NAME`` by default.
        profile: what the tasks ask for.
        blocks: number of blocks; by default that of the folder, else what makes tasks of ``minutes``.
        minutes: target duration of a task.
        speed: known speeds; else the profile's.
        selection: part of the run to submit; by default all of it.
        refresh: list the data set again; the tasks read the listing that is made here.

    Raises:
        InputError: the config, the data, the folder or the number of blocks is wrong.
    """
    folder = RunFolder((out or Path("runs") / config.name).absolute())
    dataset = load_dataset(config.data, config.compute.workers, refresh=refresh)
    classes = len(dataset.classes)
    speed = speed or ClusterSpeed()
    speed = replace(
        speed, rate=speed.rate or profile.rate, update_seconds=speed.update_seconds or profile.update_seconds
    )
    size = TaskSize(minutes, speed, min(scheduler.largest_array(), LARGEST_ARRAY))
    waiting, queued = _in_queue(folder)
    blocks = blocks or _bound_blocks(folder, bool(waiting))
    blocks = blocks or plan.blocks_for(config, classes, size, profile.stages["distill"].ranks)
    # As many decoders as a rank has CPUs: it decides no result.  A task with fewer CPUs starts fewer (runtime.cpus).
    workers = profile.stages["distill"].cpus_per_rank if config.compute.workers else 0
    config = config.replace({"blocks": blocks, "compute.workers": workers})
    class_partition.plan(config, classes)  # refuses more blocks than groups
    pipeline.check(config, dataset)
    selection = selection or Selection()
    selection.check(config.blocks)
    return _planned(Request(config, folder, dataset, profile, size, selection), waiting, queued)


def _planned(request: Request, waiting: dict[Stage, set[str]], queued: dict[Stage, set[int]]) -> Request:
    """Return a request for what is missing and is not in the queue."""
    config, folder = request.config, request.folder
    if waiting and _without_workers(read_json(folder.path / "config.json")["config"]) != _without_workers(
        config.model_dump(mode="json")
    ):
        raise InputError(
            f"{folder.path}: tasks with another config are in the queue; use another --out, or cancel them"
        )
    selection = replace(request.selection, queued=queued)
    arrays = plan.arrays(config, folder, request.dataset, request.profile, request.size, selection)
    return replace(request, arrays=arrays, waiting=waiting)


def submit(request: Request) -> list[Submitted]:
    """Hand the graph to SLURM; all of it or nothing.

    Every job is submitted held, since its pickles are put in place after sbatch has answered, and the graph is released
    once it is complete and written down.  Of several commands that submit one run one works at a time, and what another
    one has submitted meanwhile is left out.

    Raises:
        InputError: SLURM is missing or refuses a job, or others can write to the folder of the pickles; nothing is left
            in the queue.
    """
    scheduler.require("sbatch", "srun", "squeue", "scontrol", "scancel")
    runs = pipeline.runs_of(request.config, request.folder)
    for place, one in runs.items():
        place.check(one, request.dataset.fingerprint)
    for array in request.arrays:
        _rehearse(request, array)
    with request.folder.locked("submit"):
        request = _planned(request, *_in_queue(request.folder))
        for place, one in runs.items():
            place.bind(one, request.dataset.fingerprint)
            if any(array.stage == "students" for array in request.arrays):
                # A task checks the records of its own students only. Records of students that no task trains move here.
                images = len(request.dataset.classes) * one.ipc
                evaluate.set_aside(place, partial(evaluate.is_of_recipe, config=one, images=images))
            cache.pin(pipeline.entries_of(one, request.dataset))
        private(_jobs_folder(request))
        return _submitted(request) if request.arrays else []


def _submitted(request: Request) -> list[Submitted]:
    launched: list[Submitted] = []
    jobs: list[str] = []
    try:
        for array in request.arrays:
            items = _items(request, array.stage)
            tasks = tuple(tuple(items[index] for index in task or (0,)) for task in array.tasks)
            jobs.append(_launch(request, array, tasks, jobs))
            launched.append(Submitted(array.stage, jobs[-1], array.resources.gpus, array.resources.ranks, tasks))
        profile = request.profile.name
        profile = str(Path(profile).absolute()) if is_file(profile) else profile
        submissions.write(request.folder.path, profile, launched)
        scheduler.release(jobs)
    except BaseException:
        with contextlib.suppress(WmddError):
            scheduler.cancel(jobs)
        raise
    return launched


def script(request: Request, array: Array, before: Sequence[str] = (), hold: bool = True) -> str:
    """Return the text that sbatch is given for an array, in a graph that is held or by itself.

    Args:
        request: the run.
        array: of one stage.
        before: jobs of the graph that were submitted before it, in order.
        hold: whether the job waits for its release.
    """
    from submitit.slurm import slurm

    folder = _pattern(request, array)
    command = f"{python(array.resources)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    count = len(array.tasks) if len(array.tasks) > 1 else None
    written = _parameters(request, array, before)
    if not hold:
        written["dependency"] = None
        del written["additional_parameters"]["hold"]
    text: str = slurm._make_sbatch_string(command=command, folder=folder, map_count=count, **written)
    return text


def job_script(name: str, wanted: Resources, lines: Sequence[str], folder: Path, **further: Any) -> str:
    """Return the script of a job that is no array.

    Args:
        name: name of the job.
        wanted: resources of the job.
        lines: shell lines of the job.
        folder: folder of its log.
        further: options of sbatch.
    """
    from submitit.slurm import slurm

    job = parameters(name, wanted, further)
    text: str = slurm._make_sbatch_string(command="\n".join(lines), folder=folder, use_srun=False, **job)
    return text


def send(text: str) -> str:
    """Submit the script of a job, and return the number of the job.

    Raises:
        WmddError: sbatch refuses it.
    """
    with clean_environment():
        return scheduler.call("sbatch", "--parsable", given=text).strip().partition(";")[0]


def _rehearse(request: Request, array: Array) -> None:
    """Let SLURM check what an array asks for: of a job that is held it would only find out when it releases it.

    SLURM answers from the nodes that are up at this moment, and with its own state: what may be different tomorrow is
    said and not refused.

    Raises:
        InputError: the array asks for something that does not exist.
    """
    try:
        scheduler.call("sbatch", "--test-only", given=script(request, array, hold=False))
    except WmddError as error:
        told = str(error)
        absent = _NO_NODE in told.lower() and scheduler.unavailable_nodes()
        if absent or not any(part in told.lower() for part in _REMEDIES):
            logger.warning(
                f"{array.stage}: {told}{f'; {absent} nodes are down or drained' if absent else ''}; submitted anyway"
            )
            return
        raise _refused(array, told) from None


def _refused(array: Array, told: str) -> InputError:
    """Return the error of an array that sbatch refuses, with what to do about it."""
    remedy = next((advice for part, advice in _REMEDIES.items() if part in told.lower()), "nothing was submitted")
    return InputError(f"{array.stage}: {told}; {remedy}")


def _launch(request: Request, array: Array, tasks: Sequence[Sequence[Item]], before: Sequence[str]) -> str:
    """Submit one array, held; return its number."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(
        _pattern(request, array), max_num_timeout=1_000_000, python=python(array.resources)
    )
    executor.update_parameters(**_parameters(request, array, before))
    config = request.config.model_dump(mode="json")
    # Only this user can read the folder of the pickles, and so the secret.
    environment = {"WMDD_CACHE": str(cache.cache_root().absolute()), SECRET_VARIABLE: secrets.token_hex(16)}
    environment |= array.resources.env
    common = SlurmTask(config, str(request.folder.path), array.stage, (), environment, versions())
    gpu = array.resources.gpus_per_rank > 0
    try:
        # submitit prints what sbatch complains of; it is said once, below.
        with clean_environment(), open(os.devnull, "w") as void, contextlib.redirect_stderr(void), executor.batch():
            jobs = [
                executor.submit(
                    replace(
                        common,
                        items=indices,
                        gpu=gpu,
                        files=tuple(file for item in items for file in (*item.parts, *item.proof)),
                    )
                )
                for indices, items in zip(array.tasks, tasks, strict=True)
            ]
        return str(jobs[0].job_id).partition("_")[0]
    except (FailedJobError, FailedSubmissionError) as error:
        raise _refused(array, scheduler.complaint(str(error), "sbatch")) from None


def _parameters(request: Request, array: Array, before: Sequence[str]) -> dict[str, Any]:
    """Return what submitit writes into the script; see its ``SlurmExecutor``."""
    wanted = array.resources
    # Jobs of an earlier submission may fail: what waits for them then says what is missing.
    stages = STAGES[: STAGES.index(array.stage)]
    earlier = sorted(job for stage in stages for job in request.waiting.get(stage, ()))
    if array.stage == "report":  # it says what is missing, so it runs whatever became of the others
        conditions = [f"afterany:{job}" for job in [*before, *earlier]]
    else:
        conditions = [f"afterok:{job}" for job in before[-1:]] + [f"afterany:{job}" for job in earlier]
    further = {"hold": True, "requeue" if wanted.requeue else "no-requeue": True, "kill-on-invalid-dep": "yes"}
    settings = {
        "requeue": int(wanted.requeue),
        "retries": wanted.retries,
        "exclude": wanted.exclude or "",
        "attempts": request.folder.path / attempts.FOLDER,
    }
    known = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in settings.items())
    teardown = (resources.files("slurm") / "teardown.sh").read_text()
    return parameters(f"{request.config.name}-{array.stage}", wanted, further) | {
        "dependency": ",".join(conditions) or None,
        "array_parallelism": wanted.parallel,
        "teardown": [f"code=$? {known}", *teardown.splitlines()],
    }


def parameters(name: str, wanted: Resources, further: dict[str, Any]) -> dict[str, Any]:
    """Return what submitit writes into the script of a job of that name, with further options of sbatch."""
    gpus = wanted.gpus_per_rank * wanted.ranks_per_node
    if wanted.reservation:
        further = further | {"reservation": wanted.reservation}
    return {
        "job_name": name,
        "partition": wanted.partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "constraint": wanted.constraint,
        "exclude": wanted.exclude,
        "time": wanted.minutes,
        "signal_delay_s": wanted.signal_seconds,
        "nodes": wanted.nodes,
        "ntasks_per_node": wanted.ranks_per_node,
        "cpus_per_task": wanted.cpus_per_rank,
        "gpus_per_node": f"{wanted.gpu_type}:{gpus}" if gpus and wanted.gpu_type else gpus or None,
        "mem": f"{int(wanted.memory_gb * 1024)}M",
        "setup": list(wanted.setup) or None,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": further | wanted.sbatch,
        # Some versions of srun forget the CPUs of sbatch; a rank that fails must not leave the others waiting.
        "srun_args": [f"--cpus-per-task={wanted.cpus_per_rank}", "--kill-on-bad-exit=1", *wanted.srun_args],
    }


def _items(request: Request, stage: Stage) -> dict[int, Item]:
    """Return, for every item of a stage, how it will be seen that it is done."""
    config, root = request.config, request.folder.path

    def below(path: Path) -> str:
        return path.relative_to(root).as_posix()

    if stage == "distill":
        runs = list(pipeline.runs_of(config, request.folder))
        return {
            block.index: Item(
                block.index,
                tuple(below(run.sidecar_file(block.index)) for run in runs),
                tuple(below(run.group_file(group.index)) for run in runs for group in block.groups),
            )
            for block in class_partition.plan(config, len(request.dataset.classes))
        }
    if stage == "students":
        students = enumerate(pipeline.students_of(config, request.folder))
        return {index: Item(index, (below(evaluate.record_file(place, task)),)) for index, (place, task) in students}
    return {0: Item(0, (f"{stage}.json" if stage == "teacher" else "report.html",))}


def _in_queue(folder: RunFolder) -> tuple[dict[Stage, set[str]], dict[Stage, set[int]]]:
    """Return the jobs and the items of earlier submissions that may still do something, by stage."""
    jobs: dict[Stage, set[str]] = {}
    items: dict[Stage, set[int]] = {}
    launched = submissions.read(folder.path) if submissions.exists(folder.path) else []
    known = scheduler.queue(one.job for one in launched)
    for one in launched:
        for name, task in zip(one.names(), one.tasks, strict=True):
            if name in known and known[name].active:
                jobs.setdefault(one.stage, set()).add(one.job)
                items.setdefault(one.stage, set()).update(item.index for item in task)
    return jobs, items


def _bound_blocks(folder: RunFolder, waiting: bool) -> int | None:
    """Return the number of blocks of a folder that holds work, or for which work waits in the queue."""
    if not waiting and not any(folder.path.glob("*s/*.safetensors")):  # neither blocks/ nor groups/ has any
        return None
    return int(read_json(folder.path / "config.json")["config"]["blocks"])


def _without_workers(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what the profile decides."""
    return config | {"compute": {key: value for key, value in config["compute"].items() if key != "workers"}}


def _jobs_folder(request: Request) -> Path:
    return request.folder.path / submissions.JOBS


def _pattern(request: Request, array: Array) -> Path:
    """Return the folder of each task as submitit takes it: one a task, so that no folder has many files."""
    return _jobs_folder(request) / ("%A" if len(array.tasks) > 1 else "%j") / "%j"


def private(folder: Path) -> None:
    """Make a private folder for the pickles of jobs. Pickles are code, so no other user may write there.

    Raises:
        InputError: others can write there, or could have.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(
            f"{folder}: others can write there, and jobs run what lies there; delete it while no job of the run is in"
            " the queue, or use another --out"
        )
    folder.chmod(0o700)


def python(wanted: Resources) -> str:
    """Return the words that start the interpreter of a task."""
    return shlex.join([*wanted.container, wanted.python or sys.executable])


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the job that this process may itself run in: sbatch would pass its settings on."""
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf:
            os.environ["SLURM_CONF"] = conf
        yield
