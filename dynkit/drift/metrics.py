"""Tests and scores of whether two sets of samples come from one distribution: every drift metric by its name.

Samples are rows of numbers (N, D). `test` compares two sets once; `prepared` keeps a reference that many sets are
compared with. The metrics themselves are in `kernels`, `marginals` and here; `chance` has what permutations share.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import scipy  # its parts load at first use
import torch

from dynkit.drift.chance import Kept, Prepared, Scores, Tested, number, tested
from dynkit.drift.columns import check_level, same_columns
from dynkit.drift.kernels import MMD, PAIRS, BlockMMD, Energy, center, squares
from dynkit.drift.marginals import (
    JS,
    KS,
    PSI,
    CramerVonMises,
    Hellinger,
    PredictedClasses,
    SlicedWasserstein,
    Wasserstein,
)
from dynkit.errors import InvalidInput, NotFound, check_whole, did_you_mean
from dynkit.policies import as_drift_metric
from dynkit.types import DriftMetric

__all__ = ["METRICS", "Classifier", "Coverage", "DriftTest", "Reference", "both_points", "prepared", "resolve", "test"]

_ROUNDS = 100  # of training a classifier


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
        A name of `METRICS`, such as ``"mmd"``, ``"energy"``, ``"c2st"``, ``"ks"`` or ``"psi"``, for its defaults; a
        metric with your own, such as ``MMD(features=512)``; or a function of two tensors.
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
    metric = resolve(metric)
    x, y = both_points(reference, current)
    found = tested(metric, x, y, permutations, np.random.default_rng(seed))
    name = getattr(metric, "__name__", type(metric).__name__)
    return DriftTest(name, found.score, found.p_value, level, found.null)


def prepared(metric: str | DriftMetric, reference: Any) -> "Reference":
    """Compute what a metric needs of a reference, to compare many sets of samples with it.

    Parameters
    ----------
    metric : str or callable
        See `test`. The bandwidth of a kernel is fixed by the reference, so that all scores have one scale.
    reference : tensor, array or frame (N, ...)

    Returns
    -------
    Reference
        With score, tested and extended.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> reference = prepared("mmd", rng.normal(size=(300, 4)))
    >>> reference.score(rng.normal(1.0, size=(200, 4))) > reference.score(rng.normal(0.5, size=(200, 4)))
    True
    """
    metric = resolve(metric)
    names = tuple(reference.collect_schema().names()) if isinstance(reference, pl.DataFrame | pl.LazyFrame) else None
    x = points(reference, "reference")
    prepare = getattr(metric, "prepare", None)
    return Reference(metric, x, Kept(metric, x) if prepare is None else prepare(x), names)


@dataclass(frozen=True)
class Reference:
    """Result of `prepared`: a set of samples that others are compared with.

    Parameters
    ----------
    metric : DriftMetric
    samples : (N, D) tensor
    kept : Prepared
        What the metric has computed of them.
    names : tuple of str or None
        Of the columns, where the reference is a frame.
    """

    metric: DriftMetric
    samples: torch.Tensor
    kept: Prepared
    names: tuple[str, ...] | None = None

    def score(self, current: Any) -> float:
        """Distance of samples (M, ...) from the reference: 0 is the same, larger is further."""
        return number(self.kept.score(self._points(current, "current")), self.metric)

    def tested(self, current: Any, permutations: int = 200, rng: np.random.Generator | None = None) -> Tested:
        """Score, p_value and the scores of permutations of samples (M, ...)."""
        check_whole("permutations", permutations, 1)
        rng = np.random.default_rng(0) if rng is None else rng
        return self.kept.tested(self._points(current, "current"), permutations, rng)

    def extended(self, more: Any) -> "Reference":
        """Return the reference with more samples; of those it has, no more is computed again than needed."""
        x = self._points(more, "more")
        return Reference(self.metric, torch.cat([self.samples, x]), self.kept.extended(x), self.names)

    def _points(self, samples: Any, name: str) -> torch.Tensor:
        if self.names is not None and isinstance(samples, pl.DataFrame | pl.LazyFrame):
            lone = sorted(set(self.names) ^ set(samples.collect_schema().names()))
            if lone:
                raise InvalidInput(
                    f"column {lone[0]!r} is in one of the tables only; select the columns that both have"
                )
            samples = samples.select(self.names)
        x = points(samples, name)
        if x.shape[1] != self.samples.shape[1]:
            raise InvalidInput(
                f"reference has {self.samples.shape[1]} numbers a row, {name} has {x.shape[1]}; compare like with like"
            )
        return x.to(self.samples)

    def __repr__(self) -> str:
        return f"{len(self.samples)} samples of {self.samples.shape[1]} numbers, prepared for {self.metric!r}"


def resolve(metric: str | DriftMetric) -> DriftMetric:
    """Return the metric of a name of `METRICS`, or a callable ``(reference, current) -> float`` as it is."""
    if isinstance(metric, str):
        if metric not in METRICS:
            raise NotFound(f"no drift metric {metric!r}{did_you_mean(metric, METRICS)}")
        metric = METRICS[metric]()
    return as_drift_metric(metric)


def both_points(reference: Any, current: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both sets as rows of as many numbers, of one type and on one device."""
    if all(isinstance(one, pl.LazyFrame) or hasattr(one, "columns") for one in (reference, current)):
        reference, current = same_columns(reference, current)  # also of pandas
    x, y = points(reference, "reference"), points(current, "current")
    if x.shape[1] != y.shape[1]:
        raise InvalidInput(
            f"reference has {x.shape[1]} numbers a row, current has {y.shape[1]}; compare like with like"
        )
    wider = torch.promote_types(x.dtype, y.dtype)
    return x.to(wider), y.to(x.device, wider)


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
    tensor = tensor.to(torch.float64 if tensor.dtype in _WIDE else torch.float32).reshape(len(tensor), -1)
    bad = int((~torch.isfinite(tensor)).any(1).sum())
    if bad:
        raise InvalidInput(f"{bad} samples of {name} have NaN or infinite numbers; fill or drop them first")
    return tensor


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
        rank = scipy.stats.mannwhitneyu(margin[new], margin[~new], alternative="greater")
        auc = float(rank.statistic) / (int(new.sum()) * int((~new).sum()))
        return Tested(max(0.0, 2 * auc - 1), float(rank.pvalue), np.empty(0))


