"""Kill runs at random moments and resume them by the same command, until they are done; then compare every byte.

    python tests/kill_runs.py --once 50 --runs 10 --times 3

Prints the kills that were survived, by stage, and the bytes that were compared with an uninterrupted run.  Runs are
forked from one warm process, so that a kill costs no import of torch; the signal is SIGKILL to the whole process.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.records.files import read_records
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime import log

SETTINGS = [
    "ipc=2",
    "blocks=2",
    "data.resolution=8",
    "data.classes=4",
    "compute.threads=1",
    "compute.checkpoint_seconds=0.2",
    "teacher.network=convnet2x8",
    "teacher.epochs=20",
    "teacher.batch_size=32",
    "synthesis.iterations=200",
    "synthesis.classes_per_group=1",
    "student.networks=['convnet2x8']",
    "student.epochs=20",
    "student.batch_size=2",
    "student.seeds=2",
]
STAGES = ("teacher", "statistics", "synthesis", "students", "start or report")


@dataclass(frozen=True)
class Outcome:
    """What a finished run holds."""

    images: dict[str, bytes]
    accuracies: dict[str, Any]

    def differences(self, other: "Outcome") -> list[str]:
        """Return the names of what differs."""
        pairs = ((vars(self)[kind], vars(other)[kind]) for kind in ("images", "accuracies"))
        return [name for mine, theirs in pairs for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]

    @property
    def size(self) -> int:
        """Bytes that are compared."""
        return sum(map(len, self.images.values())) + len(json.dumps(self.accuracies))


def outcome(run: Path) -> Outcome:
    """Read the sets, labels, weights and accuracies of a run and of its baseline."""
    images, accuracies = {}, {}
    for title, folder in (("run", run), ("random", run / "baselines" / "random")):
        found = DistilledSet.load(folder)
        for name in ("images", "labels", "weights"):
            images[f"{title}/{name}"] = getattr(found, name).numpy().tobytes()
        for record in read_records(folder / "records")[0]:
            accuracies[f"{title}/{record.regime}/{record.student_seed}"] = record.metrics
    return Outcome(images, dict(sorted(accuracies.items())))


def work(config: Config, run: Path, store: Path) -> None:
    """Do the whole run, as ``wmdd run`` would."""
    os.environ["WMDD_CACHE"] = str(store)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of this process
    log.console.file = sys.stderr
    pipeline.run(config, run)


def stage(run: Path) -> str:
    """Return what the run said it was doing when it died."""
    try:
        title = json.loads((run / "progress" / "run.json").read_text())["stage"]
    except (OSError, ValueError):
        return STAGES[-1]
    for word, name in (("teacher", "teacher"), ("training images", "teacher"), ("statistics", "statistics")):
        if word in title:
            return name
    return "students" if "students" in title or "test images" in title else "synthesis"


def attempt(config: Config, run: Path, store: Path, target: str | None, delay: float) -> bool:
    """Start the run and kill it ``delay`` seconds later, or after ``target`` has begun; return whether it ended."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(config, run, store))
    process.start()
    while target and process.is_alive() and stage(run) != target:
        time.sleep(0.002)
    process.join(delay)
    if not process.is_alive():
        if process.exitcode:
            raise SystemExit(f"{run}: ended by itself with exit code {process.exitcode}; progress: {stage(run)}")
        return True
    process.kill()
    process.join()
    return False


def kill(config: Config, run: Path, store: Path, times: int, rng: random.Random, hits: Counter[str]) -> int:
    """Kill a run so many times, resume it to its end, and return how many kills it met."""
    kills = 0
    while kills < times:
        # Half of the kills wait for the stage that was hit least, the others fall where they fall.
        rare = min(STAGES[:-1], key=lambda name: hits[name]) if rng.random() < 0.5 else None
        if rare and rare != stage(run) and _passed(rare, run):
            rare = None
        if attempt(config, run, store, rare, rng.uniform(0.0, 0.15) if rare else rng.uniform(0.05, 1.0)):
            return kills
        kills += 1
        hits[stage(run)] += 1
    process = multiprocessing.get_context("fork").Process(target=work, args=(config, run, store))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{run}: could not be resumed, exit code {process.exitcode}")
    return kills


def _passed(name: str, run: Path) -> bool:
    """Return whether a stage can no longer come: its results are there."""
    blocks = len(list((run / "blocks").glob("*.json")))
    return {"teacher": (run / "teacher.json").exists(), "students": False}.get(name, blocks == 2)


def main() -> None:
    """Run the trial and print what was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", type=int, default=50, help="kills of the one run")
    parser.add_argument("--runs", type=int, default=10, help="further runs")
    parser.add_argument("--times", type=int, default=3, help="kills of each further run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config, rng, hits = load_config("digits", SETTINGS), random.Random(arguments.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        begun = time.monotonic()
        # Here, and not in a process of its own: what it imports, the forked runs need not import again.
        os.environ["WMDD_CACHE"] = str(root / "whole-store")
        pipeline.run(config, root / "whole")
        expected = outcome(root / "whole")
        print(f"uninterrupted: {time.monotonic() - begun:.1f} s", flush=True)
        plan = [("one", arguments.once), *((f"run {index}", arguments.times) for index in range(arguments.runs))]
        survived = compared = 0
        for name, times in plan:
            run, store = root / name, root / f"{name}-store"
            kills = kill(config, run, store, times, rng, hits)
            found = outcome(run)
            if found != expected:
                raise SystemExit(f"{name}: after {kills} kills these differ: {', '.join(found.differences(expected))}")
            survived, compared = survived + kills, compared + found.size
            print(f"{name}: {kills} kills, {found.size:,} bytes equal", flush=True)
        by_stage = ", ".join(f"{name} {hits[name]}" for name in STAGES)
        print(f"{survived} kills survived ({by_stage}); {compared:,} bytes compared, all equal")
        if arguments.once >= 50 and min(hits[name] for name in STAGES) < 2:
            raise SystemExit("not every stage was hit twice; choose another --seed")


if __name__ == "__main__":
    main()
