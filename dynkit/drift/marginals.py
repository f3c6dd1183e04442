"""Distances of single columns, or of projections on a line, over all of them at once.

`KS` and `CramerVonMises` take the largest distance of any column, the others the mean over columns: a change of one
column among a thousand is for the former, how far samples moved for the latter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynkit.drift.chance import Tested, against_null, memberships, sampled
from dynkit.drift.columns import BINS, chi2, hellinger, js, ks_p_values, psi, quantile_edges
from dynkit.errors import check_whole

__all__ = ["JS", "KS", "PSI", "CramerVonMises", "Hellinger", "PredictedClasses", "SlicedWasserstein", "Wasserstein"]

_CELLS = 1 << 25  # of rows and bins at once


@dataclass(frozen=True)
class KS:
    """Kolmogorov-Smirnov test of every column; the score is the largest distance, the p-value is Bonferroni's.

    On a model's softmax outputs this is the black-box shift detection of Rabanser et al. 2019 (BBSDs).
    """

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Largest distance of two distribution functions over the columns of (N, D), (M, D)."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets; nothing is permuted."""
        n, m = len(reference), len(current)
        merged, order = torch.cat([reference, current]).sort(dim=0)
        step = (order < n).double().mul_(1 / n + 1 / m).sub_(1 / m).cumsum(0)
        last = torch.ones_like(merged, dtype=torch.bool)
        last[:-1] = merged[1:] != merged[:-1]  # the functions differ only after all equal samples
        distances = (step.abs() * last).max(0).values.cpu().numpy()
        p_value = min(1.0, len(distances) * float(ks_p_values(distances, n, m).min()))
        return Tested(float(distances.max()), p_value, np.empty(0))


@dataclass(frozen=True)
class CramerVonMises:
    """Mean squared difference of distribution functions over the pooled samples, of the column where it is largest.

    ``T (N + M) / (N M)`` of Anderson 1962, equation 2, with equal samples taken together; from 0 to about 1/3.

    Parameters
    ----------
    rows : int
        Most samples of each set; larger sets are sampled.
    """

    rows: int = 5_000

    def __post_init__(self) -> None:
        check_whole("rows", self.rows, 2)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Largest distance of a column of two sets (N, D), (M, D)."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets, and permutations of their rows."""
        x, y = (sampled(part, self.rows, rng) for part in (reference, current))
        scores = _over_lines(torch.cat([x, y]), len(x), permutations, rng, _mean_square, torch.maximum)
        return against_null(scores.cpu().numpy())


@dataclass(frozen=True)
class Wasserstein:
    """Mean over columns of the Wasserstein-1 distance, each in standard deviations of the reference.

    Parameters
    ----------
    rows : int
        Most samples of each set; larger sets are sampled.
    """

    rows: int = 5_000

    def __post_init__(self) -> None:
        check_whole("rows", self.rows, 2)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Mean distance of the columns of two sets (N, D), (M, D)."""
        rng = np.random.default_rng(0)
        return self._score(*(sampled(part, self.rows, rng) for part in (reference, current)))

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets, and permutations of their rows."""
        x, y = (sampled(part, self.rows, rng) for part in (reference, current))
        pooled = torch.cat([x, y])
        # Spreads of one side would treat the sides differently, which permutations do not; those of both are fair.
        scores = _over_lines(_scaled(pooled, pooled), len(x), permutations, rng, _area, torch.add)
        return Tested(self._score(x, y), *against_null(scores.cpu().numpy())[1:])

    def _score(self, x: torch.Tensor, y: torch.Tensor) -> float:
        scaled = _scaled(torch.cat([x, y]), x)
        score = _over_lines(scaled, len(x), 0, np.random.default_rng(0), _area, torch.add) / x.shape[1]
        return against_null(score.cpu().numpy()).score


