"""When a number is bad enough to act on: criteria for drift scores, p-values and accuracies alike.

A criterion looks at a value and at the values before it, and keeps nothing itself: the same values give the same
decision, in a run and when its stored scores are replayed under another criterion. Drift is bad when it is high; an
accuracy, with ``lower_is_worse=True``, when it is low.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from dynkit.errors import InvalidInput, check_whole

__all__ = ["HISTORY", "Criterion", "Decision", "DynamicQuantile", "DynamicRollingAverage", "PValue", "Threshold"]


class Decision(NamedTuple):
    """Whether a value fires, and the threshold it was compared with; None where no earlier value gave one."""

    fires: bool
    threshold: float | None


HISTORY = 10_000  # values that a criterion without a `window` is given


class Criterion(Protocol):
    """Decides whether a value, given those before it, oldest first, is bad enough.

    Those are the last ones of its attribute `window`, or 10 000.
    """

    def __call__(self, value: float, history: Sequence[float], /, *, lower_is_worse: bool = False) -> Decision: ...


@dataclass(frozen=True)
class Threshold:
    """Fires at a fixed value: at it or above, at it or below where lower is worse.

    Parameters
    ----------
    value : float

    Examples
    --------
    >>> Threshold(0.1)(0.1, [])
    Decision(fires=True, threshold=0.1)
    """

    value: float

    def __post_init__(self) -> None:
        _check_finite(self.value, "value")

    def __call__(self, value: float, history: Sequence[float] = (), *, lower_is_worse: bool = False) -> Decision:
        """Compare `value`; `history` has no say."""
        _check_finite(value, "value")
        return Decision(value <= self.value if lower_is_worse else value >= self.value, float(self.value))


@dataclass(frozen=True)
class DynamicQuantile:
    """Fires beyond a quantile of the last values; not at it, and never before there is one.

    The threshold is the quantile at ``1 - quantile``, at `quantile` where lower is worse, with linear interpolation.

    Parameters
    ----------
    quantile : float
        Share of the last values that may lie beyond.
    window : int
        How many values it looks back.

    Examples
    --------
    >>> DynamicQuantile(quantile=0.5)(3.0, [1.0, 2.0])
    Decision(fires=True, threshold=1.5)
    >>> DynamicQuantile()(3.0, [])
    Decision(fires=False, threshold=None)
    """

    quantile: float = 0.05
    window: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.quantile, int | float) or not 0 <= self.quantile <= 1:
            raise InvalidInput(f"quantile={self.quantile!r} must be from 0 to 1, such as 0.05")
        check_whole("window", self.window, 1)

    def __call__(self, value: float, history: Sequence[float], *, lower_is_worse: bool = False) -> Decision:
        """Compare `value` with the quantile of the last `window` of `history`."""
        _check_finite(value, "value")
        if not len(history):
            return Decision(False, None)
        at = self.quantile if lower_is_worse else 1 - self.quantile
        threshold = float(np.quantile(history[-self.window :], at))
        return Decision(value < threshold if lower_is_worse else value > threshold, threshold)


@dataclass(frozen=True)
class DynamicRollingAverage:
    """Fires at a distance from the mean of the last values, on the bad side of it; never before there is one.

    Parameters
    ----------
    deviation : float
        The distance; a share of the mean's size unless `absolute`.
    window : int
        How many values it looks back.
    absolute : bool
        Whether `deviation` has the unit of the values.

    Examples
    --------
    >>> DynamicRollingAverage(deviation=0.5)(3.0, [1.0, 3.0])
    Decision(fires=True, threshold=3.0)
    """

    deviation: float = 0.05
    window: int = 10
    absolute: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.deviation, int | float) or not (math.isfinite(self.deviation) and self.deviation >= 0):
            raise InvalidInput(f"deviation={self.deviation!r} must be a number, at least 0")
        check_whole("window", self.window, 1)

    def __call__(self, value: float, history: Sequence[float], *, lower_is_worse: bool = False) -> Decision:
        """Compare `value` with the mean of the last `window` of `history`; equal to that mean, it never fires."""
        _check_finite(value, "value")
        if not len(history):
            return Decision(False, None)
        mean = float(np.mean(history[-self.window :]))
        distance = self.deviation if self.absolute else self.deviation * abs(mean)
        if lower_is_worse:
            return Decision(value <= mean - distance and value < mean, mean - distance)
        return Decision(value >= mean + distance and value > mean, mean + distance)


@dataclass(frozen=True)
class PValue:
    """Fires where chance alone would rarely give such drift; its value is the p-value, not the score.

    Parameters
    ----------
    level : float
        Below which a p-value fires: the accepted share of false alarms.
    permutations : int
        How many the p-value comes from.

    Examples
    --------
    >>> PValue()(0.01, [])
    Decision(fires=True, threshold=0.05)
    """

    level: float = 0.05
    permutations: int = 200

    def __post_init__(self) -> None:
        if not isinstance(self.level, int | float) or not 0 < self.level < 1:
            raise InvalidInput(f"level={self.level!r} must be between 0 and 1, such as 0.05")
        check_whole("permutations", self.permutations, 1)
        if 1 / (self.permutations + 1) >= self.level:
            raise InvalidInput(
                f"{self.permutations} permutations give no p-value below level={self.level:g}; "
                f"permutations={math.ceil(1 / self.level)} or more do"
            )

    def __call__(self, value: float, history: Sequence[float] = (), *, lower_is_worse: bool = False) -> Decision:
        """Compare the p-value; `history` and what is worse have no say."""
        _check_finite(value, "value")
        return Decision(value < self.level, float(self.level))


def _check_finite(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise InvalidInput(f"{name}={value!r} must be a finite number")
