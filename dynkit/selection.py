"""Selections: which samples to train on, with which weights.

A selection gets the pool (all samples up to the trigger, in replay order: key, timestamp, label, scalar columns), the
run's view and a random generator that belongs to this trigger; it returns keys, or a frame with columns key and
weight.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from dynkit.errors import InvalidInput
from dynkit.types import RunView

__all__ = ["All", "New", "Random"]


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
        if (self.fraction is None) == (self.n is None):
            raise InvalidInput("give either fraction or n: Random(fraction=0.5) or Random(n=10_000)")
        if self.fraction is not None and not (isinstance(self.fraction, int | float) and 0 < self.fraction <= 1):
            raise InvalidInput(f"fraction={self.fraction!r} must be in (0, 1]")
        if self.n is not None and (isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1):
            raise InvalidInput(f"n={self.n!r} must be a whole number of samples, at least 1")

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        n = self.n if self.n is not None else max(1, round((self.fraction or 0) * pool.height))
        rows = rng.choice(pool.height, size=min(n, pool.height), replace=False, shuffle=False)
        return pool["key"][np.sort(rows)]
