"""The newer drift metrics against scipy and brute force; references that are prepared once."""

import importlib.util
import pickle

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

import dynkit as dk
from dynkit import drift, testing
from dynkit.drift import kernels
from dynkit.errors import InvalidInput, NotFound, PolicyError

NAMES = list(dk.drift.METRICS)
CHEAP = ["block_mmd", "cvm", "psi", "js", "hellinger", "wasserstein", "coverage", "bbsdh"]


def two(n: int, m: int, d: int, shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(shift, 1, size=(m, d))


# ---- every metric ----


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_is_a_distance(name: str) -> None:
    testing.check_drift_metric(name)


def test_what_is_no_distance_is_found() -> None:
    calls, first = iter(range(100)), []

    def by_first_row(x: torch.Tensor, y: torch.Tensor) -> float:
        first.append(float(x[0, 0]))
        return float((x.mean(0) - y.mean(0)).norm()) * (4 if first[-1] == first[0] else 1)

    for broken, says in (
        (lambda x, y: float("nan"), "finite"),
        (lambda x, y: 1.0, "further must be larger"),
        (lambda x, y: float((x.mean(0) - y.mean(0)).norm()) + 5, "must be near 0"),
        (lambda x, y: float((x.mean(0) - y.mean(0)).norm()) + 1e-6 * next(calls), "called again"),
        (by_first_row, "another order"),
        (lambda x, y: max(0.0, float((y.mean(0) - x.mean(0))[0])), "exchanged"),
        (lambda x, y: float((x.mean(0) - y.mean(0)).norm()) * (1 + (x.dtype == torch.float32)), "float32"),
    ):
        with pytest.raises(AssertionError, match=says):
            testing.check_drift_metric(broken)


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize(("n", "m", "d"), [(150, 100, 4), (60, 300, 3), (300, 40, 2)])
def test_false_alarms_stay_near_the_level(name: str, n: int, m: int, d: int) -> None:
    metric = dk.drift.resolve(name)
    drifted = [dk.drift.test(*two(n, m, d, seed=s), metric, permutations=59, seed=s).drifted for s in range(200)]
    assert np.mean(drifted) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_large_change_is_found_and_named(name: str) -> None:
    x, y = two(400, 300, 3)
    y[:, 0] += 3
    found = dk.drift.test(x, y, name, permutations=99)
    assert found.drifted and found.score > 0
    assert type(dk.drift.resolve(name)).__name__ in repr(found)


@pytest.mark.parametrize("name", NAMES)
def test_constant_or_hardly_any_data_has_not_drifted(name: str) -> None:
    for x in (np.ones((50, 2)), np.ones((2, 2)), np.arange(4.0).reshape(2, 2)):
        found = dk.drift.test(x, x.copy(), name, permutations=5)
        assert not found.drifted and np.isfinite(found.score)


# ---- scores and p-values against oracles ----


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_cramer_von_mises_is_scipys(n: int, m: int, seed: int) -> None:
    x, y = two(n, m, 3, 0.3, seed)
    found = dk.drift.test(x, y, "cvm", permutations=1).score
    # scipy's T is N M / (N + M) times the mean square, less the part that has no drift in it
    each = [stats.cramervonmises_2samp(x[:, i], y[:, i], method="asymptotic").statistic for i in range(3)]
    assert found == pytest.approx(max(each) * (n + m) / (n * m), rel=1e-6)


def test_cramer_von_mises_of_equal_and_of_rare_values() -> None:
    for x in (np.ones((100, 2)), np.ones((100, 2), np.float32)):
        assert dk.drift.test(x, x, "cvm").score == 0
        assert not dk.drift.test(x, x, "cvm").drifted
    rng = np.random.default_rng(0)
    rare = [(rng.random((2, 200, 3)) < 0.02).astype(np.float32) for _ in range(100)]
    assert np.mean([dk.drift.test(x, y, "cvm", permutations=99, seed=i).drifted for i, (x, y) in enumerate(rare)]) < 0.1


def test_columns_of_tables_are_paired_by_name() -> None:
    x, _ = two(300, 300, 2)
    old = pl.DataFrame({"heat": x[:, 0], "noise": 60 + 5 * x[:, 1]})
    for table in (old, old.lazy(), old.to_pandas() if importlib.util.find_spec("pandas") else old):
        wanted = ["noise", "heat"]
        new = table.select(wanted) if hasattr(table, "select") else table[wanted]
        assert dk.drift.test(table, new, "energy").score == pytest.approx(0, abs=1e-6)


def test_cramer_von_mises_takes_equal_samples_together() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (60, 1)).astype(float), rng.integers(0, 5, (50, 1)).astype(float)
    pooled = np.concatenate([x, y])
    f, g = ((side <= pooled.T).mean(0) for side in (x, y))
    assert dk.drift.test(x, y, "cvm", permutations=1).score == pytest.approx(((f - g) ** 2).mean())


