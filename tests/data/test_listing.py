"""A data set is listed once; who reads the listing opens only its own images, and notices what has changed."""

import errno
import json
import os
import shutil
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked, python
from PIL import Image
from rank_processes import in_ranks

import wmdd
from wmdd.config.schema import ComputeConfig, DataConfig
from wmdd.data import listing as listing_module
from wmdd.data import listing_build, sources
from wmdd.data.dataset import check_files, load_dataset
from wmdd.data.listing import open_listing
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.runtime import signals
from wmdd.runtime.ranks import ranks

CLASSES = tuple(f"n{index:02}" for index in range(12))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """12 classes of 6 training and 2 test images, in folders that have not changed for long."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in CLASSES:
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    settle(tmp_path / "tree")
    return tmp_path / "tree"


def settle(tree: Path, seconds: float = 1e9) -> None:
    """Make folders old enough that their times are relied on."""
    for folder, _, _ in os.walk(tree):
        os.utime(folder, (seconds, seconds))


def config(root: Path, **fields: Any) -> DataConfig:
    return DataConfig(**({"root": str(root), "resolution": 8} | fields))


def listings(cache: Path) -> list[Path]:
    return sorted(cache.glob("listings/*/*.safetensors"))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were looked at, by name."""
    found: list[str] = []
    look = sources.Tree.look
    monkeypatch.setattr(sources.Tree, "look", lambda self, name: (found.append(name), look(self, name))[1])
    return found


# What is opened

WATCHED = """
import json, os, sys
opened, seen = [], 0
def watch(event, arguments):
    global seen
    if event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])
sys.addaudithook(watch)
from wmdd.config.schema import DataConfig
from wmdd.data.dataset import load_dataset
root = sys.argv[1]
real = os.stat
def counted(path, *rest, **more):
    global seen
    seen += str(path).startswith(root + "/train/") or str(path).startswith(root + "/val/")
    return real(path, *rest, **more)
os.stat = counted
dataset = load_dataset(DataConfig(root=root, resolution=8))
for index in range(int(sys.argv[2]), int(sys.argv[3])):
    dataset.train.decode(dataset.train.of_class(index))
print(json.dumps({"opened": [name for name in opened if name.startswith(root)], "seen": seen}))
"""


def watched(tree: Path, start: int, stop: int) -> dict[str, Any]:
    done = python("-c", WATCHED, str(tree), str(start), str(stop))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_block_opens_the_training_images_of_its_own_classes_and_no_other_file(tree: Path) -> None:
    load_dataset(config(tree))
    found = watched(tree, 3, 5)
    assert sorted(found["opened"]) == [str(tree / f"train/{CLASSES[c]}/{i}.png") for c in (3, 4) for i in range(6)]
    assert found["seen"] == 2 * len(CLASSES)  # each class folder of either split, and no file


def test_only_the_classes_that_are_asked_for_are_listed_and_others_are_added(
    tree: Path, cache: Path, looked_at: list[str]
) -> None:
    shutil.rmtree(tree / "val" / "n11")
    (tree / "val" / "n11").mkdir()  # without images: of no matter to the others
    load_dataset(config(tree, classes="2:4"))
    assert {Path(name).parent.name for name in looked_at} == {"n02", "n03"}
    looked_at.clear()
    load_dataset(config(tree, classes="3:6"))
    assert {Path(name).parent.name for name in looked_at} == {"n04", "n05"}
    looked_at.clear()
    load_dataset(config(tree, classes="2:6"))
    assert not looked_at and len(listings(cache)) == 2


