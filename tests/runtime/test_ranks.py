"""Many ranks: the same bytes, the same losses, and no rank left waiting for one that is gone."""

import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, UNREPORTED, blocks_of, wait_until
from forked import python
from rank_processes import fork, free_port, in_ranks, take
from synthesis_targets import targets
from torch import Tensor, nn

from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import ComputeConfig, Config, SynthesisConfig
from wmdd.distill import blocks as blocks_module
from wmdd.distill.synthesis import objective as objective_module
from wmdd.distill.synthesis.engine import Problem, State, synthesize
from wmdd.distill.synthesis.objective import Objective, evaluate, own_rows
from wmdd.errors import Interrupted, WmddError
from wmdd.networks.frozen import FrozenNetwork
from wmdd.records.files import read_records
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime import heartbeats, memory
from wmdd.runtime import ranks as ranks_module
from wmdd.runtime.arithmetic import Hardware, resolve
from wmdd.runtime.heartbeats import PeerLost, Peers
from wmdd.runtime.job_store import open_store
from wmdd.runtime.placement import Placement
from wmdd.runtime.progress_bars import observed_by
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.team import SINGLE, Team
from wmdd.session import Session

pytestmark = pytest.mark.ranks


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Wait for the threads of a test: a fork while one of them writes torch's last words inherits their locks."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), f"{thread.name} is left"


@pytest.fixture
def ungrouped(tiny: Config) -> Config:
    """Return a run whose 4 classes are 4 groups."""
    return tiny.model_copy(update={"synthesis": tiny.synthesis.model_copy(update={"classes_per_group": 1})})


@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_bytes(ungrouped: Config, tmp_path: Path) -> None:
    images = {}
    for size in (1, 2, 3, 4):
        in_ranks(size, lambda size=size: pipeline.run(ungrouped, tmp_path / str(size), share=UNREPORTED))  # type: ignore[misc]
        images[size] = blocks_of(tmp_path / str(size))
        records = read_records(tmp_path / str(size) / "records")[0]
        assert len(records) == 4 and {record.provenance["world_size"] for record in records} == {size}
    assert images[1] == images[2] == images[3] == images[4]
    accuracies = {
        tuple(sorted((r.regime, r.student_seed, r.metrics["loss"]) for r in read_records(tmp_path / n / "records")[0]))
        for n in "1234"
    }
    assert len(accuracies) == 1


@pytest.mark.slow
def test_blocks_and_ranks_together_write_the_same_bytes(ungrouped: Config, tmp_path: Path) -> None:
    share = pipeline.Share(("teacher", "distill"))
    pipeline.run(ungrouped, tmp_path / "one", share=share)
    in_ranks(2, lambda: pipeline.run(ungrouped.model_copy(update={"blocks": 3}), tmp_path / "two", share=share))
    assert blocks_of(tmp_path / "two") == blocks_of(tmp_path / "one")


@pytest.mark.slow
def test_a_slow_rank_takes_fewer_groups_of_all_blocks_and_no_byte_changes(ungrouped: Config, tmp_path: Path) -> None:
    share = pipeline.Share(("teacher", "distill"))
    # Every block has one group: dealt block by block, one rank would do them all.
    blocks = ungrouped.replace({"data.classes": 6, "blocks": 6, "student.baselines": ()})
    pipeline.run(blocks, tmp_path / "one", share=share)
    distill_group = blocks_module.distill_group

    def work() -> int:
        done = 0

        def counted(session: Session, *arguments: Any) -> None:
            nonlocal done
            done += 1
            if session.ranks.rank == 0:  # this rank holds one group and the next one: the other rank does the rest
                while sum(path.exists() for path in finished) < 4:
                    time.sleep(0.01)
            distill_group(session, *arguments)

        folder = RunFolder(tmp_path / "two")
        finished = [folder.sidecar_file(block) for block in range(6)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks_module, "distill_group", counted)
            pipeline.run(blocks, folder.path, share=share)
        return done

    shares = in_ranks(2, work)
    assert sum(shares) == 6 and 1 <= shares[0] < shares[1], shares
    assert blocks_of(tmp_path / "two") == blocks_of(tmp_path / "one")