@pytest.mark.parametrize("name", ["cvm", "psi", "js", "wasserstein"])
@pytest.mark.parametrize("discrete", [False, True])
def test_permuted_p_values_are_uniform_when_nothing_changed(name: str, discrete: bool) -> None:
    p_values = []
    for seed in range(200):
        x, y = two(60, 50, 3, seed=seed)
        if discrete:
            x, y = np.round(2 * x), np.round(2 * y)
        p_values.append(dk.drift.test(x, y, name, permutations=99, seed=seed).p_value)
    spread = np.array(p_values) - np.random.default_rng(0).uniform(0, 0.01, 200)
    assert stats.kstest(spread, "uniform").pvalue > 0.01


def test_wasserstein_is_the_mean_of_scipys_in_standard_deviations() -> None:
    x, y = two(80, 60, 4, 0.4)
    x[:, 1] *= 10
    each = [stats.wasserstein_distance(x[:, i], y[:, i]) / x[:, i].std() for i in range(4)]
    assert dk.drift.test(x, y, "wasserstein").score == pytest.approx(np.mean(each), rel=1e-6)


@pytest.mark.parametrize("name", ["psi", "js", "hellinger"])
def test_a_frequent_value_has_a_bin_of_its_own_in_any_dtype(name: str) -> None:
    rng = np.random.default_rng(0)
    x, y = np.where(rng.random((2, 500, 1)) < 0.4, [[[255.0]], [[240.0]]], rng.integers(0, 200, (2, 500, 1)))
    wide = dk.drift.prepared(name, x).score(y)
    assert wide > 0.5
    for dtype in (np.float32, np.uint8):
        assert dk.drift.prepared(name, x.astype(dtype)).score(y.astype(dtype)) == pytest.approx(wide)
    with pytest.raises(InvalidInput, match="column 'a' has infinite values"):
        dk.drift.columns(*(pl.DataFrame({"a": np.where(side == 255, np.inf, side)[:, 0]}) for side in (x, y)), name)


def test_the_wasserstein_test_keeps_its_level_on_heavy_tails() -> None:
    rng = np.random.default_rng(0)
    sides = [(rng.lognormal(sigma=2, size=(200, 20)), rng.lognormal(sigma=2, size=(20, 20))) for _ in range(200)]
    found = [dk.drift.test(x, y, "wasserstein", permutations=99, seed=i).drifted for i, (x, y) in enumerate(sides)]
    assert np.mean(found) <= 0.1


def test_whole_numbers_of_32_bits_keep_their_digits() -> None:
    x = 4_000_000_000 + np.random.default_rng(0).integers(0, 40, (500, 1))
    for dtype in (np.uint32, np.uint64, np.int64):
        assert dk.drift.test(x.astype(dtype), (x + 60).astype(dtype), "ks").score == pytest.approx(1)


def test_a_metric_of_ones_own_returns_a_finite_number() -> None:
    x, _ = two(50, 50, 2)
    with pytest.raises(PolicyError, match="returned nan; it must return one finite number"):
        dk.drift.prepared(lambda reference, current: float("nan"), x).score(x)