@dataclass(frozen=True)
class Coverage:
    """Share of the current samples that lie where the reference has none: they are what to label first.

    A sample is uncovered when it is farther from its nearest neighbour in one half of the reference than all but 1 %
    of the other half are. The score is the share of uncovered samples beyond the expected one, at least 0. Their
    number follows the beta-binomial distribution, whatever the samples', were both sets from one distribution (the
    rank of a new sample among calibration samples, Vovk 2012, proposition 2b), which gives the p-value.

    Parameters
    ----------
    outside : float
        Share of the reference that counts as uncovered.
    rows : int
        Most samples of each half of the reference; larger ones are sampled.
    """

    outside: float = 0.01
    rows: int = 5_000

    def __post_init__(self) -> None:
        if not isinstance(self.outside, int | float) or not 0 < self.outside < 1:
            raise InvalidInput(f"outside={self.outside!r} must be between 0 and 1, such as 0.01")
        check_whole("rows", self.rows, 1)

    def __call__(self, reference: torch.Tensor, current: torch.Tensor) -> float:
        """Excess share of samples (M, D) that a reference (N, D) does not cover."""
        return self.prepare(reference).score(current)

    def tested(
        self, reference: torch.Tensor, current: torch.Tensor, permutations: int, rng: np.random.Generator
    ) -> Tested:
        """Score the sets; nothing is permuted."""
        return self.prepare(reference).tested(current, permutations, rng)

    def prepare(self, reference: torch.Tensor) -> "_Covered":
        """Find the radius around one half of the reference that covers the other."""
        return _Covered(self, reference)


class _Covered:
    """One half of a reference, and the distance from it beyond which few of the other half lie."""

    def __init__(self, metric: Coverage, reference: torch.Tensor) -> None:
        self.metric, self.reference = metric, reference
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(reference))).to(reference.device)
        half = (len(order) + 1) // 2
        self._core = reference[order[:half][: metric.rows]]
        radii = _nearest(reference[order[half:][: metric.rows]], self._core).sort().values
        self._outside, self._inside = max(1, round(metric.outside * len(radii))), len(radii)
        self._radius = radii[-self._outside]

    def score(self, current: torch.Tensor) -> float:
        return self.tested(current, 0, np.random.default_rng(0)).score

    def tested(self, current: torch.Tensor, permutations: int, rng: np.random.Generator) -> Tested:
        far = int((_nearest(current, self._core) > self._radius).sum())
        chance = scipy.stats.betabinom(len(current), self._outside, self._inside + 1 - self._outside)
        excess = far / len(current) - self._outside / (self._inside + 1)
        return Tested(max(0.0, excess), float(chance.sf(far - 1)), np.empty(0))

    def extended(self, more: torch.Tensor) -> "_Covered":
        return _Covered(self.metric, torch.cat([self.reference, more]))


_WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)  # float32 has not their digits

METRICS: dict[str, type[Any]] = {
    "mmd": MMD,
    "block_mmd": BlockMMD,
    "energy": Energy,
    "sliced_wasserstein": SlicedWasserstein,
    "c2st": Classifier,
    "coverage": Coverage,
    "ks": KS,
    "cvm": CramerVonMises,
    "psi": PSI,
    "js": JS,
    "hellinger": Hellinger,
    "wasserstein": Wasserstein,
    "bbsds": KS,  # of softmax outputs
    "bbsdh": PredictedClasses,
}


def _nearest(x: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Squared distance (N,) of each sample to the nearest of `core`."""
    middle = center(core)
    core = core - middle
    blocks = torch.split(x, max(1, PAIRS // len(core)))
    return torch.cat([squares(rows - middle, core).min(1).values for rows in blocks])


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
