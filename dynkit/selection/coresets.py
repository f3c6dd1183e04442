"""Selections of few samples that stand for all of them, by the newest model's embeddings or gradients.

Embeddings are what goes into the model's last linear layer; a gradient is that of a sample's loss by the model's
outputs. Without a model, at the first trigger, all of them draw a uniform sample of the same size.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import torch

from dynkit.errors import InvalidInput, did_you_mean
from dynkit.selection import greedy
from dynkit.selection.budget import Balanced, Choice, check_finite
from dynkit.selection.sampling import Random
from dynkit.types import RunView

__all__ = ["Craig", "FacilityLocation", "GradMatch", "GraphCut", "KCenter", "LogDeterminant"]

Optimizer = Literal["naive", "lazy", "stochastic"]


@dataclass(frozen=True)
class Coreset(Balanced):
    """What coresets have in common: they choose among rows of numbers."""

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> "pl.DataFrame | pl.Series":
        """Keys of the chosen samples in replay order, with weights if there are any."""
        if run.model is None or not pool.height:
            return Random(self.fraction, self.n)(pool, run, rng)
        vectors = self._vectors(pool, run)
        check_finite(vectors, "embedding or gradient")
        budget = self._of(pool.height)
        return self._chosen(pool, budget, lambda rows, n, generator: self._choose(vectors[rows], n, generator), rng)

    def _vectors(self, pool: pl.DataFrame, run: RunView) -> torch.Tensor:
        return run.gradients(pool["key"])

    def _choose(self, vectors: torch.Tensor, n: int, rng: torch.Generator) -> Choice:
        raise NotImplementedError


@dataclass(frozen=True)
class KCenter(Coreset):
    """Samples that leave none far away, by embeddings (Sener and Savarese 2018, algorithm 1).

    The first one is drawn; each further one is the farthest from those before it.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Choose from every class on its own, at the same ratio.
    """

    def _vectors(self, pool: pl.DataFrame, run: RunView) -> torch.Tensor:
        return run.embed(pool["key"])

    def _choose(self, vectors: torch.Tensor, n: int, rng: torch.Generator) -> Choice:
        first = int(torch.randint(len(vectors), (1,), generator=rng))
        return greedy.farthest_first(vectors, n, first), None


@dataclass(frozen=True)
class GradMatch(Coreset):
    """Samples, and weights for them, whose gradients sum to about those of all (Killamsetty et al. 2021, algorithm 2).

    Orthogonal matching pursuit with a ridge of 1; fewer samples than the budget where no more would help.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Most samples. Exactly one of the two is given.
    balance : bool
        Match the sum of every class on its own, at the same ratio.
    """

    def _choose(self, vectors: torch.Tensor, n: int, rng: torch.Generator) -> Choice:
        rows, weights = greedy.matching_pursuit(vectors, n)
        if not len(rows):  # the gradients sum to nothing, so any samples do
            return torch.randperm(len(vectors), generator=rng)[:n], torch.ones(n)
        return rows, weights


@dataclass(frozen=True)
class Submodular(Coreset):
    """What coresets that maximise a submodular function have in common."""

    optimizer: Optimizer = "lazy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in greedy.OPTIMIZERS:
            raise InvalidInput(
                f"optimizer={self.optimizer!r} is not known{did_you_mean(str(self.optimizer), greedy.OPTIMIZERS)}"
            )

    def _choose(self, vectors: torch.Tensor, n: int, rng: torch.Generator) -> Choice:
        return greedy.maximize(self._function(vectors), n, self.optimizer, rng), None

    def _function(self, vectors: torch.Tensor) -> greedy.SetFunction:
        raise NotImplementedError


@dataclass(frozen=True)
class Craig(Submodular):
    """Samples near to all gradients, each weighted by the number it stands for (CRAIG, Mirzasoleiman et al. 2020).

    Facility location on a bound of all distances less the distance of two gradients (equations 9 and 10); the weight of
    a sample is the number of those whose nearest it is, itself included (algorithm 1, line 8).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Choose from every class on its own, at the same ratio, as the paper does.
    optimizer : str
        ``"lazy"``; ``"naive"`` for the same at more cost; ``"stochastic"``, faster and nearly as good.
    """

    balance: bool = True

    def _choose(self, vectors: torch.Tensor, n: int, rng: torch.Generator) -> Choice:
        function = greedy.Facilities.by_distance(vectors)
        rows = greedy.maximize(function, n, self.optimizer, rng)
        return rows, function.served_by.bincount(minlength=len(vectors))[rows]


@dataclass(frozen=True)
class FacilityLocation(Submodular):
    """Samples such that every sample has a similar one among them: maximise ``sum_j max_{a in A} s_ja``.

    s is 1/2 + 1/2 cos of two gradients (Wei et al. 2015, equation 5).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Choose from every class on its own, at the same ratio.
    optimizer : str
        ``"lazy"``; ``"naive"`` for the same at more cost; ``"stochastic"``, faster and nearly as good.
    """

    def _function(self, vectors: torch.Tensor) -> greedy.SetFunction:
        return greedy.Facilities.by_product(greedy.cosine_vectors(vectors))


@dataclass(frozen=True)
class GraphCut(Submodular):
    """Samples similar to all others and not to each other: ``sum_{j in V, a in A} s_ja - sum_{a, b in A} s_ab``.

    s is 1/2 + 1/2 cos of two gradients (Iyer et al. 2021, table 1, with lambda = 1).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Choose from every class on its own, at the same ratio.
    optimizer : str
        ``"lazy"``; ``"naive"`` for the same at more cost; ``"stochastic"``, faster and nearly as good.
    """

    def _function(self, vectors: torch.Tensor) -> greedy.SetFunction:
        return greedy.GraphCut(greedy.cosine_vectors(vectors))


@dataclass(frozen=True)
class LogDeterminant(Submodular):
    """Samples that differ from each other: maximise ``log det(I + S_A)`` (Iyer et al. 2021, table 1).

    S are the similarities 1/2 + 1/2 cos of two gradients.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    balance : bool
        Choose from every class on its own, at the same ratio.
    optimizer : str
        ``"lazy"``; ``"naive"`` for the same at more cost; ``"stochastic"``, faster and nearly as good.
    """

    def _function(self, vectors: torch.Tensor) -> greedy.SetFunction:
        return greedy.LogDeterminant(greedy.cosine_vectors(vectors))
