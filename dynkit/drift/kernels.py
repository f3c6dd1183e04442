"""Distances from a kernel of all pairs of samples: MMD by all pairs, by blocks and by random features; energy.

Each is ``E k(X, X') + E k(Y, Y') - 2 E k(X, Y)``. The part within the reference is computed once when it is prepared,
and so is the kernel's bandwidth; random features of a reference are sums, to which more rows are added.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its parts load at first use
import torch

from dynkit.drift.chance import Kept, Tested, against_null, memberships, sampled
from dynkit.errors import InvalidInput, check_whole

__all__ = ["MMD", "PAIRS", "BlockMMD", "Energy", "center", "median_square", "squares"]

Kernel = Callable[[torch.Tensor], torch.Tensor]  # of squared distances, in place

_EXACT_ROWS = 10_000  # of both sets together: a matrix of all pairs takes 400 MB
_BANDWIDTH_ROWS = 2_000
_SMALL_ROWS = 500
_BLOCK_ROWS = 8_192
_CACHED_PAIRS = 1 << 18  # of one block on a CPU
PAIRS = 1 << 24  # of a block of the matrix of all pairs
_CHUNKS = 1_000  # of one set, permuted as wholes
_FEATURES = 1_024
_CENTER_ROWS = 200
_ROUNDING = 8  # of a squared distance, in units of the norms' last place


@dataclass(frozen=True)
class MMD:
    """Maximum mean discrepancy, squared and unbiased, of a Gaussian kernel (Gretton et al. 2012, equation 3).

    Parameters
    ----------
    features : int or None
        Number of random Fourier features (Rahimi and Recht 2007) in place of all pairs: time and memory grow with the
        samples, not with their square. Permuted are then up to 1 000 chunks of neighbouring rows of each set, which
        also allows for samples that resemble their neighbours. A set of more than 10 000 samples and ten times the
        other is sampled. None means all pairs up to 10 000 samples in both sets together, and 1 024 features beyond.
    bandwidth : float or None
        The kernel is ``exp(-|x - y|**2 / (2 bandwidth**2))``. None is the median heuristic: ``2 bandwidth**2`` is the
        median squared distance of up to 2 000 samples of both sets, of the reference alone where it is prepared.
    """

    features: int | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.features is not None:
            check_whole("features", self.features, 2)
        _check_bandwidth(self.bandwidth)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Squared discrepancy of two sets (N, D), (M, D); unbiased, so it can be slightly negative."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets, and permutations of their rows or chunks."""
        gamma = _gamma(self.bandwidth, reference, current, rng)
        if self.features is None and len(reference) + len(current) <= _EXACT_ROWS:
            return _all_pairs(reference, current, _gaussian(gamma), permutations, rng, unbiased=True)
        x, y = (sampled(a, max(10 * len(b), _EXACT_ROWS), rng) for a, b in ((reference, current), (current, reference)))
        w = _frequencies(self.features, gamma, x, rng)
        size = _chunk_rows(x, y)
        return _permuted_chunks(_feature_means(x, w, size), _feature_means(y, w, size), size, permutations, rng)

    def prepare(self, reference: torch.Tensor) -> "_PreparedMMD":
        """Fix the bandwidth by the reference (N, D)."""
        rng = np.random.default_rng(0)
        gamma = _gamma(self.bandwidth, reference, reference[:0], rng)
        return _PreparedMMD(dataclasses.replace(self, bandwidth=(2 * gamma) ** -0.5), reference)


