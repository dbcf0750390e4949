"""Images are chosen, listed, checked and decoded as data.* says; bad input ends in one line that names it."""

import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional

from wmdd.config.schema import DataConfig
from wmdd.data import decode_checks, decoding, download, sources
from wmdd.data.dataset import Dataset, check_files, load_dataset
from wmdd.data.download import fetch
from wmdd.data.pixels import normalize, pixel_range, quantize
from wmdd.errors import InputError, WmddError
from wmdd.runtime.progress_bars import observed_by

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "cache"))


def picture(seed: int, size: tuple[int, int] = (40, 32), mode: str = "RGB") -> Image.Image:
    """A noisy picture, so that its file is long enough to be damaged in places."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def make_tree(root: Path, train: int = 5, val: int = 2, suffix: str = ".jpg") -> Path:
    for split, count in (("train", train), ("val", val)):
        for index, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture(100 * index + number).save(folder / f"{number}{suffix}")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


def config(root: Path | None = None, **fields: Any) -> DataConfig:
    values: dict[str, Any] = {"root": None if root is None else str(root), "resolution": 8}
    return DataConfig(**(values | fields))


def message(root: Path | None = None, **fields: Any) -> str:
    """The one line in which loading ends."""
    with pytest.raises(InputError) as caught:
        load_dataset(config(root, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settle(tree: Path) -> None:
    """Make folders old enough that their times are relied on."""
    for folder, _, _ in os.walk(tree):
        os.utime(folder, (1e9, 1e9))


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damage_inside(path: Path) -> None:
    """Put a marker that no decoder accepts into the middle of a JPEG; both ends stay as they are."""
    content = path.read_bytes()
    middle = (content.index(b"\xff\xda") + len(content)) // 2  # halfway through the compressed pixels
    path.write_bytes(content[:middle] + b"\xff\xf0" + content[middle + 2 :])


# What is listed


def test_images_of_a_class_are_contiguous_sorted_and_labelled_by_the_position_of_its_name(tree: Path) -> None:
    dataset = load_dataset(config(tree))
    assert dataset.classes == dataset.train.classes == CLASSES
    assert dataset.train.names == tuple(f"train/{name}/{number}.jpg" for name in CLASSES for number in range(5))
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.train.labels.tolist() == [index for index in range(4) for _ in range(5)]
    assert dataset.train.of_class(2) == range(10, 15)
    assert len(dataset.test) == 8
    with pytest.raises(IndexError):
        dataset.train.of_class(4)


def test_extensions_are_known_in_any_case_and_at_any_depth_and_all_else_is_passed_over(tree: Path) -> None:
    folder = tree / "train" / "ant"
    (folder / "more").mkdir()
    picture(1).save(folder / "more" / "x.JPEG")
    for suffix in (".png", ".bmp", ".webp"):
        picture(1).save(folder / f"y{suffix.upper()}", suffix[1:])
    (folder / "notes.txt").write_text("no image")
    (folder / "._0.jpg").write_text("left behind by an archiver")
    names = {Path(name).name for name in load_dataset(config(tree)).train.names[:9]}
    assert names == {"0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "x.JPEG", "y.PNG", "y.BMP", "y.WEBP"}


def test_a_folder_test_stands_in_for_an_absent_val(tree: Path) -> None:
    (tree / "val").rename(tree / "test")
    assert load_dataset(config(tree)).test.names[0] == "test/ant/0.jpg"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, CLASSES),
        (2, ("ant", "bee")),
        ("1:3", ("bee", "cat")),
        ("2:", ("cat", "dog")),
        ("dog", ("dog",)),
        (("dog", "ant"), ("dog", "ant")),
    ],
)
def test_classes_are_chosen_by_number_range_or_name(tree: Path, asked: Any, expected: tuple[str, ...]) -> None:
    dataset = load_dataset(config(tree, classes=asked))
    assert dataset.classes == expected
    for index, name in enumerate(expected):
        members = [dataset.train.names[position] for position in dataset.train.of_class(index)]
        assert members == [f"train/{name}/{number}.jpg" for number in range(5)]
    assert len(dataset.test) == 2 * len(expected)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        (5, "only 4 classes"),
        (0, "selects no class"),
        ("2:9", "only 4 classes"),
        ("3:3", "selects no class"),
        ("dgo", "did you mean 'dog'"),
        (("ant", "zebra"), "valid: ant, bee, cat, dog"),
        (("ant", "bee", "ant"), "'ant' is given twice"),
        ((), "name at least one class"),
    ],
)
def test_a_choice_that_cannot_be_met_is_explained(tree: Path, asked: Any, hint: str) -> None:
    text = message(tree, classes=asked)
    assert text.startswith("data.classes") and hint in text


def test_the_hint_for_an_unknown_class_stays_short_among_many(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for index in range(200):
            (tmp_path / split / f"n{index:03}").mkdir(parents=True)
    text = message(tmp_path, classes="zebra")
    assert "there are 200, 'n000' to 'n199'" in text and len(text) < 120


def test_holdout_is_taken_out_of_train_evenly_and_validates(tree: Path) -> None:
    plain = load_dataset(config(tree))
    assert plain.holdout is None and plain.validation is plain.test
    dataset = load_dataset(config(tree, holdout_per_class=2))
    assert dataset.holdout is not None and dataset.validation is dataset.holdout
    assert not set(dataset.train.names) & set(dataset.holdout.names)
    assert set(dataset.train.names) | set(dataset.holdout.names) == set(plain.train.names)
    assert dataset.holdout.names[:2] == ("train/ant/1.jpg", "train/ant/3.jpg")
    assert dataset.holdout.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [len(dataset.train.of_class(index)) for index in range(4)] == [3, 3, 3, 3]


def test_a_holdout_that_leaves_nothing_to_train_on_is_refused(tree: Path) -> None:
    for number in range(1, 5):
        (tree / "train" / "bee" / f"{number}.jpg").unlink()
    assert "class 'bee' has 1 training images" in message(tree, holdout_per_class=1)


# What identifies it


def test_fingerprint_does_not_know_the_place(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(tree, copy)
    assert load_dataset(config(copy)).fingerprint == load_dataset(config(tree)).fingerprint


def test_fingerprint_changes_with_files_choice_and_decoding(tree: Path) -> None:
    prints = [
        load_dataset(config(tree, **fields)).fingerprint
        for fields in (
            {},
            {"classes": 2},
            {"classes": ("bee", "ant")},
            {"holdout_per_class": 1},
            {"resolution": 9},
            {"crop_ratio": 0.5},
            {"channels": 1, "mean": (0.5,), "std": (0.5,)},
        )
    ]
    picture(7).save(tree / "train" / "ant" / "9.jpg")
    prints.append(load_dataset(config(tree)).fingerprint)
    picture(7, (30, 30)).save(tree / "train" / "ant" / "9.jpg")
    prints.append(load_dataset(config(tree)).fingerprint)
    picture(7, (30, 30)).save(tree / "val" / "ant" / "9.jpg")
    prints.append(load_dataset(config(tree)).fingerprint)
    assert len(set(prints)) == len(prints)


# Decoding


@pytest.mark.parametrize("size", [(20, 16), (16, 33), (8, 8), (5, 7), (9, 40)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875, 0.5])
def test_decoding_is_torchvisions_resize_and_centre_crop(tree: Path, size: tuple[int, int], crop_ratio: float) -> None:
    path = tree / "train" / "ant" / "0.png"
    picture(3, size).save(path)
    dataset = load_dataset(config(tree, crop_ratio=crop_ratio))
    position = dataset.train.names.index("train/ant/0.png")
    image = functional.resize(Image.open(path), round(8 / crop_ratio))
    expected = functional.pil_to_tensor(functional.center_crop(image, 8))
    assert torch.equal(dataset.train.decode([position])[0], expected)


def test_grey_becomes_three_equal_channels_and_colour_becomes_grey(tree: Path) -> None:
    for name, mode in (("g", "L"), ("p", "P"), ("a", "RGBA"), ("c", "CMYK"), ("b", "1")):
        picture(1, mode=mode).save(tree / "train" / "ant" / f"{name}.{'jpg' if mode == 'CMYK' else 'png'}")
    train = load_dataset(config(tree)).train
    colour = train.decode(range(len(train)))
    assert colour.shape == (25, 3, 8, 8) and colour.dtype == torch.uint8
    grey = colour[train.names.index("train/ant/g.png")]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    train = load_dataset(config(tree, channels=1, mean=(0.5,), std=(0.5,))).train
    single = train.decode(range(len(train)))
    assert single.shape == (25, 1, 8, 8) and single.dtype == torch.uint8
    expected = picture(1).convert("L").resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8))
    assert torch.equal(single[train.names.index("train/ant/a.png"), 0], torch.from_numpy(np.array(expected)))


def test_batches_are_the_same_with_and_without_workers_and_leave_the_random_state_alone(tree: Path) -> None:
    train = load_dataset(config(tree)).train
    wanted = [[3, 1], range(5, 12), [0], [19, 0, 19]]
    state = torch.random.get_rng_state()
    here, there = list(train.batches(wanted, workers=0)), list(train.batches(wanted, workers=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(batch) for batch in there] == [2, 7, 1, 3]
    assert all(map(torch.equal, here, there))
    assert torch.equal(here[0], train.decode([3, 1]))
    assert list(train.batches([], workers=2)) == []


def test_an_image_set_travels_to_another_process(tree: Path) -> None:
    train = load_dataset(config(tree)).train
    assert torch.equal(pickle.loads(pickle.dumps(train)).decode([4]), train.decode([4]))  # noqa: S301


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_the_middle_of_work_is_named_in_one_line(tree: Path, workers: int) -> None:
    train = load_dataset(config(tree)).train
    damage_inside(tree / "train" / "bee" / "2.jpg")
    with pytest.raises(InputError) as caught:
        list(train.batches([[0, 1], [6, 7, 8]], workers))
    text = str(caught.value)
    assert str(tree / "train/bee/2.jpg") in text and "data.on_error=skip" in text and "\n" not in text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_is_a_failure_of_the_machine_not_of_the_image(tree: Path, workers: int) -> None:
    train = load_dataset(config(tree)).train
    (tree / "train/ant/0.jpg").unlink()
    with pytest.raises(WmddError, match=r"train/ant/0.jpg: cannot be read: No such file") as caught:
        list(train.batches([[0]], workers))
    assert not isinstance(caught.value, InputError)


def _die(batch: object) -> None:
    os._exit(3)


def test_the_death_of_a_worker_is_one_clear_line() -> None:
    with pytest.raises(WmddError, match=r"compute\.workers") as caught:
        list(decoding.in_order(_die, [[0]], workers=1))
    assert "\n" not in str(caught.value)


# Values


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mean": (0.0, 0.5, 1.0), "std": (1.0, 0.01, 3.7)},
        {"channels": 1, "mean": (0.3,), "std": (0.37,)},
    ],
)
def test_every_pixel_value_survives_normalising_and_quantising(fields: dict[str, Any]) -> None:
    settings = config(**fields)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, settings.channels, 1, 1)
    values = normalize(pixels, settings)
    assert values.dtype == torch.float32
    assert torch.equal(quantize(values, settings), pixels)
    low, high = pixel_range(settings)
    assert low.shape == high.shape == (settings.channels, 1, 1)
    assert torch.equal(values.amin((0, 2, 3)), low.flatten()) and torch.equal(values.amax((0, 2, 3)), high.flatten())


def test_normalising_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    values = normalize(torch.full((1, 3, 1, 1), 51, dtype=torch.uint8), config(mean=(0.2, 0.1, 0.7), std=(1, 0.5, 2)))
    assert torch.allclose(values.flatten(), torch.tensor([0.0, 0.2, -0.25]), atol=1e-6)


def test_quantising_rounds_to_the_nearest_and_clamps() -> None:
    settings = config(channels=1, mean=(0.0,), std=(1.0,))
    values = torch.tensor([-3.0, 0.49 / 255, 0.51 / 255, 99.6 / 255, 7.0]).reshape(1, 1, 1, 5)
    assert quantize(values, settings).flatten().tolist() == [0, 0, 1, 100, 255]


# Bad trees


def test_a_missing_root_names_the_path_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = message(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in text and "data.root=" in text and "fetch" not in text
    for source in ("cifar10", "imagenette", "tiny-imagenet", "imagenet-1k"):
        text = message(source=source)
        assert text.startswith(f"data/{source}:") and f"`wmdd data fetch {source}`" in text


def test_a_root_without_splits_names_what_is_missing(tree: Path) -> None:
    shutil.rmtree(tree / "val")
    assert f"{tree}: has no folder 'val'" in message(tree)
    shutil.rmtree(tree / "train")
    assert f"{tree}: has no folder 'train'" in message(tree)


def test_a_class_of_one_split_alone_is_named(tree: Path) -> None:
    shutil.copytree(tree / "val" / "ant", tree / "val" / "eel")
    assert "class 'eel' has validation images but no training images" in message(tree)
    (tree / "val" / "eel").rename(tree / "train" / "eel")
    assert "class 'eel' has training images but no validation images" in message(tree)


def test_an_empty_class_folder_is_named(tree: Path) -> None:
    for path in (tree / "val" / "cat").iterdir():
        path.unlink()
    assert f"{tree / 'val' / 'cat'}: no images" in message(tree)
    assert len(load_dataset(config(tree, classes=2)).test) == 4  # it does not matter to other classes


def test_a_name_that_is_not_utf8_is_refused(tree: Path) -> None:
    picture(1).save(tree / "train" / "ant" / os.fsdecode(b"\xff.jpg"))
    assert r"\udcff.jpg' is not UTF-8" in message(tree)


# Bad files

BAD = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("<html>not found</html>"), "is not a JPEG, PNG, BMP or WebP image"),
    "truncated": (cut_short, "truncated"),
    "absent": (lambda path: (path.unlink(), path.symlink_to("gone"))[1], "No such file"),
    "deep": (lambda path: Image.fromarray(np.zeros((9, 9), np.uint16)).save(path, "png"), "more than 8 bits"),
}


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "deep"])
def test_a_bad_file_is_named_before_work_begins_or_left_out(tree: Path, kind: str) -> None:
    spoil, reason = BAD[kind]
    spoil(tree / "train" / "bee" / "3.jpg")
    text = message(tree)
    assert f"1 of 28 images cannot be read: {tree / 'train/bee/3.jpg'}" in text and reason in text
    assert "data.on_error=skip" in text and "wmdd data check" in text
    dataset = load_dataset(config(tree, on_error="skip"))
    assert dataset.skipped == ("train/bee/3.jpg",)
    assert dataset.train.names == tuple(name for name in all_names(5) if name != "train/bee/3.jpg")
    assert len(dataset.train.of_class(1)) == 4 and dataset.train.of_class(2) == range(9, 14)
    dataset.train.decode(range(19))


def all_names(count: int) -> list[str]:
    return [f"train/{name}/{number}.jpg" for name in CLASSES for number in range(count)]


def test_three_bad_files_are_named_and_the_others_counted(tree: Path) -> None:
    for name in CLASSES:
        cut_short(tree / "val" / name / "1.jpg")
    text = message(tree)
    assert text.startswith("4 of 28 images") and text.count("1.jpg") == 3 and "dog" not in text


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".jpeg"])
def test_a_truncated_file_of_any_format_is_noticed_before_work_begins(tmp_path: Path, suffix: str) -> None:
    root = make_tree(tmp_path / "tree", suffix=suffix)
    load_dataset(config(root))
    cut_short(root / "train" / "ant" / f"4{suffix}")
    assert str(root / "train" / "ant" / f"4{suffix}") in message(root)


def test_a_file_counts_by_its_content_and_padding_after_its_end_is_allowed(tree: Path) -> None:
    folder = tree / "train" / "ant"
    picture(1).save(folder / "really_a_png.JPEG", "png")
    (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes() + b"\0" * 40)
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes() + b"padding" * 400)
    train = load_dataset(config(tree)).train
    assert train.decode(train.of_class(0)).shape[0] == 6


def test_the_first_look_decodes_nothing_that_ends_well(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: sources.Tree, name: str) -> Image.Image:
        raise AssertionError(f"{name} was decoded")

    monkeypatch.setattr(sources.Tree, "read", refuse)
    assert len(load_dataset(config(tree)).train) == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_that_only_decoding_shows_is_found_by_the_check_and_by_skipping(tree: Path, workers: int) -> None:
    damage_inside(tree / "val" / "cat" / "0.jpg")
    BAD["deep"][0](tree / "train" / "ant" / "0.jpg")
    cut_short(tree / "train" / "dog" / "0.jpg")
    told: list[tuple[int, int]] = []
    with observed_by(lambda title, done, total, unit: told.append((done, total))):
        faults = check_files(config(tree), workers)
    assert [file for file, _ in faults] == [
        str(tree / name) for name in ("train/dog/0.jpg", "train/ant/0.jpg", "val/cat/0.jpg")
    ]
    assert "truncated" in faults[0][1] and "more than 8 bits" in faults[1][1] and faults[2][1]
    assert told[0] == (0, 27) and told[-1] == (27, 27), "a check of hours would be silent"
    dataset = load_dataset(config(tree, on_error="skip"), workers)
    assert set(dataset.skipped) == {"train/ant/0.jpg", "train/dog/0.jpg", "val/cat/0.jpg"}
    assert (len(dataset.train), len(dataset.test)) == (18, 7)
    dataset.test.decode(range(7))


def test_check_reports_nothing_on_good_files(tree: Path) -> None:
    assert check_files(config(tree), workers=0) == []


def test_the_verdict_of_skipping_is_kept_until_a_file_changes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (tree / "train" / "ant" / "2.jpg").read_bytes()
    damage_inside(tree / "train" / "ant" / "2.jpg")
    settle(tree)
    first = load_dataset(config(tree, on_error="skip"))
    assert first.skipped == ("train/ant/2.jpg",)
    with monkeypatch.context() as patch:
        patch.setattr(decode_checks, "decoding_faults", lambda *_: pytest.fail("decoded again"))
        assert load_dataset(config(tree, on_error="skip")).fingerprint == first.fingerprint
    (tree / "train" / "ant" / "2.jpg").write_bytes(good)  # of the same size
    assert load_dataset(config(tree, on_error="skip")).skipped == ()


def test_a_class_of_which_skipping_leaves_nothing_is_named(tree: Path) -> None:
    for number in range(2):
        cut_short(tree / "val" / "dog" / f"{number}.jpg")
    assert "class 'dog': none of its test images can be read" in message(tree, on_error="skip")


# Known data sets


def test_digits_are_split_alike_in_every_run_without_any_file() -> None:
    settings = config(source="digits", resolution=8, channels=1, mean=(0.3,), std=(0.37,))
    dataset, again = load_dataset(settings), load_dataset(settings)
    assert dataset.classes == tuple("0123456789")
    assert len(dataset.train) + len(dataset.test) == 1797
    for index in range(10):
        train, test = len(dataset.train.of_class(index)), len(dataset.test.of_class(index))
        assert test == (train + test) // 5
    assert (dataset.fingerprint, dataset.train.names) == (again.fingerprint, again.train.names)
    images = dataset.train.decode(range(len(dataset.train)))
    assert (images.min(), images.max()) == (0, 255)
    assert len(images.unique()) == 17
    assert load_dataset(settings.model_copy(update={"resolution": 16})).test.decode([0]).shape == (1, 1, 16, 16)
    assert check_files(settings, workers=0) == []


def test_digits_keep_their_pixels_and_labels() -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    settings = config(source="digits", classes=("7",), channels=1, mean=(0.3,), std=(0.37,))
    dataset = load_dataset(settings)
    both = torch.cat([part.decode(range(len(part))) for part in (dataset.train, dataset.test)])
    found = sorted((both.reshape(-1, 64).double() * 16 / 255).round().tolist())
    assert found == sorted(scans[labels == 7].tolist())


def make_tiny(root: Path) -> Path:
    """Tiny-ImageNet as published, but with two classes of three images."""
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    for wnid in ("n02", "n01"):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text("a box")
        for number in range(3):
            picture(number).save(folder / f"{wnid}_{number}.JPEG")
    lines = []
    for number, wnid in enumerate(("n02", "n01", "n02", "n01")):
        picture(number + 10).save(root / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t1\t2\t3\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def check_tiny(dataset: Dataset) -> None:
    assert dataset.classes == ("n01", "n02")
    assert dataset.train.names[:2] == ("train/n01/images/n01_0.JPEG", "train/n01/images/n01_1.JPEG")
    assert [Path(name).name for name in dataset.test.names] == [f"val_{number}.JPEG" for number in (1, 3, 0, 2)]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]


def test_tiny_imagenet_is_read_as_published_wherever_the_root_points(tmp_path: Path) -> None:
    root = make_tiny(tmp_path / "tiny-imagenet-200")
    outer = load_dataset(config(tmp_path, source="tiny-imagenet"))
    check_tiny(outer)
    assert load_dataset(config(root, source="tiny-imagenet")).fingerprint == outer.fingerprint
    assert load_dataset(config(root, source="tiny-imagenet", classes=("n02",))).test.names == (
        "val/images/val_0.JPEG",
        "val/images/val_2.JPEG",
    )


def test_tiny_imagenet_is_read_with_val_rearranged_into_class_folders(tmp_path: Path) -> None:
    root = make_tiny(tmp_path / "tiny")
    for number, wnid in enumerate(("n02", "n01", "n02", "n01")):
        (root / "val" / wnid).mkdir(exist_ok=True)
        (root / "val" / "images" / f"val_{number}.JPEG").rename(root / "val" / wnid / f"val_{number}.JPEG")
    (root / "val" / "images").rmdir()
    check_tiny(load_dataset(config(root, source="tiny-imagenet")))


def test_tiny_imagenet_with_bad_annotations_names_the_line_or_the_file(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text() + "val_9.JPEG\tn01\t0\t0\t0\t0\n")
    assert "val/images/val_9.JPEG (cannot be read: No such file" in message(root, source="tiny-imagenet")
    annotations.write_text("val_0.JPEG n02\n")
    assert f"{annotations}:1: expected a file and a class" in message(root, source="tiny-imagenet")


def test_imagenette_is_found_in_the_folder_its_archive_unpacks_to(tmp_path: Path) -> None:
    make_tree(tmp_path / "imagenette2-320", suffix=".JPEG")
    dataset = load_dataset(config(tmp_path, source="imagenette"))
    assert dataset.train.names[0] == "train/ant/0.JPEG"


def make_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """CIFAR-10 in small, with torchvision's checksums set to it; return the training pixels [20, 3072]."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"thing{index}" for index in range(10)]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    files = {
        "data_batch_1": {"data": pixels, "labels": [index % 10 for index in range(20)]},
        "test_batch": {"data": pixels[:10], "labels": list(range(10))},
        "batches.meta": {"label_names": names},
    }
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((folder / name).read_bytes()).hexdigest()  # noqa: S324
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["batches.meta"]})
    return pixels


