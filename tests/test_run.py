"""Whole runs on digits: what they promise, and how they refuse wrong input."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TINY, blocks_of
from forked import python
from PIL import Image
from typer.testing import CliRunner

import wmdd
from wmdd import pipeline
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.data.synthetic import generate
from wmdd.errors import InputError, WmddError
from wmdd.records.correct_bitmaps import unpack
from wmdd.records.files import read_records
from wmdd.report.collect import collect
from wmdd.runs import class_partition
from wmdd.runs.distilled_set import DistilledSet, export
from wmdd.runs.folder import RunFolder
from wmdd.storage.files import read_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    return wmdd.run("digits", tmp_path_factory.mktemp("runs") / "finished", TINY)


def images_only(config: Config, out: Path, **changes: object) -> dict[str, bytes]:
    """Distil without students, and return the images of each class."""
    pipeline.run(config.model_copy(update=changes), out, share=pipeline.Share(("teacher", "distill")))
    return blocks_of(out)


def test_a_run_ends_with_images_students_records_and_a_report(finished: Path) -> None:
    found = DistilledSet.load(finished)
    assert found.images.shape == (8, 1, 8, 8) and found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(found.weights, torch.full((8,), 0.5))
    records, problems = read_records(finished / "records")
    assert problems == [] and len(records) == 4
    assert {(record.regime, record.student_seed) for record in records} == {
        (regime, seed) for regime in ("hard", "soft") for seed in (0, 1)
    }
    assert {record.artefact for record in records} == {found.sha256}
    size = sum(file.stat().st_size for file in (finished / "blocks").glob("*.safetensors"))
    assert {record.cost["image_bytes"] for record in records} == {size}
    for record in records:  # 355 test images of ten digits, of which the run has the first four
        assert record.test_images is not None and record.correct is not None and record.seeded
        correct = unpack(record.correct, sum(record.test_images))
        assert correct.mean() == pytest.approx(record.metrics["top1"])
        assert len(record.test_images) == 4
    random = read_records(finished / "baselines" / "random" / "records")[0]
    assert {record.protocol for record in random} == {record.protocol for record in records}
    page = (finished / "report.html").read_text()
    assert "wmdd" in page and "random" in page and "data:image/png" in page


@pytest.mark.slow
def test_random_images_are_drawn_several_times_with_one_student_each(tmp_path: Path) -> None:
    settings = [*TINY, "student.baseline_sets=3", "student.baselines=['random','k-center']", "labels.regimes=['hard']"]
    run = wmdd.run("digits", tmp_path / "run", [*settings, "method=rded"])

    places = [run / "baselines" / name for name in ("random", "random-1", "random-2")]
    records = [read_records(place / "records")[0] for place in places]
    assert [[(one.distillation_seed, one.student_seed) for one in own] for own in records] == [
        [(0, 0)],
        [(1, 1)],
        [(2, 2)],
    ]
    assert len({own[0].artefact for own in records}) == 3
    assert len({own[0].protocol for own in records} | {one.protocol for one in read_records(run / "records")[0]}) == 1
    fixed = read_records(run / "baselines" / "k-center" / "records")[0]
    assert len(fixed) == 2 and not any(one.seeded for one in fixed)
    frame = collect([run]).accuracy.set_index("method")
    assert list(frame.loc[["rded", "random", "k-center"], "sets"]) == [1, 3, 1]
    assert not any("missing" in line for line in collect([run]).coverage["missing"])
    assert "3×1" in (run / "report.html").read_text()


def test_baseline_holds_real_training_images_byte_for_byte(finished: Path) -> None:
    from wmdd.data.dataset import load_dataset

    train = load_dataset(load_config("digits", TINY).data).train
    real = {image.numpy().tobytes() for image in train.decode(range(len(train)))}
    chosen = [image.numpy().tobytes() for image in DistilledSet.load(finished / "baselines" / "random").images]
    assert set(chosen) <= real and len(set(chosen)) == 8
    assert not {image.numpy().tobytes() for image in DistilledSet.load(finished).images} & real


def test_doing_it_again_does_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "blocks").iterdir()}
    records = sorted((finished / "records").iterdir())
    times = [path.stat().st_mtime_ns for path in records]
    wmdd.run("digits", finished, TINY)
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "blocks").iterdir()}
    assert times == [path.stat().st_mtime_ns for path in records]


@pytest.mark.slow
def test_more_students_join_a_finished_run(finished: Path) -> None:
    wmdd.run("digits", finished, [*TINY, "student.seeds=3", "labels.regimes=['hard']"])
    assert len(read_records(finished / "records")[0]) == 5


@pytest.mark.slow
def test_same_seed_same_bytes_and_another_seed_other_images(tiny: Config, tmp_path: Path) -> None:
    first = images_only(tiny, tmp_path / "a")
    assert images_only(tiny, tmp_path / "b") == first
    other = images_only(tiny, tmp_path / "c", seed=1)
    assert all(other[name] != first[name] for name in first)


@pytest.mark.slow
def test_blocks_change_no_byte_in_any_order(tiny: Config, tmp_path: Path) -> None:
    # 4 classes in groups of 1: up to 4 blocks.
    tiny = tiny.model_copy(update={"synthesis": tiny.synthesis.model_copy(update={"classes_per_group": 1})})
    whole = images_only(tiny, tmp_path / "one")
    assert images_only(tiny, tmp_path / "three", blocks=3) == whole
    four = tiny.model_copy(update={"blocks": 4})
    for block in (2, 0, 3, 1):
        pipeline.run(four, tmp_path / "four", share=pipeline.Share(("distill",), (block,)))
    assert blocks_of(tmp_path / "four") == whole
    names = {DistilledSet.load(tmp_path / name).sha256 for name in ("one", "three", "four")}
    assert len(names) == 1


def test_a_missing_block_is_named(tiny: Config, tmp_path: Path) -> None:
    tiny = tiny.model_copy(update={"blocks": 2})
    pipeline.run(tiny, tmp_path / "run", share=pipeline.Share(("distill",), (1,)))
    with pytest.raises(WmddError, match="of 2 blocks, these are missing: 0"):
        DistilledSet.load(tmp_path / "run")


def test_plan_keeps_groups_whole_and_classes_in_order(tiny: Config) -> None:
    config = tiny.model_copy(
        update={"blocks": 3, "synthesis": tiny.synthesis.model_copy(update={"classes_per_group": 3})}
    )
    blocks = class_partition.plan(config, 20)
    assert [index for block in blocks for index in block.classes] == list(range(20))
    assert [len(group.classes) for block in blocks for group in block.groups] == [3] * 6 + [2]
    with pytest.raises(InputError, match="blocks = 8: 20 classes in groups of 3 make 7 groups"):
        class_partition.plan(config.model_copy(update={"blocks": 8}), 20)


@pytest.mark.parametrize("ipc", [1, 3])
@pytest.mark.parametrize("method", ["wmdd", "ce-pcbn", "barycenter-global", "ce-global", "random"])
def test_every_method_distils_at_any_ipc(tiny: Config, tmp_path: Path, method: str, ipc: int) -> None:
    synthesis = tiny.synthesis.model_copy(update={"classes_per_group": 3, "start": "noise", "iterations": 3})
    images = images_only(tiny, tmp_path / "run", method=method, ipc=ipc, synthesis=synthesis)
    assert {len(content) for content in images.values()} == {ipc * 64}


@pytest.mark.parametrize("weights", ["uniform", "free", "alternating"])
def test_barycenter_weights_reach_the_distilled_set(tiny: Config, tmp_path: Path, weights: str) -> None:
    barycenter = tiny.barycenter.model_copy(update={"weights": weights})
    images_only(tiny, tmp_path / "run", barycenter=barycenter)
    found = DistilledSet.load(tmp_path / "run").weights.view(4, 2)
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    assert bool((found == 0.5).all()) == (weights == "uniform")
    sidecar = RunFolder(tmp_path / "run").sidecar(0)
    assert sidecar is not None and all(value > 0 for value in sidecar["w2"].values())


def test_statistics_under_augmentation_differ(tiny: Config, tmp_path: Path) -> None:
    plain = images_only(tiny, tmp_path / "plain")
    augmented = tiny.statistics.model_copy(update={"augment": True})
    assert images_only(tiny, tmp_path / "augmented", statistics=augmented) != plain


@pytest.mark.parametrize("format", ["imagefolder", "parquet"])
def test_export_is_lossless(finished: Path, tmp_path: Path, format: str) -> None:
    import io

    import numpy as np
    import pandas

    found = DistilledSet.load(finished)
    export(found, format, tmp_path / "out")
    if format == "imagefolder":
        pictures = [Image.open(path) for path in sorted((tmp_path / "out").rglob("*.png"))]
    else:
        table = pandas.read_parquet(tmp_path / "out" / "distilled.parquet")
        assert table["label"].tolist() == found.labels.tolist()
        pictures = [Image.open(io.BytesIO(row["bytes"])) for row in table["image"]]
    assert np.array_equal(np.stack([np.array(picture) for picture in pictures]), found.images[:, 0].numpy())
    with pytest.raises(InputError, match="not empty"):
        export(found, format, tmp_path / "out")


def test_a_distilled_set_feeds_a_data_loader(finished: Path) -> None:
    loader = torch.utils.data.DataLoader(DistilledSet.load(finished), batch_size=3)
    images, labels = next(iter(loader))
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float32 and labels.tolist() == [0, 0, 1]


def test_a_flipped_byte_is_found_named_and_redone(
    tiny: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = images_only(tiny, tmp_path / "run")
    file = RunFolder(tmp_path / "run").block_file(0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WmddError, match=re.escape(f"{file}: its SHA-256")):
        DistilledSet.load(tmp_path / "run")
    assert images_only(tiny, tmp_path / "run") == before
    assert f"{file}: its SHA-256" in capfd.readouterr().err


def test_a_run_works_in_a_thread(tiny: Config, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        assert len(pool.submit(images_only, tiny, tmp_path / "run").result()) == 4


@pytest.mark.slow
def test_importing_wmdd_is_light() -> None:
    code = (
        "import sys, wmdd, wmdd.pipeline, wmdd.cli;"
        "heavy = {'ray', 'submitit', 'bench', 'slurm', 'sweeps', 'ot', 'sklearn', 'scipy', 'pandas', 'triton'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    light = "import sys, wmdd, wmdd.cli; assert not {'torch', 'pandas', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True)


def test_a_refusal_on_the_command_line_is_one_line_and_exit_code_2() -> None:
    result = python("-m", "wmdd", "run", "digits", "--set", "ipc=0")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == ["wmdd: config digits: ipc: expected 1 or more (given: 0)"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ipc", "10,some"], "wmdd: --ipc 10,some: expected numbers from 1 to 1300, such as 10,50"),
        (["--spectrum", "blue"], "wmdd: --spectrum blue: valid: decaying, flat"),
    ],
)
def test_a_program_beside_the_command_line_refuses_in_one_line_too(arguments: list[str], said: str) -> None:
    result = python("-m", "bench.barycenters", *arguments)
    assert (result.returncode, result.stderr.strip()) == (2, said)


def folder_of_images(root: Path, size: int = 16) -> None:
    """Write an ImageFolder of 3 classes, 6 training and 2 validation images each."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator).numpy()
                Image.fromarray(pixels).save(root / split / name / f"{index}.jpg", quality=95)


