"""Selections: which samples to train on, with which weights.

A selection gets the pool (all samples up to the trigger, in replay order: key, timestamp, label, scalar columns), the
run's view and a random generator that belongs to this trigger; it returns keys, or a frame with columns key and
weight.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from dynkit.errors import InvalidInput, check_whole
from dynkit.time import IntArray
from dynkit.types import RunView

__all__ = ["All", "ClassBalanced", "New", "Random", "Recent"]


@dataclass(frozen=True)
class New:
    """The samples since the last trigger."""

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the newest samples of the pool."""
        return pool["key"].tail(run.samples_since_trigger)


@dataclass(frozen=True)
class All:
    """Every sample so far."""

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the whole pool."""
        return pool["key"]


@dataclass(frozen=True)
class Random:
    """A uniform sample, without replacement, of everything so far.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    fraction: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        _check_budget(self)

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        rows = rng.choice(pool.height, size=_budget(self, pool.height), replace=False, shuffle=False)
        return pool["key"][np.sort(rows)]


@dataclass(frozen=True)
class Recent:
    """The newest samples.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    fraction: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        _check_budget(self)

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the last samples of the pool."""
        return pool["key"].tail(_budget(self, pool.height))


@dataclass(frozen=True)
class ClassBalanced:
    """A sample in which every class has the same number of samples, as far as it has that many.

    The budget is shared by water filling: a class smaller than its share gives all it has, and the others share what it
    leaves. Within a class the sample is uniform, without replacement. Samples without a label are left out.

    Parameters
    ----------
    fraction : float or None
        Share of the labelled samples of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; all labelled ones while there are fewer. Exactly one of the two is given.
    """

    fraction: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        _check_budget(self)

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        if "label" not in pool.columns:
            raise InvalidInput("ClassBalanced needs labels, and the dataset has none; Random needs no labels")
        labelled = pool.select("key", "label").drop_nulls("label")
        ranks = labelled["label"].rank("dense").to_numpy()
        _, classes, sizes = np.unique(ranks, return_inverse=True, return_counts=True)
        shares = _fair_shares(sizes, _budget(self, labelled.height), rng)
        order = rng.permutation(labelled.height)
        by_class = order[np.argsort(classes[order], kind="stable")]
        place = np.arange(labelled.height) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its class
        return labelled["key"][np.sort(by_class[place < np.repeat(shares, sizes)])]


def _check_budget(selection: "Random | Recent | ClassBalanced") -> None:
    name, fraction, n = type(selection).__name__, selection.fraction, selection.n
    if (fraction is None) == (n is None):
        raise InvalidInput(f"give either fraction or n: {name}(fraction=0.5) or {name}(n=10_000)")
    if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction <= 1):
        raise InvalidInput(f"fraction={fraction!r} must be in (0, 1]")
    if n is not None:
        check_whole("n", n, 1)


def _budget(selection: "Random | Recent | ClassBalanced", rows: int) -> int:
    """Return how many of so many samples to keep."""
    n = selection.n if selection.n is not None else max(1, round((selection.fraction or 0) * rows))
    return min(n, rows)


def _fair_shares(sizes: IntArray, budget: int, rng: np.random.Generator) -> IntArray:
    """Share a budget among groups by water filling; what does not divide goes to groups by chance."""
    shares = np.zeros_like(sizes)
    while budget > shares.sum():
        open_groups = np.flatnonzero(shares < sizes)
        each = (budget - int(shares.sum())) // len(open_groups)
        if not each:
            shares[rng.choice(open_groups, budget - int(shares.sum()), replace=False)] += 1
            break
        shares[open_groups] = np.minimum(shares[open_groups] + each, sizes[open_groups])
    return shares
