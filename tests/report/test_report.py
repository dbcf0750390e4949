import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_runs import RECIPE, SETTINGS, make_pair, make_random, make_run
from rich.console import Console

from bench.recipes import effects
from wmdd.config.schema import Config
from wmdd.errors import InputError
from wmdd.records.files import write_records
from wmdd.records.schema import Record
from wmdd.report.collect import Report, collect
from wmdd.report.collect_tables import tables
from wmdd.report.html import write_html
from wmdd.report.table import Table
from wmdd.report.text import csv, latex, markdown, terminal
from wmdd.storage.files import digest, write_json

T2 = 4.302653 / math.sqrt(3)
"""Half-width of the 95 % interval of three values, in standard deviations."""


def row_of(report: Report, method: str) -> Any:
    return report.accuracy[report.accuracy["method"] == method].iloc[0]


def table(report: Report, title: str) -> Table:
    return next(table for table in tables(report) if table.title == title)


def cells(table: Table, *columns: str) -> list[tuple[str, ...]]:
    return [tuple(row[table.columns.index(column)] for column in columns) for row in table.rows]


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=300)
    terminal(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_accuracy_table_has_the_figures_computed_by_hand(tmp_path: Path) -> None:
    report = collect([make_pair(tmp_path)])

    wmdd, random = row_of(report, "wmdd"), row_of(report, "random")
    assert wmdd["top1"] == pytest.approx(0.97)
    assert random["top1"] == pytest.approx(0.95)
    assert random["top1_half_width"] == pytest.approx(0.01 * T2, rel=1e-5)
    assert wmdd["difference"] == pytest.approx(0.02)
    # Both sides have s = 0.01 and n = 3: Welch's error is 0.01 · √(2/3), with 4 degrees of freedom.
    assert wmdd["high"] - wmdd["difference"] == pytest.approx(2.776445 * 0.01 * math.sqrt(2 / 3), rel=1e-5)
    accuracy = table(report, "Accuracy")
    assert accuracy.columns[:5] == ["Data set", "Network", "View", "IPC", "Labels"]
    assert accuracy.rows[0][:5] == ["digits", "convnet3x32", "epochs", "2", "soft"]
    assert cells(accuracy, "Method", "Top-1 %", "vs random, points", "n", "Top-5 %") == [
        ("wmdd", "97.0 (96.0–98.0)", "+2.0 [−0.3, 4.3] (this set only)", "1×3", "100.0"),
        ("random", "95.0 ± 2.5", "–", "3×1", "100.0"),
        ("teacher", "98.5", "–", "1", "–"),
    ]
    assert "one set says nothing about another distillation" in accuracy.caption


def test_no_output_prints_an_interval_or_a_p_value_of_one_set(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", [0.97, 0.96, 0.98])
    make_run(run / "baselines" / "random", [0.95, 0.96, 0.94], method="random", name="digits/random")
    report = collect([run])
    write_html(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<script>.*?</script>", "", page, flags=re.DOTALL)

    for text in (printed(report), markdown(report), latex(report), page):
        assert not re.search(r"±\s*\d|\\pm|\[[−+\d]|< 0\.001", text), "an interval of one set"
        assert "one set says nothing about another distillation" in text.lower()
    frame = pd.read_csv(io.StringIO(csv(report)))
    bounds = frame.filter(regex="half_width|low|high|^p$|_p$|adjusted|detects|95")
    assert bounds.isna().all().all()


def test_the_recipe_that_all_rows_share_stands_with_the_table_and_what_varies_in_a_column(tmp_path: Path) -> None:
    one = make_run(tmp_path / "ipc2", [0.97])
    two = make_run(tmp_path / "ipc1", [0.9], ipc=1, recipe=RECIPE | {"updates": 150})

    accuracy = table(collect([one, two]), "Accuracy")

    shared = {"epochs": "150", "batch size": "50", "checkpoint": "last epoch", "teacher": "7" * 12, "lr": "0.001"}
    shared |= {"evaluated on": "test", "classes": "10", "resolution": "16 px"}
    assert accuracy.terms == shared
    assert accuracy.columns[-1] == "updates"
    assert [row[-1] for row in accuracy.rows] == ["150", "300", "–"]


def test_the_summary_says_what_was_found_and_whether_the_interval_holds_zero(tmp_path: Path) -> None:
    run = make_pair(tmp_path)
    assert (
        "Highest mean: wmdd 97.0 (96.0–98.0) %, +2.0 [−0.3, 4.3] points over random (this set only), the interval holds"
        " 0. One set says nothing about another distillation." in printed(collect([run]))
    )

    make_random(run, [0.85, 0.84, 0.87])
    assert "holds 0" not in printed(collect([run]))


def test_students_of_several_distillation_seeds_make_one_row_and_both_numbers_are_told(tmp_path: Path) -> None:
    for seed in range(2):
        run = make_run(tmp_path / f"seed{seed}", [0.9, 0.92, 0.94], seed=seed)
        make_run(run / "baselines" / "random", [0.9, 0.91, 0.92], seed=seed, method="random")
    make_run(tmp_path / "seed1", [0.9, 0.92], seed=1)

    accuracy = table(collect([tmp_path]), "Accuracy")

    assert cells(accuracy, "n") == [("5 of 2×3",), ("2×3",), ("1",)]


def test_unlike_recipes_have_a_section_each_and_are_never_averaged(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [0.9, 0.8])
    make_run(tmp_path / "b", [0.6], seed=1, recipe=RECIPE | {"epochs": 300})

    report = collect([tmp_path])

    made = [one for one in tables(report) if one.title == "Accuracy"]
    assert [one.section for one in made] == ["digits, recipe A", "digits, recipe B"]
    assert [(one.rows[0][6], one.terms["epochs"]) for one in made] == [("85.0 (80.0–90.0)", "150"), ("60.0", "300")]
    assert [one.differing for one in report.recipes] == [{"epochs": 150}, {"epochs": 300}]
    with pytest.raises(InputError, match=r"holds students of 2 recipes \(epochs differ\)"):
        effects(tmp_path, tmp_path)


def test_a_baseline_under_another_recipe_is_not_compared_either(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [0.9])
    make_run(run / "baselines" / "random", [0.8], method="random", recipe=RECIPE | {"lr": 0.01})

    report = collect([run])

    assert pd.isna(row_of(report, "wmdd")["difference"])
    assert [one.differing for one in report.recipes] == [{"lr": 0.001}, {"lr": 0.01}]


def test_runs_that_read_the_same_images_from_other_places_are_alike(tmp_path: Path) -> None:
    here, there = (SETTINGS["data"] | {"root": f"/{place}", "packed": f"/{place}/packed"} for place in "ab")
    make_run(tmp_path / "a", [0.9, 0.92], data=here | {"stage": "/local"})
    make_run(tmp_path / "b", [0.9, 0.92], data=there, seed=1)

    assert table(collect([tmp_path]), "Accuracy").rows[0][7] == "2×2"


def test_test_images_are_neither_mixed_nor_compared_with_held_out_ones(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [0.9, 0.8, 0.7])
    make_run(tmp_path / "b", [0.9], seed=1, record={"evaluated_on": "holdout"})

    report = collect([tmp_path])

    assert list(report.accuracy["n"]) == [3, 1, 1]
    assert "Effect of the recipe" not in [one.title for one in tables(report)]


def test_what_was_measured_on_held_out_images_is_marked(tmp_path: Path) -> None:
    report = collect([make_run(tmp_path / "a", [0.9], record={"evaluated_on": "holdout"})])

    accuracy = table(report, "Accuracy")
    assert "on the holdout images" in printed(report)
    assert accuracy.columns[-1] == "evaluated on"
    assert [row[-1] for row in accuracy.rows] == ["holdout", "test"], "the teacher was measured on other images"


def test_distillations_that_go_by_one_name_must_be_alike(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [0.9])
    make_run(tmp_path / "b", [0.9], seed=1, synthesis={"bn_weight": 30})

    with pytest.raises(InputError, match=r"synthesis\.bn_weight is 100 in a and 30 in b"):
        collect([tmp_path])


def test_variants_with_names_of_their_own_are_rows_of_their_own_beside_one_baseline(tmp_path: Path) -> None:
    for name, weight, top1 in (("weak", 10, 0.9), ("strong", 100, 0.8)):
        run = make_run(
            tmp_path / name,
            [top1, top1 + 0.01],
            name=name,
            synthesis={"bn_weight": weight},
            record={"artefact": digest(name)},
        )
        make_run(run / "baselines" / "random", [0.7, 0.72], method="random", name=f"{name}/random")

    report = collect([tmp_path])

    assert list(report.accuracy["method"]) == ["wmdd (strong)", "wmdd (weak)", "random", "teacher"]
    assert row_of(report, "wmdd (weak)")["difference"] == pytest.approx(0.195)
    assert row_of(report, "random")["n"] == 2
    assert any("2 measurements were repeated" in problem for problem in report.problems)


def test_one_seed_with_two_sets_of_images_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [0.9])
    make_run(tmp_path / "b", [0.9], record={"artefact": "another"})

    with pytest.raises(InputError, match=r"artefact is \w+ in a and another in b"):
        collect([tmp_path])


def test_missing_blocks_students_and_baselines_are_named(tmp_path: Path) -> None:
    classes = tuple("01234567")
    run = make_run(tmp_path / "digits", [0.9], classes=classes, missing=(0, 2, 3))

    report = collect([run])

    first, absent = report.coverage.to_dict("records")
    assert [row[2] for row in table(report, "Coverage").rows] == [first["missing"], "all"]
    assert first["missing"] == "block 0, block 2–3, student convnet3x32 soft seed 1–2"
    assert (first["blocks"], first["blocks_expected"], first["students"], first["students_expected"]) == (1, 4, 1, 3)
    assert (absent["run"], absent["missing"]) == ("digits/baselines/random", "all")
    assert "0 of 2 runs are complete" in printed(report)


def test_a_block_without_its_tensors_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", [0.9])
    (run / "blocks" / "block-00000.safetensors").unlink()

    assert collect([run]).coverage.iloc[0]["missing"].startswith("block 0")


def test_a_run_without_students_can_be_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", missing=(0,))

    report = collect([run])
    write_html(report, tmp_path / "report.html")

    assert list(report.accuracy["method"]) == ["teacher"]
    assert "student convnet3x32 soft seed 0–2" in markdown(report)
    assert "No student has been measured yet" in (tmp_path / "report.html").read_text()


def test_a_corrupt_line_is_named_and_the_rest_counts(tmp_path: Path) -> None:
    run = make_pair(tmp_path)
    with open(run / "records" / "students.jsonl", "a") as file:
        file.write("{broken\n")
    (run / "blocks" / "block-00000.json").write_text("{")

    report = collect([run])

    assert any(problem.startswith("digits/records/students.jsonl:4: Invalid JSON") for problem in report.problems)
    assert any(
        problem.startswith("digits/blocks/block-00000.json: is not complete JSON") for problem in report.problems
    )
    assert row_of(report, "wmdd")["n"] == 3
    assert "students.jsonl:4" in printed(report)


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        collect([tmp_path])
    with pytest.raises(InputError, match="no such run folder"):
        collect([tmp_path / "elsewhere"])


def test_costs_are_added_and_a_shared_teacher_counts_once(tmp_path: Path) -> None:
    report = collect([make_pair(tmp_path)])

    # Teacher 30, one group 0.5 and 12.5, and students of 4 seconds: three of the run, one of each random set.
    assert list(report.cost["total"]) == [55.0, 47.0, 47.0, 47.0]
    total = table(report, "Cost").rows[-1]
    assert total == ["all runs, each teacher once", "30.0", "2.0", "50.0", "24.0", "106.0", "0.029", "1.07 GB"]


def test_each_number_can_be_traced(tmp_path: Path) -> None:
    provenance = collect([make_pair(tmp_path)]).provenance

    row = provenance[(provenance["of"] == "accuracy") & (provenance["run"] == "digits")].iloc[0]
    assert row["config"] == Config.model_validate(SETTINGS).fingerprint("images")
    assert row["artefact"] == digest(["wmdd", 0])
    assert row["revision"] == "8" * 40 + " + changes"
    assert (row["hardware"], row["count"]) == ("Xeon", 3)
    assert "torch 2.15.0" in row["versions"]


def test_csv_has_every_figure_and_the_recipe(tmp_path: Path) -> None:
    frame = pd.read_csv(io.StringIO(csv(collect([make_pair(tmp_path)])))).set_index("method")

    assert frame.loc["wmdd", "top1"] == pytest.approx(0.97)
    assert frame.loc["wmdd", "recipe.epochs"] == 150
    assert frame.loc["wmdd", "recipe.evaluated_on"] == "test"


def test_markdown_is_made_of_whole_tables(tmp_path: Path) -> None:
    text = markdown(collect([make_pair(tmp_path)]))

    words = ["digits", "convnet3x32", "epochs", "2", "soft", "wmdd", "**97.0 (96.0–98.0)**"]
    assert f"| {' | '.join(words)} | +2.0 [−0.3, 4.3] (this set only) |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_loads_nothing_and_escapes_names(tmp_path: Path, channels: int) -> None:
    names = ("<b>bold</b>", "{{ 7 * 7 }}")
    run = make_run(tmp_path / "digits", [0.97, 0.96, 0.98], classes=names, channels=channels)
    make_run(run / "baselines" / "random", [0.9, 0.9, 0.9], classes=names, channels=channels, method="random")
    path = tmp_path / "report.html"

    write_html(collect([run]), path)

    page = path.read_text()
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page
    assert "{{ 7 * 7 }}" in page
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
    assert not re.search(r"@import|url\((?!#)|<script[^>]|<link(?! rel=.icon. href=.data:,.>)", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len([source for source in sources if source.startswith("data:image/png")]) == 8
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert str(tmp_path) not in page


@pytest.mark.slow
def test_the_page_caps_what_it_shows_and_says_so(tmp_path: Path) -> None:
    classes = tuple(f"class{index}" for index in range(40))
    run = make_run(tmp_path / "digits", [0.9], classes=classes)
    write_html(collect([run]), tmp_path / "report.html")

    page = (tmp_path / "report.html").read_text()
    assert page.count('<figure role="img"') == 12
    assert "12 of 20 groups" in page
    assert page.count("<img") == 20 * 2
    assert "20 of 40 classes" in page
    identities = re.findall(r'<clipPath id="([^"]*)"', page)
    assert len(set(identities)) == len(identities), "plots on one page must not share ids"


def test_a_damaged_block_is_told_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", [0.9])
    (run / "blocks" / "block-00000.safetensors").write_bytes(b"damaged")
    write_html(collect([run]), tmp_path / "report.html")

    page = (tmp_path / "report.html").read_text()
    assert "digits/blocks/block-00000.safetensors: is not a complete safetensors file" in page


@pytest.mark.slow
def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    run = make_pair(tmp_path)
    for name in ("one.html", "two.html"):
        write_html(collect([run]), tmp_path / name)

    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


@pytest.mark.slow
def test_ten_thousand_records_of_many_runs_are_collected_tabulated_and_written(tmp_path: Path) -> None:
    # 2 methods × 5 IPCs × 10 distillation seeds = 100 runs of 5 networks × 2 regimes × 10 students each.
    line = json.loads((make_run(tmp_path / "one", [0.9]) / "records" / "students.jsonl").read_text())
    for method, ipc, seed in itertools.product(("wmdd", "random"), (1, 2, 5, 10, 20), range(10)):
        folder = make_run(tmp_path / "all" / method / str(ipc) / str(seed), method=method, ipc=ipc, seed=seed)
        about = {"method": method, "ipc": ipc, "distillation_seed": seed, "artefact": f"{method}-{ipc}-{seed}"}
        records = [
            Record(**line | about | {"network": f"net{network}", "regime": regime, "student_seed": 10 * seed + student})
            for network, regime, student in itertools.product(range(5), ("hard", "soft"), range(10))
        ]
        write_records(folder / "records" / "students.jsonl", records)

    report = collect([tmp_path / "all"])
    terminal(report, Console(file=io.StringIO()))
    write_html(report, tmp_path / "report.html")

    assert len(report.students) == report.accuracy["n"].sum() - 1 == 10_000, "one of them is the teacher"
    assert len(report.accuracy) == 2 * 5 * 5 * 2 + 1
    assert set(report.accuracy["sets"].dropna()) == {10}
    assert "10,000 measurements" in (tmp_path / "report.html").read_text()


def test_a_file_of_records_is_reported_without_configs() -> None:
    report = collect([Path(__file__).parents[2] / "bench" / "results" / "digits-wmdd.jsonl"])

    accuracy = table(report, "Accuracy")
    assert [row[5] for row in accuracy.rows] == ["wmdd", "random"] * 4
    assert set(cells(accuracy, "n")) == {("10×1",)}
    assert all(row[7] != "–" for row in accuracy.rows[::2]), "the file's baseline is found"
    assert {"Coverage"}.isdisjoint(table.title for table in tables(report))
    assert report.problems == []


def test_a_folder_of_files_of_records_is_reported_like_its_files(tmp_path: Path) -> None:
    for name, accuracies in (("one", [0.5, 0.6]), ("two", [0.7, 0.8])):
        run = make_run(tmp_path / "runs" / name, accuracies, name=name)
        content = b"".join(file.read_bytes() for file in sorted((run / "records").glob("*.jsonl")))
        (tmp_path / "published").mkdir(exist_ok=True)
        (tmp_path / "published" / f"{name}.jsonl").write_bytes(content)
    (tmp_path / "published" / "LOG.md").write_text("notes")

    files = sorted((tmp_path / "published").glob("*.jsonl"))
    assert csv(collect([tmp_path / "published"])) == csv(collect(files))


def test_what_a_protocol_still_misses_is_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "wmdd" / "seed-0", [0.9, 0.9, 0.9], student={"baselines": []})
    cells = [{"folder": f"wmdd/seed-{n}", "method": "wmdd", "name": "paper", "ipc": 2, "seed": n} for n in range(3)]
    write_json(tmp_path / "protocol.json", {"name": "p", "cells": [*cells, {"method": "wmdd"}]})

    report = collect([tmp_path])

    assert table(report, "Coverage").caption.startswith("0 of 3 runs are complete")
    missing = {row[0].rpartition("/")[2]: row[1:4] for row in table(report, "Coverage").rows}
    assert missing["seed-1"] == ["wmdd (paper)", "all", "1"]
    assert missing["seed-2"] == ["wmdd (paper)", "all", "2"]
    assert "seed 1" not in missing["seed-0"][1], "all students of the first are there"
    assert any("protocol.json: cells.3: names no folder" in problem for problem in report.problems)


def test_a_sweep_is_reported_by_its_best_run(tmp_path: Path) -> None:
    write_json(tmp_path / "sweep.json", {})
    make_run(tmp_path / "trials" / "trial-00001", [0.1])
    with pytest.raises(InputError, match=r"its best trial was not run yet: wmdd sweep best"):
        collect([tmp_path])

    make_run(tmp_path / "best", [0.9])
    assert [run.folder.name for run in collect([tmp_path]).runs] == ["best"]


def test_an_empty_file_of_records_is_named_and_the_rest_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", [0.9])
    (run / "records" / "later.jsonl").write_text("")

    report = collect([run])

    assert report.problems == ["digits/records/later.jsonl: is empty"]
    assert row_of(report, "wmdd")["n"] == 1


def test_students_of_every_view_and_of_later_seeds_are_expected(tmp_path: Path) -> None:
    student = {"networks": ["convnet3x32"], "seeds": 3, "first_seed": 6, "views": ["epochs", "plain"], "baselines": []}
    run = make_run(tmp_path / "digits", [0.9], student=student, record={"student_seed": 6})

    missing = collect([run]).coverage.iloc[0]["missing"]

    assert "student convnet3x32 soft seed 7–8" in missing
    assert "student convnet3x32 soft plain seed 6–8" in missing


def test_a_file_without_any_record_is_refused_and_beside_others_told(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text("no record\n" * 100)
    with pytest.raises(InputError, match=r"notes\.jsonl: no measurement could be read; .*notes\.jsonl:1: Invalid JSON"):
        collect([tmp_path / "notes.jsonl"])

    report = collect([tmp_path / "notes.jsonl", make_run(tmp_path / "digits", [0.9])])

    assert len(report.problems) == 100
    assert "notes.jsonl:30: Invalid JSON" in printed(report)
    assert "and 70 more problems" in printed(report) and "notes.jsonl:31" not in printed(report)