@pytest.mark.parametrize("name", ["psi", "js", "hellinger"])
def test_shares_are_compared_as_their_formulas_say(name: str) -> None:
    x, y = two(500, 300, 3, 0.4)
    each = []
    for i in range(3):
        edges = np.quantile(x[:, i], np.arange(1, 10) / 10)
        p, q = (np.bincount(np.searchsorted(edges, side[:, i]), minlength=10) / len(side) for side in (x, y))
        psi = ((np.maximum(q, 1e-4) - p) * np.log(np.maximum(q, 1e-4) / p)).sum()
        hellinger = np.linalg.norm(np.sqrt(p) - np.sqrt(q)) / 2**0.5
        each.append({"psi": psi, "js": jensenshannon(p, q, base=2), "hellinger": hellinger}[name])
    assert dk.drift.test(x, y, name).score == pytest.approx(np.mean(each), rel=1e-6)
    frames = [pl.DataFrame(side, schema=["a", "b", "c"]) for side in (x, y)]
    assert dk.drift.columns(*frames, name)["score"].mean() == pytest.approx(np.mean(each), rel=1e-6)


def test_the_null_of_shares_is_that_of_a_loop() -> None:
    x, y = two(80, 60, 3, 0.3)
    found = dk.drift.test(x, y, "psi", permutations=400)
    pooled, rng, looped = np.concatenate([x, y]), np.random.default_rng(1), []
    edges = [np.quantile(pooled[:, i], np.arange(1, 10) / 10) for i in range(3)]  # fair to both sides
    bins = np.stack([np.searchsorted(edges[i], pooled[:, i]) for i in range(3)], 1)
    for _ in range(400):
        order = rng.permutation(140)
        sides = [
            np.stack([np.bincount(bins[part, i], minlength=10) for i in range(3)]) for part in (order[:80], order[80:])
        ]
        p, q = (np.maximum(side / side.sum(1, keepdims=True), 1e-4) for side in sides)
        looped.append(((q - p) * np.log(q / p)).sum(1).mean())
    assert stats.ks_2samp(found.null, looped).pvalue > 0.01


def test_predicted_classes_are_compared_by_scipys_chi_square() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet([1, 1, 1], 400), rng.dirichlet([2, 1, 1], 300)
    table = [np.bincount(side.argmax(1), minlength=3) for side in (p, q)]
    found = dk.drift.test(p, q, "bbsdh")
    assert found.p_value == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue, rel=1e-9)
    assert found.score == pytest.approx(stats.contingency.association(np.array(table), "cramer"), rel=1e-9)
    one = dk.drift.test(p[:, :1], q[:, :1], "bbsdh")
    table = [[(side[:, 0] <= 0.5).sum(), (side[:, 0] > 0.5).sum()] for side in (p, q)]
    assert one.p_value == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue, rel=1e-9)


def test_blocks_have_the_mean_of_their_discrepancies() -> None:
    x, y = two(30, 60, 2, 0.5)
    metric = dk.drift.BlockMMD(block=10, bandwidth=1.3)
    rng = np.random.default_rng(0)
    parts = [side[rng.permutation(len(side))].reshape(3, -1, 2) for side in (x, y)]
    exact = [
        dk.drift.test(a, b, dk.drift.MMD(bandwidth=1.3), permutations=1).score for a, b in zip(*parts, strict=True)
    ]
    found = dk.drift.test(x, y, metric)
    assert found.score == pytest.approx(np.mean(exact), rel=1e-6)
    assert found.p_value == pytest.approx(stats.ttest_1samp(exact, 0, alternative="greater").pvalue, rel=1e-6)


def test_blocks_need_no_matrix_of_all_pairs() -> None:
    x, y = (torch.from_numpy(side) for side in two(100_000, 80_000, 3, 0.05))
    assert dk.drift.test(x, y, "block_mmd").drifted