def moments_of_ranks(network: FrozenNetwork, images: Tensor, target: Any, objective: Objective, size: int) -> Any:
    """Return loss and gradient of the whole group, computed in parts."""

    def work() -> Any:
        with ranks(ComputeConfig(device="cpu")) as job:
            team = job.team(size, "test")
            rows = own_rows(2, 4, team)
            own = images[rows].requires_grad_(True)
            loss = evaluate(objective, network(own), target.part(team), network.layer_sizes, team).total
            (gradient,) = torch.autograd.grad(loss, own)
            return loss.item(), rows.tolist(), gradient.tolist()

    return in_ranks(size, work)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [Objective(1.0, 20.0, 0.5), Objective(1.0, 20.0, 0.5, squared=False), Objective(1.0, 20.0, 0.5, per_class=False)],
)
def test_a_split_class_has_the_loss_and_gradient_of_the_whole(classifier: nn.Module, objective: Objective) -> None:
    network = FrozenNetwork(classifier)
    target, _ = targets(classifier, torch.tensor([0.4, 0.3, 0.2, 0.1]), count=4)
    if not objective.per_class:
        mean, variance = network.running_moments()
        target = objective_module.Target(target.labels, target.weights, mean[None], variance[None], target.atoms)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = images.clone().requires_grad_(True)
    loss = evaluate(objective, network(whole), target, network.layer_sizes).total
    (gradient,) = torch.autograd.grad(loss, whole)
    for size in (2, 4):
        for value, rows, part in moments_of_ranks(network, images, target, objective, size):
            assert value == pytest.approx(loss.item(), rel=1e-5)
            assert (torch.tensor(part) - gradient[rows]).norm() < 1e-5 * gradient.norm()


def test_a_split_synthesis_follows_the_unsplit_one_and_resumes(classifier: nn.Module) -> None:
    target, _ = targets(classifier, torch.full((4,), 0.25), count=4)
    network = FrozenNetwork(classifier)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = SynthesisConfig(iterations=6, lr=0.01, augment="image")
    limits = torch.full((3, 1, 1), -3.0), torch.full((3, 1, 1), 3.0)

    def work(size: int, state: State) -> State:
        with ranks(ComputeConfig(device="cpu")) as job:
            team = job.team(size, "test")
            problem = Problem(network, Objective.from_settings(settings), target, settings, limits, (0,))
            return synthesize(problem, state, job, team)

    whole = work(1, State(images))
    halves = in_ranks(2, lambda: work(2, State(images)).images.tolist())
    assert halves[0] == halves[1]
    # Along six steps rounding has no time to grow: images differ by less than a hundredth of a step.
    assert (torch.tensor(halves[0]) - whole.images).abs().max() < 1e-4


@pytest.mark.slow
def test_a_run_with_split_classes_ends_and_its_teams_share_the_groups(tiny: Config, tmp_path: Path) -> None:
    split = tiny.model_copy(update={"synthesis": tiny.synthesis.model_copy(update={"split_class": 2})})
    in_ranks(4, lambda: pipeline.run(split, tmp_path / "run", share=pipeline.Share(("teacher", "distill"))))
    assert len(DistilledSet.load(tmp_path / "run")) == 8


@pytest.mark.slow
@pytest.mark.parametrize("key", ["synthesis.split_class", "teacher.ranks", "student.ranks"])
def test_too_few_ranks_for_a_team_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=rf"{key} = 2 does not divide the job's 1 ranks.*nproc-per-node 2"):
        pipeline.run("digits", tmp_path / "run", [*TINY, f"{key}=2", "teacher.seed=99"])