FOLDER = [
    "data.source=folder",
    "data.channels=3",
    "data.mean=[0.5,0.5,0.5]",
    "data.std=[0.5,0.5,0.5]",
    "data.classes=null",
    "compute.workers=1",
]


@pytest.mark.slow
def test_a_folder_of_jpegs_runs_and_its_damaged_file_is_named_or_skipped(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "data")
    overrides = [*TINY, *FOLDER, f"data.root={tmp_path / 'data'}"]
    assert len(DistilledSet.load(wmdd.run("digits", tmp_path / "run", overrides))) == 6
    damaged = tmp_path / "data" / "train" / "bee" / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(InputError, match=re.escape(str(damaged))):
        wmdd.run("digits", tmp_path / "other", overrides, refresh=True)
    assert not (tmp_path / "other").exists()
    wmdd.run("digits", tmp_path / "skipped", [*overrides, "data.on_error=skip"])
    assert len(DistilledSet.load(tmp_path / "skipped")) == 6


def weights_file(path: Path, network: torch.nn.Module) -> Path:
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=wmd"], "did you mean 'wmdd'"),
        (["student.baselines=['randam']"], "did you mean 'random'"),
        (["teacher.network=squeezenet1_1", "data.resolution=64"], "no BatchNorm2d layer"),
        (["student.networks=['resnet19']"], "did you mean 'resnet18'"),
        (["data.classes=11"], "only 10 classes"),
        (["ipc=1000"], "class '0' has"),
        (["blocks=9"], "blocks = 9: 4 classes in groups of 2 make 2 groups"),
        (["data.source=folder", "data.root=nowhere"], "nowhere"),
        (["data.source=folder"], "data/folder"),
        (["teacher.weights=none.pt"], "no such file"),
        (["teacher.weights=torchvision:V1", "teacher.network=resnet18"], "valid: IMAGENET1K_V1"),
        (["compute.device=cuda:7"], "torch sees"),
    ],
)
def test_wrong_input_is_refused_before_any_work(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        wmdd.run("digits", tmp_path / "run", [*TINY, *overrides])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("block-*"))


