"""RS2: another random subset in every epoch."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from dynkit.selection.budget import Budget
from dynkit.time import IntArray
from dynkit.types import RunView

__all__ = ["RS2"]


@dataclass(frozen=True)
class RS2(Budget):
    """A uniform sample for each epoch of the training (RS2, repeated sampling of random subsets: Okanovic et al. 2024).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1] for one epoch; at least one sample is kept.
    n : int or None
        Number of samples for one epoch; the whole pool while it has fewer. Exactly one of the two is given.
    replacement : bool
        Whether epochs are independent of each other. If not, the pool is shuffled and dealt out to the epochs, and
        shuffled anew when too few samples are left for another one (algorithm 1).
    """

    replacement: bool = False

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.DataFrame:
        """Keys of the drawn samples with a column epoch, from 0; in replay order within an epoch."""
        n = self._of(pool.height)
        per_shuffle = 1 if self.replacement or not n else pool.height // n
        rows: list[IntArray] = []
        while len(rows) < run.epochs:
            dealt = rng.permutation(pool.height)[: n * per_shuffle]
            rows.extend(np.sort(some) for some in np.split(dealt, per_shuffle))
        epoch = np.repeat(np.arange(run.epochs), n)
        return pool.select("key")[np.concatenate(rows[: run.epochs])].with_columns(pl.Series("epoch", epoch))