@pytest.mark.parametrize("name", ["mmd", "block_mmd", "energy", "coverage"])
def test_outliers_take_no_digits_from_single_precision(name: str) -> None:
    x, y = two(3000, 2500, 3, 0.1)
    x[7] = 1e5
    y[:3] = -1e5
    exact = dk.drift.prepared(name, x).score(y)
    single = dk.drift.prepared(name, x.astype(np.float32)).score(y.astype(np.float32))
    assert single == pytest.approx(exact, rel=1e-4, abs=1e-6)


def test_uncovered_are_those_far_from_the_reference() -> None:
    x, y = two(2000, 500, 2)
    y[:40] += 10
    found = dk.drift.test(x, y, "coverage")
    assert found.drifted and found.score == pytest.approx(0.08, abs=0.02)
    inside = dk.drift.test(x, 0.1 * y[40:], "coverage")
    assert inside.score == 0 and not inside.drifted


def test_the_number_of_uncovered_has_the_distribution_that_its_p_value_says() -> None:
    counts = []
    metric = dk.drift.Coverage(outside=0.1)
    for seed in range(400):
        x, y = two(60, 20, 3, seed=seed)
        prepared = metric.prepare(torch.from_numpy(x))
        counts.append(
            int((kernels.squares(torch.from_numpy(y), prepared._core).min(1).values > prepared._radius).sum())
        )
    expected = stats.betabinom(20, 3, 28)
    shares = np.bincount(np.minimum(counts, 5), minlength=6)
    wanted = np.append(expected.pmf(np.arange(5)), expected.sf(4))
    assert stats.chisquare(shares, 400 * wanted).pvalue > 0.01


# ---- references ----


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_reference_says_what_the_metric_says(name: str) -> None:
    x, y = (torch.from_numpy(side) for side in two(300, 200, 4, 0.4))
    metric = dk.drift.resolve(name)
    if name in ("mmd", "block_mmd"):  # the bandwidth is that of the reference
        bandwidth = (kernels.median_square(x, x[:0], np.random.default_rng(0)) / 2) ** 0.5
        metric = type(metric)(bandwidth=bandwidth)
    prepared = dk.drift.prepared(name, x)
    assert prepared.score(y) == pytest.approx(metric(x, y), rel=1e-6)
    found = prepared.tested(y, 50, np.random.default_rng(3))
    expected = dk.drift.test(x, y, metric, permutations=50, seed=3)
    assert found.score == pytest.approx(expected.score, rel=1e-6)
    assert found.p_value == pytest.approx(expected.p_value, rel=1e-6)


@pytest.mark.parametrize("metric", [*NAMES, dk.drift.MMD(features=64)], ids=str)
def test_an_extended_reference_is_one_of_all_samples(metric: object) -> None:
    x, y = two(400, 200, 3, 0.4)
    whole = dk.drift.prepared(metric, x)
    parts = dk.drift.prepared(metric, x[:300])
    parts.score(y)
    parts = parts.extended(x[300:])
    assert len(parts.samples) == 400
    assert parts.score(y) == pytest.approx(whole.score(y), rel=0.1)  # the bandwidth is that of the first samples
    if not isinstance(metric, str) or "mmd" not in metric:
        again = dk.drift.prepared(dk.drift.resolve(metric), x)
        if isinstance(metric, str):
            assert parts.score(y) == pytest.approx(again.score(y), rel=1e-6)


def test_features_of_a_reference_are_added_up() -> None:
    x, y = two(20_000, 500, 3, 0.4)
    metric = dk.drift.MMD(features=64, bandwidth=1.5)
    first = dk.drift.prepared(metric, x[:9_000])
    first.score(y)
    seen = []
    count = kernels._feature_means
    kernels._feature_means = lambda rows, w, size: seen.append(len(rows)) or count(rows, w, size)
    try:
        extended = first.extended(x[9_000:])
        assert extended.score(y) == pytest.approx(dk.drift.prepared(metric, x).score(y), rel=1e-6)
    finally:
        kernels._feature_means = count
    assert sum(seen[:-4]) < 20_000 + 2 * 500  # the first 9 000 rows are not visited again


