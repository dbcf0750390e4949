"""Plots and pictures of the page."""

import re
from pathlib import Path
from typing import Any

import torch
from report_runs import make_everything, make_run

from wmdd.config.schema import Config
from wmdd.data.dataset import load_dataset
from wmdd.report.collect import collect
from wmdd.report.gallery import grids
from wmdd.report.plots import figures, pareto
from wmdd.storage.files import digest, read_tensors, write_tensors


def test_the_front_holds_what_nothing_cheaper_reaches() -> None:
    points = [(3.0, 0.8), (1.0, 0.5), (2.0, 0.5), (2.0, 0.7), (4.0, 0.8), (1.0, 0.4)]

    assert pareto(points) == [1, 3, 0]
    assert pareto([]) == []


def test_every_plot_has_its_panels_and_takes_its_colours_from_the_page(tmp_path: Path) -> None:
    found = {figure.title: figure for figure in figures(collect([make_everything(tmp_path / "all")]))}

    # 2 networks × 3 regimes × 2 views over IPC, of which six are drawn; strong and weak scaling.
    assert [len(found["Accuracy over IPC"].panels), found["Accuracy over IPC"].total] == [6, 12]
    assert all("no augmentation" not in panel.title for panel in found["Accuracy over IPC"].panels)
    assert found["Accuracy over bytes"].total == 4
    assert found["Accuracy over device-hours"].panels
    assert len(found["Throughput over ranks"].panels) == 2
    assert len(found["Response to λ"].panels) == 1
    svgs = [panel.svg for figure in found.values() for panel in figure.panels]
    assert all("#1000" not in svg and "var(--" in svg for svg in svgs)
    names = [name for svg in svgs for name in set(re.findall(r'clipPath id="([^"]*)"', svg))]
    assert len(set(names)) == len(names), "plots on one page must not share ids"


def test_the_response_to_lambda_is_drawn_only_where_nothing_else_differs(tmp_path: Path) -> None:
    def drawn(folder: Path, **other: Any) -> bool:
        for weight in (10, 100):
            changes: dict[str, Any] = {"name": f"w{weight}", "synthesis": {"bn_weight": weight, **other}}
            other = {key: value * 2 for key, value in other.items()}
            make_run(folder / str(weight), [0.9], record={"artefact": digest(weight)}, **changes)
        return "Response to λ" in [figure.title for figure in figures(collect([folder]))]

    assert drawn(tmp_path / "alone")
    assert not drawn(tmp_path / "with-lr", lr=0.1)


def test_one_point_makes_no_plot(tmp_path: Path) -> None:
    assert figures(collect([make_run(tmp_path / "run", [0.9])])) == []


def test_each_distilled_image_stands_above_the_real_image_that_is_nearest_to_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [0.9])
    config = Config.model_validate(collect([run]).runs[0].config)
    train = load_dataset(config.data).train
    chosen = [train.of_class(label)[place] for label, place in ((0, 5), (0, 9), (1, 3), (1, 40))]
    block = run / "blocks" / "block-00000.safetensors"
    noise = torch.randint(0, 8, (4, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = (train.decode(chosen) // 2 * 2).clamp(max=240) + noise
    write_tensors(block, read_tensors(block) | {"images": images})
    problems: list[str] = []

    (grid,), total = grids(collect([run]).runs, problems)

    strips = {name: {strip.name: strip.images for strip in strips} for name, strips in grid.classes}
    nearest = [what.partition(",")[0] for name in "01" for _, what in strips[name]["nearest real"]]
    assert nearest == [train.names[position] for position in chosen]
    assert (total, grid.compared, problems) == (1, 2, [])


def test_without_the_data_the_nearest_images_are_left_out_with_a_word(tmp_path: Path) -> None:
    data = {"source": "folder", "root": str(tmp_path / "gone"), "resolution": 16, "channels": 1, "mean": [0.3]}
    run = make_run(tmp_path / "run", [0.9], data=data | {"std": [0.4]})
    problems: list[str] = []

    (grid,), _ = grids(collect([run]).runs, problems)

    assert [[strip.name for strip in strips] for _, strips in grid.classes] == [["wmdd"], ["wmdd"]]
    assert len(problems) == 1 and problems[0].startswith("run: nearest real images are left out: ")


def test_of_a_selection_of_real_images_no_nearest_ones_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [0.9], method="random")

    (grid,), _ = grids(collect([run]).runs, [])

    assert [[strip.name for strip in strips] for _, strips in grid.classes] == [["random"], ["random"]]


def test_classes_that_are_not_distilled_yet_have_no_nearest_images_beside_the_baseline(tmp_path: Path) -> None:
    classes = ("0", "1", "2", "3")
    make_run(tmp_path / "begun", classes=classes, missing=(1,))
    make_run(tmp_path / "random", classes=classes, method="random")
    problems: list[str] = []

    (grid,), _ = grids(collect([tmp_path]).runs, problems)

    shown = [[strip.name for strip in strips] for _, strips in grid.classes]
    assert shown == [["wmdd", "nearest real", "random"]] * 2 + [["random"]] * 2
    assert problems == []
