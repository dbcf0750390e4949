"""Promises of tempered weights: between uniform and free weights, with exact or entropic plans, and exact W2²."""

import itertools

import numpy as np
import ot
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import linprog
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from wmdd.config.schema import BarycenterConfig
from wmdd.distill.barycenter.solve import Atoms, barycenter
from wmdd.distill.barycenter.tempered import entropic_plan, tempered, tempered_masses
from wmdd.runs.distilled_set import counted_weights

TEMPERS = (0.0, 0.25, 0.5, 0.75, 1.0)


def digits(label: int) -> torch.Tensor:
    """Return the real scans of one digit, [n, 64]."""
    data = load_digits()
    return torch.from_numpy(data.data[data.target == label]).float()


def solved(features: torch.Tensor, **keys: object) -> Atoms:
    return barycenter(features, 10, BarycenterConfig(**keys), seed=0)  # type: ignore[arg-type]


def masses_by_hand(positions: torch.Tensor, features: torch.Tensor, temper: float) -> np.ndarray:
    """Return (1 − τ)/K + τ·(cell masses), one image at a time in float64."""
    counts = np.zeros(len(positions))
    for point in features.double().numpy():
        counts[((positions.double().numpy() - point) ** 2).sum(1).argmin()] += 1
    return (1 - temper) / len(positions) + temper * counts / len(features)


def w2_by_hand(atoms: Atoms, features: torch.Tensor, weights: np.ndarray) -> float:
    """Return W2² by a general linear program, independent of POT."""
    count, images = len(atoms.positions), len(features)
    cost = cdist(atoms.positions.double(), features.double(), "sqeuclidean")
    rows, columns = np.kron(np.eye(count), np.ones(images)), np.kron(np.ones(count), np.eye(images))
    marginals = np.concatenate([weights, np.full(images, 1 / images)])
    return float(linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals).fun)


@pytest.mark.parametrize("label", [1, 8])
def test_tempered_weights_lead_from_uniform_to_free_and_w2_falls_on_the_way(label: int) -> None:
    features = digits(label)
    found = [solved(features, weights="tempered", temper=temper) for temper in TEMPERS]
    for name, end in (("uniform", found[0]), ("free", found[-1])):  # the ends are those solvers
        known = solved(features, weights=name)
        assert torch.equal(end.positions, known.positions) and torch.equal(end.weights, known.weights)
    w2 = [atoms.w2 for atoms in found]
    assert all(later < earlier for earlier, later in itertools.pairwise(w2))
    effective = [1 / float(atoms.weights.square().sum()) for atoms in found]
    assert effective[0] == pytest.approx(10) and effective[-1] < effective[0]
    for temper, atoms in zip(TEMPERS[1:4], found[1:4], strict=True):
        weights = masses_by_hand(atoms.positions, features, temper)
        assert atoms.weights.numpy() == pytest.approx(weights, rel=1e-12)
        assert atoms.w2 == pytest.approx(w2_by_hand(atoms, features, weights), rel=1e-6)


@pytest.mark.parametrize("label", [1, 8])
@pytest.mark.parametrize(("temper", "name"), [(0.0, "uniform"), (1.0, "free")])
def test_the_general_solver_is_within_one_percent_at_both_ends(label: int, temper: float, name: str) -> None:
    """From random starts, without the solutions of the solvers that it is compared with."""
    features = digits(label)
    points, draw = features.double().numpy(), np.random.default_rng(0)
    found = []
    for _ in range(40):
        atoms = tempered(points, points[draw.choice(len(points), 10, replace=False)], 100, temper)
        cost = cdist(atoms, points, "sqeuclidean")
        found.append(ot.emd2(tempered_masses(cost, temper), ot.unif(len(points)), cost))
    end = solved(features, weights=name).w2
    assert min(found) <= 1.01 * end
    assert solved(features, weights="tempered", temper=abs(temper - 1e-9)).w2 == pytest.approx(end, rel=0.01)