@dataclass(frozen=True)
class SlicedWasserstein:
    """Mean of the Wasserstein-1 distances of random one-dimensional projections (Bonneel et al. 2015, section 2.3).

    Parameters
    ----------
    projections : int
        Number of directions.
    rows : int
        Most samples of each set; larger sets are sampled.
    """

    projections: int = 64
    rows: int = 5_000

    def __post_init__(self) -> None:
        check_whole("projections", self.projections, 1)
        check_whole("rows", self.rows, 2)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Sliced Wasserstein distance of two sets (N, D), (M, D)."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets, and permutations of their rows."""
        x, y = (sampled(part, self.rows, rng) for part in (reference, current))
        directions = torch.from_numpy(rng.normal(size=(x.shape[1], self.projections))).to(x)
        projected = torch.cat([x, y]) @ (directions / directions.norm(dim=0))
        scores = _over_lines(projected, len(x), permutations, rng, _area, torch.add) / self.projections
        return against_null(scores.cpu().numpy())


class _OfShares:
    """Mean over columns of a distance of the shares of bins between the reference's quantiles.

    P-values are those of permuted rows with bins between the quantiles of both sets.
    """

    rows: int

    def __post_init__(self) -> None:
        check_whole("rows", self.rows, 2)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Mean distance of the columns of two sets (N, D), (M, D)."""
        return self.prepare(reference).score(current)

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets, and permutations of their rows among bins of both."""
        return self.prepare(reference).tested(current, permutations, rng)

    def prepare(self, reference: torch.Tensor) -> "_Binned":
        """Find the bins of the reference (N, D), and where it lies."""
        raise NotImplementedError


@dataclass(frozen=True)
class PSI(_OfShares):
    """Population stability index, ``sum (q - p) log(q / p)``, of ten bins between the reference's quantiles.

    The mean over columns. Chance alone gives about ``9 (1/N + 1/M)``.

    Parameters
    ----------
    rows : int
        Most samples of each set; larger sets are sampled.
    """

    rows: int = 50_000

    def prepare(self, reference: torch.Tensor) -> "_Binned":
        """Find the bins of the reference (N, D), and where it lies."""
        return _Binned(psi, self.rows, reference)


@dataclass(frozen=True)
class JS(_OfShares):
    """Jensen-Shannon distance to the base 2, from 0 to 1, of ten bins between the reference's quantiles.

    The mean over columns.

    Parameters
    ----------
    rows : int
        Most samples of each set; larger sets are sampled.
    """

    rows: int = 50_000

    def prepare(self, reference: torch.Tensor) -> "_Binned":
        """Find the bins of the reference (N, D), and where it lies."""
        return _Binned(js, self.rows, reference)


@dataclass(frozen=True)
class Hellinger(_OfShares):
    """Hellinger distance, from 0 to 1, of ten bins between the reference's quantiles.

    The mean over columns.

    Parameters
    ----------
    rows : int
        Most samples of each set; larger sets are sampled.
    """

    rows: int = 50_000

    def prepare(self, reference: torch.Tensor) -> "_Binned":
        """Find the bins of the reference (N, D), and where it lies."""
        return _Binned(hellinger, self.rows, reference)


@dataclass(frozen=True)
class PredictedClasses:
    """Chi-square test of the classes a model predicts, from its outputs (BBSDh, Rabanser et al. 2019, section 3).

    The score is Cramer's V. Samples are outputs (N, K), one for each class, of which the largest is the prediction;
    (N, 1) is the probability of class 1 of two.
    """

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Cramer's V of the predicted classes of two sets (N, K), (M, K)."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets; nothing is permuted."""
        classes = max(2, reference.shape[1])
        old, new = (
            torch.bincount(part.argmax(1) if part.shape[1] > 1 else (part[:, 0] > 0.5).long(), minlength=classes)
            for part in (reference, current)
        )
        effect, p_value = chi2(old.cpu().numpy(), new.cpu().numpy())
        if math.isnan(p_value):  # each class a few times only
            return Tested(0.0, 1.0, np.empty(0))
        return Tested(effect, p_value, np.empty(0))


