"""Packed data: the same images, names and fingerprint as the files they were made from, or one clear line."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, blocks_of
from forked import python
from PIL import Image
from typer.testing import CliRunner

import wmdd
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.config.schema import DataConfig
from wmdd.data import shards as shards_module
from wmdd.data.dataset import Dataset, check_files, load_dataset
from wmdd.data.pack import pack
from wmdd.errors import InputError
from wmdd.storage.files import sha256

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four classes of 5 + 2 pictures that are neither square nor of the resolution asked for."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in CLASSES:
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (24, 31, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    return tmp_path / "tree"


def data(root: Path | None, **fields: Any) -> DataConfig:
    values: dict[str, Any] = {"root": str(root), "resolution": 8, "crop_ratio": 0.875}
    return DataConfig(**(values | fields))


def packed_tree(tree: Path, out: Path, **fields: Any) -> Path:
    pack(data(tree, **fields), out, workers=0, shard_bytes=3 * 8 * 8 * 15)  # two classes of seven a shard
    return out


def pixels(dataset: Dataset, workers: int = 0) -> dict[str, bytes]:
    found = {}
    for part in (dataset.train, dataset.holdout, dataset.test):
        if part is not None:
            images = torch.cat(list(part.batches([range(1), range(1, len(part))], workers)))
            found |= {name: image.numpy().tobytes() for name, image in zip(part.names, images, strict=True)}
    return found


def refusal(config: DataConfig) -> str:
    with pytest.raises(InputError) as caught:
        pixels(load_dataset(config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def one_bit_off(shard: bytes) -> bytes:
    """A shard with another bit in the last training image of its last class."""
    header = int.from_bytes(shard[:8], "little")
    place = 8 + header + json.loads(shard[8 : 8 + header])["train.pixels"]["data_offsets"][1] - 1
    return shard[:place] + bytes([shard[place] ^ 1]) + shard[place + 1 :]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_from_shards_is_what_is_read_from_files(
    tree: Path, tmp_path: Path, channels: int, workers: int
) -> None:
    fields: dict[str, Any] = {"channels": channels, "mean": [0.5] * channels, "std": [0.5] * channels}
    size = 3 * 8 * 8 * 15
    pack(data(tree, **fields), tmp_path / "packed", workers, size)
    assert len(shards(tmp_path / "packed")) == (2 if channels == 3 else 1)
    whole = load_dataset(data(tree, **fields))
    shutil.copytree(tree, tmp_path / "kept")
    shutil.rmtree(tree)  # nothing but the shards is needed any more
    found = load_dataset(data(None, packed=str(tmp_path / "packed"), **fields))
    assert found.fingerprint == whole.fingerprint
    assert (found.classes, found.all_classes) == (whole.classes, whole.all_classes)
    assert (found.train.names, found.test.names) == (whole.train.names, whole.test.names)
    (tmp_path / "kept").rename(tree)
    assert pixels(found, workers) == pixels(whole)


@pytest.mark.parametrize(
    "fields", [{"classes": 2}, {"classes": "1:3"}, {"classes": ("dog", "ant")}, {"holdout_per_class": 2}]
)
def test_a_folder_serves_fewer_classes_and_any_hold_out(tree: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = packed_tree(tree, tmp_path / "packed")
    found, whole = load_dataset(data(None, packed=str(folder), **fields)), load_dataset(data(tree, **fields))
    assert found.fingerprint == whole.fingerprint
    assert pixels(found) == pixels(whole)


OPENED = """
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import safetensors
safe_open = safetensors.safe_open  # maps a file without an audit event
safetensors.safe_open = lambda path, framework: (opened.append(str(path)), safe_open(path, framework))[1]
from wmdd.config.schema import DataConfig
from wmdd.data.dataset import load_dataset
dataset = load_dataset(DataConfig(packed=sys.argv[1], resolution=8, crop_ratio=0.875))
dataset.train.decode(dataset.train.of_class(3))
print(*[name for name in opened if name.endswith((".json", ".safetensors"))])
"""


def test_a_process_opens_the_index_and_the_shards_of_its_own_classes(tree: Path, tmp_path: Path) -> None:
    folder = packed_tree(tree, tmp_path / "packed")
    found = python("-c", OPENED, str(folder)).stdout.split()
    assert found == [str(folder / "index.json"), str(shards(folder)[1])]


def test_nothing_is_held_in_memory_for_an_image_of_a_class_that_is_not_read(tree: Path, tmp_path: Path) -> None:
    folder = packed_tree(tree, tmp_path / "packed")
    few = len((folder / "index.json").read_bytes())
    for name in CLASSES:
        for number in range(10, 60):
            shutil.copy(tree / "train" / name / "0.jpg", tree / "train" / name / f"{number}.jpg")
    folder = packed_tree(tree, tmp_path / "more")
    assert len(json.loads((folder / "index.json").read_text())["shards"]) == 4
    assert len((folder / "index.json").read_bytes()) < few + 1000  # two shards more, 200 images more


def test_sources_in_memory_are_packed_too(tmp_path: Path) -> None:
    config = load_config("digits", ["data.classes=3"]).data
    pack(config, tmp_path, 0)
    found = load_dataset(config.model_copy(update={"packed": str(tmp_path)}))
    whole = load_dataset(config)
    assert found.fingerprint == whole.fingerprint and pixels(found) == pixels(whole)


@pytest.mark.slow
def test_a_run_on_shards_writes_the_bytes_of_a_run_on_files(tmp_path: Path) -> None:
    pack(load_config("digits", TINY).data, tmp_path / "packed", 0)
    short = [*TINY, "student.seeds=1", "student.baselines=[]"]
    plain = wmdd.run("digits", out=tmp_path / "plain", overrides=short)
    places = [f"data.packed={tmp_path / 'packed'}", f"data.stage={tmp_path / 'stage'}"]
    other = wmdd.run("digits", out=tmp_path / "other", overrides=[*short, *places])
    assert blocks_of(plain) == blocks_of(other)
    # Places are no part of the recipe: either run goes on with the other's, and the store holds one teacher.
    wmdd.run("digits", out=tmp_path / "plain", overrides=[*short, *places])
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"resolution": 16}, "was packed with data.resolution=8, the config has 16"),
        ({"crop_ratio": 1.0}, "data.crop_ratio=0.875"),
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, "data.channels=3"),
        ({"source": "imagenette"}, "data.source='folder'"),
    ],
)
def test_other_settings_than_the_shards_were_made_under_are_refused(
    tree: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    folder = packed_tree(tree, tmp_path / "packed")
    assert said in refusal(data(None, packed=str(folder), **fields))


def test_classes_that_were_not_packed_are_refused_and_positions_mean_those_of_the_whole(
    tree: Path, tmp_path: Path
) -> None:
    folder = packed_tree(tree, tmp_path / "packed", classes="1:3")
    assert load_dataset(data(None, packed=str(folder), classes="1:3")).classes == ("bee", "cat")
    assert "contains 2 of 4 classes, but not 'ant'" in refusal(data(None, packed=str(folder), classes=2))


def test_an_unfinished_missing_or_damaged_folder_is_refused(tree: Path, tmp_path: Path) -> None:
    config = data(None, packed=str(tmp_path / "packed"))
    assert "no finished index.json" in refusal(config)
    folder = packed_tree(tree, tmp_path / "packed")
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index[:50])
    assert "is damaged" in refusal(config)
    (folder / "index.json").write_text(index.replace('"version": 2', '"version": 1'))
    assert "has format version 1, this wmdd reads 2; pack it again" in refusal(config)
    (folder / "index.json").write_text(index)
    first = shards(folder)[0]
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    assert f"{first}: has the wrong size" in refusal(config)
    first.unlink()
    assert f"{first}: is missing" in refusal(config)
    first.write_bytes(one_bit_off(content))
    assert f"{first} (train/bee/4.jpg): is damaged" in refusal(config)
    assert [name for name, _ in check_files(config, 0)] == [str(first)]
    assert check_files(data(None, packed=str(folder), classes="2:4"), 0) == []
    packed_tree(tree, tmp_path / "packed")  # the same command makes good what is damaged
    assert first.read_bytes() == content and check_files(config, 0) == []


def test_packing_goes_on_where_it_was_stopped(tree: Path, tmp_path: Path) -> None:
    folder = packed_tree(tree, tmp_path / "packed")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    first, second = shards(folder)
    (folder / "index.json").unlink()
    second.unlink()
    kept = first.stat().st_mtime_ns
    packed_tree(tree, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert first.stat().st_mtime_ns == kept


def test_a_folder_of_other_images_is_left_alone(tree: Path, tmp_path: Path) -> None:
    folder = packed_tree(tree, tmp_path / "packed")
    Image.new("RGB", (9, 9)).save(tree / "train" / "ant" / "0.jpg")
    with pytest.raises(InputError, match="is a shard of other images; use another --out"):
        packed_tree(tree, folder)


def test_too_little_room_is_told_before_the_work(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    folder = packed_tree(tree, tmp_path / "packed")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(InputError, match="the packed images need "):
        packed_tree(tree, tmp_path / "other")
    assert not shards(tmp_path / "other")
    assert "GB are free" in refusal(data(None, packed=str(folder), stage=str(tmp_path / "stage")))


def test_files_that_were_left_out_are_left_out_again_or_refused(tree: Path, tmp_path: Path) -> None:
    broken = tree / "train" / "bee" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:40])
    folder = packed_tree(tree, tmp_path / "packed", on_error="skip")
    found = load_dataset(data(None, packed=str(folder), on_error="skip"))
    whole = load_dataset(data(tree, on_error="skip"))
    assert found.skipped == whole.skipped == ("train/bee/1.jpg",)
    assert found.fingerprint == whole.fingerprint and pixels(found) == pixels(whole)
    assert "1 of 28 images cannot be read" in refusal(data(None, packed=str(folder)))


def read_all(config: DataConfig) -> dict[str, bytes]:
    return pixels(load_dataset(config))


def test_shards_are_staged_once_a_node_and_only_those_that_are_needed(tree: Path, tmp_path: Path) -> None:
    folder = packed_tree(tree, tmp_path / "packed")
    config = data(None, packed=str(folder), stage=str(tmp_path / "stage"))
    one = config.model_copy(update={"classes": ("dog",)})
    assert pixels(load_dataset(one)) == pixels(load_dataset(data(tree, classes=("dog",))))
    place = next((tmp_path / "stage").iterdir())
    assert [path.name for path in shards(place)] == [shards(folder)[1].name]

    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(read_all, [config] * 4)
    assert found == [pixels(load_dataset(data(tree)))] * 4
    assert {path.name: sha256(path) for path in shards(place)} == {p.name: sha256(p) for p in shards(folder)}
    assert not list(place.glob(".*tmp"))
    (copy, _), times = shards(place), [path.stat().st_mtime_ns for path in shards(place)]
    pixels(load_dataset(config))
    assert [path.stat().st_mtime_ns for path in shards(place)] == times and copy.is_file()


def test_a_damaged_shard_is_not_staged(tree: Path, tmp_path: Path) -> None:
    folder = packed_tree(tree, tmp_path / "packed")
    first = shards(folder)[0]
    content = first.read_bytes()
    first.write_bytes(one_bit_off(content))
    config = data(None, packed=str(folder), stage=str(tmp_path / "stage"))
    assert f"{first}: is damaged" in refusal(config)
    assert not shards(next((tmp_path / "stage").iterdir()))


def test_staging_without_shards_is_refused() -> None:
    with pytest.raises(InputError, match=r"set their folder with data\.packed"):
        load_config("digits", ["data.stage=/tmp"])


def test_the_command_packs_and_says_how_to_use_it(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    settings = [f"data.root={tree}", "data.source=folder", "data.resolution=8", "compute.workers=0"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["data", "pack", "imagenette", "--out", str(out), *arguments])
    assert result.exit_code == 0
    assert f"28 images, 0.0 MB; add --set data.packed={out} to use them" in result.stdout
    assert json.loads((out / shards_module.INDEX).read_text())["data"]["resolution"] == 8