def test_ddp_gradients_are_those_of_the_whole_batch() -> None:
    images, classes = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(0)
    network = nn.Linear(4, 3)

    def gradient(team: Team) -> list[list[float]]:
        parallel = team.wrap(network, images)
        loss = nn.functional.cross_entropy(parallel(team.shard(images)), team.shard(classes), reduction="sum")
        network.zero_grad()
        (loss * (team.size / len(images))).backward()
        assert network.weight.grad is not None
        found: list[list[float]] = network.weight.grad.tolist()
        return found

    def work() -> list[list[float]]:
        with ranks(ComputeConfig(device="cpu")) as job:
            return gradient(job.team(2, "test"))

    whole = torch.tensor(gradient(SINGLE))
    for found in in_ranks(2, work):
        torch.testing.assert_close(torch.tensor(found), whole)


@pytest.mark.slow
def test_teacher_and_students_train_under_ddp_and_learn_as_well(tmp_path: Path) -> None:
    changes = [
        "data.classes=4",
        "ipc=5",
        "teacher.epochs=4",
        "student.epochs=30",
        "student.seeds=3",
        "student.lr=0.005",
    ]
    base = [*TINY, *changes, "labels.regimes=['hard']", "student.baselines=[]", "teacher.network=convnet2x16"]
    accuracy = {}
    for size in (1, 2):
        config = load_config("digits", [*base, f"teacher.ranks={size}", f"student.ranks={size}"])
        in_ranks(size, lambda config=config, size=size: pipeline.run(config, tmp_path / str(size), share=UNREPORTED))  # type: ignore[misc]
        records = read_records(tmp_path / str(size) / "records")[0]
        teacher = (tmp_path / str(size) / "teacher.json").read_text()
        students = torch.tensor([record.metrics["top1"] for record in records])
        accuracy[size] = students
        assert '"network": "convnet2x16"' in teacher and len(records) == 3
    print("students at 1 and 2 ranks:", accuracy)
    spread = 3 * max(float(values.std()) for values in accuracy.values()) + 0.02
    assert abs(float(accuracy[1].mean() - accuracy[2].mean())) < spread
    assert min(float(values.mean()) for values in accuracy.values()) > 0.7


@pytest.fixture
def store() -> Iterator[torch.distributed.TCPStore]:
    """Return a store in this process."""
    yield torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    gc.collect()  # a later test's ranks are forks, in which the end of a store would wait for its thread


class Counted:
    """The store, with the requests that each method sends: ``get`` and ``multi_get`` first wait for their keys."""

    def __init__(self, store: Any) -> None:
        self.store, self.requests = store, 0
        self.before: Callable[[str], None] = lambda name: None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)
        if name in ("clone", "set_timeout"):
            return method

        def call(*arguments: Any) -> Any:
            self.before(name)
            self.requests += 1 + (name in ("get", "multi_get"))
            return method(*arguments)

        return call


@contextmanager
def joined(store: Any, rank: int, size: int, secret: str = "") -> Iterator[Peers]:
    """Join a job in a thread, and leave it."""
    peers = Peers(store, rank, size, lambda: False, secret)
    try:
        yield peers
    finally:
        peers.leave()


