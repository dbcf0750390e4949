"""The engine against the plain reference, against finite differences, and against itself when interrupted."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from synthesis_targets import CLASSES, COUNT, targets
from torch import Tensor, nn

from bench import reference
from wmdd.config.schema import ComputeConfig, SynthesisConfig
from wmdd.data import augment
from wmdd.distill.synthesis.engine import Problem, State, _schedule, synthesize
from wmdd.distill.synthesis.objective import Objective, Target, evaluate
from wmdd.errors import Interrupted
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runtime.ranks import Ranks, ranks


@pytest.fixture
def alone() -> Any:
    with ranks(ComputeConfig(device="cpu")) as job:
        yield job


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(CLASSES * COUNT, 3, 16, 16)


def value_and_gradient(loss: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, images)[0]


@pytest.mark.parametrize("weights", [None, torch.tensor([0.6, 0.3, 0.1])])
def test_paper_objective_equals_the_reference(classifier: nn.Module, images: Tensor, weights: Tensor | None) -> None:
    target, plain = targets(classifier, weights)
    network = FrozenNetwork(classifier)
    images.requires_grad_(True)
    own = evaluate(Objective(1.0, 30.0, 0.0), network(images), target, network.layer_sizes).total
    other = reference.paper_loss(reference.Probe(classifier), images, plain, 30.0)
    for found, expected in zip(value_and_gradient(own, images), value_and_gradient(other, images), strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_upstream_objective_equals_the_reference(classifier: nn.Module, images: Tensor) -> None:
    target, plain = targets(classifier)
    network = FrozenNetwork(classifier)
    images.requires_grad_(True)
    own = evaluate(Objective(1.0, 10.0, 0.5, squared=False), network(images), target, network.layer_sizes).total
    other = reference.upstream_loss(reference.Probe(classifier), images, plain, 10.0, 0.5)
    for found, expected in zip(value_and_gradient(own, images), value_and_gradient(other, images), strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("weights", [None, torch.tensor([0.6, 0.3, 0.1])])
def test_mean_matching_compares_the_weighted_means_of_each_class(
    classifier: nn.Module, images: Tensor, weights: Tensor | None
) -> None:
    target, plain = targets(classifier, weights)
    network = FrozenNetwork(classifier)
    found = evaluate(Objective(1.0, 0.0, 0.0, feature_mean=True), network(images), target, network.layer_sizes).feature
    features = network(images).features.double()
    expected = 0.0
    for number, one in enumerate(plain):
        own = features[COUNT * number : COUNT * (number + 1)]
        means = [sum(float(w) * row for w, row in zip(one.weights, rows, strict=True)) for rows in (own, one.atoms)]
        expected += float(((means[0] - means[1]) ** 2).sum())
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(1.0, 5.0, 0.3),
        Objective(1.0, 5.0, 0.3, feature_mean=True),
        Objective(1.0, 5.0, 0.3, squared=False, bn_first=3.0),
        Objective(0.0, 5.0, 1.0, per_class=False, bn_first=3.0),
    ],
)
def test_gradient_equals_finite_differences(classifier: nn.Module, images: Tensor, objective: Objective) -> None:
    network = FrozenNetwork(classifier.double())
    target, _ = targets(classifier.float())
    if not objective.per_class:
        mean, variance = network.running_moments()
        target = replace(target, mean=mean[None], variance=variance[None])
    target = Target(*(value.double() if value.is_floating_point() else value for value in vars(target).values()))
    images = images.double().requires_grad_(True)

    def loss(pixels: Tensor) -> Tensor:
        return evaluate(objective, network(pixels), target, network.layer_sizes).total

    (gradient,) = torch.autograd.grad(loss(images), images)
    for seed in range(4):
        direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step = 1e-6 * direction
        with torch.no_grad():
            slope = (loss(images + step) - loss(images - step)) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


def test_first_layer_factor_multiplies_the_first_layer_alone(classifier: nn.Module, images: Tensor) -> None:
    target, _ = targets(classifier)
    network = FrozenNetwork(classifier)
    seen = network(images)
    sizes = network.layer_sizes
    for squared in (True, False):
        one, three = (
            evaluate(Objective(0, 1, 0, squared=squared, bn_first=factor), seen, target, sizes).bn
            for factor in (1.0, 3.0)
        )
        blind = replace(target, mean=target.mean.clone(), variance=target.variance.clone())
        rest = torch.arange(sum(sizes)) >= sizes[0]
        first_only = evaluate(Objective(0, 1, 0, squared=squared), seen, _matched_after(seen, blind, rest), sizes).bn
        torch.testing.assert_close(three - one, 2 * first_only, rtol=1e-4, atol=1e-5)


def test_images_that_already_match_their_atoms_have_no_gradient_and_not_nan(
    classifier: nn.Module, images: Tensor
) -> None:
    target, _ = targets(classifier)
    shown = images.clone().requires_grad_(True)
    seen = FrozenNetwork(classifier)(shown)
    matched = replace(target, atoms=seen.features.detach().view_as(target.atoms))
    loss = evaluate(Objective(1.0, 0.0, 0.0, squared=False), seen, matched, FrozenNetwork(classifier).layer_sizes)
    value, gradient = value_and_gradient(loss.total, shown)
    assert value == 0 and torch.equal(gradient, torch.zeros_like(shown))


def _matched_after(seen: Any, target: Target, where: Tensor) -> Target:
    """Return the target with the images' own moments in some channels, so that these add nothing."""
    from wmdd.distill.synthesis.objective import group_moments

    mean, variance = group_moments(seen, target.weights, True)
    return replace(
        target, mean=torch.where(where, mean, target.mean), variance=torch.where(where, variance, target.variance)
    )


