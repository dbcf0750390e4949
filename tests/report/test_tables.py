"""The tables beyond accuracy, and their forms."""

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from report_runs import PROVENANCE, RECIPE, make_pair, make_run, make_students
from rich.console import Console

from bench import published as shipped
from wmdd.config.schema import DataConfig
from wmdd.data.synthetic import name_of
from wmdd.errors import InputError
from wmdd.records.correct_bitmaps import pack
from wmdd.records.files import write_records
from wmdd.records.intervals import paired, welch
from wmdd.records.schema import Record, SpeedRecord
from wmdd.report import published
from wmdd.report.collect import Report, collect
from wmdd.report.collect_tables import tables
from wmdd.report.format import size
from wmdd.report.gallery import grids
from wmdd.report.table import Table
from wmdd.report.text import latex, terminal
from wmdd.storage.files import digest


def student(method: str, top1: float, **changes: Any) -> Record:
    """Return a student on ImageNette at IPC 10, under soft labels."""
    about = {"kind": "student", "run": method, "dataset": "imagenette", "classes": 10, "resolution": 128}
    about |= {"method": method, "ipc": 10, "network": "resnet18", "regime": "soft", "distillation_seed": 0}
    about |= {"student_seed": 0, "evaluated_on": "test", "recipe": RECIPE, "protocol": digest(RECIPE)}
    about |= {"config": "c", "artefact": method, "provenance": PROVENANCE, "metrics": {"top1": top1}, **changes}
    return Record.model_validate(about)


def report_of(folder: Path, *measured: Record | SpeedRecord) -> Report:
    write_records(folder / "all.jsonl", measured)
    return collect([folder / "all.jsonl"])


def teacher(top1: float) -> Record:
    nothing: dict[str, Any] = dict.fromkeys(("ipc", "regime", "distillation_seed", "student_seed"))
    return student("teacher", top1, kind="teacher", artefact=RECIPE["teacher"], **nothing)


def named(report: Report, title: str) -> Table:
    return next(table for table in tables(report) if table.title == title)


def cells(table: Table, *columns: str) -> list[tuple[str, ...]]:
    return [tuple(row[table.columns.index(column)] for column in columns) for row in table.rows]


def titles(report: Report) -> list[str]:
    return [table.title for table in tables(report)]


def test_published_figures_stand_beside_measured_ones_and_never_in_their_column(tmp_path: Path) -> None:
    paper = {"run": "paper", "resolution": 224}
    published_recipe = [student("wmdd", 0.6, **paper), student("wmdd", 0.3, regime="hard", **paper)]
    report = report_of(tmp_path, *published_recipe, student("random", 0.5, resolution=224))

    found = cells(named(report, "Measured and published"), "Method", "Labels", "Measured %", "Published %", "Mark")

    assert ("wmdd", "soft", "60.0", "64.8 ± 0.4", "author") in found
    assert {row[1] for row in found} == {"soft"}, "nothing is published for hard labels"
    assert ("random", "soft", "50.0", "–", "–") in found
    assert ("RDED", "soft", "–", "61.4", "author") in found
    assert ("RETA", "soft", "–", "72.5", "second-hand") in found
    assert not [row for row in found if row[0] == "WMDD"], "what stands beside is not repeated"
    row = next(row for row in named(report, "Measured and published").rows if {"wmdd", "soft"} <= set(row))
    assert {"224 px", "best epoch, as its public code reports", "https://liu-hy.github.io/WMDD/"} <= set(row)


def test_a_figure_of_another_recipe_or_resolution_has_a_row_of_its_own(tmp_path: Path) -> None:
    report = report_of(tmp_path, student("wmdd", 0.6), student("wmdd", 0.5, run="paper", artefact="p"))

    found = cells(named(report, "Measured and published"), "Method", "Measured %", "Published %", "Published at")

    assert ("wmdd", "60.0", "–", "–") in found, "the suite's recipe is not the paper's"
    assert ("wmdd (paper)", "50.0", "–", "–") in found, "128 px are not 224 px"
    assert ("WMDD", "–", "64.8 ± 0.4", "224 px (another resolution)") in found


