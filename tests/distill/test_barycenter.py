"""Promises of the barycenter: optimal on small problems, consistent, and the same bytes for the same seed."""

import itertools
import multiprocessing
import os
import select
import signal

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from wmdd.config.schema import BarycenterConfig
from wmdd.distill.barycenter.processes import barycenters, solvers
from wmdd.distill.barycenter.solve import Atoms, barycenter, starts, w2_squared
from wmdd.errors import InputError, WmddError
from wmdd.runtime.signals import stop_on

VARIANTS = ("uniform", "free", "alternating")
KINDS = ("means", "medoids")


def gaussian(images: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(images, dimension))).float()


def relu_like(images: int = 300, dimension: int = 32, modes: int = 12, seed: int = 0) -> torch.Tensor:
    """Features as a ReLU network makes them: non-negative, sparse, in clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(modes, dimension))
    features = np.maximum(0.8 * centres[rng.integers(modes, size=images)] + rng.normal(size=(images, dimension)), 0)
    return torch.from_numpy(features).float()


def transport_cost(features: torch.Tensor, atoms: Atoms) -> float:
    """W2² by a general linear program, independent of POT."""
    count, images = len(atoms.positions), len(features)
    cost = cdist(atoms.positions.double(), features.double(), "sqeuclidean")
    rows = np.kron(np.eye(count), np.ones(images))
    columns = np.kron(np.ones(count), np.eye(images))
    marginals = np.concatenate([atoms.weights.numpy(), np.full(images, 1 / images)])
    return float(linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals).fun)


def within(features: np.ndarray, cells: np.ndarray) -> float:
    """Mean squared distance to the cell means."""
    return sum(features[cells == k].var(axis=0).sum() * (cells == k).mean() for k in np.unique(cells))


@pytest.mark.parametrize(("count", "images"), [(2, 10), (3, 12), (2, 7), (4, 11)])
def test_uniform_on_the_line_gives_the_means_of_sorted_chunks(count: int, images: int) -> None:
    features = gaussian(images, 1)
    atoms = barycenter(features, count, BarycenterConfig(), seed=0)
    # Each point split into K equal parts: then n parts make up one atom, whether or not K divides n.
    chunks = np.sort(features.double().numpy().ravel()).repeat(count).reshape(count, images)
    assert sorted(atoms.positions.ravel().tolist()) == pytest.approx(chunks.mean(1).tolist(), rel=1e-5)
    assert atoms.w2 == pytest.approx(chunks.var(axis=1).mean(), rel=1e-5)


def test_uniform_is_the_best_balanced_partition() -> None:
    features = gaussian(8, 2)
    halves = [np.isin(np.arange(8), half) for half in itertools.combinations(range(8), 4)]
    optimum = min(within(features.numpy(), half) for half in halves)
    assert barycenter(features, 2, BarycenterConfig(starts=12), seed=0).w2 == pytest.approx(optimum, rel=1e-5)


def test_free_is_the_best_partition() -> None:
    features = gaussian(8, 2)
    partitions = map(np.array, itertools.product(range(3), repeat=8))
    optimum = min(within(features.numpy(), cells) for cells in partitions)
    atoms = barycenter(features, 3, BarycenterConfig(weights="free", starts=12), seed=0)
    assert atoms.w2 == pytest.approx(optimum, rel=1e-5)


@pytest.mark.parametrize("weights", VARIANTS)
def test_one_atom_is_the_mean_and_its_w2_the_variance(weights: str) -> None:
    features = relu_like()
    atoms = barycenter(features, 1, BarycenterConfig(weights=weights), seed=0)
    assert torch.allclose(atoms.positions[0], features.mean(0), atol=1e-5)
    assert atoms.w2 == pytest.approx(features.double().var(dim=0, correction=0).sum().item(), rel=1e-6)
    assert atoms.weights.tolist() == [1.0]
    assert atoms.images.item() == (features - features.mean(0)).square().sum(1).argmin().item()


@pytest.mark.parametrize("weights", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_atoms_as_images_are_the_images(weights: str, kind: str) -> None:
    features = relu_like(20)
    atoms = barycenter(features, 20, BarycenterConfig(weights=weights, atoms=kind), seed=0)
    assert torch.equal(atoms.positions, features)
    assert atoms.images.tolist() == list(range(20))
    assert atoms.weights.tolist() == pytest.approx([1 / 20] * 20)
    assert atoms.w2 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [0, 6])
def test_an_impossible_count_is_the_users_error(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} atoms requested for a class of 5 images"):
        barycenter(gaussian(5, 2), count, BarycenterConfig(), seed=0)


def test_features_that_are_not_finite_are_refused() -> None:
    features = gaussian(5, 2)
    features[3, 1] = torch.nan
    with pytest.raises(WmddError, match="NaN"):
        barycenter(features, 2, BarycenterConfig(), seed=0)


# Few distinct values, so that points coincide, often fewer distinct ones than atoms.
tied = arrays(np.float32, st.tuples(st.integers(3, 12), st.integers(1, 3)), elements=st.integers(0, 3).map(float))
smooth = st.builds(gaussian, st.integers(3, 12), st.integers(1, 3), st.integers(0, 999)).map(torch.Tensor.numpy)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.one_of(tied, smooth), share=st.floats(0, 1), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**40))
def test_every_variant_keeps_its_promises_on_small_data(data: np.ndarray, share: float, kind: str, seed: int) -> None:
    features = torch.from_numpy(data)
    count = 1 + round(share * (len(data) - 1))
    w2 = {}
    for weights in VARIANTS:
        atoms = barycenter(features, count, BarycenterConfig(weights=weights, atoms=kind, starts=2), seed)
        assert atoms.positions.shape == (count, data.shape[1]) and atoms.positions.dtype == torch.float32
        assert atoms.weights.dtype == torch.float64 and (atoms.weights > 0).all()
        assert atoms.weights.sum().item() == pytest.approx(1)
        assert atoms.images.dtype == torch.int64 and len(set(atoms.images.tolist())) == count
        assert atoms.w2 == pytest.approx(transport_cost(features, atoms), rel=1e-6, abs=1e-6)
        if weights == "uniform":
            assert atoms.weights.tolist() == pytest.approx([1 / count] * count)
        else:
            nearest = cdist(atoms.positions.double(), data, "sqeuclidean").min(0).mean()
            assert atoms.w2 == pytest.approx(nearest, rel=1e-6, abs=1e-6)
        if kind == "medoids":
            assert torch.equal(atoms.positions, features[atoms.images])
        w2[weights] = atoms.w2
    if kind == "means":
        assert w2["free"] <= w2["uniform"] * (1 + 1e-6) + 1e-9


def test_images_are_the_cheapest_distinct_assignment() -> None:
    # Two pairs far apart and an image between them that is nearest to both atoms.
    features = torch.tensor([[-4.0, 5, 0], [-4, -5, 0], [4, 0, 5], [4, 0, -5], [0, 0, 0]])
    atoms = barycenter(features, 2, BarycenterConfig(), seed=0)
    cost = cdist(atoms.positions, features, "sqeuclidean")
    assert cost.argmin(1).tolist() == [4, 4]
    optimum = min(cost[range(2), list(chosen)].sum() for chosen in itertools.permutations(range(5), 2))
    assert cost[range(2), atoms.images].sum() == pytest.approx(optimum)


def test_uniform_is_at_least_as_good_as_one_pot_run_from_each_of_its_starts() -> None:
    features = relu_like()
    points = features.double().numpy()
    atoms = barycenter(features, 10, BarycenterConfig(starts=3), seed=5)
    drawn = starts(points, 10, 3, seed=5)
    assert len(drawn) == 3
    for start in drawn:
        single = ot.lp.free_support_barycenter([points], [ot.unif(300)], start)
        assert atoms.w2 <= ot.emd2([], [], ot.dist(single, points)) * (1 + 1e-6)


def test_free_is_no_worse_than_uniform_even_where_lloyd_gets_stuck() -> None:
    features = gaussian(40, 2, seed=28)
    points = features.double().numpy()
    uniform, free = (
        barycenter(features, 5, BarycenterConfig(weights=w, starts=1), seed=28).w2 for w in ("uniform", "free")
    )
    stuck = KMeans(5, init=starts(points, 5, 1, seed=28)[0], tol=0).fit(points).inertia_ / 40
    assert free <= uniform * (1 + 1e-6) < stuck


def test_free_is_a_fixed_point_of_lloyd() -> None:
    features = relu_like()
    atoms = barycenter(features, 10, BarycenterConfig(weights="free"), seed=0)
    nearest = cdist(atoms.positions, features).argmin(0)
    for k in range(10):
        assert torch.allclose(atoms.positions[k], features[nearest == k].mean(0), atol=1e-5)
        assert atoms.weights[k].item() == pytest.approx((nearest == k).mean())


def test_starts_take_turns_between_spread_and_density() -> None:
    # Ten far points beside a thousand near ones: k-means++ goes for the far ones, random points do not.
    points = np.concatenate([np.eye(10) * 100, np.random.default_rng(0).normal(size=(1000, 10))])
    far = [int((np.abs(start).max(1) > 50).sum()) for start in starts(points, 10, 4, seed=0)]
    assert min(far[0::2]) >= 9 and max(far[1::2]) <= 2


def test_starts_are_rows_of_the_data_and_more_of_them_begin_with_the_fewer() -> None:
    points = gaussian(50, 4).double().numpy()
    four = starts(points, 7, 4, seed=3)
    assert all(len(np.unique(start, axis=0)) == 7 and (cdist(start, points).min(1) == 0).all() for start in four)
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(four, 2))
    assert all(map(np.array_equal, four, starts(points, 7, 2, seed=3)))


@pytest.mark.parametrize("weights", VARIANTS)
def test_more_starts_are_never_worse(weights: str) -> None:
    features = gaussian(60, 3)
    for seed in range(12):
        one, two, four = (
            barycenter(features, 6, BarycenterConfig(weights=weights, starts=number, rounds=20), seed).w2
            for number in (1, 2, 4)
        )
        assert four <= two <= one


@pytest.mark.parametrize("weights", VARIANTS)
def test_more_rounds_are_better(weights: str) -> None:
    few, many = (
        barycenter(relu_like(), 10, BarycenterConfig(weights=weights, starts=1, rounds=rounds), seed=1).w2
        for rounds in (1, 20)
    )
    assert many < few


@pytest.mark.parametrize("seed", range(3))
def test_alternating_comes_within_five_percent_of_lloyd(seed: int) -> None:
    features = relu_like(seed=seed)
    points = features.double().numpy()
    atoms = barycenter(features, 10, BarycenterConfig(weights="alternating", starts=1), seed)
    lloyd = KMeans(10, n_init=10, random_state=0).fit(points).inertia_ / len(points)
    assert atoms.w2 <= 1.05 * lloyd
    exact = ot.emd2(atoms.weights.numpy(), ot.unif(300), cdist(atoms.positions.double(), points, "sqeuclidean"))
    assert atoms.w2 == pytest.approx(exact, rel=1e-9)
    assert w2_squared(features, atoms.positions, atoms.weights) == atoms.w2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weights", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_distinct_points_than_atoms(weights: str, kind: str) -> None:
    features = gaussian(3, 4).repeat(4, 1)
    atoms = barycenter(features, 6, BarycenterConfig(weights=weights, atoms=kind, starts=2), seed=0)
    assert (atoms.weights > 0).all() and atoms.weights.sum().item() == pytest.approx(1)
    assert len(set(atoms.images.tolist())) == 6
    assert atoms.w2 == pytest.approx(0, abs=1e-9)


def stored(atoms: Atoms) -> bytes:
    parts = (atoms.positions, atoms.weights, atoms.images, torch.tensor(atoms.w2, dtype=torch.float64))
    return b"".join(part.numpy().tobytes() for part in parts)


@pytest.mark.parametrize("weights", VARIANTS)
def test_same_seed_same_bytes_on_any_number_of_threads(weights: str) -> None:
    def solved(seed: int, threads: int) -> bytes:
        with threadpool_limits(threads):
            return stored(barycenter(features, 10, BarycenterConfig(weights=weights, starts=2, rounds=20), seed))

    features = relu_like(600, 128)
    before = np.random.get_state(legacy=False)["state"]["pos"]
    first = solved(seed=4, threads=1)
    assert first == solved(seed=4, threads=1) == solved(seed=4, threads=4)
    assert first != solved(seed=5, threads=1)
    assert np.random.get_state(legacy=False)["state"]["pos"] == before


def test_uniform_is_on_average_no_worse_than_pot_from_the_same_starts() -> None:
    ratios = []
    for seed in range(12):
        points = relu_like(200, 64, modes=4, seed=seed).double().numpy()
        atoms = barycenter(torch.from_numpy(points), 8, BarycenterConfig(starts=1), seed)
        single = ot.lp.free_support_barycenter([points], [ot.unif(200)], starts(points, 8, 1, seed)[0])
        ratios.append(atoms.w2 / ot.emd2([], [], ot.dist(single, points)))
    assert np.mean(ratios) <= 1


@pytest.mark.parametrize("modes", [1, 12, 60])
@pytest.mark.parametrize("count", [10, 41])
def test_the_stated_w2_is_exact_wherever_the_clusters_lie(modes: int, count: int) -> None:
    for seed in range(4):
        features = relu_like(500, 24, modes, seed) * 3
        atoms = barycenter(features, count, BarycenterConfig(starts=1, rounds=1 + 10 * (seed % 2)), seed)
        assert atoms.w2 == pytest.approx(w2_squared(features, atoms.positions, atoms.weights), rel=1e-9)


@pytest.mark.parametrize("size", [1e-4, 1e20])
def test_the_unit_of_the_features_does_not_matter(size: float) -> None:
    features = relu_like(100, 8)
    expected = barycenter(features, 5, BarycenterConfig(starts=2), seed=0)
    atoms = barycenter(features.double() * size, 5, BarycenterConfig(starts=2), seed=0)
    assert atoms.images.tolist() == expected.images.tolist()
    assert atoms.w2 == pytest.approx(expected.w2 * size**2, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("weights", VARIANTS)
def test_many_classes_at_once_are_the_same_bytes_as_one_by_one_on_any_number_of_workers(weights: str) -> None:
    classes = [relu_like(images, 16, seed=images) for images in (40, 41, 60, 12, 50, 47, 30)]
    chosen, seeds = BarycenterConfig(weights=weights, starts=2, rounds=10), range(3, 10)
    expected = [stored(barycenter(points, 6, chosen, seed)) for points, seed in zip(classes, seeds, strict=True)]
    for workers in (0, 1, 3):
        assert [stored(atoms) for atoms in barycenters(iter(classes), 6, chosen, seeds, workers)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_that_cannot_be_solved_ends_many_at_once_in_its_one_line(workers: int) -> None:
    classes = [gaussian(8, 2), gaussian(4, 2), gaussian(9, 2)]
    with pytest.raises(InputError, match="5 atoms requested for a class of 4 images"):
        list(barycenters(classes, 5, BarycenterConfig(starts=1), range(3), workers))


def test_classes_are_read_no_further_ahead_than_the_workers_need() -> None:
    read = []
    classes = (read.append(index) or gaussian(8, 2, index) for index in range(40))  # type: ignore[func-returns-value]
    stream = barycenters(classes, 2, BarycenterConfig(starts=1), range(40), workers=2)
    next(stream)
    assert len(read) <= 5
    stream.close()


def test_what_asks_a_run_to_stop_does_not_stop_a_solver() -> None:
    with solvers(1) as submit:
        expected = stored(submit(gaussian(8, 2), 2, BarycenterConfig(), 0)())
        for number in (signal.SIGINT, signal.SIGUSR2):
            os.kill(multiprocessing.active_children()[0].pid or 0, number)
            assert stored(submit(gaussian(8, 2), 2, BarycenterConfig(), 0)()) == expected


@pytest.mark.parametrize(("asked", "message"), [(False, "died, perhaps for lack of memory"), (True, "stopped while")])
def test_a_dead_solver_ends_the_others_and_is_told(asked: bool, message: str) -> None:
    # Under the handlers of a run: solvers that inherited them would not end when the pool asks.
    with (
        stop_on(signal.SIGTERM),
        pytest.raises(WmddError, match=message),
        solvers(2, lambda: asked) as submit,
    ):
        for solved in [
            submit(relu_like(600, 128), 20, BarycenterConfig(), seed) for seed in range(2)
        ]:  # one for each solver
            solved()
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        while True:  # until the loss is noticed
            submit(gaussian(8, 2), 2, BarycenterConfig(), 0)()
    assert not multiprocessing.active_children()


def test_solvers_end_with_a_process_that_is_killed() -> None:
    reading, writing = os.pipe()

    def run() -> None:
        with solvers(2) as submit:
            submit(gaussian(8, 2), 2, BarycenterConfig(), 0)()
            os.write(writing, b".")
            signal.pause()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(writing)
    assert os.read(reading, 1) == b"."
    process.kill()
    process.join()
    # The pipe ends with the last process that holds it.
    assert select.select([reading], [], [], 30)[0] and os.read(reading, 1) == b""
    os.close(reading)
