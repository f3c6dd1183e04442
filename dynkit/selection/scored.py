"""Selections by a score that the run's newest model gives to every sample.

They select from the whole pool (`New` and `Where` narrow it) before a training, or, given to a training as its batch
selection, from every batch as it is loaded. Without a model, at the first trigger, they draw a uniform sample of the
same size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import polars as pl
import torch

from dynkit.errors import InvalidInput
from dynkit.selection.budget import Balanced, Choice, check_finite
from dynkit.selection.sampling import Random
from dynkit.types import RunView

__all__ = ["Entropy", "GradNorm", "LeastConfidence", "Loss", "Margin"]

_LEAST_CHANCE = 1e-3  # of a sample, in parts of the mean chance; so no weight is above about 1 000


@dataclass(frozen=True)
class Scored(Balanced):
    """What selections by one score per sample have in common."""

    kind: ClassVar[str]

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> "pl.DataFrame | pl.Series":
        """Keys of the chosen samples in replay order, with their scores, and weights if there are any."""
        if run.model is None or not pool.height:
            return Random(self.fraction, self.n)(pool, run, rng)
        scores = run.score(self.kind, pool["key"])
        check_finite(scores, self.kind)
        rule, budget = _RULES[self.kind], self._of(pool.height)
        return self._chosen(pool, budget, lambda rows, n, generator: rule(scores[rows], n, generator), rng, scores)

    def choose(self, scores: torch.Tensor, rng: torch.Generator) -> Choice:
        """Choose among the samples of a batch.

        Parameters
        ----------
        scores : (N,) float32
        rng : torch.Generator
            On the device of the scores.

        Returns
        -------
        rows : (M,) int64
        weights : (M,) float32 or None

        Raises
        ------
        InvalidInput
            With ``balance=True``: a batch is not balanced.
        """
        if self.balance:
            raise InvalidInput(f"balance=True needs the whole pool; give the training {type(self).__name__} without it")
        n = self._of(len(scores))
        if self.fraction is not None:
            n = max(n, min(2, len(scores)))  # layers that normalise over a batch cannot train on one
        return _RULES[self.kind](scores, n, rng)


@dataclass(frozen=True)
class Loss(Scored):
    """Samples drawn with chances in proportion to their loss (importance sampling).

    Drawn without replacement with chances p = loss / sum(loss), and weighted by 1 / (N p), with which one draw has the
    mean of all N samples in expectation (Katharopoulos and Fleuret 2018, equations 3 and 4, with the loss in place of
    the gradient norm); many draws out of few samples only come near it. No chance is below a thousandth of the mean
    one.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Draw from every class at the same ratio (not within batches).
    """

    kind: ClassVar[str] = "loss"


@dataclass(frozen=True)
class GradNorm(Scored):
    """Samples drawn with chances in proportion to the norm of their gradient (DLIS).

    As `Loss`, with the norm of the loss's gradient by the model's outputs, which bounds that by the weights
    (Katharopoulos and Fleuret 2018, equation 20).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Draw from every class at the same ratio (not within batches).
    """

    kind: ClassVar[str] = "grad_norm"


@dataclass(frozen=True)
class Margin(Scored):
    """Samples whose two most probable classes are nearest in probability (Scheffer et al. 2001).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Take from every class at the same ratio (not within batches).
    """

    kind: ClassVar[str] = "margin"


@dataclass(frozen=True)
class LeastConfidence(Scored):
    """Samples whose most probable class, by the softmax, is least probable (Lewis and Gale 1994).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Take from every class at the same ratio (not within batches).
    """

    kind: ClassVar[str] = "least_confidence"


@dataclass(frozen=True)
class Entropy(Scored):
    """Samples whose predicted probabilities have the largest entropy (Settles 2009, equation 2.3).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Take from every class at the same ratio (not within batches).
    """

    kind: ClassVar[str] = "entropy"


def _draw(scores: torch.Tensor, n: int, rng: torch.Generator) -> Choice:
    """Draw n with chances p in proportion to the scores, weighted by 1 / (N p)."""
    mean = scores.mean()
    chances = torch.where(mean > 0, scores.clamp_min(_LEAST_CHANCE * mean), 1)
    p = chances / chances.sum()
    # The n earliest of exponential clocks are n successive draws (Efraimidis and Spirakis 2006, section 2).
    rows = torch.empty_like(p).exponential_(generator=rng).div_(p).topk(n, largest=False).indices
    return rows, 1 / (len(p) * p[rows])


def _lowest(scores: torch.Tensor, n: int, rng: torch.Generator) -> Choice:
    return scores.topk(n, largest=False).indices, None


def _highest(scores: torch.Tensor, n: int, rng: torch.Generator) -> Choice:
    return scores.topk(n).indices, None


_RULES: dict[str, Callable[[torch.Tensor, int, torch.Generator], Choice]] = {
    "loss": _draw,
    "grad_norm": _draw,
    "margin": _lowest,
    "least_confidence": _highest,
    "entropy": _highest,
}
