"""Arithmetic: resolved, set and recorded; results of two arithmetics are never joined."""

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, blocks_of
from rank_processes import in_ranks
from torch import nn
from typer.testing import CliRunner

from wmdd import pipeline
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.config.schema import ComputeConfig, Config
from wmdd.data.dataset import load_dataset
from wmdd.distill import blocks, checkpoints, groups, statistics
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.networks.accuracy import Validation
from wmdd.networks.checkpoint import Checkpoint, Clock
from wmdd.networks.frozen import FrozenNetwork
from wmdd.records.files import read_records
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime.arithmetic import ENGINE, Arithmetic, Hardware, applied, candidates, permits, resolve, switches
from wmdd.runtime.ranks import ranks
from wmdd.runtime.team import SINGLE
from wmdd.session import Session
from wmdd.storage import cache
from wmdd.storage.files import FORMAT, read_json, write_json
from wmdd.teacher import obtain

CPU = Arithmetic("cpu", "fp32", compile=False, deterministic=True, threads=1)
A100 = Hardware("cuda", bf16=True, tf32=True)
V100 = Hardware("cuda", bf16=False, tf32=False)
PLAIN = Hardware("cpu", bf16=False)
IMAGES = pipeline.Share(("teacher", "distill"))


def in_(config: Config, precision: str, **changes: Any) -> Config:
    return config.model_copy(update={"compute": config.compute.model_copy(update={"precision": precision}), **changes})


@pytest.mark.parametrize(
    ("compute", "hardware", "expected"),
    [
        (ComputeConfig(), PLAIN, CPU),
        (ComputeConfig(threads=3, precision="auto"), PLAIN, Arithmetic("cpu", "fp32", False, True, 3)),
        (ComputeConfig(precision="auto"), Hardware("cpu", bf16=True), Arithmetic("cpu", "bf16", False, True, 1)),
        (ComputeConfig(threads=8, precision="auto"), A100, Arithmetic("cuda", "bf16", False, True, None)),
        (ComputeConfig(precision="auto"), V100, Arithmetic("cuda", "fp32", False, True, None)),
        (ComputeConfig(precision="tf32", compile=True), A100, Arithmetic("cuda", "tf32", True, True, None)),
        (ComputeConfig(deterministic=False), A100, Arithmetic("cuda", "fp32", False, False, None)),
        (ComputeConfig(deterministic=False), PLAIN, CPU),
    ],
)
def test_a_config_resolves_on_the_hardware_at_hand(
    compute: ComputeConfig, hardware: Hardware, expected: Arithmetic
) -> None:
    assert resolve(compute, hardware) == expected
    assert permits(compute, expected)
    assert Arithmetic.from_facts(json.loads(json.dumps(expected.facts))) == expected


def test_fp32_is_ieee_and_what_is_not_deterministic_may_choose_its_algorithms() -> None:
    fp32, tf32, free = (
        switches(resolve(ComputeConfig(**asked), A100))
        for asked in ({}, {"precision": "tf32"}, {"precision": "bf16", "deterministic": False})
    )
    assert not any(value for name, value in fp32.items() if name.endswith("tf32")) and fp32["cudnn.deterministic"]
    assert all(value for name, value in tf32.items() if name.endswith("tf32")) and not tf32["cudnn.benchmark"]
    assert (free["cudnn.deterministic"], free["cudnn.benchmark"]) == (False, True)


def test_torch_computes_so_within_the_ranks_and_as_before_after_them() -> None:
    def now() -> tuple[bool, ...]:
        cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul
        return cudnn.allow_tf32, product.allow_tf32, cudnn.deterministic, cudnn.benchmark

    before = now()
    assert before[0], "cuDNN may use TF32 by torch's own defaults"
    with pytest.raises(ZeroDivisionError), ranks(ComputeConfig(device="cpu")):
        assert now() == (False, False, True, False)
        raise ZeroDivisionError
    assert now() == before
    with applied(Arithmetic("cuda", "tf32", False, False, None)):
        assert now() == (True, True, False, True)
    assert now() == before


def test_tf32_where_there_is_none_is_wrong_input(tmp_path: Path) -> None:
    for hardware in (PLAIN, V100):
        with pytest.raises(InputError, match="has no TF32"):
            resolve(ComputeConfig(precision="tf32"), hardware)
    tf32 = ["--set", "compute.precision=tf32", "--set", "compute.device=cpu"]
    result = CliRunner().invoke(app, ["run", "digits", "--out", str(tmp_path / "run"), *tf32])
    assert isinstance(result.exception, InputError) and not (tmp_path / "run").exists()


