"""How large a model's loss is on samples without labels, from its losses on labelled ones (regression, too).

A second model learns the loss from what the first one sees and says. It can only know what the reference shows: where
the meaning of labels changed while the samples did not, or where samples lie outside the reference, it is blind.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynkit.drift.chance import sampled
from dynkit.drift.kernels import median_square
from dynkit.drift.metrics import Coverage, both_points
from dynkit.errors import InvalidInput, check_whole

__all__ = ["LossEstimate", "estimate_loss"]

Array = np.ndarray[Any, np.dtype[np.float64]]

_ROWS = 50_000
_FEATURES = 256
_WIDTHS = (0.5, 1.0, 2.0)  # of the kernel, by the median distance
_RIDGES = np.logspace(-6, 2, 17)  # by the samples
_UNCOVERED = 0.05


@dataclass(frozen=True)
class LossEstimate:
    """Result of `estimate_loss`.

    Parameters
    ----------
    estimate : float
        Mean loss on the current samples, in the unit of the losses.
    low, high : float
        95 % band of the mean loss that the labels of these samples will show.
    reference : float
        Mean loss on the reference.
    uncovered : float
        Share of the current samples that lie where the reference has none, beyond the expected 1 % (see `Coverage`).
    """

    estimate: float
    low: float
    high: float
    reference: float
    uncovered: float

    @property
    def extrapolates(self) -> bool:
        """Whether so many samples lie outside the reference that the estimate should not be trusted."""
        return self.uncovered > _UNCOVERED

    def __repr__(self) -> str:
        doubt = f"; {self.uncovered:.0%} of the samples lie outside the reference" if self.extrapolates else ""
        return f"loss {self.estimate:.4g} ({self.low:.4g} to {self.high:.4g}), {self.reference:.4g} before{doubt}"


def estimate_loss(reference: Any, reference_losses: Any, current: Any, *, seed: int = 0) -> LossEstimate:
    """Estimate a model's mean loss on samples that have no labels (direct loss estimation).

    Parameters
    ----------
    reference : tensor, array or frame (N, D)
        Labelled samples that the model was not trained on: features, and its predictions as columns among them.
    reference_losses : (N,)
        Its loss on each, such as the absolute error.
    current : (M, D)
        The samples in question, with the same columns.
    seed : int

    Returns
    -------
    LossEstimate
        With estimate, low, high, reference, uncovered and extrapolates.

    Raises
    ------
    InvalidInput
        When samples or losses are not finite numbers, or do not belong together.

    Notes
    -----
    The loss is learned by ridge regression on the standardised columns and 256 random Fourier features of them; width
    and ridge are those of the least generalised cross-validation error (Golub et al. 1979, equation 1.4). The estimate
    is a weighted sum of the reference's losses, so the band follows from their leave-one-out residuals (HC3, MacKinnon
    and White 1985), from the spread of the current samples' predicted losses and from residuals as large among the
    current samples. A bias is not in the band.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = rng.uniform(0, 1, 2000)
    >>> losses = np.abs(rng.normal(scale=x))  # it errs more where x is large
    >>> found = estimate_loss(x, losses, rng.uniform(0.8, 1, 500))
    >>> bool(found.low < 0.9 * (2 / np.pi) ** 0.5 < found.high)
    True
    """
    check_whole("seed", seed, 0)
    x, y = both_points(reference, current)
    losses = _losses(reference_losses, len(x))
    rng = np.random.default_rng(seed)
    rows = sampled(torch.arange(len(x)), _ROWS, rng)
    x, losses, y = x[rows.to(x.device)].double(), losses[rows.numpy()], y.double()
    spread = x.std(0, correction=0)
    x, y = ((side - x.mean(0)) / torch.where(spread > 0, spread, 1) for side in (x, y))
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise InvalidInput("the samples are too large to be compared; scale them first")
    median = median_square(x, x[:0], rng) ** 0.5
    directions = rng.normal(size=(x.shape[1], _FEATURES // 2))
    fits = [_Fit(x, y, losses, directions / (width * median)) for width in _WIDTHS]
    estimate, error = min(fits, key=lambda fit: fit.cross_validated).estimated()
    low, high = estimate - 1.96 * error, estimate + 1.96 * error
    if losses.min() >= 0:
        estimate, low = max(0.0, estimate), max(0.0, low)
    return LossEstimate(estimate, low, high, float(losses.mean()), Coverage()(x, y))


class _Fit:
    """Ridge regression of losses on features of one width, with the ridge that cross-validation likes best."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, losses: Array, frequencies: Array) -> None:
        w = torch.from_numpy(frequencies * 2**0.5).to(x)
        old, new = (_features(side, w) for side in (x, y))
        middle = old.mean(0)
        self._old, self._new, self._rows = old - middle, new - middle, len(old)
        self._mean, self._losses = losses.mean(), losses - losses.mean()
        self._values, self._vectors = np.linalg.eigh(self._old.T @ self._old)
        self._values = np.maximum(self._values, 0)
        self._along = self._vectors.T @ (self._old.T @ self._losses)
        errors = [self._cross_validated(ridge * self._rows) for ridge in _RIDGES]
        self.cross_validated = min(errors)
        self._ridge = _RIDGES[int(np.argmin(errors))] * self._rows

    def _cross_validated(self, ridge: float) -> float:
        explained = (self._along**2 * (self._values + 2 * ridge) / (self._values + ridge) ** 2).sum()
        left = max(float((self._losses**2).sum() - explained), 0.0)
        free = self._rows - 1 - float((self._values / (self._values + ridge)).sum())
        return self._rows * left / free**2 if free > 0 else math.inf

    def estimated(self) -> tuple[float, float]:
        """Return the mean loss on the new rows, and its standard error."""
        scale = self._values + self._ridge
        weights = self._vectors @ (self._along / scale)
        new, rotated = self._new @ weights, self._old @ self._vectors
        leverage = 1 / self._rows + (rotated**2 / scale).sum(1)
        residual = (self._losses - self._old @ weights) / np.maximum(1 - leverage, 1e-3)
        share = 1 / self._rows + rotated @ (self._vectors.T @ self._new.mean(0) / scale)
        noise = float((residual**2).mean() + new.var()) / len(new)  # of the current samples' own losses
        variance = float((share * residual) @ (share * residual)) + noise
        return float(self._mean + new.mean()), variance**0.5


def _features(x: torch.Tensor, w: torch.Tensor) -> Array:
    """Columns, and random Fourier features, (N, D + 2 F)."""
    angle = x @ w
    features: Array = torch.cat([x, angle.cos(), angle.sin()], 1).cpu().numpy()
    return features


def _losses(losses: Any, rows: int) -> Array:
    """Return one finite loss for each row."""
    if hasattr(losses, "detach"):
        losses = losses.detach().cpu()
    try:
        array = np.asarray(losses, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"reference_losses cannot be read as numbers: {error}") from None
    if array.shape != (rows,):
        raise InvalidInput(f"reference_losses has shape {array.shape}; expected one loss for each of {rows} samples")
    if not np.isfinite(array).all():
        raise InvalidInput("reference_losses has NaN or infinite numbers; drop those samples first")
    return array
