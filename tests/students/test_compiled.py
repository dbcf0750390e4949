"""Compiled steps compute what eager ones do, in one graph each (torch has had silently wrong compiled code)."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from torch import Tensor, nn

from wmdd.config.loading import load_config
from wmdd.config.schema import ComputeConfig, SynthesisConfig
from wmdd.distill.synthesis.engine import Problem, State, synthesize
from wmdd.distill.synthesis.objective import Objective, Target
from wmdd.errors import WmddError
from wmdd.networks import create
from wmdd.networks.accuracy import Judgement
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime import ranks as ranks_module
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.team import SINGLE
from wmdd.session import Session
from wmdd.students import tasks, train
from wmdd.teacher.obtain import Teacher

pytestmark = [
    needs(shutil.which("g++"), "COMPILER", "torch.compile needs a C++ compiler on a CPU (apt-get install g++)"),
    pytest.mark.slow,
    pytest.mark.compiler,
    pytest.mark.xdist_group("compiler"),
]


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def jobs() -> Iterator[dict[str, Ranks]]:
    """Return a job of eager and one of compiled steps."""
    with ranks(ComputeConfig(device="cpu")) as eager, ranks(ComputeConfig(device="cpu", compile=True)) as compiled:
        yield {"eager": eager, "compiled": compiled}


def graphs() -> int:
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


def traced() -> Any:
    """Return a context in which graphs are traced, and kernels not generated: that takes g++ seconds for each graph."""
    return torch.compiler.set_stance(force_backend="eager")


def network() -> nn.Module:
    torch.manual_seed(4)
    made = create.create("convnet1x4", 5, 3, 8)
    nn.init.uniform_(made[1].running_var, 0.5, 2)  # type: ignore[index]
    return made


def test_synthesis(jobs: dict[str, Ranks]) -> None:
    target = Target(
        labels=torch.tensor([4, 4, 1, 1]),
        weights=torch.full((2, 2), 0.5),
        mean=torch.randn(2, 4),
        variance=torch.rand(2, 4),
        atoms=torch.randn(2, 2, 64),
    )
    start, limits = torch.randn(4, 3, 8, 8), (torch.full((3, 1, 1), -3.0), torch.full((3, 1, 1), 3.0))
    settings = SynthesisConfig(iterations=4, lr=0.05, jitter=2)

    def run(job: Ranks) -> State:
        frozen, objective = FrozenNetwork(network()), Objective(1.0, 10.0, 0.5)
        return synthesize(Problem(frozen, objective, target, settings, limits, ("group",)), State(start), job)

    eager, compiled = run(jobs["eager"]), run(jobs["compiled"])
    assert graphs() == 1, "one graph for all iterations"
    torch.testing.assert_close(compiled.images, eager.images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        torch.tensor(compiled.curve["total"]), torch.tensor(eager.curve["total"]), atol=0, rtol=1e-4
    )


def test_a_student_and_its_teacher(jobs: dict[str, Ranks], tmp_path: Path) -> None:
    settings = ["data.channels=3", "data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]", "data.resolution=8"]
    config = load_config("digits", [*settings, "student.epochs=2", "student.batch_size=5"])
    torch.manual_seed(5)
    pixels = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    distilled = DistilledSet(pixels, torch.arange(10) % 5, torch.full((10,), 0.5), tuple("abcde"), config.data, "set")
    teacher = Teacher(FrozenNetwork(network()), "teacher", {})
    shown = torch.randn(6, 3, 8, 8)

    def run(job: Ranks) -> Tensor:
        seen = []

        def judge(predict: nn.Module, team: object) -> Judgement:
            with torch.no_grad():
                seen.append(predict(shown))
            return Judgement({})

        task = tasks.StudentTask("convnet1x8", "soft", 0)
        session = Session(config, None, judge, teacher, job, lambda: False)  # type: ignore[arg-type]
        train.train(session, task, distilled, SINGLE, tmp_path)
        return seen[0]

    eager, compiled = run(jobs["eager"]), run(jobs["compiled"])
    assert graphs() == 2, "one of the student, one of the teacher"
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


def test_every_shape_is_compiled_also_the_ninth(jobs: dict[str, Ranks]) -> None:
    def double(values: Tensor) -> Tensor:
        return 2 * values

    step = jobs["compiled"].compiled(double)
    with traced():
        for size in range(1, 10):
            assert torch.equal(step(torch.ones(size)), torch.full((size,), 2.0))
    assert graphs() == 9


def test_a_process_that_makes_more_graphs_than_allowed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_MAX_GRAPHS", 2)
    with (
        pytest.raises(WmddError, match=r"compute\.compile = true: one process compiled 2 graphs"),
        ranks(ComputeConfig(device="cpu", compile=True)) as job,
        traced(),
    ):
        step = job.compiled(lambda values: 3 * values)
        for size in range(1, 4):
            step(torch.ones(size))
    assert torch._dynamo.config.recompile_limit == 8, "what others compile is left alone"
