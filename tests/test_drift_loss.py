"""Losses without labels, where the true ones are known."""

import numpy as np
import polars as pl
import pytest
import torch

import dynkit as dk
from dynkit.errors import InvalidInput


def regression(n: int, low: float, high: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features with the prediction beside them, and absolute errors, which grow with the first feature and a wave."""
    rng = np.random.default_rng(seed)
    x = np.stack([rng.uniform(low, high, n), rng.normal(size=n), rng.normal(size=n)], 1)
    scale = 0.2 + x[:, 0] ** 2 + 0.3 * np.sin(3 * x[:, 1]) ** 2
    return np.concatenate([x, 2 * x[:, :1] - x[:, 1:2]], 1), np.abs(rng.normal(scale=scale))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.5, 1), (0, 0.4)])
def test_the_loss_follows_the_samples(low: float, high: float) -> None:
    x, losses = regression(4000, 0, 1, 0)
    y, truth = regression(20_000, low, high, 1)
    found = dk.drift.estimate_loss(x, losses, y)
    assert found.estimate == pytest.approx(truth.mean(), rel=0.05)
    assert found.low < found.estimate < found.high
    assert found.reference == pytest.approx(losses.mean())
    assert not found.extrapolates


def test_the_band_holds_the_expected_loss_as_often_as_it_says() -> None:
    expected = regression(400_000, 0.4, 1, 10_000)[1].mean()
    held = []
    for seed in range(100):
        x, losses = regression(600, 0, 1, 2 * seed)
        found = dk.drift.estimate_loss(x, losses, regression(300, 0.4, 1, 2 * seed + 1)[0], seed=seed)
        held.append(found.low <= expected <= found.high)
    assert np.mean(held) >= 0.88


def test_it_is_the_ridge_regression_that_numpy_solves() -> None:
    from dynkit.drift.loss import _features, _Fit

    x, losses = regression(80, 0, 1, 0)
    y, _ = regression(50, 0, 1, 1)
    old, new = torch.from_numpy(x), torch.from_numpy(y)
    frequencies = np.random.default_rng(0).normal(size=(4, 6))
    fit = _Fit(old, new, losses, frequencies)
    a, b = (_features(side, torch.from_numpy(frequencies * 2**0.5)) for side in (old, new))
    design = np.concatenate([np.ones((80, 1)), a - a.mean(0)], 1)
    penalty = fit._ridge * np.diag([0.0] + [1.0] * a.shape[1])
    smoother = np.linalg.solve(design.T @ design + penalty, design.T)
    row = np.concatenate([np.ones((50, 1)), b - a.mean(0)], 1)
    estimate, error = fit.estimated()
    assert estimate == pytest.approx((row @ smoother @ losses).mean(), rel=1e-9)
    hat = design @ smoother
    loo = (losses - hat @ losses) / (1 - np.diag(hat))
    own = ((row @ smoother @ losses).var() + (loo**2).mean()) / 50
    variance = (((row @ smoother).mean(0) * loo) ** 2).sum() + own
    assert error == pytest.approx(variance**0.5, rel=1e-6)
    gcv = 80 * ((losses - hat @ losses) ** 2).sum() / (80 - np.trace(hat)) ** 2
    assert fit.cross_validated == pytest.approx(gcv, rel=1e-9)


def test_samples_outside_the_reference_are_told() -> None:
    x, losses = regression(2000, 0, 1, 0)
    found = dk.drift.estimate_loss(x, losses, regression(500, 3, 4, 1)[0])
    assert found.extrapolates and "outside the reference" in repr(found)


def test_arrays_tensors_and_frames_say_the_same() -> None:
    x, losses = regression(300, 0, 1, 0)
    y, _ = regression(200, 0, 1, 1)
    expected = dk.drift.estimate_loss(x, losses, y)
    assert dk.drift.estimate_loss(torch.from_numpy(x), torch.from_numpy(losses), torch.from_numpy(y)) == expected
    names = ["a", "b", "c", "prediction"]
    frames = [pl.DataFrame(side, schema=names) for side in (x, y)]
    assert dk.drift.estimate_loss(frames[0], pl.Series(losses), frames[1].select(names[::-1])) == expected


def test_constant_columns_and_losses_are_no_trouble() -> None:
    x = np.ones((50, 2))
    found = dk.drift.estimate_loss(x, np.full(50, 2.0), x)
    assert (found.estimate, found.low, found.high) == pytest.approx((2, 2, 2), abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "current", "says"),
    [
        ([1.0, 2.0], np.zeros((5, 2)), "one loss for each of 5"),
        ([1.0, 2.0, np.nan, 1, 1], np.zeros((5, 2)), "NaN"),
        (["a"] * 5, np.zeros((5, 2)), "as numbers"),
        (np.ones(5), np.zeros((5, 3)), "current has 3"),
    ],
)
def test_what_does_not_belong_together_is_named(losses: object, current: object, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        dk.drift.estimate_loss(np.zeros((5, 2)), losses, current)
