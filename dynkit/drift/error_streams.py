"""Detectors of more frequent errors in the stream of a model's right (0) and wrong (1) predictions.

See `streams` for how they are used and what they keep.
"""

from dataclasses import dataclass

import numpy as np

from dynkit.drift.streams import Array, Carry, Stream, cumulated, faded
from dynkit.errors import InvalidInput, check_whole

__all__ = ["DDM", "EDDM", "HDDM_A", "HDDM_W"]


@dataclass(frozen=True)
class _Errors(Stream):
    """What comes in is 0 or 1."""

    def _check(self, x: Array) -> None:
        bad = (x != 0) & (x != 1)
        if bad.any():
            raise InvalidInput(f"{type(self).__name__} takes 1 for an error and 0 for none; {x[bad][0]:g} is neither")


@dataclass(frozen=True)
class DDM(_Errors):
    """Drift detection method: the error rate leaves its lowest value by more than chance does (Gama et al. 2004).

    Parameters
    ----------
    warm_start : int
        Values before the first detection.
    drift_threshold : float
        Standard deviations above the lowest error rate.
    """

    warm_start: int = 30
    drift_threshold: float = 3.0

    def __post_init__(self) -> None:
        check_whole("warm_start", self.warm_start, 1)

    def _begin(self, columns: int) -> Carry:
        zero = np.zeros(columns)
        return {"errors": zero, "rate": zero, "spread": zero, "lowest": np.full(columns, np.inf)}

    def _run(self, x: Array, seen: Array, carry: Carry) -> tuple[Array, Carry]:
        errors = cumulated(np.add, carry["errors"], x)
        n = np.maximum(seen, 1)
        rate = errors / n
        spread = np.sqrt(rate * (1 - rate) / n)
        warm = seen > self.warm_start
        lowest = cumulated(np.minimum, carry["lowest"], np.where(warm, rate + spread, np.inf))
        at = warm & (rate + spread == lowest)
        rate_then, spread_then = _latest(at, rate, carry["rate"]), _latest(at, spread, carry["spread"])
        change = warm & (rate + spread > rate_then + self.drift_threshold * spread_then)
        kept = {"errors": errors, "rate": rate_then, "spread": spread_then, "lowest": lowest}
        return change, {name: array[-1] for name, array in kept.items()}


@dataclass(frozen=True)
class EDDM(_Errors):
    """Early drift detection method: errors come closer to each other (Baena-Garcia et al. 2006).

    Parameters
    ----------
    warm_start : int
        Values and errors before the first detection.
    beta : float
        Share of the largest distance between errors (its mean and two standard deviations) that fires.
    """

    warm_start: int = 30
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_whole("warm_start", self.warm_start, 1)

    def _begin(self, columns: int) -> Carry:
        zero = np.zeros(columns)
        return {"errors": zero, "last": zero, "squares": zero, "largest": np.full(columns, -1.0)}

    def _run(self, x: Array, seen: Array, carry: Carry) -> tuple[Array, Carry]:
        wrong = x == 1
        errors = cumulated(np.add, carry["errors"], x)
        last = cumulated(np.maximum, carry["last"], np.where(wrong, seen, 0).astype(np.float64))
        before = np.concatenate([carry["last"][None], last[:-1]])
        distance = np.where(wrong, seen - before, 0)
        squares = cumulated(np.add, carry["squares"], distance * distance)
        n = np.maximum(errors, 1)
        mean = last / n  # the distances add up to where the last error was
        variance = np.where(errors > 1, np.maximum(squares - n * mean * mean, 0) / np.maximum(n - 1, 1), 0)
        level = mean + 2 * np.sqrt(variance)
        counted = wrong & (seen > self.warm_start)
        largest = cumulated(np.maximum, carry["largest"], np.where(counted, level, -1.0))
        change = counted & (errors > self.warm_start) & (level / np.where(largest > 0, largest, 1) < self.beta)
        kept = {"errors": errors, "last": last, "squares": squares, "largest": largest}
        return change, {name: array[-1] for name, array in kept.items()}


@dataclass(frozen=True)
class HDDM_A(_Errors):  # noqa: N801  (the paper's name)
    """Hoeffding's bound on moving averages: the error rate against its lowest (Frias-Blanco et al. 2015, section 4.1).

    Parameters
    ----------
    drift_confidence : float
        Accepted probability of a false alarm.
    two_sided : bool
        Whether fewer errors fire, too.
    """

    drift_confidence: float = 0.001
    two_sided: bool = False

    def __post_init__(self) -> None:
        _check_confidence(self.drift_confidence)

    def _begin(self, columns: int) -> Carry:
        zero = np.zeros(columns)
        lowest, highest = np.full(columns, np.inf), np.full(columns, -np.inf)
        cuts = {"low_n": zero, "low_rate": zero, "high_n": zero, "high_rate": zero}
        return {"errors": zero, "lowest": lowest, "highest": highest} | cuts

    def _run(self, x: Array, seen: Array, carry: Carry) -> tuple[Array, Carry]:
        there, n = seen > 0, np.maximum(seen, 1).astype(np.float64)
        errors = cumulated(np.add, carry["errors"], x)
        rate = errors / n
        bound = np.sqrt(np.log(1 / self.drift_confidence) / (2 * n))
        lowest = cumulated(np.minimum, carry["lowest"], np.where(there, rate + bound, np.inf))
        highest = cumulated(np.maximum, carry["highest"], np.where(there, rate - bound, -np.inf))
        low, high = there & (rate + bound == lowest), there & (rate - bound == highest)
        low_n, low_rate = _latest(low, n, carry["low_n"]), _latest(low, rate, carry["low_rate"])
        high_n, high_rate = _latest(high, n, carry["high_n"]), _latest(high, rate, carry["high_rate"])
        change = self._apart(low_n, n, rate - low_rate)
        if self.two_sided:
            change |= self._apart(high_n, n, high_rate - rate)
        kept = {"errors": errors, "lowest": lowest, "highest": highest, "low_n": low_n, "low_rate": low_rate}
        kept |= {"high_n": high_n, "high_rate": high_rate}
        return change & there, {name: array[-1] for name, array in kept.items()}

    def _apart(self, cut: Array, n: Array, distance: Array) -> Array:
        share = (n - cut) / np.maximum(cut, 1) / n
        return np.asarray((cut < n) & (distance >= np.sqrt(share / 2 * np.log(2 / self.drift_confidence))))