def test_nothing_published_is_shown_for_other_data_networks_or_test_sets(
    tmp_path: Path,
) -> None:
    held_out = {"evaluated_on": "holdout"}
    for change in ({"ipc": 7}, {"network": "convnet3"}, {"dataset": "digits"}, {"classes": 5}, held_out):
        assert "Measured and published" not in titles(report_of(tmp_path, student("wmdd", 0.6, **change)))


def test_the_shipped_figures_are_those_of_the_paper() -> None:
    found = {
        (f.dataset, f.ipc): f.top1
        for f in published.read(shipped.folder())
        if f.entry.method == "WMDD" and f.entry.study == "main" and "cross" not in f.entry.source
    }

    assert found["imagenette", 10] == pytest.approx(0.648)
    assert found["tiny-imagenet", 50] == pytest.approx(0.594)
    assert found["imagenet-1k", 100] == pytest.approx(0.607)
    assert len(found) == 12
    assert len(published.load()) > 120, "the entry point finds them"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('mark = "hearsay"\ntop1 = { 10 = 1.0 }', "bad.toml: entry.0.mark"),
        ('mark = "author"\ntop1 = { 10 = 104.0 }', "bad.toml: entry.0.top1.10"),
        ('mark = "author"\ntop1 = { ten = 10.0 }', "bad.toml: entry.0.top1.ten"),
        ('mark = "author"\ntop1 = { 1 = 1.0 }\nspread = { 2 = 0.1 }', "top1 has no figure for this IPC"),
        ('mark = "author"\ntop1 = { 1 = 1.0 }\nyear = 2024', "bad.toml: entry.0.year"),
    ],
)
def test_a_wrong_file_of_published_figures_is_refused_with_its_key(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "bad.toml").write_text(f'dataset = "x"\nclasses = 10\n[[entry]]\nmethod = "A"\nsource = "b"\n{text}\n')

    with pytest.raises(InputError, match=complaint):
        list(published.read(tmp_path))


def test_the_ablation_shows_its_four_cells_once_all_are_there(tmp_path: Path) -> None:
    four = [
        student(m, t) for m, t in (("ce-global", 0.5), ("wmdd", 0.6), ("ce-pcbn", 0.58), ("barycenter-global", 0.55))
    ]

    assert "Ablation" not in titles(report_of(tmp_path, *four[:3]))
    begin = student("start", 0.59)
    rows = cells(named(report_of(tmp_path, *four, begin), "Ablation"), "Method", "Features", "Top-1 %")
    assert rows[-1] == ("start", "nothing", "59.0"), "what the start alone is worth"
    ablation = named(report_of(tmp_path, *four), "Ablation")
    assert cells(ablation, "Features", "BatchNorm", "Top-1 %", "Published %") == [
        ("barycenter", "class", "60.0", "64.7"),
        ("cross-entropy", "class", "58.0", "63.8"),
        ("barycenter", "global", "55.0", "60.7"),
        ("cross-entropy", "global", "50.0", "54.2"),
    ]


def test_the_overview_has_a_row_for_each_method_and_a_column_for_each_setting(tmp_path: Path) -> None:
    hard = {"regime": "hard"}
    two = [student("wmdd", 0.6), student("random", 0.5), student("wmdd", 0.4, **hard)]
    assert "Overview" not in titles(report_of(tmp_path, *two)), "two methods are compared well by the long table"
    table = named(report_of(tmp_path, *two, student("herding", 0.3, ipc=1)), "Overview")
    assert cells(table, "Method", "IPC 1 soft", "IPC 10 soft", "IPC 10 hard") == [
        ("wmdd", "–", "60.0", "40.0"),
        ("random", "–", "50.0", "–"),
        ("herding", "30.0", "–", "–"),
    ]


