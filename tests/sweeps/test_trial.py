"""What a trial does, without Ray."""

from dataclasses import replace

import pytest
import torch

from sweeps import trial
from sweeps.objective import OBJECTIVES
from sweeps.search import suggest
from sweeps.space_file import space_names
from wmdd.data.dataset import load_dataset
from wmdd.data.pixels import quantize
from wmdd.distill import blocks, groups, statistics
from wmdd.distill.synthesis.engine import State
from wmdd.errors import InputError
from wmdd.networks import accuracy
from wmdd.records.scores import label_robust_score
from wmdd.runs.class_partition import plan
from wmdd.runtime.ranks import ranks
from wmdd.runtime.team import SINGLE
from wmdd.session import open_session
from wmdd.students import losses
from wmdd.teacher import obtain

BUDGET = {"student_seeds": 2, "iterations": 1.0, "student_epochs": 1.0}
SPACE = "[parameters]\nsynthesis.bn_weight = { loguniform = [0.1, 1000.0] }"


def prepared(sweep):
    return trial.prepare(trial.SweepSetup(sweep.config, sweep.space.budget, sweep.objective), lambda: False)


def reports(settled, values=None):
    found = []
    trial.run(settled, values or {}, found.append)
    return found


def timeless(found):
    return [{key: value for key, value in report.items() if "seconds" not in key} for report in found]


@pytest.mark.slow
def test_teacher_statistics_and_held_out_images_are_computed_once_for_all_trials(make, monkeypatch):
    sweep = make(
        SPACE, ("teacher.seed=77",), budget={**BUDGET, "holdout_per_class": 37}
    )  # no other test has put these into the cache
    trained, measured = [], []
    make_teacher, compute = obtain._make, statistics._compute

    def count_teachers(*arguments, **options):
        trained.append(1)
        return make_teacher(*arguments, **options)

    def count_classes(session, index, *rest):
        measured.append(index)
        return compute(session, index, *rest)

    decoded = []
    decode = accuracy.decoded_in_order

    def count_images(images, *rest):
        decoded.append(len(images))
        return decode(images, *rest)

    monkeypatch.setattr(obtain, "_make", count_teachers)
    monkeypatch.setattr(statistics, "_compute", count_classes)
    monkeypatch.setattr(accuracy, "decoded_in_order", count_images)
    settled = prepared(sweep)
    monkeypatch.setattr(accuracy, "decode_all", None)  # no trial decodes images for itself
    for weight in (1.0, 10.0, 100.0):
        reports(settled, {"synthesis.bn_weight": weight})
    assert len(trained) == 1
    assert sorted(measured) == [0, 1, 2, 3]
    assert decoded == [4 * 37]  # the hold-out, into a file that all trials map


@pytest.mark.slow
def test_a_trial_reports_at_its_rungs_and_is_measured_on_the_holdout(make):
    sweep = make(SPACE)
    found = reports(prepared(sweep))
    assert [(report["rung"], report["iteration"]) for report in found] == [(1, 2), (2, 4), (3, 8)]
    assert len(found[0]["seeds"]) == 1 and len(found[2]["seeds"]) == 2
    # 40 images of each of 4 digits: accuracies are multiples of 1/160, as those of the test set (about 45 each) are not
    assert all((top1 * 160) % 1 == pytest.approx(0, abs=1e-9) for top1 in found[2]["seeds"])
    assert found == [{**report, "seconds": report["seconds"]} for report in found]


def test_a_trial_in_stages_ends_with_the_images_of_a_whole_run(make):
    settled = prepared(make(SPACE, ("synthesis.classes_per_group=2",)))
    config = settled.proxy({})
    with ranks(config.compute) as here:
        dataset = load_dataset(config.data)
        session = open_session(config, dataset, here, lambda: False)
        stages = trial._Synthesis(session)
        for iteration in (2, 4, 8):
            stages.advance_to(iteration)
        method = blocks.check(config, dataset)
        (block,) = plan(config, len(dataset.classes))
        found = dict(statistics.measure(session, block.classes))
        begun = [groups.prepare(session, method, group, found) for group in block.groups]
        whole = [groups.optimize(group, State(group.images), here).images for group in begun]
        assert torch.equal(stages.images().images, quantize(torch.cat(whole), config.data))


def test_a_seeded_trial_repeats(make):
    settled = prepared(make(SPACE))
    first, second = reports(settled, {"synthesis.bn_weight": 5.0}), reports(settled, {"synthesis.bn_weight": 5.0})
    assert timeless(first) == timeless(second)


@pytest.mark.slow
def test_a_trial_that_lost_its_worker_goes_on_at_its_last_report(make, tmp_path, monkeypatch):
    settled, saved = prepared(make(SPACE, ("synthesis.classes_per_group=2",))), tmp_path / "saved.safetensors"
    values, steps, known = {"synthesis.bn_weight": 5.0}, [], []

    class Died(BaseException):
        pass

    def dies(report):
        known.append(report)
        if report["rung"] == 2:
            raise Died

    with pytest.raises(Died):
        trial.run(settled, values, dies, saved=saved)
    advance = trial._Synthesis.advance_to
    monkeypatch.setattr(trial._Synthesis, "advance_to", lambda self, step: (steps.append(step), advance(self, step)))
    found = []
    trial.run(settled, values, found.append, saved=saved)
    assert steps == [8] and found[:2] == known  # nothing that was reported is computed again
    assert timeless(found) == timeless(reports(settled, values))
    assert found[-1]["seconds"] > known[-1]["seconds"]
    steps.clear()
    trial.run(settled, {"synthesis.bn_weight": 6.0}, lambda report: None, saved=saved)
    assert steps == [2, 4, 8]  # the checkpoint of other values is ignored