def test_a_baseline_that_cannot_be_is_refused_before_the_teacher_is_trained(tmp_path: Path) -> None:
    wrong = ["student.baselines=['external']", f"external.folder={tmp_path}/none", "teacher.seed=4711"]
    with pytest.raises(InputError, match=r"none"):
        wmdd.run("digits", tmp_path / "run", [*TINY, *wrong])
    assert not list(tmp_path.rglob("teacher.json"))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    from wmdd.networks.create import create

    path = weights_file(tmp_path / "other.pt", create("convnet3x8", 4, 1, 8))
    with pytest.raises(InputError, match=r"other.pt: does not fit ConvNet: unexpected .*; shape"):
        wmdd.run("digits", tmp_path / "run", [*TINY, f"teacher.weights={path}"])
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(InputError, match="is not a state dict"):
        wmdd.run("digits", tmp_path / "run", [*TINY, f"teacher.weights={tmp_path / 'text.pt'}"])


def test_weights_of_more_classes_need_a_map_and_take_one(tmp_path: Path) -> None:
    from wmdd.networks.create import create

    torch.manual_seed(0)
    path = weights_file(tmp_path / "twelve.pt", create("convnet2x8", 12, 1, 8))
    share = pipeline.Share(("teacher",))
    overrides = [*TINY, f"teacher.weights={path}"]
    with pytest.raises(InputError, match=r"set teacher.outputs"):
        wmdd.run("digits", tmp_path / "run", overrides, share)
    outputs = "teacher.outputs=[11, 10, 9, 8, 7, 6, 5, 4, 3, 2]"
    wmdd.run("digits", tmp_path / "run", [*overrides, outputs], share)
    assert '"outputs": [\n    11,\n    10,\n    9,\n    8\n  ]' in (tmp_path / "run" / "teacher.json").read_text()


