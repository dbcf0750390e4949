"""Configs: presets resolve, overrides apply, wrong input is named, the fingerprint leaves out what must not matter."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from wmdd.config.loading import describe, load_config, preset_names, to_toml
from wmdd.config.schema import DECIDES, DEFAULTS, Config
from wmdd.config.section import SCOPES, Section
from wmdd.errors import InputError
from wmdd.storage.files import FORMAT, digest, write_json

PINNED = Path(__file__).parent / "defaults.json"


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
        (["iterations=5"], "unknown key 'iterations': did you mean 'synthesis.iterations'"),
        (["epochs=5"], "unknown key 'epochs': did you mean 'teacher.epochs' or 'student.epochs'"),
        (["synthesis.bn_wieght=1"], "unknown key 'synthesis.bn_wieght': did you mean 'bn_weight'"),
        (["ipc=0"], "ipc: expected 1 or more"),
        (["ipc=many"], "ipc: expected a whole number"),
        (["synthesis.crop_scale=[0.9, 0.1]"], "smallest crop 0.9 exceeds the largest 0.1"),
        (["data.channels=3"], "data.mean has 1 values, data.channels is 3"),
        (["synthesis=3"], "synthesis is a section"),
        (["ipc"], "expected key=value"),
        (["compute.precision=fp8"], "compute.precision: expected 'fp32', 'tf32', 'bf16' or 'auto'"),
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


OTHER: dict[str, Any] = {
    "name": "another",
    "method": "random",
    "compute.device": "cpu",
    "compute.precision": "bf16",
    "data.source": "cifar10",
    "data.root": "elsewhere",
    "data.format": "folder",
    "data.packed": "shards",
    "data.stage": "scratch",
    "data.classes": 3,
    "data.channels": 1,
    "data.crop_ratio": 0.875,
    "data.mean": [0.5, 0.5, 0.5],
    "data.std": [0.5, 0.5, 0.5],
    "data.on_error": "skip",
    "teacher.network": "convnet3x64",
    "teacher.stem": "small",
    "teacher.weights": "weights.safetensors",
    "teacher.outputs": [2, 1, 0],
    "teacher.optimizer": "adamw",
    "statistics.between": "batchwise",
    "barycenter.weights": "free",
    "barycenter.atoms": "medoids",
    "synthesis.betas": [0.9, 0.99],
    "synthesis.start": "real",
    "synthesis.norm": "euclidean",
    "synthesis.bn_target": "global",
    "synthesis.bn_variance": "matched",
    "synthesis.augment": "image",
    "synthesis.crop_scale": [0.5, 1.0],
    "labels.regimes": ["hard"],
    "labels.encoding": "int8",
    "labels.teacher_mode": "batch",
    "labels.loss": "mse-ce",
    "synthesis.feature_target": "mean",
    "labels.mix": "none",
    "student.cosine_stretch": 2.0,
    "student.networks": ["convnet3x64"],
    "student.views": ["plain"],
    "student.baselines": [],
    "external.folder": "theirs",
    "external.layout": "numbered",
    "external.sha256": "ab",
    "tuning.on": "holdout",
    "synthesis.grouping": "spread",
    "sre2l.bn_weight": 0.5,
    "sre2l.norm": "squared",
    "sre2l.betas": [0.9, 0.9],
    "sre2l.augment": "image",
    "sre2l.crop_scale": [0.5, 1.0],
    "sre2l.jitter": 3,
}
"""Another value of each key that is no number and no flag."""
WITH = {"data.stage": {"data.packed": "shards"}, "data.channels": {"data.mean": [0.5], "data.std": [0.5]}}
"""What must change with a key, for the config to be valid."""


def changed(key: str) -> tuple[Config, Config]:
    """Return two valid configs that differ in one key."""
    default = DEFAULTS[key]
    if key in OTHER:
        value = OTHER[key]
    else:
        value = not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else default / 2
        value = 0.125 if value == default else value

    def config(values: dict[str, Any]) -> Config:
        nested: dict[str, Any] = {}
        for name, given in values.items():
            section, _, field = name.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[field] = given
        return Config.model_validate(nested)

    if key == "synthesis.split_class":
        return config({"ipc": 10}), config({"ipc": 10, key: 2})
    beside = WITH.get(key, {})
    before = {} if key == "data.channels" else beside
    return config(before), config(beside | {key: value})


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_key_changes_exactly_the_fingerprints_that_its_annotation_names(key: str) -> None:
    before, after = changed(key)
    differing = {scope for scope in SCOPES if before.fingerprint(scope) != after.fingerprint(scope)}
    what = DECIDES[key]
    assert differing == (set(SCOPES[SCOPES.index(what) :]) if what in SCOPES else set())


def test_no_scope_has_the_fingerprint_of_another() -> None:
    assert len({Config().fingerprint(scope) for scope in SCOPES}) == len(SCOPES)


def test_a_field_that_does_not_say_what_it_decides_is_an_error_at_import() -> None:
    with pytest.raises(TypeError, match=r"Silent\.key does not declare which results it decides"):

        class Silent(Section):
            key: int = 0


def test_a_value_given_as_the_default_is_left_out_of_fingerprints() -> None:
    plain = Config().fingerprint("students")
    assert plain == digest({"format": FORMAT, "scope": "students", "config": {}}), "a new key would change it"
    assert Config.model_validate({"seed": 0, "synthesis": {"lr": 0.25}}).fingerprint("students") == plain
    assert Config.model_validate(Config().model_dump(mode="json")).fingerprint("students") == plain


def test_the_defaults_that_fingerprints_leave_out_are_those_they_were() -> None:
    found = {key: value for key, value in DEFAULTS.items() if DECIDES[key] in SCOPES}
    if os.environ.get("WMDD_WRITE_DEFAULTS") == "1":
        write_json(PINNED, found)
    pinned = json.loads(PINNED.read_text())
    new = sorted(found.keys() - pinned.keys())
    assert not new, f"new keys {new}: pin their defaults with WMDD_WRITE_DEFAULTS=1 pytest {__file__}"
    other = sorted(key for key, value in pinned.items() if key not in found or found[key] != value)
    assert not other, (
        f"{other}: removed, or with another default. Fingerprints leave out keys at their defaults, so the same config"
        " would now name other results. Put the default back (a preset may say otherwise), or raise wmdd.files.FORMAT,"
        " which makes every run folder and cache entry one of an earlier version; then run this with"
        " WMDD_WRITE_DEFAULTS=1"
    )