@pytest.mark.parametrize("epsilon", [0.02, 0.2])
def test_an_entropic_plan_is_that_of_plain_sinkhorn_steps_in_float64(epsilon: float) -> None:
    points = digits(3).double().numpy()
    cost = cdist(points[:6], points, "sqeuclidean")
    rows, columns = tempered_masses(cost, 0.5), ot.unif(len(points))
    unit = epsilon * points.var(axis=0).sum()
    potentials = ot.emd(rows, columns, cost, log=True)[1]
    plan = entropic_plan(rows, columns, cost, unit, (potentials["u"], potentials["v"]))
    f, g = np.zeros(6), np.zeros(len(points))
    for _ in range(20_000):
        f = -unit * np.log(np.exp((g - cost) / unit) @ columns)
        g = -unit * np.log(np.exp((f[:, None] - cost) / unit).T @ rows)
    expected = rows[:, None] * columns * np.exp((f[:, None] + g - cost) / unit)
    assert plan == pytest.approx(expected, rel=1e-2, abs=1e-7)
    assert plan.sum(axis=1) == pytest.approx(rows, rel=1e-9)


def test_entropic_atoms_are_the_conditional_means_of_their_plan_and_shrink_to_the_mean_of_the_class() -> None:
    features = digits(8)
    centre = features.mean(0)
    spread = {}
    for epsilon in (0.0, 0.003, 0.1, 0.9):
        atoms = solved(features, epsilon=epsilon)
        spread[epsilon] = float((atoms.positions - centre).square().sum(1).mean())
        assert atoms.w2 == pytest.approx(w2_by_hand(atoms, features, np.full(10, 0.1)), rel=1e-6)
    assert spread[0.003] == pytest.approx(spread[0.0], rel=0.05)  # a small ε is close to the optimal plan
    assert spread[0.1] < 0.99 * spread[0.0] and spread[0.9] < 0.01 * spread[0.0]
    # A fixed point of POT's own solver of Sinkhorn barycenters.
    points = features.double().numpy()
    unit = 0.1 * points.var(axis=0).sum()
    atoms = solved(features, epsilon=0.1)
    again = ot.bregman.free_support_sinkhorn_barycenter(
        [points], [ot.unif(len(points))], atoms.positions.double().numpy(), unit, numItermax=1, method="sinkhorn_log"
    )
    moved = np.square(again - atoms.positions.double().numpy()).sum(1).mean()
    assert moved < 1e-3 * spread[0.1]


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_tempered_atoms_are_the_same_bytes_again_and_survive_fewer_distinct_points_than_atoms(epsilon: float) -> None:
    keys = {"weights": "tempered", "temper": 0.3, "epsilon": epsilon}
    one, two = solved(digits(0), **keys), solved(digits(0), **keys)
    assert torch.equal(one.positions, two.positions) and torch.equal(one.weights, two.weights) and one.w2 == two.w2
    for kind in ("means", "medoids"):
        few = solved(digits(0)[:3].repeat(4, 1), atoms=kind, **keys)
        assert (few.weights > 0).all() and few.weights.sum().item() == pytest.approx(1)
        assert len(set(few.images.tolist())) == 10 and torch.isfinite(few.positions).all()


def test_alternating_weights_and_entropic_plans_are_refused_together() -> None:
    with pytest.raises(ValidationError, match="alternating has exact plans"):
        BarycenterConfig(weights="alternating", epsilon=0.1)


def test_the_power_of_the_weights_leads_from_equal_to_barycenter_weights() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]])
    assert counted_weights(weights, 1) is weights
    assert torch.equal(counted_weights(weights, 0), torch.full((2, 3), 1 / 3))
    half = torch.tensor([0.1, 0.2, 0.7]).double().sqrt()
    assert counted_weights(weights, 0.5)[0].tolist() == pytest.approx((half / half.sum()).tolist(), rel=1e-6)