def test_a_folder_of_another_config_or_of_something_else_is_refused(tiny: Config, tmp_path: Path) -> None:
    images_only(tiny, tmp_path / "run")
    with pytest.raises(InputError, match=r"belongs to another config \(differs in ipc\)"):
        images_only(tiny, tmp_path / "run", ipc=3)
    with pytest.raises(InputError, match="differs in blocks"):
        images_only(tiny, tmp_path / "run", blocks=2)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        images_only(tiny, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_too_little_disk_is_refused_before_any_work(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="make room"):
        images_only(tiny, tmp_path / "run")


def test_a_submission_and_a_run_ask_for_the_same_room(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    from slurm.estimate import ClusterSpeed, estimate
    from slurm.plan import Array
    from slurm.profile import Resources

    labels = tiny.labels.model_copy(update={"regimes": ("stored",)})
    student = tiny.student.model_copy(update={"epochs": 500, "baselines": ()})
    config = tiny.model_copy(update={"labels": labels, "student": student, "blocks": 2})
    alone = Resources(parallel=1)
    planned = [Array("distill", ((0, 1),), alone), Array("students", ((0, 1),), alone)]
    room = estimate(config, 4, planned, ClusterSpeed()).size - 30_000 * (2 + 2)
    assert room > 2 * 500 * 500, "labels are the largest part"

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room - 1))
    with pytest.raises(InputError, match="make room"):
        pipeline.run(config, tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    pipeline.run(config, tmp_path / "run", share=pipeline.Share(("teacher", "distill")))


def test_command_line_tells_and_exports(finished: Path, tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    assert told("verify", str(finished)).startswith(f"{finished}: 8 images of 4 classes are intact")
    told("export", str(finished), "--out", str(tmp_path / "out"))
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8
    described = read_json(tmp_path / "out" / "distilled.json")
    assert described["classes"] == sorted(folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir())
    assert described["sha256"] == wmdd.DistilledSet.load(finished).sha256
    assert len(described["mean"]) == len(described["std"]) == described["channels"]
    told("report", str(finished), "--html", str(tmp_path / "page.html"), "--csv", str(tmp_path / "table.csv"))
    assert "top1" in (tmp_path / "table.csv").read_text()
    assert "random" in told("methods")
    assert "bn_weight = 300.0" in told("config", "show", "digits")
    assert "upstream" in told("config", "list")
    assert "torch" in told("doctor")
    assert "images of 10 classes can be read" in told("data", "check", "digits")
    assert "teachers" in told("cache", "list")


def test_data_check_accepts_only_what_a_run_accepts(tmp_path: Path) -> None:
    generate(tmp_path / "tree", 2, 4, 16, 2, seed=0, workers=1)
    bad = sorted((tmp_path / "tree" / "train").rglob("*.JPEG"))[0]
    bad.write_bytes(bad.read_bytes()[:100])
    own = ["data", "check", "digits", *(f"--set=data.{key}" for key in ("source=folder", f"root={tmp_path / 'tree'}"))]

    refused = CliRunner().invoke(app, own)
    assert refused.exit_code == 1 and bad.name in refused.output
    skipped = CliRunner().invoke(app, [*own, "--set=data.on_error=skip", "--set=ipc=3"])
    assert skipped.exit_code == 0 and "11 images of 2 classes can be read; 1 unreadable" in skipped.output
    with pytest.raises(InputError, match="ipc = 4: class 'class-00000' has 3 training images"):
        CliRunner().invoke(app, [*own, "--set=data.on_error=skip", "--set=ipc=4"], catch_exceptions=False)


@pytest.mark.slow
def test_status_expects_the_students_of_every_view(tmp_path: Path) -> None:
    settings = [*TINY, "student.views=['epochs','updates']", "student.updates=3", "student.baselines=[]"]
    wmdd.run("digits", tmp_path / "run", settings)
    assert "8 / 8" in CliRunner().invoke(app, ["status", str(tmp_path / "run")]).output


def test_help_lists_the_commands_of_the_other_packages() -> None:
    assert "protocol" in CliRunner().invoke(app, ["bench", "--help"]).output
    assert "bench" in CliRunner().invoke(app, ["--help"]).output
