"""How many samples to select, and how groups of samples share that number."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from dynkit.errors import InvalidInput, PolicyError, check_whole
from dynkit.time import IntArray

__all__ = ["Balanced", "Budget", "Choice", "check_finite", "group_of", "proportional", "water_filled"]

#: rows (M,) int64 of what was offered, and their weights (M,) or None
Choice = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Budget:
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
class Balanced(Budget):
    """A budget that is spent on all samples together, or on every class at the same ratio."""

    balance: bool = False

    def _chosen(
        self,
        pool: pl.DataFrame,
        budget: int,
        choose: Callable[[torch.Tensor, int, torch.Generator], Choice],
        rng: np.random.Generator,
        score: torch.Tensor | None = None,
    ) -> pl.DataFrame:
        """Choose rows of the pool, and give them as a frame in replay order.

        Parameters
        ----------
        pool : pl.DataFrame
        budget : int
        choose : callable
            ``(rows, n, generator)``: choose n of these rows of the pool, as places among them.
        rng : np.random.Generator
            Seeds the generator.
        score : (N,) float32 or None
            Kept with the chosen ones.

        Returns
        -------
        pl.DataFrame
            Columns key, weight where there are weights, score where there are scores.
        """
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        groups = group_of(pool, type(self).__name__) if self.balance else np.zeros(pool.height, np.int64)
        rows, weights = [], []
        for group, n in proportional(groups, budget):
            offered = torch.from_numpy(group)
            places, some = choose(offered, n, generator)
            rows.append(offered[places.cpu()])
            if some is not None:
                weights.append(some.float().cpu())
        of_all, order = torch.cat(rows).sort()
        columns = {"weight": torch.cat(weights)[order]} if weights else {}
        if score is not None:
            columns["score"] = score[of_all]
        return pool.select("key")[of_all.numpy()].with_columns(
            pl.Series(name, values.numpy()) for name, values in columns.items()
        )


def check_finite(values: torch.Tensor, what: str) -> None:
    """Refuse numbers of samples (N, ...) that are not finite.

    Raises
    ------
    PolicyError
    """
    bad = int((~torch.isfinite(values).reshape(len(values), -1).all(1)).sum())
    if bad:
        raise PolicyError(f"the {what} of {bad} samples is not a finite number; look at the model's outputs")


def group_of(pool: pl.DataFrame, policy: str) -> IntArray:
    """Return the class of each sample of a pool as a number from 1 on (N,); 0 is no label.

    Raises
    ------
    InvalidInput
        When the pool has no labels.
    """
    if "label" not in pool.columns:
        raise InvalidInput(f"{policy} needs labels, and the dataset has none; Random needs no labels")
    groups: IntArray = pool["label"].rank("dense").fill_null(0).to_numpy().astype(np.int64)
    return groups


def proportional(groups: IntArray, budget: int) -> Iterator[tuple[IntArray, int]]:
    """Share a budget among groups at one ratio; what does not divide goes to those with the largest remainders.

    Parameters
    ----------
    groups : (N,) int64
        Number of the group of each row, from 0.
    budget : int
        At most N.

    Yields
    ------
    rows : (M,) int64
        Of one group, in order.
    share : int
        How many of them, at least one.
    """
    sizes = np.bincount(groups)
    shares, remainders = np.divmod(budget * sizes, max(1, len(groups)))
    shares[np.argsort(-remainders, kind="stable")[: budget - int(shares.sum())]] += 1
    rows = np.split(_sorted_by(groups), np.cumsum(sizes)[:-1])
    yield from ((some, int(share)) for some, share in zip(rows, shares, strict=True) if share)


def water_filled(groups: IntArray, budget: int, rng: np.random.Generator) -> IntArray:
    """Draw rows so that every group gives as many, as far as it has them: a small one all, others what it leaves.

    Parameters
    ----------
    groups : (N,) int64
        Number of the group of each row, from 0.
    budget : int
        At most N.
    rng : np.random.Generator

    Returns
    -------
    (budget,) int64
        Rows in order; uniform within a group, without replacement.
    """
    sizes = np.bincount(groups)
    shares = _fair_shares(sizes, budget, rng)
    order = rng.permutation(len(groups))
    by_group = order[_sorted_by(groups[order])]
    place = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its group
    return np.sort(by_group[place < np.repeat(shares, sizes)])


def _sorted_by(groups: IntArray) -> IntArray:
    """Rows group by group, within a group in their order (N,)."""
    small = np.min_scalar_type(int(groups.max(initial=0)))  # NumPy sorts numbers of 16 bits by their digits
    return np.argsort(groups.astype(small), kind="stable")


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