def test_random_features_of_a_prepared_reference_approach_the_exact_score() -> None:
    x, y = two(3000, 2000, 6, 0.2)
    exact = dk.drift.prepared("mmd", x).score(y)
    assert dk.drift.prepared(dk.drift.MMD(features=20_000), x).score(y) == pytest.approx(exact, rel=0.1)


def test_chunks_of_a_prepared_reference_find_what_rows_find() -> None:
    x, y = two(12_000, 9_000, 4)
    reference = dk.drift.prepared("mmd", x)
    assert reference.tested(y + 0.1, 99).p_value == 0.01
    assert reference.tested(y + 0.1, 99).score == pytest.approx(reference.score(y + 0.1), rel=0.01)
    same = [
        reference.tested(two(10, 9_000, 4, seed=seed)[1], 99, np.random.default_rng(seed)).p_value
        for seed in range(1, 31)
    ]
    assert np.mean(np.array(same) < 0.05) <= 0.2
    assert reference.tested(y[:300], 19).p_value > 0.05  # a set of another size


def test_a_function_of_your_own_has_a_reference_too() -> None:
    def means_apart(reference: torch.Tensor, current: torch.Tensor) -> float:
        return float((reference.mean(0) - current.mean(0)).norm())

    x, y = two(100, 90, 3, 1.0)
    reference = dk.drift.prepared(means_apart, x)
    assert reference.score(y) == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))
    assert reference.tested(y, 50).p_value < 0.05
    with pytest.raises(PolicyError, match="finite number"):
        dk.drift.prepared(lambda a, b: "far", x).score(y)


def test_references_take_what_tests_take() -> None:
    x, y = two(100, 80, 2, 0.5)
    frames = [pl.DataFrame(side, schema=["a", "b"]) for side in (x, y)]
    reference = dk.drift.prepared("energy", frames[0])
    expected = dk.drift.prepared("energy", x).score(y)
    assert reference.score(frames[1].select("b", "a")) == reference.score(frames[1].lazy()) == expected
    assert reference.score(y.astype(np.float32)) == pytest.approx(expected, rel=1e-5)
    assert "100 samples of 2 numbers" in repr(reference)
    copy = pickle.loads(pickle.dumps(reference))
    assert copy.score(y) == expected
    with pytest.raises(InvalidInput, match="current has 3"):
        reference.score(np.zeros((5, 3)))
    with pytest.raises(InvalidInput, match=r"'b' is in one of the tables only"):
        reference.score(frames[1].rename({"b": "c"}))
    with pytest.raises(NotFound, match="did you mean 'energy'"):
        dk.drift.prepared("enrgy", x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dk.drift.MMD(bandwidth=0),
        lambda: dk.drift.BlockMMD(block=1),
        lambda: dk.drift.BlockMMD(bandwidth="wide"),
        lambda: dk.drift.CramerVonMises(rows=1),
        lambda: dk.drift.PSI(rows=0),
        lambda: dk.drift.Coverage(outside=1),
        lambda: dk.drift.Wasserstein(rows=1.5),
    ],
)
def test_impossible_parameters_are_refused(make: object) -> None:
    with pytest.raises(InvalidInput, match="="):
        make()


@pytest.mark.parametrize("metric", ["mmd", "energy"])
def test_one_large_sample_does_not_hide_the_others(metric: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3000, 8)).astype(np.float32), rng.normal(1, 1, (3000, 8)).astype(np.float32)
    y[0] = 1e4
    exact = drift.test(x.astype(np.float64), y.astype(np.float64), metric, permutations=20)
    found = drift.test(x, y, metric, permutations=20)
    assert found.score == pytest.approx(exact.score, rel=1e-3)
    assert found.p_value == exact.p_value < 0.05
    wide = drift.prepared(metric, x.astype(np.float64)).score(y.astype(np.float64))
    assert drift.prepared(metric, x).score(y) == pytest.approx(wide, rel=1e-3)
