"""Train when waiting has cost as much as training would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import polars as pl

from dynkit.errors import InvalidInput, check_whole
from dynkit.evaluation.metrics import Accuracy
from dynkit.time import IntArray
from dynkit.triggers.looking import check_looking, looked, newest, since_training, told
from dynkit.triggers.performance import Expectation, check_expected, judged
from dynkit.types import RunView, Trained, Trigger

__all__ = ["Cost"]

_RIDGE = 1.0


@dataclass(frozen=True)
class Cost:
    """Train once the regret of waiting, at a given rate, has reached the seconds that training will take.

    Regret is an area, in units times seconds of the stream's time, that grows from zero after each training.
    ``"latency"``: every sample since the last training counts for as long as it has waited,
    ``sum of (now - timestamp)``. ``"misclassification"``: every avoidable misclassification (see
    `AvoidableMisclassifications`) counts from the middle of the look in which it was made. Training is due when
    ``regret / rate >= expected training seconds``; these come from a ridge regression of the run's training seconds on
    the number of samples, at the number of samples since the last training. The first look always trains.

    Parameters
    ----------
    rate : float
        Regret accepted for a second of training: the larger, the less often it trains.
    regret : "latency" or "misclassification"
    every : int
        Samples between two looks.
    window : int
        How many trainings the regression looks back.
    training_s : callable or None
        Seconds that a training on so many samples takes, ``(samples) -> float``, in place of what the run measured.
        With it the same stream gives the same triggers; measured seconds differ from run to run.
    expected_accuracy : float or None
        See `AvoidableMisclassifications`.
    warmup : Trigger or None
        Decides during the first `warmup_looks` looks.
    warmup_looks : int

    References
    ----------
    Böther et al., "Modyn: Data-Centric Machine Learning Pipeline Orchestration", SIGMOD 2025, section 4. There the rate
    multiplies the regret and the area is never reset, so that a trigger that has fired fires on every look after.
    """

    rate: float
    regret: Literal["latency", "misclassification"] = "latency"
    every: int = 1000
    window: int = 1000
    training_s: Callable[[int], float] | None = None
    expected_accuracy: float | None = None
    warmup: Trigger | None = None
    warmup_looks: int = 0
    _expectation: Expectation = field(default_factory=Expectation, init=False, repr=False, compare=False)
    _waiting: "_Waiting" = field(default_factory=lambda: _Waiting(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_looking(self.every, self.warmup, self.warmup_looks)
        check_whole("window", self.window, 1)
        check_expected(self.expected_accuracy)
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate < float("inf"):
            raise InvalidInput(f"rate={self.rate!r} must be a number above 0: regret accepted for a second of training")
        if self.regret not in ("latency", "misclassification"):
            raise InvalidInput(f"regret={self.regret!r} must be 'latency' or 'misclassification'")

    def __call__(self, new: pl.DataFrame, run: RunView) -> Iterator[int]:
        """Row positions of `new` where training pays."""
        return looked(new, run, partial(self._look, new, run), self.every, self.warmup, self.warmup_looks)

    def _look(self, new: pl.DataFrame, run: RunView, row: int, warming: bool) -> bool:
        since = since_training(run, row)
        if since == run.past.height + row + 1:
            return told(run, row, warming, True, trigger="cost", reason="no training yet")
        regret = self._latency(new, run, row) if self.regret == "latency" else self._misclassified(new, run, row)
        training_s = (
            self.training_s(since) if self.training_s is not None else _expected_s(run.trained[-self.window :], since)
        )
        numbers = {"score": regret, "threshold": self.rate * training_s, "training_s": training_s}
        return told(run, row, warming, regret / self.rate >= training_s, trigger="cost", **numbers)

    def _latency(self, new: pl.DataFrame, run: RunView, row: int) -> float:
        """Sample seconds that the samples since the last training have waited."""
        time_ns = _times(newest(new, run, row, since_training(run, row)))
        return float(((time_ns.max() - time_ns) / 1e9).sum())

    def _misclassified(self, new: pl.DataFrame, run: RunView, row: int) -> float:
        """Error seconds since the last training."""
        seen = newest(new, run, row, min(self.every, since_training(run, row)))
        end_ns = int(_times(seen).max())
        outputs, labels = judged(seen, run)
        avoidable = 0.0
        if len(labels):
            accuracy = Accuracy()(outputs, labels)
            expected, _ = self._expectation.of(self.expected_accuracy, accuracy, new, run, row)
            avoidable = max(0.0, (expected - accuracy) * len(labels))
        return self._waiting.grown(run.trained, avoidable, end_ns)


@dataclass
class _Waiting:
    """The area under the count of avoidable misclassifications since the last training."""

    area: float = 0.0
    count: float = 0.0
    end_ns: int = 0
    of: int = -1  # number of the training

    def grown(self, trained: Sequence[Trained], more: float, end_ns: int) -> float:
        """Add a look that ends at `end_ns`; its errors count for half of it."""
        if self.of != len(trained):
            self.area, self.count, self.end_ns, self.of = 0.0, 0.0, trained[-1].last_ns, len(trained)
        seconds = max(end_ns - self.end_ns, 0) / 1e9
        self.area += self.count * seconds + more * seconds / 2
        self.count += more
        self.end_ns = end_ns
        return self.area


def _times(frame: pl.DataFrame) -> IntArray:
    return frame["timestamp"].to_physical().to_numpy()


def _expected_s(trained: Sequence[Trained], samples: int) -> float:
    """Seconds of a training on so many samples, by ridge regression; at least 0."""
    x = np.array([one.samples for one in trained], dtype=np.float64)
    y = np.array([one.train_s for one in trained], dtype=np.float64)
    centred = x - x.mean()
    slope = centred @ (y - y.mean()) / (centred @ centred + _RIDGE)
    return max(0.0, float(y.mean() + slope * (samples - x.mean())))
