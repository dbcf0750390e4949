"""Other people's distilled sets: each layout is read as its authors write it, wrong ones are named before work."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, blocks_of
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import wmdd
from bench.evaluate import config_of
from wmdd import pipeline
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.data.dataset import load_dataset
from wmdd.distill.methods import external_folder, registry
from wmdd.errors import InputError
from wmdd.records.files import read_records
from wmdd.records.schema import Record
from wmdd.runs.baselines import baselines_of
from wmdd.runs.distilled_set import DistilledSet, export
from wmdd.runs.folder import RunFolder

QUICK = [*TINY, "student.seeds=1"]


def records_of(run: Path) -> dict[tuple[str, str, int], Record]:
    found = read_records(run / "records")[0]
    return {(record.method, str(record.regime), int(record.student_seed or 0)): record for record in found}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a finished run and the folder of its exported images."""
    base = tmp_path_factory.mktemp("evaluate")
    run = wmdd.run("digits", base / "run", [*TINY, "student.baselines=['random']"])
    export(DistilledSet.load(run), "imagefolder", base / "theirs")
    return run, base / "theirs"


def written(
    folder: Path, place: str, size: int = 8, classes: tuple[int, ...] = (0, 1, 2, 3)
) -> dict[int, list[Tensor]]:
    """Write two images of each class as another project does, and return their pixels as the files hold them.

    ``place`` is a format of the class ``c`` and of the image ``i``; its suffix says PNG or JPEG.
    """
    source = np.random.default_rng(0)
    pixels: dict[int, list[Tensor]] = {}
    for c in classes:
        for i in range(2):
            path = folder / place.format(c=c, i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Shades that tell class and image apart even after JPEG.
            shade = 20 + 50 * c + 20 * i + source.integers(0, 3, (size, size))
            Image.fromarray(shade.astype(np.uint8)).save(path)
            pixels.setdefault(c, []).append(torch.from_numpy(np.array(Image.open(path))))
    return pixels


def distilled(config: Config, out: Path) -> DistilledSet:
    return DistilledSet.load(pipeline.run(config, out, share=pipeline.Share(("teacher", "distill"))))


LAYOUTS = {
    "ImageFolder": ("{c}/{i:04d}.png", "classes"),
    "SRe2L, CDA, EDC, WMDD": ("new{c:03d}/class{c:03d}_id{i:03d}.jpg", "numbered"),
    "RDED": ("{c:05d}/class{c:05d}_id{i:05d}.jpg", "numbered"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", LAYOUTS)
@pytest.mark.parametrize("named", [True, False])
def test_each_layout_is_read_as_its_authors_write_it(tmp_path: Path, place: str, named: bool) -> None:
    pattern, layout = LAYOUTS[place]
    pixels = written(tmp_path / "theirs", pattern)
    config = config_of(tmp_path / "theirs", "digits", TINY, layout if named else "auto")
    assert (config.ipc, config.method, config.name) == (2, "external", "theirs")
    found = distilled(config, tmp_path / "run")
    for c, images in pixels.items():
        assert torch.equal(found.images[found.labels == c], torch.stack(images)[:, None])


def test_numbers_count_in_the_whole_data_set_and_names_do_not(tmp_path: Path) -> None:
    """A run of the classes 7, 2 and 9 finds their images in a set of all ten."""
    chosen = ["data.classes=['7', '2', '9']"]
    for place in ("new{c:03d}/class{c:03d}_id{i:03d}.jpg", "{c}/{i}.png"):
        folder = tmp_path / place[:3]
        pixels = written(folder, place, classes=tuple(range(10)))
        config = config_of(folder, "digits", [*TINY, *chosen])
        images = external_folder.open_set(config.external, config.data, load_dataset(config.data))
        for index, c in enumerate((7, 2, 9)):
            assert torch.equal(images.decode(images.of_class(index)), torch.stack(pixels[c])[:, None])


def test_positions_follow_the_names_of_the_classes(tmp_path: Path) -> None:
    for place in ("train", "val"):
        for name in ("b", "a", "c"):
            (tmp_path / "data" / place / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "data" / place / name / "1.png")
    given = ["data.source=folder", f"data.root={tmp_path / 'data'}", "data.classes=['c', 'a']"]
    pixels = written(tmp_path / "theirs", "new{c:03d}/class{c:03d}_id{i:03d}.jpg", classes=(0, 1, 2))
    config = config_of(tmp_path / "theirs", "digits", [*TINY, *given])
    images = external_folder.open_set(config.external, config.data, load_dataset(config.data))
    assert torch.equal(images.decode(range(4)), torch.stack([*pixels[2], *pixels[0]])[:, None])


def test_images_of_another_size_are_resized_whole(tmp_path: Path) -> None:
    """Also where the data are cropped: a frame of white around black stays on all four sides."""
    for c in range(4):
        (tmp_path / "theirs" / str(c)).mkdir(parents=True)
        framed = np.full((32, 32, 3), 255, np.uint8)
        framed[4:-4, 4:-4] = 0
        Image.fromarray(framed).save(tmp_path / "theirs" / str(c) / "0.png")
    config = config_of(tmp_path / "theirs", "digits", [*TINY, "data.crop_ratio=0.5"])
    image = distilled(config, tmp_path / "run").images[0, 0].int()
    border = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
    assert image.shape == (8, 8) and border.min() > 150 and image[2:-2, 2:-2].max() < 50


@pytest.mark.slow
def test_what_wmdd_exports_comes_back_bit_by_bit_and_is_worth_the_same(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run, theirs = exported
    again = pipeline.run(config_of(theirs, "digits", TINY, baselines=("random",)), tmp_path / "again")
    assert blocks_of(again) == blocks_of(run)
    own, other = records_of(run), records_of(again)
    assert len(own) == len(other) == 4
    for (_, regime, seed), record in own.items():
        assert other["external", regime, seed].metrics == record.metrics
        assert other["external", regime, seed].protocol == record.protocol
    # The baseline is the very same one, whatever set is evaluated beside it.
    place = Path("baselines") / "random"
    assert DistilledSet.load(again / place).sha256 == DistilledSet.load(run / place).sha256
    assert {one.config for one in records_of(again / place).values()} == {
        one.config for one in records_of(run / place).values()
    }
    # Other blocks, same bytes.
    config = config_of(theirs, "digits", [*TINY, "synthesis.classes_per_group=1", "blocks=3"])
    distilled(config, tmp_path / "blocks")
    assert blocks_of(tmp_path / "blocks") == blocks_of(run)


@pytest.mark.slow
def test_the_command_measures_a_set_beside_real_images(exported: tuple[Path, Path], tmp_path: Path) -> None:
    sets = [part for override in QUICK for part in ("--set", override)]
    command = ["bench", "evaluate", str(exported[1]), "--config", "digits", *sets, "--name", "ours"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")], catch_exceptions=False)
    assert result.exit_code == 0
    for place, method in (("", "external"), ("baselines/random", "random"), ("baselines/medoids", "medoids")):
        found = records_of(tmp_path / "run" / place)
        assert {key[0] for key in found} == {method} and {record.run.split("/")[0] for record in found.values()} == {
            "ours"
        }
    for word in ("external", "random", "medoids"):
        assert word in result.output, result.output
    assert (tmp_path / "run" / "report.html").exists()


def test_a_changed_folder_is_another_distillation(exported: tuple[Path, Path], tmp_path: Path) -> None:
    theirs = shutil.copytree(exported[1], tmp_path / "theirs")
    config = config_of(theirs, "digits", QUICK, baselines=())
    distilled(config, tmp_path / "run")
    moved = theirs.rename(tmp_path / "moved")
    elsewhere = config_of(moved, "digits", QUICK, name="theirs", baselines=())
    assert elsewhere.fingerprint("images") == config.fingerprint("images")
    distilled(elsewhere, tmp_path / "run")

    Image.new("L", (8, 8), 99).save(moved / "1" / "0001.png")
    with pytest.raises(InputError, match=f"{moved}: has changed: external.sha256 is"):
        distilled(elsewhere, tmp_path / "run")
    changed = config_of(moved.rename(tmp_path / "third"), "digits", QUICK, baselines=())
    assert changed.fingerprint("images") != config.fingerprint("images")
    with pytest.raises(InputError, match=r"belongs to another config \(differs in external.sha256\)"):
        distilled(changed, tmp_path / "run")
    assert baseline_of(changed) == baseline_of(config)


def baseline_of(config: Config) -> str:
    student = config.student.model_copy(update={"baselines": ("random",)})
    return baselines_of(config.model_copy(update={"student": student}))["random"].fingerprint("images")


def test_a_config_without_an_external_set_keeps_its_fingerprint() -> None:
    plain = load_config("digits", ["external.folder=x"])
    assert load_config("digits").fingerprint("images") == plain.fingerprint("images")
    own = baselines_of(load_config("digits", ["external.folder=x", "student.baselines=['wmdd']"]))["wmdd"]
    assert plain.fingerprint("images") == own.fingerprint("images")
    assert load_config("digits", ["external.sha256=ab"]).fingerprint("images") != plain.fingerprint("images")


def damaged(folder: Path, case: str) -> None:
    """Do to a whole set what its name says."""
    if case == "missing class":
        shutil.rmtree(folder / "2")
    elif case == "uneven":
        (folder / "3" / "0001.png").unlink()
    elif case == "empty class":
        for path in (folder / "1").iterdir():
            path.unlink()
    elif case == "no images":
        for path in folder.rglob("*.png"):
            path.rename(path.with_suffix(".txt"))
    elif case == "flat":
        for path in folder.rglob("*.png"):
            path.rename(folder / f"{path.parent.name}_{path.name}")
    elif case == "cut":
        (folder / "0" / "0000.png").write_bytes((folder / "0" / "0000.png").read_bytes()[:60])
    elif case == "text":
        (folder / "0" / "0000.png").write_text("not an image")
    elif case == "another data set":
        (folder / "0").rename(folder / "new010")
    elif case == "numbers":
        for name in "0123":
            (folder / name).rename(folder / f"new{int(name) + 5:03d}")
    elif case == "twice":
        shutil.copytree(folder / "3", folder / "new003")
    elif case == "names":
        for name in "0123":
            (folder / name).rename(folder / f"digit {name}")


@pytest.mark.parametrize(
    ("case", "layout", "message"),
    [
        (
            "missing class",
            "classes",
            r"1 of 4 classes have no folder, the first is 2\. Folders found: 0, 1, 3\. Name each",
        ),
        ("missing class", "auto", "1 of 4 classes have no folder, the first is 2, number 2 of 10"),
        ("uneven", "auto", "class '3' has 1 images; every class needs ipc = 2"),
        ("empty class", "auto", "/1: contains no images of class '1'"),
        ("no images", "auto", "has no images in sub-folders; expected FOLDER/CLASS/IMAGE"),
        ("flat", "auto", "has no images in sub-folders; expected FOLDER/CLASS/IMAGE"),
        ("cut", "auto", "0/0000.png: "),
        ("text", "auto", "0/0000.png: is not a JPEG, PNG, BMP or WebP image"),
        ("another data set", "numbered", "folder new010 is beyond the 10 classes of the dataset"),
        ("numbers", "auto", "classes have no folder, the first is 0, number 0 of 10.*new005, new006, ..., new008"),
        ("twice", "numbered", "folders 3 and new003 belong to the same class"),
        (
            "names",
            "auto",
            "no folder, the first is 0. Folders found: digit 0, digit 1, ..., digit 3. Name each folder like its class",
        ),
        ("whole", "sre2l", "external.layout: expected 'auto', 'classes' or 'numbered'"),
        ("gone", "auto", "no such folder"),
    ],
)
def test_a_wrong_folder_is_named_before_any_work(
    exported: tuple[Path, Path], tmp_path: Path, case: str, layout: str, message: str
) -> None:
    theirs = tmp_path / "theirs"
    if case != "gone":
        shutil.copytree(exported[1], theirs)
        damaged(theirs, case)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        # Another teacher than any that the store holds: it would have to be trained first.
        pipeline.run(config_of(theirs, "digits", [*QUICK, "teacher.seed=77"], layout), out)
    assert not list(out.rglob("*.safetensors"))


def test_an_ipc_or_a_baseline_that_does_not_fit_is_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    theirs = exported[1]
    with pytest.raises(InputError, match="class '0' has 2 images; every class needs ipc = 3"):
        pipeline.run(config_of(theirs, "digits", QUICK, ipc=3), tmp_path / "run")
    with pytest.raises(InputError, match="no such method; did you mean 'medoids'"):
        config_of(theirs, "digits", QUICK, baselines=("medoid",))


def test_a_config_of_ones_own_must_name_folder_and_files(exported: tuple[Path, Path], tiny: Config) -> None:
    dataset = load_dataset(tiny.data)
    with pytest.raises(InputError, match=r"external\.folder is not set"):
        registry.create(tiny, "external").check(dataset)
    given = tiny.external.model_copy(update={"folder": str(exported[1])})
    with pytest.raises(InputError, match=r"external\.sha256 is not set") as caught:
        registry.create(tiny.model_copy(update={"external": given}), "external").check(dataset)
    (told,) = re.findall("[0-9a-f]{64}", str(caught.value))
    given = given.model_copy(update={"sha256": told})
    registry.create(tiny.model_copy(update={"external": given}), "external").check(dataset)


def test_another_set_may_stand_beside_a_run_of_ones_own(exported: tuple[Path, Path], tmp_path: Path) -> None:
    theirs = config_of(exported[1], "digits", QUICK).external
    config = load_config("digits", [*QUICK, "method=random", "student.baselines=['external']"])
    folder = tmp_path / "run"
    pipeline.run(config.model_copy(update={"external": theirs}), folder, share=pipeline.Share(("teacher", "distill")))
    assert blocks_of(folder / "baselines" / "external") == blocks_of(exported[0])
    assert RunFolder(folder).sidecar(0)
