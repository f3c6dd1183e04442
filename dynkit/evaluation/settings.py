"""How to judge the models of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dynkit.errors import InvalidInput, check_whole
from dynkit.evaluation.metrics import metric_name, resolve_metric
from dynkit.evaluation.windows import Tumbling
from dynkit.policies import as_windows
from dynkit.types import Metric

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """Where and by what models are judged.

    Parameters
    ----------
    windows : callable
        `Tumbling`, `BetweenTriggers` or a function ``(run) -> windows``.
    metrics : sequence of str or callable
        ``"accuracy"``, ``"top_5"``, ``"f1"``, ``"roc_auc"``, ``"mae"``, ``"rmse"``, an instance from
        `dynkit.metrics`, or a function ``(outputs, labels) -> float``.
    batch_size : int
        Samples per forward pass.
    split : str or None
        Judge only on this split of the dataset; see `Dataset.split`.
    slices : sequence of str
        Columns of the dataset's table, or ``"label"``: also judge the samples of each of their values apart; see
        `Run.slices`.
    """

    windows: Any = field(default_factory=lambda: Tumbling("30d"))
    metrics: Sequence[Any] = ("accuracy",)
    batch_size: int = 8192
    split: str | None = None
    slices: Sequence[str] = ()

    def __post_init__(self) -> None:
        as_windows(self.windows)
        if isinstance(self.metrics, str) or not isinstance(self.metrics, Sequence) or not self.metrics:
            raise InvalidInput(f"metrics={self.metrics!r} must be a list such as ['accuracy', 'roc_auc']")
        names = [metric_name(metric) for metric in self.resolved()]
        if len(set(names)) < len(names):
            raise InvalidInput(f"metrics={names} must have different names")
        check_whole("batch_size", self.batch_size, 1)
        if isinstance(self.slices, str) or not all(isinstance(column, str) for column in self.slices):
            raise InvalidInput(f"slices={self.slices!r} must be a list of columns such as ['carrier', 'label']")

    def resolved(self) -> list[Metric]:
        """Return the metrics as callables."""
        return [resolve_metric(metric) for metric in self.metrics]
