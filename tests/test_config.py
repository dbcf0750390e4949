"""Configs: presets resolve, overrides apply, wrong input is named, the fingerprint leaves out what must not matter."""

from pathlib import Path

import pytest

from wmdd.config import Config, describe, load_config, preset_names, to_toml
from wmdd.errors import InputError


def test_every_preset_resolves_alone_and_with_every_variant() -> None:
    presets, variants = preset_names()
    assert {"digits", "cifar10", "imagenette", "tiny-imagenet", "tiny-imagenet-224", "imagenet-1k"} <= set(presets)
    for preset in presets:
        names = {load_config(name).name for name in (preset, *(f"{preset}+{variant}" for variant in variants))}
        assert len(names) == 1 + len(variants)


def test_variants_change_the_method_and_keep_the_data_set() -> None:
    paper, upstream = load_config("tiny-imagenet+paper"), load_config("tiny-imagenet+upstream")
    assert paper.data == upstream.data == load_config("tiny-imagenet").data
    assert (paper.synthesis.norm, paper.synthesis.ce_weight) == ("squared", 0.0)
    assert (upstream.synthesis.norm, upstream.synthesis.ce_weight) == ("euclidean", 1.0)
    assert upstream.statistics.between == "batchwise"


def test_every_field_says_what_it_means() -> None:
    assert [key for key, _, meaning in describe(Config()) if not meaning] == []


@pytest.mark.parametrize("preset", preset_names()[0])
def test_printed_config_reads_back_as_itself(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(load_config(preset)))
    assert load_config(path) == load_config(preset)


def test_a_file_extends_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits+paper"\nipc = 3\n[synthesis]\nlr = 0.5\n')
    config = load_config(path, ["synthesis.iterations=7", "data.classes=['3', '1']", "name=other"])
    assert (config.ipc, config.synthesis.lr, config.synthesis.iterations, config.name) == (3, 0.5, 7, "other")
    assert config.synthesis.bn_variance == "total" and config.data.classes == ("3", "1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["synthesys.lr=1"], "unknown key 'synthesys': did you mean 'synthesis'"),
        (["synthesis.bn_wieght=1"], "unknown key 'synthesis.bn_wieght': did you mean 'bn_weight'"),
        (["ipc=0"], "ipc: Input should be greater than or equal to 1"),
        (["ipc=many"], "ipc: Input should be a valid integer"),
        (["synthesis.crop_scale=[0.9, 0.1]"], "smallest crop 0.9 exceeds the largest 0.1"),
        (["data.channels=3"], "data.mean has 1 values, data.channels is 3"),
        (["synthesis=3"], "synthesis is a section"),
        (["ipc"], "expected key=value"),
        (["compute.precision=fp8"], "compute.precision: Input should be 'fp32', 'bf16' or 'auto'"),
    ],
)
def test_wrong_keys_and_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("digits", overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("digits+papers", "no variant 'papers'; did you mean 'paper'"),
        ("missing.toml", "missing.toml: cannot be read"),
    ],
)
def test_wrong_names_are_named(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(source)


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("ipc = = 3")
    with pytest.raises(InputError, match="is not TOML"):
        load_config(path)


def test_fingerprint_leaves_out_what_must_not_change_a_result() -> None:
    base = load_config("digits").fingerprint()
    for same in ("blocks=5", "name=x", "compute.device=cpu", "compute.workers=7", "data.root=/x", "student.seeds=9"):
        assert load_config("digits", [same]).fingerprint() == base, same
    for other in ("seed=1", "ipc=2", "compute.threads=3", "compute.precision=bf16", "synthesis.lr=1", "teacher.seed=1"):
        assert load_config("digits", [other]).fingerprint() != base, other