def test_the_seconds_of_a_trial_are_estimated_before_the_sweep(make):
    seconds = trial.estimate_seconds(prepared(make(SPACE)), lambda: False)
    assert 0 < seconds < 600


def test_the_budget_scales_what_the_values_say(make):
    sweep = make(
        "[parameters]\nsynthesis.iterations = { int = [10, 100] }",
        budget={"iterations": 0.5, "student_epochs": 3, "classes": 2},
    )
    proxy = prepared(sweep).proxy({"synthesis.iterations": 60})
    assert proxy.synthesis.iterations == 30
    assert proxy.student.epochs == 3
    assert len(proxy.data.classes) == 2
    assert proxy.data.holdout_per_class == 40


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_is_reported_at_every_rung(make, name):
    sweep = make(SPACE, ("labels.regimes=['hard','soft']",), objective=name)
    found = reports(prepared(sweep))
    assert all(report[OBJECTIVES[name].key] > 0 for report in found)
    assert "top1" in found[-1]


def test_the_label_robust_score_is_that_of_dd_ranking():
    # α = 0 gives (1 − 1/e) / (e − 1/e); the best score, α = 1, is 1
    assert label_robust_score(0.5, 0.5, 0.5, 0.5) == pytest.approx(0.26894, abs=1e-5)
    assert label_robust_score(1.0, 1.0, 0.0, 0.0) == pytest.approx(1.0)


def test_lrs_needs_both_kinds_of_labels(make):
    with pytest.raises(InputError, match="needs both kinds of labels"):
        make(SPACE, objective="lrs")


def test_a_budget_of_more_classes_than_there_are_is_refused(make):
    with pytest.raises(InputError, match="the config has 4 classes"):
        prepared(make(SPACE, budget={"classes": 5}))


def test_images_count_by_their_weights_in_a_student_that_is_told_so():
    class Batch:
        images, partners, share = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1]), 0.75

    torch.manual_seed(0)
    logits, classes = torch.randn(3, 4), torch.tensor([0, 1, 1])
    even = torch.ones(3)
    plain = losses.hard_loss(logits, classes, Batch, SINGLE)
    assert losses.hard_loss(logits, classes, Batch, SINGLE, even) == pytest.approx(plain.item(), rel=1e-6)
    wanted = torch.randn(3, 4)
    plain = losses.soft_loss(logits, wanted, 4.0)
    assert losses.soft_loss(logits, wanted, 4.0, even) == pytest.approx(plain.item(), rel=1e-5)
    # an image of weight 2 counts as two of weight 1
    twice = torch.cat([torch.arange(3), torch.tensor([0])])
    assert losses.soft_loss(logits, wanted, 4.0, torch.tensor([2.0, 1, 1])) == pytest.approx(
        losses.soft_loss(logits[twice], wanted[twice], 4.0).item(), rel=1e-5
    )


@pytest.mark.slow
def test_weights_count_in_the_moments_as_strongly_as_the_config_says(make):
    settled = prepared(make(SPACE, ("barycenter.weights=free", "ipc=4")))
    counted = {}
    for key, value in (("synthesis.bn_weighted", False), *(("barycenter.weight_power", g) for g in (0.0, 0.5, 1.0))):
        config = settled.proxy({}).replace({key: value})
        with ranks(config.compute) as here:
            dataset = load_dataset(config.data)
            group = trial._Synthesis(trial._open(config, dataset, here, lambda: False))._groups[0]
        assert (group.weights - 0.25).abs().max() > 1e-3  # the set keeps its weights
        counted[value] = group.problem.target.weights
        variance = group.problem.target.variance
        if value == 0 or value is False:  # γ = 0 is bn_weighted = false, bit for bit
            expected = counted.setdefault("even", variance)
            assert torch.equal(variance, expected) and (counted[value] == 0.25).all()
    assert torch.equal(counted[1.0], group.weights)
    roots = group.weights.sqrt()
    assert counted[0.5].flatten().tolist() == pytest.approx((roots / roots.sum(1, keepdim=True)).flatten().tolist())


def test_weights_count_in_the_students_loss_as_strongly_as_the_config_says():
    class Set:
        weights, labels, classes = torch.tensor([0.1, 0.9, 0.4, 0.6]), torch.tensor([0, 0, 1, 1]), ("a", "b")

    assert losses.importance_of(Set).tolist() == pytest.approx([0.2, 1.8, 0.8, 1.2])
    roots = [value**0.5 for value in (0.1, 0.9, 0.4, 0.6)]
    expected = [2 * roots[0] / sum(roots[:2]), 2 * roots[1] / sum(roots[:2])]
    expected += [2 * roots[2] / sum(roots[2:]), 2 * roots[3] / sum(roots[2:])]
    assert losses.importance_of(Set, 0.5).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", space_names())
def test_every_shipped_space_runs(make, name):
    budget = {"iterations": 0.002, "student_epochs": 1, "student_seeds": 1, "rungs": 1}
    sweep = make(name, ("labels.regimes=['soft']", "ipc=2"), budget=budget)
    settled = prepared(sweep)
    values = suggest(sweep.space, "random", 3, sweep.objective, 1, [])
    assert set(values) <= {parameter.key for parameter in sweep.space.parameters}
    (report,) = reports(settled, values)
    assert 0 <= report["top1"] <= 1


def test_the_plan_can_be_sent_to_another_process(make):
    import pickle

    settled = prepared(make(SPACE))
    assert pickle.loads(pickle.dumps(settled)) == settled  # noqa: S301
    assert replace(settled, classes=None) == settled
