"""What chance alone does to the distance of two sets of samples.

A metric scores two sets as they are, and again with their rows permuted: the permuted scores are its null distribution.
No permutation is computed on its own: all of them are one product of a matrix of memberships with a matrix that does
not depend on them. What a metric needs of the reference can be prepared once and compared with many sets.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from dynkit.errors import InvalidInput, PolicyError
from dynkit.types import DriftMetric

__all__ = ["Kept", "Metric", "Prepared", "Tested", "against_null", "memberships", "sampled", "tested"]

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]


class Tested(NamedTuple):
    """What a metric finds: its score, how likely one as large is by chance, and what chance gave."""

    score: float
    p_value: float
    null: Scores


class Metric(Protocol):
    """A drift metric that knows what its score is worth."""

    def __call__(self, reference: torch.Tensor, current: torch.Tensor, /) -> float: ...

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator, /
    ) -> Tested: ...


class Prepared(Protocol):
    """A reference of which a metric has computed what it can: it is compared with many sets of samples (M, D)."""

    def score(self, current: torch.Tensor, /) -> float: ...

    def tested(self, current: torch.Tensor, permutations: int, rng: np.random.Generator, /) -> Tested: ...

    def extended(self, more: torch.Tensor, /) -> "Prepared": ...


@dataclass(frozen=True)
class Kept:
    """A reference of which nothing can be computed beforehand.

    Parameters
    ----------
    metric : DriftMetric
    reference : (N, D) tensor
    """

    metric: DriftMetric
    reference: torch.Tensor

    def score(self, current: torch.Tensor) -> float:
        """Distance of `current` (M, D) from the reference."""
        return self.metric(self.reference, current)

    def tested(self, current: torch.Tensor, permutations: int, rng: np.random.Generator) -> Tested:
        """Score `current`, and permutations."""
        return tested(self.metric, self.reference, current, permutations, rng)

    def extended(self, more: torch.Tensor) -> "Kept":
        """Return the reference with more rows."""
        return Kept(self.metric, torch.cat([self.reference, more]))


def tested(
    metric: DriftMetric, x: torch.Tensor, y: torch.Tensor, permutations: int, rng: np.random.Generator
) -> Tested:
    """Score two sets; a user's function is called once for each permutation."""
    if hasattr(metric, "tested"):
        found: Tested = metric.tested(x, y, permutations, rng)
        return found
    pooled = torch.cat([x, y])
    masks = memberships(len(x), len(y), permutations, rng).to(x.device)
    return against_null(np.array([number(metric(pooled[mask], pooled[~mask]), metric) for mask in masks]))


def number(score: Any, metric: DriftMetric) -> float:
    """Return what a user's metric returned as a number."""
    try:
        value = float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"drift metric {metric!r} must return one finite number: {error}") from None
    if not math.isfinite(value):
        raise PolicyError(f"drift metric {metric!r} returned {value}; it must return one finite number")
    return value


def memberships(n: int, m: int, permutations: int, rng: np.random.Generator) -> torch.Tensor:
    """Which rows are reference (1 + permutations, n + m): as they are, then permuted."""
    rows = np.zeros((1 + permutations, n + m), bool)
    rows[:, :n] = True
    rng.permuted(rows[1:], axis=1, out=rows[1:])
    return torch.from_numpy(rows)


def against_null(scores: Scores) -> Tested:
    """Rank the first score among the others: (1 + #{null >= score}) / (1 + B) (Phipson and Smyth 2010)."""
    if not np.isfinite(scores).all():
        raise InvalidInput(
            "the score is not a finite number; scale the samples first, they are too large to be compared"
        )
    score, null = float(scores[0]), scores[1:].astype(np.float64)
    tolerance = 1e-9 * float(np.abs(scores).max())  # equal but for rounding
    return Tested(score, float((1 + (null >= score - tolerance).sum()) / (1 + len(null))), null)


def sampled(x: torch.Tensor, rows: int, rng: np.random.Generator) -> torch.Tensor:
    """Sample rows without replacement, in their order."""
    if len(x) <= rows:
        return x
    return x[torch.from_numpy(np.sort(rng.choice(len(x), rows, replace=False))).to(x.device)]