class _Binned:
    """A sampled reference (N, D), the bins between the quantiles of each column, and how many rows are in each."""

    def __init__(self, distance: Callable[[Any, Any], Any], rows: int, reference: torch.Tensor) -> None:
        self.distance, self.rows, self.reference = distance, rows, reference
        self._some = sampled(reference, rows, np.random.default_rng(0))
        self._edges = _edges(self._some)
        self._counts = self._count(self._some)

    def score(self, current: torch.Tensor) -> float:
        some = sampled(current, self.rows, np.random.default_rng(0))
        return float(self.distance(self._counts, self._count(some)).mean())

    def tested(self, current: torch.Tensor, permutations: int, rng: np.random.Generator) -> Tested:
        some = sampled(current, self.rows, np.random.default_rng(0))
        # Bins of one side would treat the sides differently, which permutations do not; bins of both are fair.
        scores = self._permuted(torch.cat([self._some, some]), len(self._some), permutations, rng)
        return Tested(self.score(current), *against_null(scores)[1:])

    def extended(self, more: torch.Tensor) -> "_Binned":
        return _Binned(self.distance, self.rows, torch.cat([self.reference, more]))

    def _count(self, x: torch.Tensor) -> Any:
        flat, width = _bins(x, self._edges)
        counts = torch.bincount(flat.flatten(), minlength=x.shape[1] * width)
        return counts.reshape(x.shape[1], width).cpu().numpy()

    def _permuted(self, pooled: torch.Tensor, n: int, permutations: int, rng: np.random.Generator) -> Any:
        z = memberships(n, len(pooled) - n, permutations, rng).to(pooled.device, torch.float32)  # exact below 2**24
        columns, each = max(1, _CELLS // (3 * BINS * len(pooled))), []
        for x in torch.split(pooled, columns, dim=1):
            flat, width = _bins(x, _edges(x))
            member = torch.zeros(len(x), x.shape[1] * width, device=x.device).scatter_(1, flat.T, 1)
            of_x = z @ member
            sides = [side.view(len(z), -1, width).double().cpu().numpy() for side in (of_x, member.sum(0) - of_x)]
            each.append(self.distance(*sides))
        return np.concatenate(each, axis=1).mean(1)


def _edges(x: torch.Tensor) -> torch.Tensor:
    """Upper edges (D, E) of the bins of each column; those with fewer have empty ones at infinity."""
    edges = [quantile_edges(column) for column in x.T.contiguous().sort(1).values.cpu().numpy()]
    most = max(len(column) for column in edges)
    padded = [np.pad(column, (0, most - len(column)), constant_values=np.inf) for column in edges]
    return torch.from_numpy(np.stack(padded)).to(x)


def _bins(x: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the bin (D, N) of each number, counted through all columns, and the bins of a column."""
    width = edges.shape[1] + 1
    first = torch.arange(len(edges), device=x.device)[:, None] * width
    return torch.searchsorted(edges, x.T.contiguous()) + first, width


def _scaled(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Divide columns by the standard deviations of others."""
    spread = by.std(0, correction=0)
    return x / torch.where(spread > 0, spread, 1)


def _over_lines(
    points: torch.Tensor,
    n: int,
    permutations: int,
    rng: np.random.Generator,
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    joined: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Measure the difference of distribution functions along each column for all permutations, and join columns."""
    m = len(points) - n
    exact = torch.float32 if n * m < 2**24 else torch.float64  # for whole numbers, so that equal differences are equal
    z = memberships(n, m, permutations, rng).to(points.device, exact)
    step = z * m - (1 - z) * n  # of n m (F - G) at each sample
    scores = torch.zeros(len(z), dtype=torch.float64, device=points.device)
    for line in points.T:
        place, order = line.sort()
        scores = joined(scores, measure(step[:, order].cumsum_(1).div_(n * m), place).double())
    return scores


def _area(difference: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Area between the functions: the Wasserstein-1 distance."""
    return difference[:, :-1].abs_().to(place) @ place.diff()


def _mean_square(difference: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Mean squared difference at the samples; equal ones have that of the last of them."""
    last = torch.cat([place.diff() > 0, torch.ones(1, dtype=torch.bool, device=place.device)]).nonzero()[:, 0]
    times = last.diff(prepend=last.new_full((1,), -1))
    return difference[:, last].double().square() @ (times / len(place)).double()
