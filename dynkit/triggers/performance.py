"""Train when the model in use has become worse."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from dynkit.drift import estimate_accuracy
from dynkit.drift.criteria import HISTORY, Criterion, Decision, PValue, Threshold
from dynkit.errors import InvalidInput, check_whole
from dynkit.evaluation.metrics import Accuracy, higher_is_better, metric_name, resolve_metric
from dynkit.training.scores import probabilities
from dynkit.triggers.looking import check_looking, looked, newest, since_training, told
from dynkit.types import Metric, RunView, Trigger

__all__ = ["AvoidableMisclassifications", "Expectation", "Performance", "forecast", "judged"]

_REFERENCE = 5_000  # samples that say what a model can do
_OBSERVATIONS = 5  # fewer, and a line through them says little
_RIDGE = 0.5


@dataclass(frozen=True)
class AvoidableMisclassifications:
    """Fires once the model has misclassified `n` samples more than it was expected to since it was trained.

    In each look, ``misclassified - (1 - expected) * samples`` of them could have been avoided.

    Parameters
    ----------
    n : int
    expected_accuracy : float or None
        None: the model's accuracy on the newest 5 000 samples of the dataset's holdouts, or, where there are none, in
        its first look after training.
    allow_reduction : bool
        Whether looks that are better than expected reduce the count.
    """

    n: int
    expected_accuracy: float | None = None
    allow_reduction: bool = False

    def __post_init__(self) -> None:
        check_whole("n", self.n, 1)
        check_expected(self.expected_accuracy)

    def avoidable(self, accuracy: float, expected: float, samples: int) -> float:
        """Misclassifications of one look that a model as good as expected would not have made."""
        more = round((expected - accuracy) * samples, 3)  # an accuracy has no more digits than float32
        return more if self.allow_reduction else max(more, 0.0)


@dataclass(frozen=True)
class Performance:
    """Look every so many samples how well the newest model did on them, before any model was trained on them.

    Samples without a label are left out. The first look always trains: there is no model yet.

    Parameters
    ----------
    metric : str or Metric
        As in `Evaluation`; of a function of your own, more is better.
    every : int
        Samples between two looks.
    criterion : Criterion or AvoidableMisclassifications
        `Threshold`, `DynamicQuantile` or `DynamicRollingAverage` of `dynkit.drift`, or avoidable misclassifications.
    mode : "hindsight" or "lookahead"
        Look-ahead also trains when the score that is forecast for the next look would fire.
    labels : "true" or "estimated"
        Estimated: the accuracy is that of `dynkit.drift.estimate_accuracy`, from labelled samples that the newest model
        was not trained on; for labels that come late or never.
    warmup : Trigger or None
        Decides during the first `warmup_looks` looks; their scores are the first that the criterion knows.
    warmup_looks : int

    References
    ----------
    Böther et al., "Modyn: Data-Centric Machine Learning Pipeline Orchestration", SIGMOD 2025, section 4.
    """

    metric: str | Metric = "accuracy"
    every: int = 5000
    criterion: Criterion | AvoidableMisclassifications = field(default_factory=lambda: Threshold(0.7))
    mode: Literal["hindsight", "lookahead"] = "hindsight"
    labels: Literal["true", "estimated"] = "true"
    warmup: Trigger | None = None
    warmup_looks: int = 0
    _history: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _expectation: "Expectation" = field(default_factory=lambda: Expectation(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_looking(self.every, self.warmup, self.warmup_looks)
        name = metric_name(resolve_metric(self.metric))
        accuracy_only = self.labels == "estimated" or isinstance(self.criterion, AvoidableMisclassifications)
        if accuracy_only and name != "accuracy":
            raise InvalidInput(f"metric={self.metric!r}: estimates and misclassifications are of metric='accuracy'")
        if self.mode not in ("hindsight", "lookahead"):
            raise InvalidInput(f"mode={self.mode!r} must be 'hindsight' or 'lookahead'")
        if self.labels not in ("true", "estimated"):
            raise InvalidInput(f"labels={self.labels!r} must be 'true' or 'estimated'")
        judges = callable(self.criterion) or isinstance(self.criterion, AvoidableMisclassifications)
        if not judges or isinstance(self.criterion, PValue | type):
            raise InvalidInput(f"criterion={self.criterion!r} is not one; write dk.drift.Threshold(0.7), for example")

    def __call__(self, new: pl.DataFrame, run: RunView) -> Iterator[int]:
        """Row positions of `new` where the model had become worse."""
        return looked(new, run, partial(self._look, new, run), self.every, self.warmup, self.warmup_looks)

    def _look(self, new: pl.DataFrame, run: RunView, row: int, warming: bool) -> bool:
        name = metric_name(resolve_metric(self.metric))
        tell = partial(told, run, row, warming, trigger="performance", metric=name)
        if run.model is None:
            return tell(True, reason="no model yet")
        seen = newest(new, run, row, min(self.every, since_training(run, row)))
        score, band = self._judged(seen, new, run, row)
        if score is None:
            return tell(False, reason="no labels to judge by")
        samples = seen.height if band else seen["label"].count()
        coming = forecast([*self._history, score]) if self.mode == "lookahead" else None
        more, decision = self._decide(score, coming, samples, new, run, row)
        self._history.append(score)
        del self._history[: -max(getattr(self.criterion, "window", HISTORY), _WINDOW)]
        if coming is not None:
            more["forecast"] = coming
        return tell(decision.fires, score=score, threshold=decision.threshold, samples=samples, **band, **more)

    def _decide(
        self, score: float, coming: float | None, samples: int, new: pl.DataFrame, run: RunView, row: int
    ) -> tuple[dict[str, Any], Decision]:
        """Return further numbers to report, and the decision."""
        criterion = self.criterion
        if isinstance(criterion, AvoidableMisclassifications):
            expected, count = self._expectation.of(criterion.expected_accuracy, score, new, run, row)
            count = self._expectation.count = count + criterion.avoidable(score, expected, samples)
            numbers = {"expected": expected, "avoidable": count}
            ahead = 0.0 if coming is None else max(0.0, expected - coming) * self.every
            return numbers, Decision(count + ahead >= criterion.n - _TOLERANCE, float(criterion.n))
        worse = higher_is_better(resolve_metric(self.metric))
        decision = criterion(score, self._history, lower_is_worse=worse)
        if coming is not None and not decision.fires:
            decision = criterion(coming, self._history, lower_is_worse=worse)
        return {}, decision

    def _measured(self, seen: pl.DataFrame, run: RunView) -> float | None:
        outputs, labels = judged(seen, run)
        if not len(labels):
            return None
        score = resolve_metric(self.metric)(outputs, labels)
        return None if score is None or not np.isfinite(score) else float(score)

    def _judged(
        self, seen: pl.DataFrame, new: pl.DataFrame, run: RunView, row: int
    ) -> tuple[float | None, dict[str, Any]]:
        """Return how well the newest model does, None without labels; of an estimate, also how sure that is."""
        if self.labels == "estimated":
            known = untrained(new, run, row).filter(~pl.col("key").is_in(seen["key"].implode()))
            if known.height:  # else it is the first look after a training, and its labels may be there
                outputs, labels = judged(known, run)
                now = probabilities(run.predict(seen["key"]))
                found = estimate_accuracy(probabilities(outputs), labels, now)
                return found.estimate, {"low": found.low, "high": found.high, "disagree": found.disagree}
        return self._measured(seen, run), {}


_WINDOW = 20  # scores that a forecast is made from
_TOLERANCE = 1e-6  # of a sum of rounded numbers


@dataclass
class Expectation:
    """How accurate the newest model should be, and what has been counted against it since it was trained."""

    expected: float | None = None
    count: float = 0
    _of: int = -1  # number of the training that both are about

    def of(self, given: float | None, first: float, new: pl.DataFrame, run: RunView, row: int) -> tuple[float, float]:
        """Return expected accuracy and count; `first` is the accuracy of this look, the model's first perhaps."""
        if self._of != len(run.trained):
            self._of, self.count = len(run.trained), 0
            self.expected = given if given is not None else _on_holdout(new, run, row)
            if self.expected is None:
                self.expected = first
        assert self.expected is not None
        return self.expected, self.count