def together(*works: Callable[[], object]) -> list[object]:
    """Return what each function returned or raised; all run at once, in threads."""
    found: list[object] = [None] * len(works)

    def do(index: int) -> None:
        try:
            found[index] = works[index]()
        except WmddError as error:
            found[index] = error

    threads = [threading.Thread(target=do, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return found


@pytest.mark.slow
def test_an_agreement_costs_a_rank_three_requests_however_long_it_waits(store: torch.distributed.TCPStore) -> None:
    size = 5
    stores = [Counted(store.clone()) for _ in range(size)]
    late = threading.Event()

    def member(rank: int) -> list[object]:
        with joined(stores[rank], rank, size) as peers:
            stores[rank].requests = 0
            if rank == 3:  # the others wait longer than they would sleep between two looks
                assert not late.wait(1.0)
            return [peers.broadcast_from_main(f"rank {rank}"), peers.agree(rank, sum)]

    assert together(*(partial(member, rank) for rank in range(size))) == [["rank 0", 10]] * size
    assert all(0 < one.requests <= 2 * 3 for one in stores), [one.requests for one in stores]


@pytest.mark.slow
def test_a_rank_that_left_before_another_got_the_outcome_is_not_lost(
    store: torch.distributed.TCPStore,
) -> None:
    slow = Counted(store.clone())
    noticed = threading.Event()

    def first() -> object:
        peers = Peers(store.clone(), 0, 2, lambda: False)
        found = peers.broadcast_from_main("value")
        peers._left.set()
        peers._thread.join()
        store.set("state/0", "left")  # as its leave does, which would wait for the other rank
        return found

    def second() -> object:
        with joined(slow, 1, 2) as peers:
            verdict = peers._first_verdict

            def gives_up(gone: Sequence[int]) -> list[int]:
                noticed.set()
                return verdict(gone)

            def until_noticed(name: str) -> None:
                if name == "get":
                    assert noticed.wait(60)

            peers._first_verdict = gives_up  # type: ignore[method-assign]
            slow.before = until_noticed
            return peers.broadcast_from_main(None)

    assert together(first, second) == ["value", "value"] and noticed.is_set()


@pytest.mark.slow
def test_rank_0_watches_while_it_computes_and_the_others_learn_who_is_gone(store: torch.distributed.TCPStore) -> None:
    computing = threading.Event()

    def first() -> object:
        with joined(store.clone(), 0, 3) as peers:
            assert computing.wait(60)  # it comes to no meeting before the others have left
            return peers.broadcast_from_main(None)

    def second() -> None:
        with joined(store.clone(), 1, 3):
            pass

    def third() -> object:
        try:
            with joined(store.clone(), 2, 3) as peers:
                return peers.broadcast_from_main(None)
        finally:
            computing.set()

    found = together(first, second, third)
    assert [str(error) for error in found[::2]] == [
        f"rank {rank} of 3: rank 1 is gone; start the same command again" for rank in (0, 2)
    ]


def test_after_a_suspension_the_patience_with_the_others_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now)
    watch = heartbeats._Watch([1, 2])
    for second in range(25):  # rank 2 is silent from the first second on
        now += 1
        watch.note([str(second).encode(), b"0"])
    assert watch.notice().gone == () and watch.notice().silent == (2,)
    now += 3600  # suspended: all states are old
    watch.note([b"24", b"0"])
    assert watch.notice() == heartbeats._Notice()
    for second in range(31):
        now += 1
        watch.note([str(second).encode(), b"0"])
    assert watch.notice().gone == (2,)


def is_stopped(pid: int) -> bool:
    """Return whether every thread of a process has stopped: until then the store still answers."""
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) == {"T"}


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_no_reason_to_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a loss of power: no connection is closed, and no request is answered."""
    monkeypatch.setattr(heartbeats, "_LOST_AFTER_SECONDS", 2.0)
    ready, port = fork.SimpleQueue(), free_port()

    def host() -> None:
        own = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        Peers(own, 0, 2, lambda: False)
        ready.put(True)
        time.sleep(300)

    process = fork.Process(target=host, daemon=True)
    process.start()
    try:
        take(ready, 60)
        peers = Peers(torch.distributed.TCPStore("127.0.0.1", port), 1, 2, lambda: False)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(process.pid), 60)
        with pytest.raises(PeerLost, match="rank 1 of 2: the rank that hosts the job's key-value store is gone"):
            peers.ticket("groups")
        assert peers.missing() == [0]
        peers.leave()
        del peers
    finally:
        process.kill()
        process.join(60)


def test_only_those_who_know_the_secret_decide_an_agreement(store: torch.distributed.TCPStore) -> None:
    forged = heartbeats._Seal("").close("outcome/0", {"value": "skip all blocks"})
    store.set("outcome/0", forged)

    def member(rank: int) -> object:
        with joined(store.clone(), rank, 2, "word") as peers:
            return peers.broadcast_from_main("value")

    for error in together(partial(member, 0), partial(member, 1)):
        assert "'outcome/0' that no rank of this job wrote; set the same WMDD_JOB_SECRET" in str(error)


def test_a_job_on_one_node_listens_on_loopback_only() -> None:
    place = Placement(0, 1, 0, f"tcp://127.0.0.1:{free_port()}")
    store = open_store(place, {}, timedelta(seconds=20))
    assert isinstance(store, torch.distributed.TCPStore)
    socket.create_connection(("127.0.0.1", store.port), 5).close()
    with pytest.raises(OSError):  # a store on all interfaces would answer at this address
        socket.create_connection(("127.0.0.2", store.port), 5)
    del store
    gc.collect()


def test_teams_of_one_rank_need_no_process_group() -> None:
    def work() -> list[bool]:
        with ranks(ComputeConfig(device="cpu")) as job:
            job.team(1, "test")
            job.barrier()
            alone = torch.distributed.is_initialized()
            job.team(2, "test")
            return [alone, torch.distributed.is_initialized()]

    assert in_ranks(2, work) == [[False, True]] * 2


@pytest.mark.slow
def test_ranks_that_stop_at_different_times_have_all_stopped_and_none_is_lost() -> None:
    def share() -> None:
        with ranks(ComputeConfig(device="cpu")) as job:
            if job.rank == 2:
                job.barrier()
            time.sleep(9 * job.rank)  # longer than others watch for those who are lost
            raise Interrupted("checkpointed")

    def work() -> str:
        try:
            share()
        except WmddError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    assert in_ranks(3, work) == ["Interrupted: checkpointed"] * 2 + [
        "Interrupted: stopped because another rank was stopped"
    ]


def survivors(work: Callable[[Ranks], object], tmp_path: Path) -> list[tuple[str, str]]:
    """Return what ranks 0 and 2 raised and printed after rank 1 was killed, whom ``work`` kills."""
    port = str(free_port())
    results = fork.SimpleQueue()

    def member(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
        log = tmp_path / f"{rank}.log"
        sys.stderr = log.open("w")
        try:
            with ranks(ComputeConfig(device="cpu")) as job:
                job.barrier()
                work(job)
        except Exception as error:
            results.put((str(error), log.read_text()))
        else:
            results.put(("no error", ""))

    processes = [fork.Process(target=member, args=(rank,), daemon=True) for rank in range(3)]
    try:
        for process in processes:
            process.start()
        found = [take(results, 120) for _ in range(2)]
        for process in processes:
            process.join(60)
        assert processes[1].exitcode == -signal.SIGKILL
        assert processes[0].exitcode == processes[2].exitcode == 0, "a rank hangs at its end"
        return found
    finally:
        for process in processes:
            process.kill()


def kill(job: Ranks, rank: int) -> None:
    if job.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_rank_that_is_lost_before_a_meeting_is_named(tmp_path: Path) -> None:
    def work(job: Ranks) -> None:
        kill(job, 1)
        job.barrier()

    found = survivors(work, tmp_path)
    assert all(message.startswith("rank ") and "rank 1 is gone" in message for message, _ in found), found


@pytest.mark.slow
def test_a_rank_that_is_lost_inside_a_collective_is_named_once_and_the_others_leave(tmp_path: Path) -> None:
    def work(job: Ranks) -> None:
        team = job.team(3, "test")
        team.sum(torch.ones(4))
        kill(job, 1)
        team.sum(torch.ones(4))

    for message, printed in survivors(work, tmp_path):
        assert message.startswith("rank ") and "rank 1 is gone" in message
        assert printed.splitlines().count(f"wmdd: {message}") == 1, printed


def test_a_job_on_gpus_is_bound_to_them_and_aborts_its_groups_only_after_a_failure() -> None:
    gpu = ranks_module._group_options(torch.device("cuda:3"))
    assert gpu["backend"] == "cpu:gloo,cuda:nccl" and gpu["device_id"] == torch.device("cuda:3")
    cpu = ranks_module._group_options(torch.device("cpu"))
    assert cpu["backend"] == "gloo" and "device_id" not in cpu
    assert gpu["timeout"] == cpu["timeout"] <= timedelta(minutes=10)
    aborted = {
        (kind, failed): ranks_module._aborts(kind, failed) for kind in ("cuda", "cpu") for failed in (True, False)
    }
    assert [case for case, aborts in aborted.items() if aborts] == [("cuda", True)]


@pytest.mark.slow
def test_ranks_that_never_come_are_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_PATIENCE", timedelta(seconds=1))
    here = Placement(0, 2, 0, f"tcp://127.0.0.1:{free_port()}")
    with (
        pytest.raises(WmddError, match=r"rank 0 of 2: the ranks do not meet \(tcp://127\.0\.0\.1:\d+\): ") as caught,
        ranks(ComputeConfig(device="cpu"), here=here),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_what_is_gathered_keeps_its_values_in_any_layout() -> None:
    def work() -> list[bool]:
        with ranks(ComputeConfig(device="cpu")) as job:
            values = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last) + job.rank
            found = job.team(2, "test").gather(values)
            return [torch.equal(one, values - job.rank + rank) for rank, one in enumerate(found)]

    assert in_ranks(2, work) == [[True, True]] * 2


@pytest.mark.slow
def test_ranks_of_another_run_are_refused(tiny: Config, tmp_path: Path) -> None:
    """Tasks of one srun that were each meant to do a run of their own."""

    def work() -> str:
        try:
            pipeline.run(tiny, tmp_path / os.environ["RANK"])
        except WmddError as error:
            return str(error)
        return "no error"

    first, second = in_ranks(2, work)
    assert "rank 1 is gone" in first and second.startswith("rank 1 of 2: started with another config, --out or share")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_team_whose_ranks_see_different_checkpoints_does_not_go_on(tiny: Config, tmp_path: Path) -> None:
    """As on a network file system where one node still sees the folder as it was."""
    synthesis = tiny.synthesis.model_copy(update={"split_class": 2, "iterations": 40})
    split = tiny.model_copy(update={"synthesis": synthesis})
    share = pipeline.Share(("teacher", "distill"))

    def interrupted() -> None:
        def stop_inside(title: str, steps: int, total: int, unit: str) -> None:
            if unit == "iterations" and steps == 20:
                signal.raise_signal(signal.SIGUSR2)

        with observed_by(stop_inside), pytest.raises(Interrupted):
            pipeline.run(split, tmp_path / "0" / "run", share=share)

    in_ranks(2, interrupted)
    (checkpoint,) = (tmp_path / "0").rglob("group-*.checkpoint.safetensors")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    (tmp_path / "1" / checkpoint.relative_to(tmp_path / "0")).unlink()

    def resumed() -> str:
        os.chdir(tmp_path / os.environ["RANK"])
        try:
            pipeline.run(split, "run", share=share)
        except WmddError as error:
            return str(error)
        return "no error"

    for message in in_ranks(2, resumed):
        assert "checkpoint.safetensors: not every rank sees the same checkpoint" in message


@pytest.mark.slow
def test_a_lack_of_memory_names_the_key_to_change(tmp_path: Path) -> None:
    # The draws of so many iterations fill more than a process can address.
    words = overrides(["synthesis.iterations=100000000000000", "student.baselines=[]"])
    done = python("-m", "wmdd", "run", "digits", "--out", str(tmp_path / "run"), *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    told = (
        r"wmdd: out of memory on cpu, with a peak of [\d.]+ GB of [\d.]+ GB; set synthesis\.classes_per_group below 2"
    )
    assert re.fullmatch(told, done.stderr.splitlines()[-1])


def test_only_a_lack_of_memory_is_taken_for_one() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert memory._short_of_memory(caught.value, gpu) == cpu
    assert memory._short_of_memory(MemoryError(), gpu) == cpu
    assert memory._short_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried ..."), gpu) == gpu
    assert memory._short_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ..."), gpu) == gpu
    assert memory._short_of_memory(RuntimeError("shapes do not match"), gpu) is None
    with (
        pytest.raises(WmddError, match=r"out of memory on cpu.*; lower student\.batch_size$"),
        memory.within_memory(cpu, "lower student.batch_size"),
    ):
        torch.empty(2**50)


FRESH = """
import logging, os, signal, sys, threading

