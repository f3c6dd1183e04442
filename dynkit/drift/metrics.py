"""Distances between two sets of samples, with the probability of a larger one where nothing has changed.

Samples are rows of numbers (N, D). A metric scores the two sets as they are, and again with their rows permuted: the
permuted scores show what chance alone does. No permutation is computed on its own: all of them are one product of a
matrix of memberships with a matrix that does not depend on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import polars as pl
import torch
from scipy import stats

from dynkit.drift.columns import check_level, ks_p_values, same_columns
from dynkit.errors import InvalidInput, NotFound, PolicyError, check_whole, did_you_mean
from dynkit.policies import as_drift_metric
from dynkit.types import DriftMetric

__all__ = ["KS", "MMD", "Classifier", "DriftTest", "Energy", "SlicedWasserstein", "test"]

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]

_EXACT_ROWS = 10_000  # of both sets together: a matrix of all pairs takes 400 MB
_BANDWIDTH_ROWS = 2_000
_SMALL_ROWS = 2_000
_BLOCK_ROWS = 8_192
_CHUNKS = 1_000  # of one set, permuted as wholes
_ROUNDS = 100  # of training a classifier


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


@dataclass(frozen=True)
class DriftTest:
    """Result of `test`.

    Parameters
    ----------
    metric : str
    score : float
        0 where nothing changed; larger is further.
    p_value : float
        Probability of such a score or a larger one, were both sets drawn from one distribution.
    level : float
        Below which `p_value` counts as drift.
    null : (permutations,) float64
        Scores of permuted samples; empty where the p-value follows from a formula.
    """

    metric: str
    score: float
    p_value: float
    level: float
    null: Scores

    @property
    def drifted(self) -> bool:
        """Whether the sets differ by more than chance explains."""
        return self.p_value < self.level

    def __repr__(self) -> str:
        verdict = "drifted" if self.drifted else "no drift"
        return f"{self.metric}: {verdict}, score={self.score:.4g}, p_value={self.p_value:.4g} (level {self.level:g})"


def test(
    reference: Any,
    current: Any,
    metric: str | DriftMetric = "mmd",
    *,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.05,
) -> DriftTest:
    """Test whether two sets of samples come from one distribution.

    Parameters
    ----------
    reference, current : tensor, array or frame (N, ...), (M, ...)
        Numbers; of more than two dimensions the later ones are flattened. Tensors are compared on their device.
    metric : str or callable
        ``"mmd"``, ``"energy"``, ``"sliced_wasserstein"``, ``"c2st"`` or ``"ks"`` with their defaults, one of
        `MMD`, `Energy`, `SlicedWasserstein`, `Classifier` and `KS` with your own, or a function of two tensors.
    permutations : int
        How often rows are permuted for the p-value, which is at least ``1 / (permutations + 1)``.
    seed : int
        Same seed, same result.
    level : float
        Accepted share of false alarms.

    Returns
    -------
    DriftTest
        With score, p_value, drifted and the scores of the permuted samples.

    Raises
    ------
    InvalidInput
        When the samples are not finite numbers, or of different widths.
    NotFound
        When no metric has that name.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> test(rng.normal(size=(300, 4)), rng.normal(0.5, size=(300, 4))).drifted
    True
    """
    check_whole("permutations", permutations, 1)
    check_whole("seed", seed, 0)
    check_level(level)
    if isinstance(metric, str):
        if metric not in _METRICS:
            raise NotFound(f"no drift metric {metric!r}{did_you_mean(metric, _METRICS)}")
        metric = _METRICS[metric]()
    metric = as_drift_metric(metric)
    if isinstance(reference, pl.DataFrame | pl.LazyFrame) and isinstance(current, pl.DataFrame | pl.LazyFrame):
        reference, current = same_columns(reference, current)
    x, y = points(reference, "reference"), points(current, "current")
    if x.shape[1] != y.shape[1]:
        raise InvalidInput(
            f"reference has {x.shape[1]} numbers a row, current has {y.shape[1]}; compare like with like"
        )
    wider = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(wider), y.to(x.device, wider)
    tested = getattr(metric, "tested", None) or _Permuted(metric).tested
    name = getattr(metric, "__name__", type(metric).__name__)
    found = tested(x, y, permutations, np.random.default_rng(seed))
    return DriftTest(name, found.score, found.p_value, level, found.null)


def points(samples: Any, name: str) -> torch.Tensor:
    """Return samples as rows of numbers (N, D) float32, or float64 when they are."""
    if isinstance(samples, pl.Series):
        samples = samples.to_frame()
    if isinstance(samples, pl.LazyFrame):
        samples = samples.collect()
    if isinstance(samples, pl.DataFrame):
        text = [column for column, dtype in samples.schema.items() if not (dtype.is_numeric() or dtype == pl.Boolean)]
        if text:
            raise InvalidInput(f"column {text[0]!r} of {name} is not numeric; leave it out, or see drift.columns")
        samples = samples.with_columns(pl.all().cast(pl.Float64)).to_numpy()
    try:
        if isinstance(samples, torch.Tensor):
            tensor = samples.detach()
        else:
            array = np.ascontiguousarray(samples)
            tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} cannot be read as numbers: {error}") from None
    if tensor.ndim == 0 or len(tensor) < 2 or tensor.numel() == 0:
        raise InvalidInput(f"{name} has shape {tuple(tensor.shape)}; at least two samples of a number each are needed")
    if tensor.is_complex():
        raise InvalidInput(f"{name} is complex; compare its real and imaginary parts as columns")
    wide = tensor.dtype in (torch.float64, torch.int32, torch.int64)  # float32 has not the digits
    tensor = tensor.to(torch.float64 if wide else torch.float32).reshape(len(tensor), -1)
    bad = int((~torch.isfinite(tensor)).any(1).sum())
    if bad:
        raise InvalidInput(f"{bad} samples of {name} have NaN or infinite numbers; fill or drop them first")
    return tensor


@dataclass(frozen=True)
class MMD:
    """Maximum mean discrepancy, squared and unbiased, of a Gaussian kernel (Gretton et al. 2012, equation 3).

    The bandwidth is the median heuristic: ``2 sigma**2`` is the median squared distance of up to 2 000 samples.

    Parameters
    ----------
    features : int or None
        Number of random Fourier features (Rahimi and Recht 2007) in place of all pairs: time and memory grow with the
        samples, not with their square. Permuted are then up to 1 000 chunks of neighbouring rows of each set, which
        also allows for samples that resemble their neighbours. A set of more than 10 000 samples and ten times the
        other is sampled. None means all pairs up to 10 000 samples in both sets together, and 1 024 features beyond.
    """

    features: int | None = None

    def __post_init__(self) -> None:
        if self.features is not None:
            check_whole("features", self.features, 2)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Squared discrepancy of two sets (N, D), (M, D); unbiased, so it can be slightly negative."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets, and permutations of their rows or chunks."""
        gamma = 1 / _median_square(reference, current, rng)
        if self.features is None and len(reference) + len(current) <= _EXACT_ROWS:
            return _all_pairs(reference, current, lambda square: square.mul_(-gamma).exp_(), permutations, rng, True)
        return self._by_features(reference, current, gamma, permutations, rng)

    def _by_features(
        self, x: torch.Tensor, y: torch.Tensor, gamma: float, permutations: int, rng: np.random.Generator
    ) -> Tested:
        x, y = (_some(a, max(10 * len(b), _EXACT_ROWS), rng) for a, b in ((x, y), (y, x)))
        frequencies = ((self.features or 1024) + 1) // 2
        weights = rng.normal(scale=(2 * gamma) ** 0.5, size=(x.shape[1], frequencies))  # E cos(w(x - y)) is the kernel
        w = torch.from_numpy(weights).to(x)
        size = -(-min(len(x), len(y)) // _CHUNKS)
        chunks = torch.cat([_feature_means(part, w, size) for part in (x, y)]).double()
        n, m = len(x) // size, len(y) // size
        z = _memberships(n, m, permutations, rng).to(chunks)
        total, mean_x = chunks.sum(0), z @ chunks / n
        mean_y = (total - n * mean_x) / m
        rows_x, rows_y = n * size, m * size
        within_x = (rows_x * mean_x.square().sum(1) - 1) / (rows_x - 1)  # without pairs of a sample with itself
        within_y = (rows_y * mean_y.square().sum(1) - 1) / (rows_y - 1)
        return _against_null((within_x + within_y - 2 * (mean_x * mean_y).sum(1)).cpu().numpy())


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
        x, y = (_some(part, self.rows, rng) for part in (reference, current))
        return _all_pairs(x, y, lambda square: square.sqrt_().neg_(), permutations, rng, False)


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
        x, y = (_some(part, self.rows, rng) for part in (reference, current))
        directions = torch.from_numpy(rng.normal(size=(x.shape[1], self.projections))).to(x)
        projected = torch.cat([x, y]) @ (directions / directions.norm(dim=0))
        z = _memberships(len(x), len(y), permutations, rng).to(projected)
        step = z / len(x) - (1 - z) / len(y)  # of F - G at each sample
        scores = torch.zeros(len(z), dtype=torch.float64, device=x.device)
        for line in projected.T:
            place, order = line.sort()
            scores += step[:, order[:-1]].cumsum(1).abs_() @ place.diff() / self.projections
        return _against_null(scores.cpu().numpy())


@dataclass(frozen=True)
class Classifier:
    """How well a classifier can tell the sets apart (classifier two-sample test, Lopez-Paz and Oquab 2017).

    A logistic regression on the numbers and their squares learns from half of the samples. The score is
    ``2 (AUC - 1/2)``, at least 0, on the other half; the p-value is that of the Mann-Whitney test.
    """

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """How well two sets (N, D), (M, D) can be told apart, from 0 to 1."""
        return self.tested(reference, current, 0, np.random.default_rng(0)).score

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets; nothing is permuted."""
        pooled = torch.cat([reference, current])
        spread = pooled.std(0)
        if not torch.isfinite(spread).all():
            raise InvalidInput("the samples are too large to be compared; scale them first")
        pooled = (pooled - pooled.mean(0)) / torch.where(spread > 0, spread, 1)
        pooled = torch.cat([pooled, pooled.square().clamp_max(100)], 1)
        is_current = torch.arange(len(pooled), device=pooled.device) >= len(reference)
        halves = [torch.from_numpy(rng.permutation(n)).to(pooled.device) for n in (len(reference), len(current))]
        learn = torch.cat([halves[0][::2], halves[1][::2] + len(reference)])
        judge = torch.cat([halves[0][1::2], halves[1][1::2] + len(reference)])
        margin = _logistic(pooled[learn], is_current[learn], pooled[judge]).cpu().numpy()
        new = is_current[judge].cpu().numpy()
        if margin.std() == 0:
            return Tested(0.0, 1.0, np.empty(0))
        rank = stats.mannwhitneyu(margin[new], margin[~new], alternative="greater")
        auc = float(rank.statistic) / (int(new.sum()) * int((~new).sum()))
        return Tested(max(0.0, 2 * auc - 1), float(rank.pvalue), np.empty(0))


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


_METRICS: dict[str, Callable[[], Metric]] = {
    "mmd": MMD,
    "energy": Energy,
    "sliced_wasserstein": SlicedWasserstein,
    "c2st": Classifier,
    "ks": KS,
}


@dataclass(frozen=True)
class _Permuted:
    """A user's function, called once for each permutation."""

    metric: DriftMetric

    def tested(self, x: torch.Tensor, y: torch.Tensor, permutations: int, rng: np.random.Generator) -> Tested:
        pooled = torch.cat([x, y])
        masks = _memberships(len(x), len(y), permutations, rng).to(x.device)
        scores = [self.metric(pooled[mask], pooled[~mask]) for mask in masks]
        try:
            return _against_null(np.array([float(score) for score in scores]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise PolicyError(f"drift metric {self.metric!r} must return one finite number: {error}") from None


def _memberships(n: int, m: int, permutations: int, rng: np.random.Generator) -> torch.Tensor:
    """Which rows are reference (1 + permutations, n + m): as they are, then permuted."""
    rows = np.zeros((1 + permutations, n + m), bool)
    rows[:, :n] = True
    rng.permuted(rows[1:], axis=1, out=rows[1:])
    return torch.from_numpy(rows)


def _against_null(scores: Scores) -> Tested:
    """Rank the first score among the others: (1 + #{null >= score}) / (1 + B) (Phipson and Smyth 2010)."""
    if not np.isfinite(scores).all():
        raise InvalidInput(
            "the score is not a finite number; scale the samples first, they are too large to be compared"
        )
    score, null = float(scores[0]), scores[1:].astype(np.float64)
    tolerance = 1e-9 * float(np.abs(scores).max())  # equal but for rounding
    return Tested(score, float((1 + (null >= score - tolerance).sum()) / (1 + len(null))), null)


def _all_pairs(
    x: torch.Tensor,
    y: torch.Tensor,
    kernel: Callable[[torch.Tensor], torch.Tensor],
    permutations: int,
    rng: np.random.Generator,
    unbiased: bool,
) -> Tested:
    """Score ``E k(X, X') + E k(Y, Y') - 2 E k(X, Y)`` of a kernel of squared distances for all permutations at once."""
    n, m = len(x), len(y)
    pooled = torch.cat([x, y])
    if len(pooled) <= _SMALL_ROWS:
        pooled = pooled.double()  # few permutations are possible, and equal ones must be seen to be equal
    pooled = pooled - pooled.mean(0)  # small numbers keep their digits in the product
    norms = pooled.square().sum(1)
    square = torch.addmm(norms[:, None] + norms, pooled, pooled.T, alpha=-2)
    rounding = 8 * torch.finfo(pooled.dtype).eps * float(norms.max())
    torch.threshold_(square, rounding, 0)  # equal samples are at distance 0
    pairs = kernel(square.fill_diagonal_(0)).fill_diagonal_(0)
    z = _memberships(n, m, permutations, rng).to(pairs)
    row_sums = pairs.sum(1, dtype=torch.float64)
    within_x = ((z @ pairs) * z).sum(1, dtype=torch.float64)
    within_x[0] = pairs[:n, :n].sum(dtype=torch.float64)
    from_x = z.double() @ row_sums
    across, within_y = from_x - within_x, row_sums.sum() - 2 * from_x + within_x
    pairs_x, pairs_y = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    return _against_null((within_x / pairs_x + within_y / pairs_y - 2 * across / (n * m)).cpu().numpy())


def _median_square(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> float:
    """Median squared distance of different samples, of some of both sets."""
    share = len(x) / (len(x) + len(y))
    n = min(len(x), max(1, round(share * _BANDWIDTH_ROWS)))
    some = torch.cat([_some(x, n, rng), _some(y, max(1, _BANDWIDTH_ROWS - n), rng)])
    squares = torch.pdist(some.double()).square()
    different = squares[squares > 0]
    median = float(different.median()) if len(different) else 1.0
    if not np.isfinite(median):
        raise InvalidInput("the samples are too large to be compared; scale them first")
    return median


def _some(x: torch.Tensor, rows: int, rng: np.random.Generator) -> torch.Tensor:
    """Sample rows without replacement, in their order."""
    if len(x) <= rows:
        return x
    return x[torch.from_numpy(np.sort(rng.choice(len(x), rows, replace=False))).to(x.device)]


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


def _logistic(x: torch.Tensor, y: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Fit a logistic regression with a small ridge; return the log-odds of new samples."""
    weights = torch.zeros(x.shape[1] + 1, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_ROUNDS, line_search_fn="strong_wolfe")
    positive = (~y).sum() / y.sum()  # both sets weigh the same

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ weights[1:] + weights[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.to(x), pos_weight=positive)
        value = value + weights[1:].square().sum() / len(x)
        value.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (new @ weights[1:] + weights[0]).detach()