def check_expected(value: float | None) -> None:
    """Refuse an expected accuracy that is no share."""
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise InvalidInput(f"expected_accuracy={value!r} must be from 0 to 1")


def judged(frame: pl.DataFrame, run: RunView) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs of the newest model for the labelled samples of a frame, and their labels."""
    keys = frame.filter(pl.col("label").is_not_null())["key"]
    if not len(keys):
        return torch.empty(0), torch.empty(0)
    return run.predict(keys), run.read(keys)["label"]


def untrained(new: pl.DataFrame, run: RunView, row: int) -> pl.DataFrame:
    """Return labelled samples up to `row` that the newest model was not trained on, the newest of them."""
    seen, since = run.past.height + row + 1, since_training(run, row)
    before = newest(new, run, row - since, min(10 * _REFERENCE, seen - since))
    held = before.filter(pl.Series(run.held_out(before), dtype=pl.Boolean))
    after = newest(new, run, row, since)
    return pl.concat([held, after]).filter(pl.col("label").is_not_null()).tail(_REFERENCE)


def _on_holdout(new: pl.DataFrame, run: RunView, row: int) -> float | None:
    """Accuracy of the newest model on the newest samples of holdouts; None where there are none."""
    seen = newest(new, run, row, run.past.height + row + 1)
    held = seen.filter(pl.Series(run.held_out(seen), dtype=pl.Boolean) & seen["label"].is_not_null())
    outputs, labels = judged(held.tail(_REFERENCE), run)
    return Accuracy()(outputs, labels) if len(labels) else None


def forecast(scores: Sequence[float]) -> float:
    """Forecast the next score: the mean of fewer than five, else a ridge regression on the last twenty.

    >>> forecast([0.9, 0.8])
    0.85
    >>> round(forecast([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), 2)
    0.31
    """
    y = np.asarray(scores[-_WINDOW:], dtype=np.float64)
    if len(y) < _OBSERVATIONS:
        return float(np.round(y.mean(), 12))
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = x @ y / (x @ x + _RIDGE)
    return float(y.mean() + slope * (len(y) - (len(y) - 1) / 2))