def test_an_unresolved_precision_means_only_what_it_may_resolve_to() -> None:
    assert {one.precision for one in candidates(ComputeConfig(precision="auto"), "cuda")} == {"bf16", "fp32"}
    assert permits(ComputeConfig(precision="auto"), CPU) and not permits(ComputeConfig(precision="bf16"), CPU)
    assert not permits(ComputeConfig(device="cuda:1"), CPU) and not permits(ComputeConfig(threads=2), CPU)
    assert not permits(ComputeConfig(precision="tf32"), Arithmetic("cpu", "fp32", False, True, 1))


def test_ranks_that_compute_differently_refuse_to_start() -> None:
    import os

    def start() -> str:
        try:
            with ranks(ComputeConfig(device="cpu", threads=1 + int(os.environ["RANK"]))):
                return "started"
        except InputError as error:
            return str(error)

    for message in in_ranks(2, start):
        assert "rank 0 in fp32 on cpu, 1 thread, rank 1 in fp32 on cpu, 2 threads" in message, message
        assert "compute.threads=1" in message


@pytest.mark.slow
def test_a_bf16_block_does_not_join_an_fp32_run(tiny: Config, tmp_path: Path) -> None:
    synthesis = tiny.synthesis.model_copy(update={"classes_per_group": 1})
    config = tiny.model_copy(update={"blocks": 2, "synthesis": synthesis})
    one, two = (pipeline.Share(("distill",), (block,)) for block in (0, 1))
    pipeline.run(config, tmp_path / "run", share=one)
    assert read_json(tmp_path / "run" / "arithmetic.json") == CPU.facts | {"engine": ENGINE}
    assert RunFolder(tmp_path / "run").sidecar(0)["arithmetic"] == CPU.facts
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError) as caught:
        patch.setattr(obtain, "get_or_train_teacher", lambda *_: pytest.fail("a teacher was asked for"))
        pipeline.run(in_(config, "bf16"), tmp_path / "run", share=two)
    for word in ("computed in fp32 on cpu", "computes in bf16 on cpu", "set compute.precision=fp32", "--out"):
        assert word in str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not list((tmp_path / "run" / "groups").glob("*"))
    pipeline.run(config, tmp_path / "run", share=two)
    pipeline.run(config, tmp_path / "whole", share=IMAGES)
    assert blocks_of(tmp_path / "run") == blocks_of(tmp_path / "whole")


def test_a_damaged_block_is_not_made_again_in_another_arithmetic(tiny: Config, tmp_path: Path) -> None:
    pipeline.run(tiny, tmp_path / "run", share=IMAGES)
    file = RunFolder(tmp_path / "run").block_file(0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="computed in fp32 on cpu"):
        patch.setattr(blocks, "distill_group", lambda *_: pytest.fail("a group was synthesised before the refusal"))
        pipeline.run(in_(tiny, "bf16"), tmp_path / "run", share=IMAGES)


def test_a_group_that_ends_after_one_of_another_arithmetic_is_not_kept(tiny: Config, tmp_path: Path) -> None:
    def first(*_: object, **__: object) -> None:
        RunFolder(tmp_path / "run").bind_arithmetic(CPU)  # while this process synthesised

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "quantize", lambda images, data: first() or images)
        with pytest.raises(InputError, match="computed in fp32 on cpu"):
            pipeline.run(in_(tiny, "bf16"), tmp_path / "run", share=IMAGES)
    assert not list((tmp_path / "run" / "groups").glob("group-*[0-9].safetensors"))