def test_the_overview_colours_what_the_adjusted_test_shows_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    values = {
        "wmdd": [0.70, 0.71, 0.69],
        "sre2l": [0.40, 0.41, 0.39],
        "rded": [0.519, 0.529, 0.509],
        "random": [0.5, 0.51, 0.49],
    }
    records = [
        one
        for ipc in (1, 10)
        for method, own in values.items()
        for one in make_students(method, {f"{method}{ipc}{n}": [value] for n, value in enumerate(own)}, ipc=ipc)
    ]
    other = make_students("wmdd", {"other": [0.5]}, dataset="other")

    report = report_of(tmp_path, *records, *other)

    table = named(report, "Overview")
    names = [row[table.columns.index("Method")] for row in table.rows]
    shown = {names[row]: heat > 0 for (row, column), heat in table.heat.items() if column == "IPC 1 soft"}
    assert shown == {"wmdd": True, "sre2l": False}, "rded is 2.3 standard errors above random: not shown"
    assert "Not here, with two methods or one setting: other." in table.caption


def test_networks_stand_beside_each_other(tmp_path: Path) -> None:
    deep = {"network": "resnet50", "artefact": "wmdd"}
    report = report_of(tmp_path, student("wmdd", 0.6), student("wmdd", 0.65, **deep), student("random", 0.5))

    table = named(report, "Cross-architecture")
    assert cells(table, "Method", "resnet18", "resnet50") == [("wmdd", "60.0", "65.0")]


def test_robust_scores_are_those_computed_by_hand(tmp_path: Path) -> None:
    measured = [teacher(0.9)]
    for method, hard, soft, plain in (("wmdd", 0.5, 0.7, 0.6), ("random", 0.4, 0.65, 0.4)):
        measured += [student(method, hard, regime="hard"), student(method, soft), student(method, plain, view="plain")]
    other = {"network": "resnet50"}
    measured += [student(m, t, regime=r, **other) for m, r, t in (("wmdd", "hard", 0.5), ("wmdd", "soft", 0.6))]

    table = named(report_of(tmp_path, *measured), "Robustness")
    found = {
        row[:4]: row[4:] for row in cells(table, "Network", "Labels", "View", "Method", "HLR", "IOR", "LRS", "ARS")
    }

    def score(alpha: float) -> str:
        return f"{100 * (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1)):.1f}"

    # HLR = 0.9 − 0.5, IOR = 0.7 − 0.65, so α = (0.05 − 0.4) / 2; β = (0.05 + 0.2) / 2.
    assert found["resnet18", "soft", "epochs", "wmdd"] == ("40.0", "+5.0", score(-0.175), score(0.125))
    assert found["resnet18", "hard", "epochs", "wmdd"] == ("40.0", "+10.0", score(-0.15), "–")
    assert found["resnet18", "soft", "epochs", "random"] == ("50.0", "0.0", score(-0.25), score(0))
    assert ("resnet50", "soft", "epochs", "wmdd") not in found, "the teacher is another network, and random is missing"


def test_bytes_of_images_labels_and_teacher_have_columns_of_their_own(tmp_path: Path) -> None:
    online = {"image_bytes": 24_600.0, "label_bytes": 0.0, "teacher_bytes": 4.5e7, "labelling_flops": 1.2e12}
    stored = {"image_bytes": 24_600.0, "label_bytes": 5.67e9, "teacher_bytes": 0.0}
    report = report_of(tmp_path, student("wmdd", 0.6, cost=online), student("wmdd", 0.59, regime="stored", cost=stored))

    columns = ("Labels", "Images", "Labels on disk", "Teacher", "All bytes", "Labelling, FLOP")
    assert cells(named(report, "Accuracy"), *columns) == [
        ("stored", "24.6 kB", "5.67 GB", "0 B", "5.67 GB", "–"),
        ("soft", "24.6 kB", "0 B", "45 MB", "45 MB", "1.2 TFLOP"),
    ]


@pytest.mark.parametrize(("amount", "text"), [(0, "0 B"), (999.4, "999 B"), (999.6, "1 kB"), (2.5e21, "2.5 ZB")])
def test_amounts_carry_the_prefix_that_keeps_them_short(amount: float, text: str) -> None:
    assert size(amount) == text


def speed(**changes: Any) -> SpeedRecord:
    about: dict[str, Any] = {"kind": "throughput", "stage": "synthesis", "engine": "wmdd", "dataset": "synthetic"}
    about |= {
        "network": "resnet18",
        "resolution": 64,
        "unit": "img·iter/s",
        "setup": {"batch": 100, "precision": "fp32"},
    }
    about |= {"metrics": {"rate": 640.0, "rate_low": 610.0, "rate_high": 660.0}, "provenance": PROVENANCE, **changes}
    return SpeedRecord.model_validate(about)


