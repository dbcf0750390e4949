"""Tensors are read from mapped files, which no process copies."""

from pathlib import Path

import pytest
import torch

from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.errors import WmddError
from wmdd.runs.distilled_set import complete_manifest, map_set
from wmdd.runs.folder import RunFolder
from wmdd.storage.files import map_and_hash, map_tensors, read_tensors, sha256, write_tensors


def test_a_mapped_file_gives_the_tensors_and_the_digest_of_a_read_one(tmp_path: Path) -> None:
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.half, torch.float, torch.double)
    written = {f"tensor {kind}": torch.arange(7).to(kind) for kind in kinds} | {"none": torch.empty(0, 3)}
    write_tensors(tmp_path / "file", written, {"key": "value"})
    mapped, sha = map_and_hash(tmp_path / "file")
    assert sha == sha256(tmp_path / "file")
    assert mapped.keys() == written.keys()
    assert all(torch.equal(mapped[name], value) for name, value in read_tensors(tmp_path / "file").items())
    mapped["tensor torch.uint8"].zero_()
    assert sha256(tmp_path / "file") == sha, "a change of a tensor reached the file"


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_cut_file_is_named(tmp_path: Path, kept: int) -> None:
    write_tensors(tmp_path / "file", {"images": torch.zeros(10, dtype=torch.uint8)})
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:kept])
    with pytest.raises(WmddError, match="file: is not a complete safetensors file"):
        map_tensors(tmp_path / "file")


def test_students_take_images_from_the_mapped_blocks_of_a_set(tiny: Config, tmp_path: Path) -> None:
    cut = tiny.replace({"synthesis.classes_per_group": 1, "blocks": 4})
    pipeline.run(cut, tmp_path / "run", share=pipeline.Share(("teacher", "distill")))
    run = RunFolder(tmp_path / "run")
    mapped = map_set(run, complete_manifest(run))
    maps = Path("/proc/self/maps").read_text()
    assert all(str(run.block_file(block)) in maps for block in range(4))
    order = torch.tensor([7, 0, 3, 3, 4])
    assert torch.equal(mapped.images[order], mapped.joined().images[order])
    assert torch.equal(mapped.joined().images, torch.cat([read_tensors(run.block_file(b))["images"] for b in range(4)]))