def test_a_finished_listing_is_read_without_a_lock_and_without_write_access(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_dataset(config(tree))
    (place,) = (cache / "listings").iterdir()
    (place / ".lock").unlink(missing_ok=True)
    monkeypatch.setattr(listing_build, "locked", lambda *_: pytest.fail("a lock was taken"))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    for path in (place, place.parent, cache):
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert load_dataset(config(tree)).fingerprint == first.fingerprint
    finally:
        for path in (cache, place.parent, place):
            path.chmod(stat.S_IRWXU)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_processes_that_come_together_list_once(tree: Path, cache: Path) -> None:
    many = [Forked("-c", WATCHED, str(tree), "0", "0") for _ in range(3)]
    try:
        told = [json.loads(one.communicate(timeout=120)[0]) for one in many]
    finally:
        for one in many:
            one.end()
    assert sorted(len(one["opened"]) for one in told) == [0, 0, 8 * len(CLASSES)]
    assert len(listings(cache)) == 1


@pytest.mark.ranks
def test_other_ranks_read_what_rank_0_has_listed_and_get_its_error(tree: Path) -> None:
    def work() -> tuple[str, list[str]]:
        opened: list[str] = []

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.scandir"):
                opened.append(str(arguments[0]))

        sys.addaudithook(watch)  # of this rank alone
        with ranks(ComputeConfig(device="cpu")) as job:
            try:
                told = load_dataset(config(tree), 0, job).fingerprint
            except InputError as error:
                told = str(error)
        return told, [name for name in opened if name.startswith(str(tree))]

    for _ in ("good", "bad"):
        (first, by_first), (second, by_second) = in_ranks(2, work)
        assert first == second and by_first and not by_second
        shutil.rmtree(tree / "val" / "n08", ignore_errors=True)
    assert "class 'n08' has training images but no validation images" in first


# What is noticed


def test_a_new_file_lists_its_class_again_and_no_other(tree: Path, looked_at: list[str]) -> None:
    first = load_dataset(config(tree))
    shutil.copy(tree / "train/n03/0.png", tree / "train/n03/7.png")
    settle(tree / "train/n03", 2e9)  # noticed by another time, later or not
    looked_at.clear()
    found = load_dataset(config(tree))
    assert {Path(name).parent.name for name in looked_at} == {"n03"}
    assert len(found.train) == len(first.train) + 1 and found.fingerprint != first.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("change", ["add", "remove", "rename"])
def test_images_that_come_go_or_get_another_name_are_other_images(tree: Path, tmp_path: Path, change: str) -> None:
    settings = [f"data.root={tree}", "data.source=folder", "data.channels=1", "data.resolution=8", "ipc=1"]
    settings += ["data.classes=3", "method=random", "teacher.network=convnet2x8", "teacher.epochs=1"]
    settings += ["student.networks=['convnet2x8']", "student.epochs=1", "student.seeds=1", "student.baselines=[]"]
    wmdd.run("digits", tmp_path / "run", settings)
    folder = tree / "train" / "n01"
    if change == "add":
        shutil.copy(folder / "0.png", folder / "7.png")
    elif change == "remove":
        (folder / "5.png").unlink()
    else:
        (folder / "5.png").rename(folder / "9.png")
    with pytest.raises(InputError, match=r"was made from other images than those of data\.root") as caught:
        wmdd.run("digits", tmp_path / "run", settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", ["truncate", "overwrite"])
def test_a_file_of_another_size_than_was_listed_ends_the_work_in_one_line(
    tree: Path, change: str, workers: int
) -> None:
    first = load_dataset(config(tree))
    path = tree / "train" / "n02" / "1.png"
    size = path.stat().st_size
    if change == "truncate":
        os.truncate(path, size // 2)
    else:
        path.write_bytes((tree / "train/n02/0.png").read_bytes() + b"\0")
    found = load_dataset(config(tree))  # no folder has changed
    assert found.fingerprint == first.fingerprint
    with pytest.raises(InputError, match=f"{path}: has .* bytes, but {size} in the listing; .*--refresh") as caught:
        list(found.train.batches([range(len(found.train))], workers))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="--refresh"):
        check_files(config(tree), workers)
    if change == "truncate":
        with pytest.raises(InputError, match=f"1 of 96 images cannot be read: {path}"):
            load_dataset(config(tree), refresh=True)
    else:
        assert load_dataset(config(tree), refresh=True).fingerprint != first.fingerprint
        list(load_dataset(config(tree)).train.batches([range(72)], workers))


def test_a_file_that_vanishes_in_the_middle_of_work_is_named_with_the_remedy(tree: Path) -> None:
    train = load_dataset(config(tree)).train
    (tree / "train/n00/0.png").unlink()
    with pytest.raises(WmddError, match=r"n00/0\.png: cannot be read: No such file or directory; .*--refresh"):
        train.decode([0])


def test_images_that_lie_deeper_are_noticed_too(tree: Path) -> None:
    deep = tree / "train" / "n04" / "more" / "still"
    deep.mkdir(parents=True)
    settle(tree)
    first = load_dataset(config(tree))
    shutil.copy(tree / "train/n04/0.png", deep / "8.png")
    assert len(load_dataset(config(tree)).train) == len(first.train) + 1


def test_a_folder_that_has_just_changed_is_not_relied_on(tree: Path, looked_at: list[str]) -> None:
    """A second change within one tick of the file system's clock would leave the same time."""
    shutil.copy(tree / "train/n05/0.png", tree / "train/n05/7.png")
    load_dataset(config(tree))
    looked_at.clear()
    load_dataset(config(tree))
    assert {Path(name).parent.name for name in looked_at} == {"n05"}


def test_a_new_class_is_noticed(tree: Path) -> None:
    load_dataset(config(tree))
    for split in ("train", "val"):
        shutil.copytree(tree / split / "n00", tree / split / "n99")
    settle(tree)
    assert load_dataset(config(tree)).classes == (*CLASSES, "n99")


def test_a_faulty_file_that_is_repaired_in_its_place_is_looked_at_again(tree: Path) -> None:
    path = tree / "train" / "n06" / "2.png"
    good = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        load_dataset(config(tree))
    assert load_dataset(config(tree, on_error="skip")).skipped == ("train/n06/2.png",)
    path.write_bytes(good)
    assert load_dataset(config(tree)).skipped == ()


def test_a_damaged_listing_is_made_again(tree: Path, cache: Path) -> None:
    first = load_dataset(config(tree))
    (path,) = listings(cache)
    path.write_bytes(path.read_bytes()[:200])
    assert load_dataset(config(tree)).fingerprint == first.fingerprint
    assert open_listing(listings(cache)[-1]).classes == CLASSES


def test_a_stop_while_images_are_listed_keeps_what_was_listed(
    tree: Path, looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_build, "_CLASSES_AT_A_TIME", 2)
    with signals.stop_on(signal.SIGUSR2):
        original = listing_module.rows_of

        def then_stop(members: Any, looks: Any) -> Any:
            if members.folders[0][0] == "train/n05":
                os.kill(os.getpid(), signal.SIGUSR2)
            return original(members, looks)

        monkeypatch.setattr(listing_build, "rows_of", then_stop)
        with pytest.raises(Interrupted, match="listed classes are kept"):
            load_dataset(config(tree))
    looked_at.clear()
    load_dataset(config(tree))
    assert {Path(name).parent.name for name in looked_at} == set(CLASSES[6:])


def test_a_store_that_cannot_be_written_is_named_with_the_remedy(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=f"{os.strerror(errno.ENOTDIR)}; set WMDD_CACHE"):
        load_dataset(config(tree))


# What identifies images


def test_images_are_in_the_order_of_their_base_names_without_extension(tree: Path) -> None:
    folder = tree / "train" / "n00"
    shutil.rmtree(folder)
    for name in ("b-1.png", "b.png", "z/a.png", "a/c.png", "b.jpeg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(folder / name)
    names = load_dataset(config(tree, classes=1)).train.names
    assert [name.removeprefix("train/n00/") for name in names] == ["z/a.png", "b.jpeg", "b.png", "b-1.png", "a/c.png"]


def test_folders_within_a_class_and_extensions_are_no_part_of_an_images_identity(tree: Path) -> None:
    first = load_dataset(config(tree))
    for name in CLASSES:
        folder = tree / "train" / name
        (folder / "images").mkdir()
        for path in folder.glob("*.png"):
            path.rename(folder / "images" / f"{path.stem}.PNG")
    found = load_dataset(config(tree))
    assert found.train.names != first.train.names and found.fingerprint == first.fingerprint


def test_a_file_left_out_and_a_file_deleted_leave_the_same_images(tree: Path) -> None:
    path = tree / "train" / "n02" / "3.png"
    path.write_bytes(b"")
    skipping = load_dataset(config(tree, on_error="skip"))
    path.unlink()
    assert load_dataset(config(tree)).fingerprint == skipping.fingerprint


def test_the_format_decides_nothing(tree: Path) -> None:
    auto, folder = config(tree), config(tree, format="folder")
    assert load_dataset(auto).fingerprint == load_dataset(folder).fingerprint
    with pytest.raises(InputError, match=r"data\.format='tiny-imagenet': .* has no val/val_annotations\.txt"):
        load_dataset(config(tree, format="tiny-imagenet"))


def test_what_a_listing_holds_is_what_was_listed(tree: Path, cache: Path) -> None:
    dataset = load_dataset(config(tree, holdout_per_class=2))
    listing = open_listing(listings(cache)[0])
    assert listing.classes == dataset.all_classes == CLASSES
    for split, folder in (("train", "train"), ("test", "val")):
        for name in CLASSES:
            rows = listing.rows(name)[split]  # type: ignore[index]
            files = sorted((tree / folder / name).iterdir())
            assert [rows.names[row] for row in range(len(rows))] == [path.name for path in files]
            assert rows.identities.tolist() == [path.stat().st_size for path in files]
            assert rows.digest == rows.digest_of(range(len(rows)))
    assert dataset.holdout is not None
    assert torch.equal(dataset.holdout.labels, torch.arange(12).repeat_interleave(2))


def test_listings_that_nobody_needs_any_more_go(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_build, "_LISTINGS_KEPT", 3)
    for number in range(6):
        os.utime(tree / "train" / "n00", (1e9 + number, 1e9 + number))
        load_dataset(config(tree))
    assert [path.name[:8] for path in listings(cache)] == ["00000003", "00000004", "00000005"]


def test_threads_that_list_do_not_outlive_the_call(tree: Path) -> None:
    before = threading.active_count()
    load_dataset(config(tree))
    assert threading.active_count() == before
