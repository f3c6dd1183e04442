"""The records that pass between modules, and what a policy looks like.

A policy is any callable of the right shape; nothing is subclassed or registered. These Protocols are what the
built-in ones and a user's own function have in common.
"""

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import polars as pl

from dynkit.time import IntArray, to_datetime

if TYPE_CHECKING:
    import torch

__all__ = [
    "BatchSelection",
    "DriftMetric",
    "Event",
    "Metric",
    "Model",
    "RunView",
    "Selection",
    "Trained",
    "Trigger",
    "Window",
    "Windows",
]


@dataclass(frozen=True)
class Window:
    """Half-open time interval ``[start, end)`` in which models are evaluated.

    Parameters
    ----------
    start_ns, end_ns : int
        Nanoseconds UTC.
    anchor_ns : int or None
        The instant whose active model answers for this window in a composite; None means its start.
    """

    start_ns: int
    end_ns: int
    anchor_ns: int | None = None

    @property
    def anchor(self) -> int:
        """The anchor in nanoseconds UTC, resolved."""
        return self.start_ns if self.anchor_ns is None else self.anchor_ns

    @property
    def start(self) -> dt.datetime:
        """Start as a UTC datetime."""
        return to_datetime(self.start_ns)

    @property
    def end(self) -> dt.datetime:
        """End (exclusive) as a UTC datetime."""
        return to_datetime(self.end_ns)


@dataclass(frozen=True)
class Trained:
    """One committed trigger of a run: what fired, what was selected and which model came out.

    Parameters
    ----------
    index : int
        0 for the first trigger of the run.
    position : int
        Number of samples in replay order up to and including the last one the trigger saw.
    last_ns : int
        Timestamp of that last sample.
    model : str
        Identity of the model.
    samples : int
        Number of samples selected.
    train_s : float
        Seconds spent training.
    """

    index: int
    position: int
    last_ns: int
    model: str
    samples: int
    train_s: float


@dataclass(frozen=True)
class Event:
    """One step of a run, in the order it was committed."""

    run: str
    seq: int
    time_ns: int
    kind: str
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def time(self) -> dt.datetime:
        """Wall-clock time as a UTC datetime."""
        return to_datetime(self.time_ns)

    def __str__(self) -> str:
        details = " ".join(f"{key}={value}" for key, value in self.data.items() if key != "traceback")
        return f"{self.time:%Y-%m-%d %H:%M:%S} UTC {self.kind} {details}".rstrip()


class RunView(Protocol):
    """What a policy may see of the run that calls it. Read-only; everything is computed when asked for."""

    @property
    def start(self) -> dt.datetime:
        """Timestamp of the first sample of the stream (UTC)."""

    @property
    def now(self) -> dt.datetime:
        """Timestamp of the newest sample already seen (UTC); in a trigger, the last one before `new`."""

    @property
    def start_ns(self) -> int:
        """`start` in nanoseconds UTC."""

    @property
    def now_ns(self) -> int:
        """`now` in nanoseconds UTC."""

    @property
    def samples_since_trigger(self) -> int:
        """Samples after the last trigger; in a trigger, those before `new`."""

    @property
    def trained(self) -> Sequence[Trained]:
        """The triggers so far, oldest first."""

    @property
    def past(self) -> pl.DataFrame:
        """Samples seen before `new`, in replay order: columns as `new` has them."""

    @property
    def model(self) -> "torch.nn.Module | None":
        """The newest model, on the run's device in evaluation mode; None before the first trigger."""

    @property
    def epochs(self) -> int:
        """Number of passes that a training of the pipeline makes over its samples."""

    def arrived(self, keys: Any) -> IntArray:
        """Return the index of the trigger that was the first to see each sample (N,); see `Trained`."""

    def held_out(self, table: pl.DataFrame) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Which rows of a table no training may see, because a holdout of the dataset has them (N,) bool."""

    def read(self, keys: Any) -> "dict[str, torch.Tensor]":
        """Fields and labels of these samples, in this order."""

    def predict(self, keys: Any, *, model: "torch.nn.Module | None" = None) -> "torch.Tensor":
        """Return outputs of a model (the newest) for these samples (N, ...), on the CPU."""

    def score(self, kind: str, keys: Any, *, model: "torch.nn.Module | None" = None) -> "torch.Tensor":
        """Score these samples by a model (the newest), (N,); kinds as in `dynkit.training.scores.per_sample`."""

    def embed(self, keys: Any, *, model: "torch.nn.Module | None" = None) -> "torch.Tensor":
        """Return what goes into the last linear layer of a model (the newest) for these samples (N, D)."""

    def gradients(self, keys: Any, *, model: "torch.nn.Module | None" = None) -> "torch.Tensor":
        """Return gradients of the samples' losses by the outputs of a model (the newest), (N, C)."""

    def fit(self, keys: Any, *, seed: int) -> "torch.nn.Module":
        """Train a fresh model on these samples, as the pipeline trains; it is not stored."""

    def report(self, position: int, **numbers: Any) -> None:
        """Record as an event what a trigger saw after row `position` of `new`: score, threshold, whether it fired."""


class Trigger(Protocol):
    """Decides after which samples to train: True (after the last row of `new`) or row positions of `new`."""

    def __call__(self, new: pl.DataFrame, run: RunView, /) -> bool | Iterable[int]: ...


class Selection(Protocol):
    """Decides which samples of `pool` to train on: keys, or a frame with columns key and weight."""

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator, /) -> Any: ...


class BatchSelection(Protocol):
    """Decides by their scores which samples of a batch to train on; `kind` as in `dynkit.training.scores`."""

    @property
    def kind(self) -> Literal["loss", "grad_norm", "margin", "least_confidence", "entropy"]:
        """Which score."""

    def choose(self, scores: "torch.Tensor", rng: "torch.Generator", /) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Rows (k,) int64 out of scores (N,), and their weights (k,) or None for equal ones."""


class Windows(Protocol):
    """Lists the windows to evaluate in; called once all samples were seen."""

    def __call__(self, run: RunView, /) -> Iterable[Window]: ...


class Metric(Protocol):
    """Scores a model's outputs (N, ...) against labels (N,) of one window; NaN or None where undefined."""

    def __call__(self, outputs: "torch.Tensor", labels: "torch.Tensor", /) -> float | None: ...


class DriftMetric(Protocol):
    """Distance between a reference (N, D) and a current (M, D) set of samples: 0 is the same, larger is further."""

    def __call__(self, reference: "torch.Tensor", current: "torch.Tensor", /) -> float: ...


class Model(Protocol):
    """Builds a fresh model."""

    def __call__(self) -> "torch.nn.Module": ...