@dataclass(frozen=True)
class HDDM_W(_Errors):  # noqa: N801  (the paper's name)
    """McDiarmid's bound on weighted moving averages (Frias-Blanco et al. 2015, section 4.2).

    Parameters
    ----------
    drift_confidence : float
        Accepted probability of a false alarm.
    weight : float
        Of the newest value.
    two_sided : bool
        Whether fewer errors fire, too.
    """

    drift_confidence: float = 0.001
    weight: float = 0.05
    two_sided: bool = False

    def __post_init__(self) -> None:
        _check_confidence(self.drift_confidence)
        if not 0 < self.weight < 1:
            raise InvalidInput(f"weight={self.weight!r} must be between 0 and 1, such as 0.05")

    def _begin(self, columns: int) -> Carry:
        zero = np.zeros(columns)
        sides = {f"{side}_{name}": zero for side in ("low", "high") for name in ("n", "mean", "since")}
        return {"mean": zero, "lowest": np.full(columns, np.inf), "highest": np.full(columns, -np.inf)} | sides

    def _run(self, x: Array, seen: Array, carry: Carry) -> tuple[Array, Carry]:
        there = seen > 0
        mean = self._mean(x, seen, carry["mean"])
        bound = np.sqrt(self._weights(seen) * np.log(1 / self.drift_confidence) / 2)
        kept = {"mean": mean}
        above = np.where(there, mean + bound, np.inf)
        kept["lowest"] = cumulated(np.minimum, carry["lowest"], above)
        below = np.where(there, mean - bound, -np.inf)
        kept["highest"] = cumulated(np.maximum, carry["highest"], below)
        low = above < np.concatenate([carry["lowest"][None], kept["lowest"][:-1]])
        high = below > np.concatenate([carry["highest"][None], kept["highest"][:-1]])
        change = np.zeros(x.shape, bool)
        for side, cut in (("low", low), ("high", high)):
            then = kept[f"{side}_n"] = _latest(cut, seen.astype(np.float64), carry[f"{side}_n"])
            mean_then = kept[f"{side}_mean"] = _latest(cut, mean, carry[f"{side}_mean"])
            since = kept[f"{side}_since"] = self._mean(x, seen - then, carry[f"{side}_since"])
            weights = self._weights(then) + self._weights(seen - then)
            least = np.sqrt(weights * np.log(1 / self.drift_confidence) / 2)
            if side == "low" or self.two_sided:
                gap = since - mean_then if side == "low" else mean_then - since
                change |= (seen > then) & (gap > least)
        return change & there, {name: array[-1] for name, array in kept.items()}

    def _weights(self, n: Array) -> Array:
        """Sum of the squared weights of n values."""
        fade = (1 - self.weight) ** 2
        power = fade ** np.maximum(n, 0)
        return np.asarray(power + self.weight**2 * (1 - power) / (1 - fade))

    def _mean(self, x: Array, since: Array, last: Array) -> Array:
        """Weighted mean of the values since there were `since` (T, D) of them, 0 where there are none."""
        fade = 1 - self.weight
        mean = faded(np.where(since > 1, self.weight * x, np.where(since == 1, x, 0)), fade, last)
        row = np.arange(len(x))[:, None] * np.ones(x.shape)
        at = _latest(since == 0, row, np.full(x.shape[1], -1.0))
        stale = _latest(since == 0, mean, np.zeros(x.shape[1]))  # of before: it has faded since
        return np.asarray(np.where(at < 0, mean, mean - stale * fade ** (row - at)))


def _check_confidence(confidence: float) -> None:
    if not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise InvalidInput(f"drift_confidence={confidence!r} must be between 0 and 1, such as 0.001")


def _latest(at: Array, values: Array, before: Array) -> Array:
    """Value (T, D) at the latest row where `at`, and before the first such row what was `before` (D,)."""
    row = np.maximum.accumulate(np.where(at, np.arange(1, len(at) + 1)[:, None], 0), axis=0)
    return np.asarray(np.take_along_axis(np.concatenate([before[None], values]), row, axis=0))