import torch
from torch import distributed

import wmdd
from wmdd.runtime import progress_bars
from wmdd.errors import WmddError

signal.signal(signal.SIGUSR2, print)
torch.set_num_threads(3)
torch.manual_seed(1)
loggers = [logging.getLogger(), logging.getLogger('wmdd')]

def state():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    return {
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()),
        "random": hash(bytes(torch.get_rng_state().tolist())),
        "handlers": [signal.getsignal(number) for number in numbers],
        "environment": dict(os.environ),
        "observers": list(progress_bars._observers),
        "logging": [(vars(one)["level"], list(one.handlers), one.propagate) for one in loggers],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "groups": distributed.is_initialized(),
    }

before = state()
for settings in sys.argv[2:], [*sys.argv[2:], "data.classes=11"], [*sys.argv[2:], "labels.weighted=true"]:
    try:
        wmdd.run("digits", sys.argv[1], settings)
        print("done")
    except WmddError as error:
        print(type(error).__name__)
    print({key: (before[key], value) for key, value in state().items() if value != before[key]})
"""


@pytest.mark.slow
def test_a_run_leaves_its_process_as_it_found_it_also_when_it_fails(tmp_path: Path) -> None:
    done = python("-c", FRESH, str(tmp_path / "run"), *TINY, "student.baselines=[]")
    assert done.stdout.splitlines() == ["done", "{}", "InputError", "{}", "done", "{}"], done.stdout + done.stderr


def torchrun(*arguments: str, signals: bool = False) -> subprocess.Popen[str]:
    """Start two ranks as a user would."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port())]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR2"] if signals else []
    return subprocess.Popen([*command, "-m", "wmdd", *arguments], stderr=subprocess.PIPE, text=True, env=os.environ)


