"""Coresets: against brute force, optimal sets, and independent solvers."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from test_selection import STREAM, picked, view_of

from dynkit import selection
from dynkit.selection import greedy

Array = np.ndarray[Any, np.dtype[np.float64]]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def farthest_by_brute_force(x: Array, n: int, first: int) -> list[int]:
    chosen = [first]
    while len(chosen) < n:
        nearest = ((x[:, None] - x[chosen]) ** 2).sum(2).min(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


@given(st.integers(1, 80), st.integers(1, 4), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_farthest_first_is_exact_with_ties_and_duplicates(rows: int, width: int, side: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-side, side + 1, (rows, width)).astype(np.float64)  # exact in float32
    n, first = 1 + seed % rows, seed % rows
    found = greedy.farthest_first(torch.from_numpy(x).float(), n, first)
    assert found.tolist() == farthest_by_brute_force(x, n, first)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_farthest_first_is_exact_where_the_farthest_lie_together(spread: float) -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(8, 5)) * 100
    x = (centres[generator.integers(0, 8, 2000)] + spread * generator.normal(size=(2000, 5))).round(4)
    found = greedy.farthest_first(torch.from_numpy(x), 60, 3)
    assert found.tolist() == farthest_by_brute_force(x, 60, 3)


def test_k_center_is_a_two_approximation() -> None:
    generator = np.random.default_rng(0)
    for seed in range(5):
        x = generator.normal(size=(14, 2))
        distance = np.sqrt(((x[:, None] - x) ** 2).sum(2))
        best = min(distance[:, list(some)].min(1).max() for some in combinations(range(14), 3))
        found = greedy.farthest_first(torch.from_numpy(x), 3, seed).tolist()
        assert distance[:, found].min(1).max() <= 2 * best + 1e-9


# ---- submodular functions, as their definitions have them ----


def similarities(x: Array) -> Array:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    s: Array = 0.5 + 0.5 * unit @ unit.T
    return s


def facility_location(s: Array, some: list[int]) -> float:
    return float(s[:, some].max(1).sum()) if some else 0.0


def graph_cut(s: Array, some: list[int]) -> float:
    return float(s[:, some].sum() - s[np.ix_(some, some)].sum())


def log_determinant(s: Array, some: list[int]) -> float:
    return float(np.linalg.slogdet(np.eye(len(some)) + s[np.ix_(some, some)])[1]) if some else 0.0


Value = Callable[[Array, list[int]], float]
FUNCTIONS: dict[str, tuple[Value, Callable[[torch.Tensor], greedy.SetFunction]]] = {
    "facility location": (facility_location, greedy.Facilities.by_product),
    "graph cut": (graph_cut, greedy.GraphCut),
    "log-determinant": (log_determinant, greedy.LogDeterminant),
}


def greedy_by_brute_force(value: Value, s: Array, n: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(n):
        left = [row for row in range(len(s)) if row not in chosen]
        gains = [value(s, [*chosen, row]) - value(s, chosen) for row in left]
        chosen.append(left[int(np.argmax(gains))])
    return chosen


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("optimizer", ["naive", "lazy"])
def test_greedy_makes_the_choices_of_its_definition(name: str, optimizer: str) -> None:
    value, make = FUNCTIONS[name]
    for seed in range(4):
        x = np.abs(np.random.default_rng(seed).normal(size=(40, 6)))
        found = greedy.maximize(make(torch.from_numpy(x)), 12, optimizer, rng())
        assert found.tolist() == greedy_by_brute_force(value, x @ x.T, 12)


def test_similarity_is_a_product_of_vectors() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    vectors = greedy.cosine_vectors(torch.from_numpy(x))
    assert (vectors @ vectors.T).numpy() == pytest.approx(similarities(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gains_are_differences_of_the_function(name: str) -> None:
    value, make = FUNCTIONS[name]
    x = np.random.default_rng(1).normal(size=(30, 4))
    s, function = similarities(x), make(greedy.cosine_vectors(torch.from_numpy(x)))
    for i, row in enumerate([3, 17, 29, 0]):
        chosen = [3, 17, 29, 0][:i]
        left = [other for other in range(30) if other not in chosen]
        expected = [value(s, [*chosen, other]) - value(s, chosen) for other in left]
        assert function.gains(torch.tensor(left)).numpy() == pytest.approx(np.array(expected), rel=1e-9, abs=1e-9)
        function.add(row)


@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 1000), st.sampled_from(sorted(FUNCTIONS)))
@settings(max_examples=80, deadline=None)
def test_lazy_is_naive_with_ties_and_duplicates(rows: int, width: int, seed: int, name: str) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).integers(-1, 2, (rows, width)).astype(np.float64))
    make, n = FUNCTIONS[name][1], 1 + seed % rows
    x = x.round()  # products of halves are exact, so equal gains are equal
    by_naive, by_lazy = (greedy.maximize(make(x.abs()), n, optimizer, rng()) for optimizer in ("naive", "lazy"))
    assert by_lazy.tolist() == by_naive.tolist()


def test_stochastic_greedy_keeps_its_bound() -> None:
    values: dict[str, list[float]] = {"naive": [], "stochastic": [], "best": []}
    for seed in range(20):
        s = similarities(x := np.random.default_rng(seed).normal(size=(14, 3)))
        values["best"].append(max(facility_location(s, list(some)) for some in combinations(range(14), 3)))
        for optimizer in ("naive", "stochastic"):
            function = greedy.Facilities.by_product(greedy.cosine_vectors(torch.from_numpy(x)))
            found = greedy.maximize(function, 3, optimizer, rng(seed)).tolist()
            assert len(set(found)) == 3
            values[optimizer].append(facility_location(s, found))
    best, naive, stochastic = (np.array(values[name]) for name in ("best", "naive", "stochastic"))
    assert (naive >= (1 - 1 / np.e) * best).all()
    assert stochastic.mean() >= (1 - 1 / np.e - 0.1) * best.mean()
    assert stochastic.mean() < naive.mean()  # it looked at fewer rows


def test_stochastic_greedy_looks_at_few_rows() -> None:
    looked = 0

    class Counting(greedy.GraphCut):
        def gains(self, rows: torch.Tensor) -> torch.Tensor:
            nonlocal looked
            looked += len(rows)
            return super().gains(rows)

    x = torch.randn(1000, 4, generator=rng())
    greedy.maximize(Counting(x), 50, "stochastic", rng())
    assert looked == 50 * 47  # 1000 / 50 * ln 10


def test_lazy_greedy_looks_at_few_rows() -> None:
    looked = 0

    class Counting(greedy.Facilities):
        def gains(self, rows: torch.Tensor) -> torch.Tensor:
            nonlocal looked
            looked += len(rows)
            return super().gains(rows)

    x = greedy.cosine_vectors(torch.randn(1000, 8, generator=rng()))
    greedy.maximize(Counting.by_product(x), 100, "lazy", rng())
    assert looked < 0.2 * 1000 * 100


# ---- CRAIG and GradMatch ----


def test_craig_chooses_medoids_and_weights_them_by_the_samples_they_stand_for() -> None:
    x = np.random.default_rng(0).normal(size=(60, 5))
    distance = np.sqrt(((x[:, None] - x) ** 2).sum(2))
    expected = greedy_by_brute_force(facility_location, distance.max() - distance, 8)
    rows, weights = selection.Craig(n=8)._choose(torch.from_numpy(x), 8, rng())
    assert rows.tolist() == expected
    assert weights is not None
    assert weights.tolist() == np.bincount(distance[:, expected].argmin(1), minlength=8).tolist()


@pytest.mark.parametrize("x", [[[0.0], [1.0]], [[2.0], [2.0], [2.0]], [[-1.0], [0.0], [1.0]]])
def test_one_sample_of_craig_stands_for_all_however_far(x: list[list[float]]) -> None:
    _, weights = selection.Craig(n=1)._choose(torch.tensor(x), 1, rng())
    assert weights.tolist() == [len(x)]


def test_craig_stands_for_all_samples_of_each_class() -> None:
    chosen = picked(selection.Craig(fraction=0.1), STREAM, [300], model=True)
    labels = STREAM["label"].to_numpy()
    stands_for = np.bincount(labels[chosen["key"].to_numpy()], weights=chosen["weight"].to_numpy())
    assert stands_for.tolist() == np.bincount(labels).tolist()


def pursuit_by_brute_force(g: Array, n: int) -> list[int]:
    total, chosen = g.sum(0), list[int]()
    residual = total
    while len(chosen) < n:
        along = g @ residual
        along[chosen] = -np.inf
        if along.max() <= 0:
            break
        chosen.append(int(along.argmax()))
        a = g[chosen]
        residual = total - a.T @ np.linalg.solve(a @ a.T + np.eye(len(chosen)), a @ total)
    return chosen


@pytest.mark.parametrize(("rows", "width", "n"), [(50, 4, 3), (50, 4, 20), (200, 30, 40), (30, 1, 10)])
def test_grad_match_is_orthogonal_matching_pursuit_with_weights_of_nnls(rows: int, width: int, n: int) -> None:
    g = np.random.default_rng(rows + width).normal(0.2, 1, (rows, width))
    found, weights = greedy.matching_pursuit(torch.from_numpy(g), n)
    chosen = sorted(pursuit_by_brute_force(g, n))
    stacked = np.vstack([g[chosen].T, np.eye(len(chosen))])
    expected, _ = nnls(stacked, np.concatenate([g.sum(0), np.zeros(len(chosen))]))
    kept = expected > 1e-9
    assert found.tolist() == np.array(chosen)[kept].tolist()
    assert weights.numpy() == pytest.approx(expected[kept], rel=1e-7, abs=1e-9)


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_weights_are_the_best_that_are_not_negative(rows: int, width: int, ridge: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    g, b = generator.normal(size=(rows, width)), generator.normal(size=width) * 10
    found = greedy.nonnegative_ridge(torch.from_numpy(g), torch.from_numpy(b), ridge).numpy()
    stacked = np.vstack([g.T, np.sqrt(ridge) * np.eye(rows)])
    expected, _ = nnls(stacked, np.concatenate([b, np.zeros(rows)]))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_grad_match_comes_nearer_to_the_sum_of_gradients_than_chance() -> None:
    view = view_of(STREAM, [300], model=True)
    g = view.gradients(STREAM["key"]).double().numpy()
    chosen = picked(selection.GradMatch(n=60), STREAM, [300], model=True)
    total = g.sum(0)

    def miss(rows: Any, weights: Array) -> float:
        return float(np.linalg.norm(weights @ g[rows] - total))

    ours = miss(chosen["key"].to_numpy(), chosen["weight"].to_numpy())
    generator = np.random.default_rng(0)
    chance = [miss(generator.choice(600, 60, replace=False), np.full(60, 10.0)) for _ in range(20)]
    assert ours < 0.2 * min(chance)


def test_gradients_that_sum_to_nothing_leave_the_choice_to_chance() -> None:
    rows, weights = selection.GradMatch(n=5)._choose(torch.zeros(20, 3), 5, rng())
    assert len(set(rows.tolist())) == 5 and weights is not None and weights.tolist() == [1] * 5


def test_k_center_of_a_run_uses_embeddings_and_balances_classes() -> None:
    view = view_of(STREAM, [300], model=True)
    x = view.embed(STREAM["key"]).double().numpy()
    chosen = picked(selection.KCenter(n=30), STREAM, [300], model=True)["key"].to_numpy()
    radius = [np.sqrt(((x[:, None] - x[some]) ** 2).sum(2)).min(1).max() for some in (chosen, np.arange(0, 600, 20))]
    assert radius[0] < radius[1]
    labels = STREAM["label"].to_numpy()
    balanced = picked(selection.KCenter(n=30, balance=True), STREAM, [300], model=True)["key"].to_numpy()
    assert np.abs(np.bincount(labels[balanced]) - np.bincount(labels) / 20).max() < 1