def test_cifar10_is_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = make_cifar(tmp_path, monkeypatch)
    settings = config(tmp_path, source="cifar10", resolution=32, classes="1:3")
    train = load_dataset(settings).train
    assert train.classes == ("thing1", "thing2")
    assert train.names == ("train/1", "train/11", "train/2", "train/12")
    assert torch.equal(train.decode([1])[0], torch.from_numpy(pixels[11].reshape(3, 32, 32)))
    assert all(map(torch.equal, train.batches([[0], [2, 3]], 1), train.batches([[0], [2, 3]], 0)))
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    text = message(tmp_path, source="cifar10")
    assert "missing or damaged" in text and "wmdd data fetch cifar10" in text


# Fetching


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server on this machine that serves the folder ``tmp_path/web``."""
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "web"))
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_tiny_imagenet_is_fetched_verified_and_unpacked(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "web"
    make_tiny(served / "tiny-imagenet-200")
    archive = served / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((served / "tiny-imagenet-200").rglob("*")):
            file.write(path, path.relative_to(served))
    checksum = md5(archive.read_bytes()).hexdigest()  # noqa: S324
    address = f"{web}/tiny-imagenet-200.zip"
    monkeypatch.setattr(download, "TINY_ARCHIVE", (address, "0" * 32))
    with pytest.raises(WmddError, match="tiny-imagenet: cannot be fetched"):
        fetch("tiny-imagenet", tmp_path / "bad")
    assert not (tmp_path / "bad" / "tiny-imagenet-200").exists()
    monkeypatch.setattr(download, "TINY_ARCHIVE", (address, checksum))
    root = fetch("tiny-imagenet", tmp_path / "good")
    check_tiny(load_dataset(config(root, source="tiny-imagenet")))
    archive.unlink()
    assert fetch("tiny-imagenet", root) == root  # there already
    assert sorted(path.name for path in root.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_unpacking_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def unpack_in_part(folder: Path) -> None:
        make_tree(folder / "images")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download._make_whole(tmp_path / "images", unpack_in_part)
    assert not list(tmp_path.iterdir())
    download._make_whole(tmp_path / "images", lambda folder: make_tree(folder / "images"))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_imagenet_explains_its_licence_and_names_the_archives_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        fetch("imagenet-1k", tmp_path)
    text = str(caught.value)
    assert "license" in text and str(tmp_path) in text
    for archive in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        assert archive in text


def pack(target: Path, folder: Path, mode: str) -> None:
    with tarfile.open(target, mode) as file:  # type: ignore[call-overload]
        for path in sorted(folder.iterdir()):
            file.add(path, path.name)


def test_imagenet_is_unpacked_from_its_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import imagenet

    root, raw = tmp_path / "imagenet", tmp_path / "raw"
    root.mkdir()
    for number, wnid in enumerate(("n01", "n02")):
        (raw / wnid).mkdir(parents=True)
        picture(number).save(raw / wnid / f"{wnid}_1.JPEG")
        (raw / "train").mkdir(exist_ok=True)
        pack(raw / "train" / f"{wnid}.tar", raw / wnid, "w")
        (raw / "val").mkdir(exist_ok=True)
        picture(number).save(raw / "val" / f"ILSVRC2012_val_0000000{number}.JPEG")
    kit = raw / "kit" / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    kind = [("id", "i4"), ("wnid", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    synsets = np.array([(1, "n01", "one", "", 0), (2, "n02", "two", "", 0), (3, "n03", "all", "", 2)], dtype=kind)
    savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    archives = {key: root / name for key, (name, _) in imagenet.ARCHIVE_META.items()}
    pack(archives["train"], raw / "train", "w")
    pack(archives["val"], raw / "val", "w")
    pack(archives["devkit"], raw / "kit", "w:gz")
    sums = {key: (path.name, md5(path.read_bytes()).hexdigest()) for key, path in archives.items()}  # noqa: S324
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    monkeypatch.chdir(tmp_path)
    fetch("imagenet-1k", Path("imagenet"))
    dataset = load_dataset(config(root, source="imagenet-1k"))
    assert dataset.train.names == ("train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG")
    assert dataset.test.names == ("val/n01/ILSVRC2012_val_00000001.JPEG", "val/n02/ILSVRC2012_val_00000000.JPEG")
    for path in archives.values():
        path.unlink()
    fetch("imagenet-1k", root)  # there already
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_other_names_are_answered_with_what_can_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fetch("digits", None) == Path("data/digits")
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        fetch("cifra10", None)
    with pytest.raises(InputError, match=r"data\.root="):
        fetch("folder", None)
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the network is unreachable")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(WmddError, match=f"cifar10: cannot be fetched into {tmp_path}: the network is unreachable"):
        fetch("cifar10", tmp_path)