def overrides(extra: list[str]) -> list[str]:
    return [word for value in [*TINY, *extra] for word in ("--set", value)]


@pytest.mark.slow
def test_torchrun_writes_what_one_process_writes_and_one_process_resumes_it_after_a_signal(tmp_path: Path) -> None:
    extra = ["synthesis.classes_per_group=1", "synthesis.iterations=400", "student.baselines=[]"]
    extra.append("compute.checkpoint_seconds=0.2")
    pipeline.run("digits", tmp_path / "one", [*TINY, *extra])
    groups = tmp_path / "two" / "groups"
    process = torchrun("run", "digits", "--out", str(tmp_path / "two"), *overrides(extra), signals=True)
    try:

        def some_are_done() -> bool:
            assert process.poll() is None
            checkpoints = len(list(groups.glob("*.checkpoint.safetensors")))
            return bool(checkpoints) and len(list(groups.glob("*.safetensors"))) > checkpoints

        wait_until(some_are_done)
        process.send_signal(signal.SIGUSR2)
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
        process.communicate()
    # torchrun itself exits with 1 whatever its ranks return; what they did is in the run folder.
    assert process.returncode == 1 and "checkpointed at iteration" in errors, errors
    assert not list((tmp_path / "two" / "blocks").glob("*.json"))
    assert list(groups.glob("group-?????.safetensors")), "no group of the two ranks is whole"
    pipeline.run("digits", tmp_path / "two", [*TINY, *extra])
    assert blocks_of(tmp_path / "two") == blocks_of(tmp_path / "one")


def test_a_single_rank_agrees_with_itself() -> None:
    arithmetic = resolve(ComputeConfig(), Hardware("cpu", bf16=False))
    assert isinstance(Ranks(0, 1, torch.device("cpu"), arithmetic).broadcast_from_main([1]), list)