def test_speeds_are_told_with_spread_ratio_and_what_their_set_ups_do_not_share(tmp_path: Path) -> None:
    ratio = {"rate": 1234.0, "ratio": 3.05, "ratio_low": 2.9, "ratio_high": 3.2, "p50": 0.0125, "p90": 0.02}
    fast = speed(metrics=ratio, setup={"batch": 100, "precision": "bf16"})
    scaling = [
        speed(kind="scaling", mode="strong", ranks=n, metrics={"rate": 600.0 * n * e, "efficiency": e})
        for n, e in ((4, 0.9), (1, 1.0))
    ]
    report = report_of(tmp_path, speed(engine="reference"), fast, *scaling)

    table = named(report, "Throughput")
    assert table.terms == {"batch": "100"}
    columns = ("Data set", "Engine", "Rate", "Ratio to baseline", "Step (p50 / p90)", "precision")
    assert sorted(cells(table, *columns)) == [
        ("synthetic", "reference", "640 [610, 660] img·iter/s", "–", "–", "fp32"),
        ("synthetic", "wmdd", "1,234 img·iter/s", "3.05 [2.90, 3.20]×", "12.5 ms / 20 ms", "bf16"),
    ]
    assert cells(named(report, "Scaling"), "Ranks", "Efficiency %") == [("1", "100.0"), ("4", "90.0")]


def test_a_speed_measured_again_replaces_the_one_before_and_another_machine_does_not(tmp_path: Path) -> None:
    early, late = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    again = [speed(time=late, metrics={"rate": 2.0}), speed(time=early, metrics={"rate": 1.0})]
    other = speed(time=early, metrics={"rate": 3.0}, provenance=PROVENANCE | {"cpu": "EPYC"})

    report = report_of(tmp_path, *again, other)

    assert sorted(cells(named(report, "Throughput"), "Rate")) == [("2 img·iter/s",), ("3 img·iter/s",)]
    assert any("1 speeds were measured again" in problem for problem in report.problems)


def test_a_table_that_has_nothing_to_say_is_not_shown(tmp_path: Path) -> None:
    assert titles(report_of(tmp_path, speed())) == ["Throughput", "Provenance"]
    found = titles(report_of(tmp_path, student("wmdd", 0.5, dataset="digits")))
    assert found == ["Accuracy", "Provenance"]


def test_latex_is_whole_and_escaped(tmp_path: Path) -> None:
    report = report_of(tmp_path, student("wmdd", 0.6, network="timm:vit_tiny & more", dataset="50 % {x}"))

    text = latex(report)

    assert r"50 \% \{x\}" in text and r"timm:vit\_tiny \& more" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1
    assert text.isascii()


def test_a_narrow_terminal_keeps_figures_whole_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=72)

    terminal(collect([make_pair(tmp_path)]), console)

    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r" wmdd +97\.0 \(96\.0–98\.0\) +\+2\.0 \[−0\.3, 4\.3\] \(this set only\)\n", text)
    assert "In the page, further columns: n, Top-5 %." in text
    assert max(map(len, text.splitlines())) <= 72


def with_bits(method: str, sets: int, wrong: int) -> list[Record]:
    """Return students that get the first images of two classes wrong: one, and ``wrong`` or one more."""
    made = []
    for seed in range(sets):
        correct = [index >= 1 for index in range(10)] + [index >= wrong + seed % 2 for index in range(30)]
        about = {"distillation_seed": seed, "student_seed": seed, "artefact": f"{method}-{seed}"}
        bits = {"test_images": (10, 30), "correct": pack(correct)}
        made.append(student(method, sum(correct) / 40, **about, **bits))
    return made