def test_images_of_another_engine_are_not_continued(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.bind_arithmetic(CPU)
    folder.check_arithmetic(CPU)
    for engine in ({"engine": ENGINE + 1}, {}):  # the first version wrote no number
        write_json(tmp_path / "arithmetic.json", CPU.facts | engine)
        with pytest.raises(InputError, match=f"this version has {ENGINE}"):
            folder.check_arithmetic(CPU)


@pytest.mark.parametrize("module", [statistics, checkpoints])
def test_statistics_and_checkpoints_of_another_engine_are_not_used(module: Any, tiny: Config) -> None:
    found = []
    for engine in (ENGINE, ENGINE + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "ENGINE", engine)
            session = SimpleNamespace(
                config=tiny,
                dataset=SimpleNamespace(fingerprint="data"),
                teacher=SimpleNamespace(sha256="teacher"),
                ranks=SimpleNamespace(arithmetic=CPU),
            )
            names = statistics.key(tiny, session.dataset, "teacher", CPU), checkpoints.identity(session)["run"]
            found.append(names[module is checkpoints])
    assert found[0] != found[1]


def bind(folder: Path, threads: int, start: Any, won: Any) -> None:
    start.wait()
    try:
        RunFolder(folder).bind_arithmetic(Arithmetic("cpu", "fp32", False, True, threads))
        won.put(threads)
    except InputError:
        won.put(None)


@pytest.mark.slow
def test_of_tasks_that_end_their_first_groups_at_once_one_arithmetic_wins(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for turn in range(3):
        (folder := tmp_path / str(turn)).mkdir()
        start, won = fork.Barrier(6), fork.Queue()
        tasks = [fork.Process(target=bind, args=(folder, 1 + task % 3, start, won)) for task in range(6)]
        for task in tasks:
            task.start()
        found = [won.get(timeout=60) for _ in tasks]
        for task in tasks:
            task.join(60)
        (winner,) = set(found) - {None}
        assert found.count(winner) == 2
        assert read_json(folder / "arithmetic.json")["threads"] == winner
        assert [file.name for file in folder.iterdir()] == ["arithmetic.json"]


def test_statistics_of_another_precision_are_not_reused(tiny: Config) -> None:
    from wmdd.networks import create

    dataset = load_dataset(tiny.data)
    torch.manual_seed(7)
    network = FrozenNetwork(create.create("convnet2x8", 4, tiny.data.channels, 8))
    frozen = obtain.Teacher(network, "of this other test", {})

    def measured(precision: str) -> tuple[int, torch.Tensor]:
        shown: list[int] = []
        hook = network.register_forward_pre_hook(lambda module, images: shown.append(len(images[0])))
        with ranks(in_(tiny, precision).compute) as job:
            judge = Validation(tiny, dataset, job)
            ((_, found),) = statistics.measure(Session(tiny, dataset, judge, frozen, job, lambda: False), [2])
        hook.remove()
        return sum(shown), found.mean

    count, whole = measured("fp32")
    assert count == len(dataset.train.of_class(2))
    again, rounded = measured("bf16")
    assert again == count and not torch.equal(whole, rounded)
    assert [measured(precision)[0] for precision in ("fp32", "bf16")] == [0, 0]


@pytest.mark.slow
def test_the_checkpoint_of_a_group_in_another_arithmetic_is_not_resumed(
    tiny: Config, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "due", lambda self: True)
    write = checkpoints.write_checkpoint

    def written(session: Session, folder: Any, group: Any, state: Any, spent: Any) -> None:
        write(session, folder, group, state, spent)
        if state.iteration == 3:
            raise Interrupted("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "write_checkpoint", written)
        with pytest.raises(Interrupted):
            pipeline.run(tiny, tmp_path / "run", share=IMAGES)
    assert list((tmp_path / "run" / "groups").glob("*.checkpoint.safetensors"))
    pipeline.run(in_(tiny, "bf16"), tmp_path / "run", share=IMAGES)
    (line,) = (line for line in said if "starts again" in line)
    assert "computed in fp32 on cpu, 1 thread, this is bf16 on cpu, 1 thread" in line
    assert not any("resumes at iteration" in line for line in said)
    pipeline.run(in_(tiny, "bf16"), tmp_path / "whole", share=IMAGES)
    assert blocks_of(tmp_path / "run") == blocks_of(tmp_path / "whole")


def test_the_checkpoint_of_a_training_in_another_arithmetic_is_not_resumed(tmp_path: Path, said: list[str]) -> None:
    network, device, file = nn.Linear(2, 2), torch.device("cpu"), tmp_path / "student.safetensors"
    bf16 = Arithmetic("cpu", "bf16", False, True, 1)
    Checkpoint(file, "this", 1e6, CPU).save({"network": network}, device, SINGLE, epoch=3)
    assert Checkpoint(file, "this", 1e6, bf16).load({"network": network}, device, SINGLE) == {}
    assert len(said) == 1 and "fp32 on cpu, 1 thread, this is bf16 on cpu" in said[0] and str(file) in said[0]
    assert Checkpoint(file, "this", 1e6, CPU).load({"network": network}, device, SINGLE) == {"epoch": 3}


@pytest.mark.slow
def test_a_bound_run_finds_its_teacher_whatever_it_was_trained_in(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "cache"))
    changes = {"seeds": 1, "baselines": ()}
    config = tiny.model_copy(update={"student": tiny.student.model_copy(update=changes)})
    run = tmp_path / "run"
    pipeline.run(config, run, share=IMAGES)
    first = read_json(run / "teacher.json")
    images = DistilledSet.load(run).sha256
    pipeline.run(in_(config, "bf16"), run)
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 1
    assert read_json(run / "teacher.json") == first and first["arithmetic"] == CPU.facts
    assert DistilledSet.load(run).sha256 == images
    records = read_records(run / "records")[0]
    assert len(records) == 2
    assert {(record.recipe["arithmetic"]["precision"], record.artefact) for record in records} == {("bf16", images)}
    assert {record.provenance["precision"] for record in records} == {"bf16"}
    # Once it is lost it cannot be made again in another arithmetic, and is not tried.
    for file in (tmp_path / "cache" / "teachers").rglob("teacher.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match=f"{first['sha256'][:12]}.* cannot be trained again in bf16 on cpu"):
        pipeline.run(in_(config, "bf16"), run)
    pipeline.run(config, run, share=IMAGES)
    assert read_json(run / "teacher.json")["sha256"] == first["sha256"]


def test_trained_teachers_are_known_by_their_arithmetic_and_imported_ones_are_not(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path))
    dataset = load_dataset(tiny.data)
    bf16 = Arithmetic("cpu", "bf16", False, True, 1)

    def known(config: Config) -> list[bool]:
        with ranks(config.compute) as job:
            obtain.get_or_train_teacher(config, dataset, Validation(config, dataset, job), job, lambda: False)
        return [obtain.is_stored(config, dataset, [arithmetic]) for arithmetic in (CPU, bf16)]

    assert known(tiny) == [True, False]
    (weights,) = tmp_path.rglob("teacher.safetensors")
    assert known(tiny.model_copy(update={"teacher": tiny.teacher.model_copy(update={"weights": str(weights)})})) == [
        True,
        True,
    ]


def test_blocks_of_two_arithmetics_make_no_set(tiny: Config, tmp_path: Path) -> None:
    synthesis = tiny.synthesis.model_copy(update={"classes_per_group": 1})
    run = tmp_path / "run"
    pipeline.run(tiny.model_copy(update={"blocks": 2, "synthesis": synthesis}), run, share=IMAGES)
    file = RunFolder(run).sidecar_file(1)
    sidecar = read_json(file)
    assert sidecar["format"] == FORMAT
    write_json(file, sidecar | {"arithmetic": CPU.facts | {"precision": "bf16"}})
    with pytest.raises(WmddError, match=r"computed differently \(0 in fp32 on cpu, 1 thread; 1 in bf16 on cpu, 1 th"):
        DistilledSet.load(run)


@pytest.fixture
def older(tiny: Config, tmp_path: Path) -> Path:
    """Return a run folder as version 0.1.0 wrote it: without a format, an arithmetic, and these fingerprints."""
    run = pipeline.run(tiny, tmp_path / "older", share=IMAGES)
    config = read_json(run / "config.json")
    del config["format"]
    write_json(run / "config.json", config | {"fingerprint": "0" * 64})
    (run / "arithmetic.json").unlink()
    return run


@pytest.mark.parametrize("command", [["verify"], ["status"], ["export", "--out", "new"]])
def test_an_older_run_folder_is_refused_in_one_line(older: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, [command[0], str(older), *command[1:]])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(
        f"{older}: was written by an earlier version of wmdd (format 1, this version"
    )


def test_an_older_run_folder_is_not_gone_on_with(tiny: Config, older: Path) -> None:
    with pytest.raises(InputError, match="was written by an earlier version of wmdd"):
        pipeline.run(tiny, older)


def test_older_entries_of_the_cache_are_named_and_not_used(
    tiny: Config, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "cache"))
    old = tmp_path / "cache" / "teachers" / ("0" * 64)
    write_json(old / "teacher.json", {"sha256": "0" * 64})
    pipeline.run(tiny, tmp_path / "run", share=IMAGES)
    assert [line for line in said if "1 entries of another version of wmdd are not used" in line]
    listed = CliRunner().invoke(app, ["cache", "list"]).output.splitlines()
    assert [line for line in listed if "000000" in line and line.endswith("by another version of wmdd, not used")]
    assert sum("another version" in line for line in listed) == 1


@pytest.mark.slow
def test_every_arithmetic_of_the_project_is_in_its_records(tmp_path: Path) -> None:
    options = ["student.seeds=1", "labels.regimes=['hard']", "compute.precision=auto"]
    run = pipeline.run("digits", tmp_path / "run", [*TINY, *options])
    with ranks(load_config("digits", [*TINY, *options]).compute) as job:
        own = job.arithmetic.facts
    for place in (run, run / "baselines" / "random"):
        (record,) = read_records(place / "records")[0]
        assert record.recipe["arithmetic"] == own and own["precision"] in ("fp32", "bf16")
    assert cache.entries("statistics", "teachers")
