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
class _Budget:
    """How many samples to keep: a share of them or a number."""

    fraction: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.n is None):
            name = type(self).__name__
            raise InvalidInput(f"give either fraction or n: {name}(fraction=0.5) or {name}(n=10_000)")
        if self.fraction is not None and not (isinstance(self.fraction, int | float) and 0 < self.fraction <= 1):
            raise InvalidInput(f"fraction={self.fraction!r} must be in (0, 1]")
        if self.n is not None:
            check_whole("n", self.n, 1)

    def _of(self, rows: int) -> int:
        n = self.n if self.n is not None else max(1, round((self.fraction or 0) * rows))
        return min(n, rows)


@dataclass(frozen=True)
class Random(_Budget):
    """A uniform sample, without replacement, of everything so far.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        rows = rng.choice(pool.height, size=self._of(pool.height), replace=False, shuffle=False)
        return pool["key"][np.sort(rows)]


@dataclass(frozen=True)
class Recent(_Budget):
    """The newest samples.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the last samples of the pool."""
        return pool["key"].tail(self._of(pool.height))


@dataclass(frozen=True)
class ClassBalanced(_Budget):
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

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        if "label" not in pool.columns:
            raise InvalidInput("ClassBalanced needs labels, and the dataset has none; Random needs no labels")
        labelled = pool.select("key", "label").drop_nulls("label")
        ranks = labelled["label"].rank("dense").to_numpy()
        _, classes, sizes = np.unique(ranks, return_inverse=True, return_counts=True)
        shares = _fair_shares(sizes, self._of(labelled.height), rng)
        order = rng.permutation(labelled.height)
        by_class = order[np.argsort(classes[order], kind="stable")]
        place = np.arange(labelled.height) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its class
        return labelled["key"][np.sort(by_class[place < np.repeat(shares, sizes)])]


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
