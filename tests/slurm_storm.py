"""A run of many blocks on a cluster of virtual nodes, where starts fail at random; then a larger one, submitted held.

    python tests/slurm_storm.py --blocks 100 --nodes 16 --failing 0.05 --held 1000

Prints what failed, the times of submission, start-up and tail, and the requests that slurmctld had to answer.  Compares
the images with those of a local run, byte by byte.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from conftest import blocks_of
from PIL import Image

from slurm import attempts, scheduler
from slurm.local_cluster import LocalCluster
from slurm.plan import Selection
from slurm.profile import STAGES, Profile, Resources
from slurm.status import status
from slurm.submit import prepare, submit
from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config

RESOURCES = Resources(gpus_per_rank=0, cpus_per_rank=8, memory_gb=1, minutes=60, signal_seconds=30, parallel=16)
"""A task takes all CPUs of a node."""


def folder_of_classes(place: Path, classes: int) -> Path:
    """Write a dataset of two grey images a class."""
    for number in range(classes):
        for split in ("train", "val"):
            folder = place / split / f"class{number:04}"
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), number % 256).save(folder / "0.png")
    return place


def config_of(place: Path, blocks: int) -> Config:
    """Return a run of blocks of one class, whose image is a real one."""
    data = [f"data.root={folder_of_classes(place, blocks)}", "data.source=folder", "data.resolution=8"]
    small = ["teacher.network=convnet2x8", "teacher.epochs=1", "student.networks=['convnet2x8']", "student.epochs=1"]
    few = ["student.seeds=1", "student.baselines=[]", "labels.regimes=['hard']", "compute.threads=1"]
    kind = ["method=random", "ipc=1", "synthesis.classes_per_group=1", f"blocks={blocks}"]
    return load_config("digits", [*data, *small, *few, *kind])


def profile_of(place: Path, failing: float) -> Profile:
    """Return a profile of whose starts a share fails before Python is up, or is killed in it."""
    script = place / "unreliable"
    parts = int(1000 * failing)
    lines = ["draw=$((SRANDOM % 1000))", f"[ $draw -ge {parts // 2} ] || exit 1"]
    lines.append(f"[ $draw -ge {parts} ] || {{ sleep 1; kill -KILL $$; }}")
    script.write_text("\n".join(["#!/bin/bash", *lines, 'exec "$@"', ""]))
    script.chmod(0o755)
    resources = RESOURCES.model_copy(update={"container": (str(script),)})
    return Profile(name="storm", stages=dict.fromkeys(STAGES, resources), update_seconds=0.01)


@contextmanager
def requests(what: str) -> Iterator[None]:
    """Print how long a block took, and how many requests slurmctld answered meanwhile."""
    ask("sdiag", "--reset")
    begun = time.perf_counter()
    yield
    seconds = time.perf_counter() - begun
    lines = ask("sdiag").partition("by message type")[2].partition("by user")[0].splitlines()
    counts = {line.split()[0]: int(line.split("count:")[1].split()[0]) for line in lines if "count:" in line}
    nodes = ("REQUEST_PING", "MESSAGE_NODE", "MESSAGE_EPILOG", "REQUEST_COMPLETE", "REQUEST_STEP", "REQUEST_STATS")
    counts = {name: count for name, count in counts.items() if not name.startswith(nodes)}
    print(f"{what}: {seconds:.1f} s, {sum(counts.values())} requests {counts}", flush=True)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def storm(place: Path, blocks: int, failing: float) -> None:
    """Run all stages, and compare."""
    config, run = config_of(place / "data", blocks), place / "run"
    with requests(f"{blocks} blocks prepared"):
        request = prepare(config, run, profile_of(place, failing), blocks)
    with requests("submitted and released"):
        launched = {one.stage: one for one in submit(request)}
    begun = time.perf_counter()
    while status(run).active:
        time.sleep(5)
    lasting = time.perf_counter() - begun
    found = status(run)
    print(f"ended after {lasting:.0f} s: {dict(Counter((row.stage, row.state) for row in found.rows))}")
    job = launched["distill"].job
    names = [path.name for path in (run / attempts.FOLDER / job).glob("*/*")]
    print(f"attempts: {dict(Counter(name.split('.')[2].partition('-')[0] for name in names))}")
    layout = ("squeue", "-h", "-t", "all", "-r", "-j", job, "-o", "%V %S %e")
    times = [[datetime.fromisoformat(one) for one in line.split()] for line in ask(*layout).splitlines()]
    first, last, end = min(one[1] for one in times), max(one[1] for one in times), max(one[2] for one in times)
    print(f"array: first to last start {(last - first).seconds} s, tail after the last start {(end - last).seconds} s")
    seconds = sorted(history.seconds for history in attempts.histories(run, [job]).values())
    print(f"seconds of a task, all its starts: median {seconds[len(seconds) // 2]}, longest {seconds[-1]}")
    local = pipeline.run(config, place / "local", share=pipeline.Share(("teacher", "distill")))
    print(f"byte-identical: {blocks_of(run) == blocks_of(local)}; report: {(run / 'report.html').exists()}")


def held(place: Path, blocks: int) -> None:
    """Plan and submit a run whose jobs nobody starts."""
    config, run = config_of(place / "many", blocks), place / "held"
    ask("scontrol", "update", "partitionname=main", "state=down")
    with requests(f"{blocks} blocks prepared"):
        request = prepare(config, run, profile_of(place, 0), blocks, selection=Selection(STAGES))
    with requests("submitted"):
        launched = submit(request)
    with requests("status"):
        status(run)
    with requests("cancelled"):
        scheduler.cancel_all([one.job for one in launched])
    folders = [folder for folder in (run / "slurm").rglob("*") if folder.is_dir()]
    print(f"most entries of a folder: {max(len(os.listdir(folder)) for folder in folders)}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--blocks", type=int, default=100)
    options.add_argument("--nodes", type=int, default=16)
    options.add_argument("--failing", type=float, default=0.05, help="share of the starts that fail")
    options.add_argument("--held", type=int, default=1000, help="blocks of the run that is submitted held; 0: none")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="wmdd-storm-", dir="/tmp") as name:
        place = Path(name)
        cluster = LocalCluster(place / "c", nodes=chosen.nodes)
        cluster.start()
        os.environ |= cluster.environment | {"WMDD_CACHE": str(place / "cache")}
        try:
            if chosen.blocks:
                storm(place, chosen.blocks, chosen.failing)
            if chosen.held:
                held(place, chosen.held)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
