"""What ``wmdd slurm submit`` says: the plan, what it will cost, what was handed in."""

from collections.abc import Sequence

from slurm import submit
from slurm.estimate import Estimate, Hours, estimate, memory_gb
from slurm.plan import Array
from slurm.profile import Stage
from slurm.submissions import Submitted
from slurm.submit import Request


def dry_run(request: Request) -> str:
    """Return plan, estimate and scripts of a submission."""
    found = estimate(request.config, len(request.dataset.classes), request.arrays, request.size.speed)
    if not request.arrays:
        return f"{request.folder.path}: nothing is missing"
    lines = [f"{request.folder.path}: {request.config.blocks} blocks of {len(request.dataset.classes)} classes", ""]
    lines += [_line(array) for array in request.arrays]
    lines.append("")
    for stage, hours in found.gpu_hours.items():
        lines.append(f"{stage:9} {_hours(request, stage, hours)}")
        lines.append(f"{'':9} ranks are busy {found.busy[stage]:.0%} of the time; {_ceiling(request, stage, found)}")
    for stage, seconds in found.wall_seconds.items():
        if seconds is not None and request.size.speed.start_seconds:
            lines.append(f"{stage:9} lasts about {seconds / 60:.1f} min from its first start to its last end")
    for array in request.arrays:
        trains = any(one.stage == "teacher" for one in request.arrays)
        needed = memory_gb(request.config, request.dataset, array.stage, array.resources, trains)
        if needed > array.resources.memory_gb:
            lines.append(
                f"{array.stage:9} needs about {needed:.0f} GB of memory on a node, and memory_gb ="
                f" {array.resources.memory_gb:g}: raise it, or lower ranks_per_node"
            )
    lines.append(f"disk      about {found.size / 1e6:,.0f} MB in {found.inodes:,} files")
    if not request.size.speed.start_seconds:
        lines.append("Start-up, reading of images and the training of a teacher come on top.")
    for position, array in enumerate(request.arrays):
        before = [f"<{earlier.stage}>" for earlier in request.arrays[:position]]
        lines += ["", f"--- {array.stage} ---", submit.script(request, array, before).rstrip()]
    return "\n".join(lines)


def _hours(request: Request, stage: Stage, hours: Hours | None) -> str:
    unit = "GPU-hours" if request.profile.stages[stage].gpus else "rank-hours"
    if hours is None:
        remedy = "--rate, --rate-from" if stage == "distill" else "--rate-from"
        return f"{unit} unknown: give {remedy}, or set the profile"
    span = f" ({hours.low:.2f} to {hours.high:.2f} at the speeds of the probe)" if hours.low < hours.high else ""
    return f"about {hours.best:.2f} {unit}{span}"


def _ceiling(request: Request, stage: Stage, found: Estimate) -> str:
    """Return how many ranks can work at a time, and whether the profile asks for more."""
    most = found.most_ranks[stage]
    wanted = next(array for array in request.arrays if array.stage == stage)
    asked = min(len(wanted.tasks), wanted.resources.parallel) * wanted.resources.ranks
    pieces = "students" if stage == "students" else "groups (synthesis.classes_per_group, split_class)"
    return f"{asked} work at a time, and {pieces} are enough for {most}"


def submitted(request: Request, launched: Sequence[Submitted]) -> str:
    """Return what was handed in, and what to do next."""
    lines = []
    for one in launched:
        tasks = tuple(tuple(item.index for item in task) for task in one.tasks)
        lines.append(f"{_line(Array(one.stage, tasks, request.profile.stages[one.stage]))}: job {one.job}")
    return "\n".join([*lines, f"wmdd slurm status {request.folder.path}"])


def _line(array: Array) -> str:
    wanted = array.resources
    items = sum(len(task) for task in array.tasks)
    what = {"distill": f" of {_count(items, 'block')}", "students": f" of {_count(items, 'student')}"}.get(
        array.stage, ""
    )
    count = len(array.tasks)
    each = f"{_count(wanted.ranks, 'rank')}, {_count(wanted.gpus, 'GPU')}, {_count(wanted.cpus_per_rank, 'CPU')} a rank"
    parallel = f", {wanted.parallel} at a time" if count > wanted.parallel else ""
    return f"{array.stage:9} {_count(count, 'task')}{what}{parallel} ({each}, {wanted.minutes} min)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
