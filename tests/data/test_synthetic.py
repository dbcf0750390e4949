"""Generated trees: deterministic, resumable, as heavy as photographs, learnable, never taken for a real data set."""

import io
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from wmdd.cli import app
from wmdd.config.schema import DataConfig
from wmdd.data import synthetic
from wmdd.data.dataset import load_dataset
from wmdd.errors import InputError

SIZES = {"classes": 2, "images": 3, "pixels": 32, "val": 1}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generated") / "tree"
    done: list[int] = []
    synthetic.generate(out, **SIZES, workers=1, advance=done.append)
    assert sum(done) == 8
    return out


def test_a_tree_is_a_data_set(tree: Path) -> None:
    data = load_dataset(DataConfig(source="folder", root=str(tree), resolution=24))
    assert (len(data.classes), len(data.train), len(data.test)) == (2, 6, 2)
    assert data.train.decode(range(6)).shape == (6, 3, 24, 24)


def test_the_bytes_depend_neither_on_the_number_of_processes_nor_on_an_interruption(tree: Path, tmp_path: Path) -> None:
    before = files_of(tree)
    other = tmp_path / "other"
    other.mkdir()
    (other / synthetic.MARKER).write_bytes(before[synthetic.MARKER])  # begun by another process, which was killed
    kept = other / "train" / "class-00001" / "000002.JPEG"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(before["train/class-00001/000002.JPEG"])
    changed = kept.stat().st_mtime_ns
    synthetic.generate(other, **SIZES, workers=2)
    assert files_of(other) == before
    assert kept.stat().st_mtime_ns == changed  # what was there is not drawn again


def test_seed_split_class_and_number_each_give_another_image() -> None:
    drawn = [(0, "train", 0, 0), (1, "train", 0, 0), (0, "val", 0, 0), (0, "train", 1, 0), (0, "train", 0, 1)]
    pictures = {
        synthetic.draw("val" if split == "val" else "train", label, number, 16, seed).tobytes()
        for seed, split, label, number in drawn
    }
    assert len(pictures) == len(drawn)


def test_files_are_as_large_as_photographs() -> None:
    sizes = []
    for number in range(6):
        image = synthetic.draw("train", number, number, 375, 0)
        assert min(image.size) == 375 and max(image.size) <= 563
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=synthetic._JPEG_QUALITY)
        sizes.append(len(buffer.getvalue()))
    assert 70_000 < sum(sizes) / len(sizes) < 130_000


def test_classes_can_be_told_apart_but_not_by_everyone() -> None:
    # The mean colour alone: better than chance over eight classes, and worse than perfect.
    def colour(label: int, number: int) -> np.ndarray:
        return np.asarray(synthetic.draw("train", label, number, 48, 0), dtype=float).mean((0, 1))

    centres = np.stack([np.mean([colour(label, number) for number in range(8)], 0) for label in range(8)])
    shown = [(label, colour(label, number)) for label in range(8) for number in range(8, 16)]
    hits = [label == int(((centres - seen) ** 2).sum(1).argmin()) for label, seen in shown]
    assert 0.25 < np.mean(hits) < 1


def test_records_call_it_synthetic(tree: Path, tmp_path: Path) -> None:
    assert synthetic.name_of(DataConfig(source="folder", root=str(tree))) == "synthetic"
    assert synthetic.name_of(DataConfig(source="folder", root=str(tmp_path))) == tmp_path.name
    assert synthetic.name_of(DataConfig(source="digits", channels=1, mean=(0.3,), std=(0.4,))) == "digits"


def test_other_settings_and_other_folders_are_refused(tree: Path, tmp_path: Path) -> None:
    before = files_of(tree)
    with pytest.raises(InputError, match="images 3 instead of 4"):
        synthetic.generate(tree, **{**SIZES, "images": 4})
    assert files_of(tree) == before
    (tmp_path / "photo.JPEG").touch()
    with pytest.raises(InputError, match="contains no generated dataset"):
        synthetic.generate(tmp_path, **SIZES)
    with pytest.raises(InputError, match="--classes 0"):
        synthetic.generate(tmp_path / "new", **{**SIZES, "classes": 0})
    assert not (tmp_path / "new").exists()


def test_the_command_says_how_to_use_the_tree(tmp_path: Path) -> None:
    out = tmp_path / "tree"
    asked = ["data", "synthesize", "--classes", "1", "--images", "1", "--val", "1", "--pixels", "16", "--out", str(out)]
    told = CliRunner().invoke(app, [*asked, "--workers", "1"], catch_exceptions=False)
    assert f"data.root={out}" in told.stdout
    assert len(list(out.rglob("*.JPEG"))) == 2