def plain_synthesis(
    classifier: nn.Module,
    start: Tensor,
    target: list[Any],
    settings: SynthesisConfig,
    seed: Any,
    injections: tuple[int, ...],
) -> Tensor:
    """Return the images of a plain loop over the reference's loss, in float64."""
    draws = _schedule(settings, len(start), 16, seed)
    probe = reference.Probe(classifier)
    images = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=settings.lr, betas=settings.betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    for iteration in range(settings.iterations):
        if iteration in injections:
            images.data.mul_(0.5).add_(start, alpha=0.5)
            optimizer.state.clear()
        box, flip, shift = (value[iteration, 0].tolist() for value in vars(draws).values())
        seen = reference.augmented(images, box, flip, shift)
        optimizer.zero_grad()
        reference.paper_loss(probe, seen, target, settings.bn_weight).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(-2.0, 2.0)
    return images.detach()


@pytest.mark.parametrize("injections", [(), (8, 16)])
def test_a_whole_trajectory_equals_the_plain_loop_in_float64(
    classifier: nn.Module, images: Tensor, alone: Ranks, injections: tuple[int, ...]
) -> None:
    # In float64, because Adam amplifies the rounding of fp32.
    classifier = classifier.double()
    target, plain = targets(classifier.float())
    classifier = classifier.double()
    target = Target(*(value.double() if value.is_floating_point() else value for value in vars(target).values()))
    for one in plain:
        one.atoms, one.weights = one.atoms.double(), one.weights.double()
        one.means, one.variances = [x.double() for x in one.means], [x.double() for x in one.variances]
    settings = SynthesisConfig(iterations=25, lr=0.05, jitter=3, bn_weight=2.0, injections=len(injections))
    limits = torch.full((3, 1, 1), -2.0, dtype=torch.float64), torch.full((3, 1, 1), 2.0, dtype=torch.float64)
    network, objective = FrozenNetwork(classifier), Objective.from_settings(settings)
    problem = Problem(network, objective, target, settings, limits, (0, "g"), images.double())
    own = synthesize(problem, State(images.double()), alone)
    expected = plain_synthesis(classifier, images.double(), plain, settings, (0, "g"), injections)
    assert (own.images - expected).abs().max() < 1e-7
    assert own.curve["total"][0] > own.curve["total"][-1]


@pytest.fixture(params=[0, 2], ids=["", "injections"])
def problem(classifier: nn.Module, images: Tensor, request: pytest.FixtureRequest) -> Problem:
    """Return what a group is optimized for in 12 iterations."""
    target, _ = targets(classifier)
    settings = SynthesisConfig(iterations=12, lr=0.05, injections=request.param)
    limits = torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)
    objective = Objective.from_settings(settings)
    return Problem(FrozenNetwork(classifier), objective, target, settings, limits, (0, "group"), images.clone())


def test_an_interrupted_synthesis_ends_in_the_same_bytes(problem: Problem, images: Tensor, alone: Ranks) -> None:
    whole = synthesize(problem, State(images), alone)
    saved: list[State] = []
    asked = iter([False] * 5 + [True] * 10)
    with pytest.raises(Interrupted, match="iteration 5 of 12"):
        synthesize(problem, State(images), alone, save=saved.append, check=lambda: (next(asked), False))
    assert saved[-1].iteration == 5
    resumed = synthesize(problem, saved[-1], alone)
    assert torch.equal(whole.images, resumed.images)
    assert whole.curve["total"] == resumed.curve["total"]


def test_a_paused_synthesis_ends_in_the_same_bytes(problem: Problem, images: Tensor, alone: Ranks) -> None:
    paused = synthesize(problem, State(images), alone, until=5)
    assert paused.iteration == 5 and not torch.equal(paused.images, images)
    assert synthesize(problem, paused, alone, until=5).iteration == 5
    whole, resumed = synthesize(problem, State(images), alone), synthesize(problem, paused, alone)
    assert torch.equal(whole.images, resumed.images) and resumed.iteration == 12
    assert whole.curve["total"] == resumed.curve["total"]


def test_clamp_keeps_pixels_in_range(classifier: nn.Module, images: Tensor, alone: Ranks) -> None:
    target, _ = targets(classifier)
    limits = torch.full((3, 1, 1), -0.5), torch.full((3, 1, 1), 0.7)
    settings = SynthesisConfig(iterations=3, lr=1.0)
    problem = Problem(FrozenNetwork(classifier), Objective.from_settings(settings), target, settings, limits, (0,))
    final = synthesize(problem, State(images), alone).images
    assert final.min() == -0.5 and final.max() == pytest.approx(0.7)


def test_curriculum_goes_from_whole_images_to_small_crops() -> None:
    settings = SynthesisConfig(iterations=200, crop_curriculum=0.5, crop_scale=(0.1, 1.0))
    boxes = _schedule(settings, 4, 64, (0,)).boxes
    area = (boxes[..., 2] * boxes[..., 3])[:, 0].float() / 64**2
    assert area[:10].min() > 0.8 and area[100:].min() < 0.25


def test_draws_per_image_and_per_group() -> None:
    shapes = {
        kind: _schedule(SynthesisConfig(iterations=7, augment=kind), 4, 16, (0,)).boxes.shape
        for kind in ("group", "image")
    }
    assert shapes == {"group": (7, 1, 4), "image": (7, 4, 4)}
    assert isinstance(_schedule(SynthesisConfig(iterations=0), 4, 16, (0,)), augment.Draws)