@dataclass(frozen=True)
class BlockMMD:
    """Mean of the MMD of blocks of samples (B-test, Zaremba et al. 2013, equation 4).

    Between all pairs and none: the time grows with the power 1.5 of the samples. The blocks' values are independent,
    so that their mean and spread give a p-value (of Student's t, as blocks can be few) without permutations.

    Parameters
    ----------
    block : int or None
        Rows of a block of the smaller set; None is the root of its size.
    bandwidth : float or None
        See `MMD`.
    """

    block: int | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            check_whole("block", self.block, 2)
        _check_bandwidth(self.bandwidth)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Squared discrepancy of two sets (N, D), (M, D); unbiased, so it can be slightly negative."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets; nothing is permuted but the order of the rows."""
        kernel = _gaussian(_gamma(self.bandwidth, reference, current, rng))
        smaller = min(len(reference), len(current))
        blocks = max(1, smaller // (self.block or max(2, math.isqrt(smaller))))
        parts = []
        for rows in (reference, current):
            order = torch.from_numpy(rng.permutation(len(rows))).to(rows.device)
            size = len(rows) // blocks
            parts.append(rows[order[: blocks * size]].view(blocks, size, -1))
        step = max(1, PAIRS // (parts[0].shape[1] + parts[1].shape[1]) ** 2)
        scores = torch.cat(
            [
                _block_scores(x, y, kernel)
                for x, y in zip(torch.split(parts[0], step), torch.split(parts[1], step), strict=True)
            ]
        )
        values = scores.cpu().numpy()
        score, spread = float(values.mean()), float(values.std(ddof=1)) if blocks > 1 else 0.0
        if not math.isfinite(score):
            raise InvalidInput("the score is not a finite number; scale the samples first, they are too large")
        if spread == 0:
            return Tested(score, 1.0, np.empty(0))
        return Tested(score, float(scipy.stats.t.sf(score / spread * blocks**0.5, blocks - 1)), np.empty(0))

    def prepare(self, reference: torch.Tensor) -> Kept:
        """Fix the bandwidth by the reference (N, D)."""
        gamma = _gamma(self.bandwidth, reference, reference[:0], np.random.default_rng(0))
        return Kept(dataclasses.replace(self, bandwidth=(2 * gamma) ** -0.5), reference)


@dataclass(frozen=True)
class Energy:
    """Energy distance: ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` (Szekely and Rizzo 2013, equation 2.1).

    Parameters
    ----------
    rows : int
        Most samples of each set; larger sets are sampled.
    """

    rows: int = 5_000

    def __post_init__(self) -> None:
        check_whole("rows", self.rows, 2)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Energy distance of two sets (N, D), (M, D)."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets, and permutations of their rows."""
        x, y = (sampled(part, self.rows, rng) for part in (reference, current))
        return _all_pairs(x, y, _minus_distance, permutations, rng, unbiased=False)

    def prepare(self, reference: torch.Tensor) -> "_PreparedEnergy":
        """Compute the distances within the reference (N, D)."""
        return _PreparedEnergy(self, reference)


class _PreparedMMD:
    """A reference with the kernel means within it: of all pairs, of random features, as soon as either is asked for."""

    def __init__(self, metric: MMD, reference: torch.Tensor, sums: torch.Tensor | None = None) -> None:
        assert metric.bandwidth is not None
        self.metric, self.reference = metric, reference
        self._gamma = 1 / (2 * metric.bandwidth**2)
        self._sums, self._within = sums, math.nan
        self._chunks: tuple[int, torch.Tensor] | None = None

    def score(self, current: torch.Tensor) -> float:
        n, m, kernel = len(self.reference), len(current), _gaussian(self._gamma)
        if self._exact(m):
            if math.isnan(self._within):
                self._within = _mean_pairs(self.reference, self.reference, kernel, 1)
            across = _mean_pairs(self.reference, current, kernel, 0)
            return _finite(self._within + _mean_pairs(current, current, kernel, 1) - 2 * across)
        if self._sums is None:
            self._sums = self._feature_sums(self.reference)
        return _finite(float(_discrepancy(self._sums / n, n, self._feature_sums(current) / m, m)))

    def tested(self, current: torch.Tensor, permutations: int, rng: np.random.Generator) -> Tested:
        largest = max(10 * len(current), _EXACT_ROWS)
        if self._exact(len(current)) or len(self.reference) > largest or len(current) > 10 * len(self.reference):
            return self.metric.tested(self.reference, current, permutations, rng)
        w, size = self._frequencies(current), _chunk_rows(self.reference, current)
        if self._chunks is None or self._chunks[0] != size:
            self._chunks = size, _feature_means(self.reference, w, size)
        return _permuted_chunks(self._chunks[1], _feature_means(current, w, size), size, permutations, rng)

    def extended(self, more: torch.Tensor) -> "_PreparedMMD":
        sums = None if self._sums is None else self._sums + self._feature_sums(more)
        return _PreparedMMD(self.metric, torch.cat([self.reference, more]), sums)

    def _exact(self, rows: int) -> bool:
        return self.metric.features is None and len(self.reference) + rows <= _EXACT_ROWS

    def _frequencies(self, x: torch.Tensor) -> torch.Tensor:
        return _frequencies(self.metric.features, self._gamma, x, np.random.default_rng(0))

    def _feature_sums(self, x: torch.Tensor) -> torch.Tensor:
        w = self._frequencies(x)
        whole = len(x) - len(x) % _BLOCK_ROWS
        sums = _feature_means(x[:whole], w, _BLOCK_ROWS).double().sum(0) * _BLOCK_ROWS
        if whole < len(x):
            sums = sums + _feature_means(x[whole:], w, len(x) - whole)[0].double() * (len(x) - whole)
        return sums


class _PreparedEnergy:
    """A sampled reference with the mean distance within it."""

    def __init__(self, metric: Energy, reference: torch.Tensor) -> None:
        self.metric, self.reference = metric, reference
        self._some = sampled(reference, metric.rows, np.random.default_rng(0))
        self._within = math.nan

    def score(self, current: torch.Tensor) -> float:
        if math.isnan(self._within):
            self._within = _mean_pairs(self._some, self._some, _minus_distance, 0)
        y = sampled(current, self.metric.rows, np.random.default_rng(0))
        within = self._within + _mean_pairs(y, y, _minus_distance, 0)
        return _finite(within - 2 * _mean_pairs(self._some, y, _minus_distance, 0))

    def tested(self, current: torch.Tensor, permutations: int, rng: np.random.Generator) -> Tested:
        return self.metric.tested(self.reference, current, permutations, rng)

    def extended(self, more: torch.Tensor) -> "_PreparedEnergy":
        return _PreparedEnergy(self.metric, torch.cat([self.reference, more]))


def _check_bandwidth(bandwidth: float | None) -> None:
    if bandwidth is not None and not (isinstance(bandwidth, int | float) and 0 < bandwidth < math.inf):
        raise InvalidInput(f"bandwidth={bandwidth!r} must be a positive number, or None for the median heuristic")


def _gamma(bandwidth: float | None, x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> float:
    return 1 / median_square(x, y, rng) if bandwidth is None else 1 / (2 * bandwidth**2)


def _gaussian(gamma: float) -> Kernel:
    return lambda square: square.mul_(-gamma / math.log(2)).exp2_()  # twice as fast as exp_ on a CPU


def _minus_distance(square: torch.Tensor) -> torch.Tensor:
    return square.sqrt_().neg_()


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise InvalidInput("the score is not a finite number; scale the samples first, they are too large")
    return score


def squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distances (..., N, M) of rows, which are small numbers: equal ones are at distance 0."""
    left, right = _factors(x, y)
    return (left @ right).clamp_min_(0)


def center(x: torch.Tensor) -> torch.Tensor:
    """Where most rows are (D,): numbers from there keep their digits in products, whatever outliers there are."""
    return x[:: len(x) // _CENTER_ROWS + 1].median(0).values


def _factors(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``[-2 x, |x|^2, 1]`` and ``[y, 1, |y|^2]^T``: squared distances are their product, where it is above 0.

    The norms are shortened by what rounding can add, so that of two equal rows nothing above 0 is left.
    """
    short = 1 - _ROUNDING * torch.finfo(x.dtype).eps
    norms_x, norms_y = (short * rows.square().sum(-1, keepdim=True) for rows in (x, y))
    left = torch.cat([-2 * x, norms_x, torch.ones_like(norms_x)], -1)
    return left, torch.cat([y, torch.ones_like(norms_y), norms_y], -1).mT.contiguous()


def _mean_pairs(x: torch.Tensor, y: torch.Tensor, kernel: Kernel, itself: int) -> float:
    """Mean kernel of pairs of rows, block by block; `itself` is 1 to leave out each sample's pair with itself.

    A block of squared distances is one product into memory that is used again and stays in the processor's cache: ten
    times as fast as all pairs at once.
    """
    within = x is y
    if len(x) <= _SMALL_ROWS:
        x, y = x.double(), y.double()
    middle = center(x)
    left, right = _factors(x - middle, y - middle)
    rows = max(1, (_CACHED_PAIRS if x.device.type == "cpu" else PAIRS) // len(y))
    memory = x.new_empty(min(rows, len(x)) * len(y))
    total = 0.0
    for low in range(0, len(x), rows):
        some, others = left[low : low + rows], right[:, low if within else 0 :]
        square = torch.mm(some, others, out=memory[: len(some) * others.shape[1]].view(len(some), -1)).clamp_min_(0)
        pairs = kernel(square)
        total += (1 + within) * float(pairs.sum(1).sum(dtype=torch.float64))
        if within:  # those to the right of the diagonal are twice, the block on it once
            total -= float(pairs[:, : len(some)].sum(1).sum(dtype=torch.float64))
    return (total - itself * len(x)) / (len(x) * (len(y) - itself))


def _block_scores(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """Unbiased scores (B,) of blocks (B, N, D), (B, M, D)."""
    middle = center(x.flatten(0, 1))
    x, y = x - middle, y - middle
    n, m = x.shape[1], y.shape[1]
    within_x, within_y, across = (
        kernel(squares(a, b)).sum((1, 2), dtype=torch.float64) for a, b in ((x, x), (y, y), (x, y))
    )
    return (within_x - n) / (n * (n - 1)) + (within_y - m) / (m * (m - 1)) - 2 * across / (n * m)


def _all_pairs(
    x: torch.Tensor, y: torch.Tensor, kernel: Kernel, permutations: int, rng: np.random.Generator, *, unbiased: bool
) -> Tested:
    """Score all permutations at once, from the matrix of all pairs of both sets."""
    n, m = len(x), len(y)
    pooled = torch.cat([x, y])
    if len(pooled) <= _SMALL_ROWS:
        pooled = pooled.double()  # few permutations are possible, and equal ones must be seen to be equal
    pooled = pooled - center(pooled)
    pairs = kernel(squares(pooled, pooled).fill_diagonal_(0)).fill_diagonal_(0)
    z = memberships(n, m, permutations, rng).to(pairs)
    row_sums = pairs.sum(1, dtype=torch.float64)
    within_x = ((z @ pairs) * z).sum(1, dtype=torch.float64)
    within_x[0] = pairs[:n, :n].sum(dtype=torch.float64)
    from_x = z.double() @ row_sums
    across, within_y = from_x - within_x, row_sums.sum() - 2 * from_x + within_x
    pairs_x, pairs_y = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    return against_null((within_x / pairs_x + within_y / pairs_y - 2 * across / (n * m)).cpu().numpy())


def median_square(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> float:
    """Median squared distance of different samples, of some of both sets."""
    share = len(x) / (len(x) + len(y))
    n = min(len(x), max(1, round(share * _BANDWIDTH_ROWS)))
    some = torch.cat([sampled(x, n, rng), sampled(y, max(1, _BANDWIDTH_ROWS - n), rng)]).double()
    some = some - center(some)
    each = np.concatenate([row[i:] for i, row in enumerate(squares(some, some).cpu().numpy(), 1)])
    equal = len(each) - int(np.count_nonzero(each))
    middle = equal + (len(each) - equal - 1) // 2
    median = _smallest(each, middle) if equal < len(each) else 1.0
    if not np.isfinite(median):
        raise InvalidInput("the samples are too large to be compared; scale them first")
    return median


def _smallest(values: "np.ndarray[Any, Any]", k: int) -> float:
    """Return the k-th smallest number, from 0; a sample tells about where it is, so that few are put in order."""
    some = np.sort(values[:: len(values) // 4096 + 1])
    place = k * len(some) // len(values)
    low, high = some[max(place - 128, 0)], some[min(place + 128, len(some) - 1)]
    near = values[(values >= low) & (values <= high)]
    before = k - int(np.count_nonzero(values < low))
    if not 0 <= before < len(near):  # or there is a NaN
        near, before = values, k
    return float(np.partition(near, before)[before])


def _frequencies(features: int | None, gamma: float, x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Draw frequencies w (D, F), so that ``E cos(w (x - y))`` is the kernel."""
    frequencies = ((features or _FEATURES) + 1) // 2
    return torch.from_numpy(rng.normal(scale=(2 * gamma) ** 0.5, size=(x.shape[1], frequencies))).to(x)


def _feature_means(x: torch.Tensor, w: torch.Tensor, size: int) -> torch.Tensor:
    """Mean random Fourier features of chunks of rows (N // size, 2 F); rows left over are not used."""
    chunks, frequencies = len(x) // size, w.shape[1]
    step = max(1, _BLOCK_ROWS // size)
    means = x.new_empty(chunks, 2 * frequencies)
    phase, waves = x.new_empty(step * size, frequencies), x.new_empty(step * size, 2 * frequencies)
    for low in range(0, chunks, step):
        rows = x[low * size : min(low + step, chunks) * size]
        angle, wave = torch.mm(rows, w, out=phase[: len(rows)]), waves[: len(rows)]
        torch.cos(angle, out=wave[:, :frequencies])
        torch.sin(angle, out=wave[:, frequencies:])
        torch.mean(wave.view(-1, size, 2 * frequencies), 1, out=means[low : low + step])
    return means.div_(frequencies**0.5)


def _chunk_rows(x: torch.Tensor, y: torch.Tensor) -> int:
    return -(-min(len(x), len(y)) // _CHUNKS)


def _permuted_chunks(
    x: torch.Tensor, y: torch.Tensor, size: int, permutations: int, rng: np.random.Generator
) -> Tested:
    """Score mean features of chunks of `size` rows, and permutations of the chunks."""
    n, m, chunks = len(x), len(y), torch.cat([x, y]).double()
    z = memberships(n, m, permutations, rng).to(chunks)
    total, mean_x = chunks.sum(0), z @ chunks / n
    mean_y = (total - n * mean_x) / m
    return against_null(_discrepancy(mean_x, n * size, mean_y, m * size).cpu().numpy())


def _discrepancy(mean_x: Any, n: int, mean_y: Any, m: int) -> torch.Tensor:
    """Unbiased squared distance of mean features (..., 2 F) of n and m rows: without pairs of a sample with itself."""
    within_x = (n * mean_x.square().sum(-1) - 1) / (n - 1)
    within_y = (m * mean_y.square().sum(-1) - 1) / (m - 1)
    discrepancy: torch.Tensor = within_x + within_y - 2 * (mean_x * mean_y).sum(-1)
    return discrepancy
