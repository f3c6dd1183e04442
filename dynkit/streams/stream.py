"""The record that every stream is, and the arrays that streams are made of."""

import datetime as dt
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from dynkit import selection, triggers
from dynkit.errors import InvalidInput
from dynkit.evaluation import Evaluation, windows
from dynkit.pipeline import Pipeline
from dynkit.streams.reference import convnet, mlp
from dynkit.time import check_duration
from dynkit.training.settings import Training
from dynkit.types import Model

if TYPE_CHECKING:
    from dynkit.data import Dataset
    from dynkit.workspace import Workspace

__all__ = ["Array", "Stream", "clocked", "evenly", "middles"]

Array = np.ndarray[Any, np.dtype[Any]]

_TRAINING: dict[str, Any] = {"epochs": 5, "batch_size": 64, "lr": 2e-3, "warm_start": True}
_START = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_PERIODS = 20  # at most, of a stream without a calendar of its own


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    """Samples in the order of their time, and what is known about them.

    Parameters
    ----------
    name : str
        Also of the dataset and the pipeline made from it; `dataclasses.replace` gives it another.
    frame : pl.DataFrame
        Columns ``timestamp`` (rising), ``label`` (whole numbers are classes, others a regression's target), the
        features, and columns to look at that no model gets.
    period : str
        Duration after which it is worth a look: of the windows, and between trainings, of `pipeline`.
    features : tuple of str or None
        Columns that become the field ``x`` of shape (F,). None: the column ``x`` holds an array per sample.
    drifts : tuple of int
        Rows at which what makes the samples changes, or begins to; empty where it is not known.
    metrics : tuple of str
        The first is the one to look at.
    training : Training
        With which the reference model learns it.

    Raises
    ------
    InvalidInput
        When a column is missing, the times fall or a drift is at no row.

    Examples
    --------
    >>> import dynkit as dk, tempfile
    >>> stream = dk.streams.sea(2000, thresholds=(8, 9.5))
    >>> stream
    Stream('sea', 2000 samples, 2 classes, 2020-01-01 to 2020-01-02, drifts at 1000)
    >>> stream.x.shape, stream.drift_times[0].isoformat()
    ((2000, 3), '2020-01-01T16:40:00+00:00')
    >>> stream.pipeline(dk.Workspace(tempfile.mkdtemp()), selection=dk.selection.All()).dataset
    Dataset('sea', version=1, samples=2000, fields=...)
    """

    name: str
    frame: pl.DataFrame
    period: str
    features: tuple[str, ...] | None = None
    drifts: tuple[int, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    training: Training = field(default_factory=lambda: Training(**_TRAINING))

    def __post_init__(self) -> None:
        check_duration(self.period, "period")
        for column in ("timestamp", "label", *(("x",) if self.features is None else self.features)):
            if column not in self.frame.columns:
                raise InvalidInput(f"stream {self.name!r} has no column {column!r}; it has {self.frame.columns}")
        if not len(self) or not self.frame["timestamp"].is_sorted():
            raise InvalidInput(f"stream {self.name!r} needs samples, sorted by timestamp: frame.sort('timestamp')")
        if any(not 0 < row < len(self) for row in self.drifts):
            raise InvalidInput(f"drifts={self.drifts} must be rows from 1 to {len(self) - 1}")

    def __len__(self) -> int:
        return self.frame.height

    def __repr__(self) -> str:
        task = "a number" if self.classes is None else f"{self.classes} classes"
        drifts = f", drifts at {', '.join(map(str, self.drifts))}" if self.drifts else ""
        first, last = self.frame["timestamp"][0], self.frame["timestamp"][-1]
        return f"Stream({self.name!r}, {len(self)} samples, {task}, {first:%Y-%m-%d} to {last:%Y-%m-%d}{drifts})"

    @property
    def x(self) -> Array:
        """Features (N, ...) of all samples."""
        if self.features is None:
            return self.frame["x"].to_numpy()
        return self.frame.select(pl.col(self.features).cast(pl.Float32)).to_numpy()

    @property
    def y(self) -> Array:
        """Labels (N,)."""
        return self.frame["label"].to_numpy()

    @property
    def classes(self) -> int | None:
        """Number of classes; None for a regression."""
        label = self.frame["label"]
        return None if label.dtype.is_float() else int(label.cast(pl.Int64).max() or 0) + 1  # type: ignore[arg-type]

    @property
    def drift_times(self) -> list[dt.datetime]:
        """Timestamps of the rows in `drifts`."""
        return self.frame["timestamp"].gather(list(self.drifts)).to_list()

    @property
    def model(self) -> Model:
        """A small reference model: convolutions for images, else two hidden layers."""
        outputs = self.classes or 1
        shape = (len(self.features),) if self.features is not None else tuple(self.frame.schema["x"].shape)  # type: ignore[attr-defined]
        if len(shape) == 1:
            return functools.partial(mlp, features=shape[0], outputs=outputs)
        channels, height, width = shape if len(shape) == 3 else (1, *shape)
        return functools.partial(convnet, channels=channels, height=height, width=width, outputs=outputs)

    def ingest(self, ws: "Workspace", name: str | None = None) -> "Dataset":
        """Make it a dataset of a workspace, or open the one that was made before; by default of its own name."""
        return ws.ingest(
            name or self.name, self.frame, timestamp="timestamp", label="label", features=self.features, progress=False
        )

    def pipeline(self, ws: "Workspace", **changes: Any) -> Pipeline:
        """Declare a pipeline that learns it: each `period`, train the previous model on what is new.

        Parameters
        ----------
        ws : Workspace
            Where its dataset is, or is made.
        **changes
            Parameters of `dynkit.Pipeline` that are to be others: ``trigger=dk.triggers.Amount(500)``.
        """
        options: dict[str, Any] = {
            "name": self.name,
            "dataset": changes["dataset"] if "dataset" in changes else self.ingest(ws),
            "model": self.model,
            "trigger": triggers.Time(self.period),
            "selection": selection.New(),
            "training": self.training,
            "evaluation": Evaluation(windows=windows.Tumbling(self.period), metrics=self.metrics),
        }
        return Pipeline(**{**options, **changes})


def clocked(
    name: str, x: Array, y: Array, drifts: tuple[int, ...] = (), columns: dict[str, Any] | None = None, **options: Any
) -> Stream:
    """Make a stream of samples (N, ...) and labels (N,) that have no time: one comes every minute."""
    times = pl.datetime_range(_START, _START + dt.timedelta(minutes=len(x) - 1), "1m", eager=True)
    frame = pl.DataFrame({"timestamp": times, "label": y, "x": x, **(columns or {})})
    if np.asarray(y).dtype.kind == "f":
        options = {"metrics": ("rmse", "mae"), "training": Training(**{**_TRAINING, "loss": "mse"}), **options}
    return Stream(name, frame, f"{-(-len(x) // _PERIODS)}m", drifts=drifts, **options)


def middles(n: int) -> Array:
    """Places of `n` rows (N,) in a stream that goes from 0 to 1."""
    return (np.arange(n) + 0.5) / n


def evenly(n: int, stages: int) -> tuple[Array, tuple[int, ...]]:
    """Split `n` rows into stages of equal length: the stage of each row, and where all but the first begin."""
    stage = (middles(n) * stages).astype(np.int64)
    return stage, tuple(np.searchsorted(stage, np.arange(1, stages)).tolist())