def test_accuracy_by_class_and_the_interval_over_other_test_images_are_shown(tmp_path: Path) -> None:
    report = report_of(tmp_path, *with_bits("wmdd", 3, 3), *with_bits("random", 4, 9))

    assert cells(named(report, "Accuracy by class"), "Method", "0", "1") == [
        ("wmdd", "90.0", "88.9"),
        ("random", "90.0", "68.3"),
    ]
    (line,) = cells(named(report, "Other test images"), "Method", "Test images", "Right / wrong")
    assert line == ("wmdd", "40", "6 / 0")
    over_sets, over_both = (named(report, "Other test images").rows[0][i].split("[")[1] for i in (7, 8))
    low, high = (float(text.split(",")[0].replace("−", "-")) for text in (over_sets, over_both))
    assert high < low, "other test images widen the interval"
    assert named(report, "Accuracy").terms["test images"] == "40"


def test_one_set_has_no_p_value_over_test_images_either(tmp_path: Path) -> None:
    one = [s.model_copy(update={"artefact": "w", "distillation_seed": 0}) for s in with_bits("wmdd", 3, 3)]
    report = report_of(tmp_path, *one, *with_bits("random", 4, 9))

    table = named(report, "Other test images")
    assert "p, McNemar" not in table.columns
    assert "(this set only)" in cells(table, "Over sets and images")[0][0]


def test_a_folder_and_its_classes_go_by_their_own_names(tmp_path: Path) -> None:
    data = {"source": "folder", "root": str(tmp_path / "flowers"), "resolution": 16, "channels": 1, "mean": [0.3]}
    config = DataConfig.model_validate(data | {"std": [0.4]})
    bits = {"test_images": (2, 2), "correct": pack([True, False, True, True]), "classes": 2, "dataset": name_of(config)}
    run = make_run(tmp_path / "run", [0.75], classes=("daisy", "tulip"), data=data | {"std": [0.4]}, record=bits)

    report = collect([run])

    assert {row[0] for row in named(report, "Accuracy").rows} == {"flowers"}, "the row of the teacher, too"
    table = named(report, "Accuracy by class")
    assert cells(table, "Method", "daisy", "tulip") == [("wmdd", "50.0", "100.0")]
    assert grids(report.runs, [])[0][0].title.startswith("flowers")


def test_pairs_of_methods_show_on_which_images_they_differ(tmp_path: Path) -> None:
    report = report_of(tmp_path, *with_bits("wmdd", 3, 3), *with_bits("random", 4, 9))

    table = named(report, "Pairs of methods")

    # The first students miss 1 + 3 and 1 + 9 of 40 images, and those of the former are among the latter.
    assert cells(table, "Pair", "Both right", "Only the first", "Only the second", "Both wrong") == [
        ("wmdd and random", "30", "6", "0", "4")
    ]
    assert table.rows[0][-1] == "0.031", "2 · ½⁶"


def taught(method: str, values: list[float], teachers: list[str]) -> list[Record]:
    made = []
    for seed, (value, teacher) in enumerate(zip(values, teachers, strict=True)):
        recipe = RECIPE | {"teacher": teacher}
        about = {"distillation_seed": seed, "student_seed": seed, "artefact": f"{method}-{seed}"}
        made.append(student(method, value, recipe=recipe, protocol=digest(recipe), **about))
    return made


def test_methods_whose_sets_each_have_a_teacher_of_their_own_are_paired_by_it(tmp_path: Path) -> None:
    own, random, teachers = [0.90, 0.80, 0.71, 0.60], [0.88, 0.79, 0.68, 0.58], ["t0", "t1", "t2", "t3"]
    report = report_of(tmp_path, *taught("wmdd", own, teachers), *taught("random", random, teachers))

    row = report.accuracy[report.accuracy["method"] == "wmdd"].iloc[0]
    assert row["p"] == pytest.approx(paired(own, random).p) and row["p"] < 0.05 < welch(own, random).p
    table = named(report, "Accuracy")
    assert "Each set has a teacher of its own; differences are paired by it." in table.caption
    assert table.terms["teacher"] == "4, one for each set"


def test_sets_of_teachers_that_some_share_are_not_averaged(tmp_path: Path) -> None:
    report = report_of(tmp_path, *taught("wmdd", [0.9, 0.8, 0.7], ["t0", "t1", "t0"]))

    assert {one.differing["teacher"]: one.name for one in report.recipes} == {"t0": "A", "t1": "B"}
    assert sorted(report.accuracy["sets"]) == [1, 2]
