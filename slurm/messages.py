"""What ``wmdd slurm submit`` says: the plan, what it will cost, what was handed in."""

from collections.abc import Sequence

from slurm import plan, submit
from slurm.plan import Array
from slurm.submissions import Submitted
from slurm.submit import Request


def dry_run(request: Request) -> str:
    """Return plan, estimate and scripts of a submission."""
    estimate = plan.estimate(request.config, len(request.dataset.classes), request.arrays, request.speed)
    if not request.arrays:
        return f"{request.folder.path}: nothing is missing"
    lines = [f"{request.folder.path}: {request.config.blocks} blocks of {len(request.dataset.classes)} classes", ""]
    lines += [_line(array) for array in request.arrays]
    lines.append("")
    for stage, hours in estimate.gpu_hours.items():
        unit = "GPU-hours" if request.profile.stages[stage].gpus else "rank-hours"
        remedy = "--rate, --rate-from" if stage == "distill" else "--rate-from"
        known = (
            f"about {hours:.2f} {unit}" if hours is not None else f"{unit} unknown: give {remedy}, or set the profile"
        )
        lines.append(f"{stage:9} {known}")
    lines.append(f"disk      about {estimate.size / 1e6:,.0f} MB in {estimate.inodes:,} files")
    lines.append("Start-up, reading of images and the training of a teacher come on top.")
    for position, array in enumerate(request.arrays):
        after = f"<{request.arrays[position - 1].stage}>" if position else None
        lines += ["", f"--- {array.stage} ---", submit.script(request, array, after).rstrip()]
    return "\n".join(lines)


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
