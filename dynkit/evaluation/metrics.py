"""Metrics: scores of a model's outputs against labels, through torchmetrics.

A metric is a function ``(outputs, labels) -> float`` of a whole window. Those that can be summed up batch by batch
say so with `accumulator`; for the others, and a user's own, outputs are kept until the window is complete.
torchmetrics loads when a score is computed: declaring must not take the second that it needs.
Outputs are logits: (N, C) for C classes, (N,) or (N, 1) for one of two classes or a number.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dynkit.errors import InvalidInput, PolicyError, TrainingError, check_whole, did_you_mean
from dynkit.policies import as_metric, snake_case
from dynkit.types import Metric

__all__ = [
    "F1",
    "NAMES",
    "Accuracy",
    "Mae",
    "Rmse",
    "RocAuc",
    "Scores",
    "TopK",
    "higher_is_better",
    "metric_name",
    "resolve_metric",
]


def _is_single(outputs: torch.Tensor) -> bool:
    """Whether there is one output per sample: the logit of class 1, or a number."""
    return outputs.ndim == 1 or outputs.shape[1] == 1


def _n_classes(outputs: torch.Tensor) -> int:
    return 2 if _is_single(outputs) else outputs.shape[1]


def _probabilities(outputs: torch.Tensor) -> torch.Tensor:
    """Probability of class 1 (N,) for two classes, of each (N, C) for more; float64, so that ties stay rare."""
    outputs = outputs.double()
    if _is_single(outputs):
        return outputs.reshape(-1).sigmoid()
    probabilities = outputs.softmax(1)
    return probabilities[:, 1] if outputs.shape[1] == 2 else probabilities


def _classes(outputs: torch.Tensor) -> torch.Tensor:
    """Predicted class (N,) int64."""
    return (outputs.reshape(-1) > 0).long() if _is_single(outputs) else outputs.argmax(1)


def _whole(labels: torch.Tensor) -> torch.Tensor:
    """Classes (N,) int64 of labels that may be floats."""
    whole = labels.long()
    if labels.is_floating_point() and not bool((whole == labels).all()):
        example = float(labels[whole != labels][0])
        raise TrainingError(
            f"a metric of classes cannot judge labels such as {example:g}: choose metrics=['mae', 'rmse']"
        )
    return whole


def _numbers(outputs: torch.Tensor) -> torch.Tensor:
    if not _is_single(outputs):
        raise TrainingError(f"a regression metric needs one output per sample, not {tuple(outputs.shape)}")
    return outputs.reshape(-1).double()


class _Accumulator:
    """A torchmetrics object fed through a conversion of outputs and labels."""

    def __init__(self, metric: Any, outputs: Callable[..., torch.Tensor], labels: Callable[..., torch.Tensor]) -> None:
        self._metric, self._outputs, self._labels = metric, outputs, labels

    def update(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        self._metric.to(outputs.device).update(self._outputs(outputs), self._labels(labels))

    def compute(self) -> float:
        return float(self._metric.compute())


class _Streamed:
    """A metric that is the sum of its batches."""

    def accumulator(self, outputs: torch.Tensor) -> _Accumulator:
        """Start a sum for outputs like these."""
        raise NotImplementedError

    def __call__(self, outputs: torch.Tensor, labels: torch.Tensor) -> float:
        """Score of all samples at once."""
        accumulator = self.accumulator(outputs)
        accumulator.update(outputs, labels)
        return accumulator.compute()


@dataclass(frozen=True)
class Accuracy(_Streamed):
    """Share of samples whose predicted class is the label."""

    def accumulator(self, outputs: torch.Tensor) -> _Accumulator:
        """See `_Streamed`."""
        from torchmetrics import classification

        n = _n_classes(outputs)
        metric = classification.MulticlassAccuracy(num_classes=n, average="micro", validate_args=False)
        return _Accumulator(metric, _classes, _whole)


@dataclass(frozen=True)
class TopK(_Streamed):
    """Share of samples whose label is among the `k` highest outputs.

    Parameters
    ----------
    k : int
    """

    k: int = 5

    def __post_init__(self) -> None:
        check_whole("k", self.k, 1)

    def accumulator(self, outputs: torch.Tensor) -> _Accumulator:
        """See `_Streamed`."""
        from torchmetrics import classification

        n = _n_classes(outputs)
        if outputs.ndim != 2 or self.k > n or n != outputs.shape[1]:
            raise TrainingError(f"top_{self.k} needs outputs (N, C) with C >= {self.k}, not {tuple(outputs.shape)}")
        metric = classification.MulticlassAccuracy(num_classes=n, top_k=self.k, average="micro", validate_args=False)
        return _Accumulator(metric, torch.Tensor.double, _whole)


@dataclass(frozen=True)
class F1(_Streamed):
    """Harmonic mean of precision and recall: of class 1 for two classes, averaged over classes for more.

    Parameters
    ----------
    average : "macro", "micro" or "weighted"
        How classes are averaged when there are more than two.
    """

    average: Literal["macro", "micro", "weighted"] = "macro"

    def __post_init__(self) -> None:
        if self.average not in {"macro", "micro", "weighted"}:
            raise InvalidInput(f"average={self.average!r} must be 'macro', 'micro' or 'weighted'")

    def accumulator(self, outputs: torch.Tensor) -> _Accumulator:
        """See `_Streamed`."""
        from torchmetrics import classification

        n = _n_classes(outputs)
        if n == 2:
            metric = classification.BinaryF1Score(validate_args=False)
        else:
            metric = classification.MulticlassF1Score(num_classes=n, average=self.average, validate_args=False)
        return _Accumulator(metric, _classes, _whole)


@dataclass(frozen=True)
class Mae(_Streamed):
    """Mean absolute error."""

    def accumulator(self, outputs: torch.Tensor) -> _Accumulator:
        """See `_Streamed`."""
        from torchmetrics import regression

        return _Accumulator(regression.MeanAbsoluteError(), _numbers, torch.Tensor.double)


@dataclass(frozen=True)
class Rmse(_Streamed):
    """Root of the mean squared error."""

    def accumulator(self, outputs: torch.Tensor) -> _Accumulator:
        """See `_Streamed`."""
        from torchmetrics import regression

        return _Accumulator(regression.MeanSquaredError(squared=False), _numbers, torch.Tensor.double)


@dataclass(frozen=True)
class RocAuc:
    """Area under the ROC curve, exact; for more than two classes the mean of one-against-rest.

    Undefined (None) in a window whose labels are all of one class, or, for more than two, lack a class.
    """

    def __call__(self, outputs: torch.Tensor, labels: torch.Tensor) -> float | None:
        """Score of all samples of a window."""
        from torchmetrics.functional import classification

        probabilities, n = _probabilities(outputs), _n_classes(outputs)
        if len(torch.unique(labels)) < n:
            return None
        if n == 2:
            return float(classification.binary_auroc(probabilities, _whole(labels), validate_args=False))
        area = classification.multiclass_auroc
        return float(area(probabilities, _whole(labels), num_classes=n, average="macro", validate_args=False))


NAMES: dict[str, type[Any]] = {snake_case(cls.__name__): cls for cls in (Accuracy, TopK, F1, RocAuc, Mae, Rmse)}


def resolve_metric(value: object) -> Metric:
    """Return the metric of a name (``"accuracy"``, ``"top_5"``), or check that `value` is one."""
    if not isinstance(value, str):
        return as_metric(value)
    top = re.fullmatch(r"top_(\d+)", value)
    if top:
        return TopK(int(top[1]))
    if value not in NAMES:
        raise InvalidInput(f"metric {value!r} is not known{did_you_mean(value, [*NAMES, 'top_5'])}")
    made: Metric = NAMES[value]()
    return made


def higher_is_better(metric: Metric) -> bool:
    """Whether a larger score is a better one; so it is of every metric but the built-in errors."""
    return not isinstance(metric, Mae | Rmse)


def metric_name(metric: Metric) -> str:
    """Name of a metric in the matrix: ``"roc_auc"``, ``"top_5"``, a function's own name."""
    if isinstance(metric, TopK):
        return f"top_{metric.k}"
    return getattr(metric, "__name__", None) or snake_case(type(metric).__name__)


class Scores:
    """Scores of one model in one window, fed batch by batch.

    Parameters
    ----------
    metrics : list of Metric
    """

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics
        self._sums: dict[int, _Accumulator] = {}
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Add one batch."""
        for i, metric in enumerate(self._metrics):
            if isinstance(metric, _Streamed):
                if i not in self._sums:
                    self._sums[i] = metric.accumulator(outputs)
                self._sums[i].update(outputs, labels)
        if len(self._sums) < len(self._metrics):
            self._kept.append((outputs, labels))

    def compute(self) -> dict[str, float | None]:
        """Value of each metric by name; None where it is undefined."""
        values: dict[str, float | None] = {}
        whole = [torch.cat(parts) for parts in zip(*self._kept, strict=True)]
        for i, metric in enumerate(self._metrics):
            value = self._sums[i].compute() if i in self._sums else metric(*whole)
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise PolicyError(f"metric {metric_name(metric)!r} must return one number: {error}") from None
            values[metric_name(metric)] = None if math.isnan(number) else number
        return values
