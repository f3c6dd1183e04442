"""Train when the samples have changed since the last training."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch

from dynkit.drift import Reference, prepared, resolve
from dynkit.drift.criteria import HISTORY, Criterion, DynamicQuantile, PValue
from dynkit.errors import InvalidInput, PolicyError, check_whole, did_you_mean
from dynkit.time import check_duration
from dynkit.training.scores import probabilities
from dynkit.triggers.looking import check_looking, looked, newest, since_training, told
from dynkit.types import DriftMetric, RunView, Trigger

__all__ = ["Drift"]

Points = Callable[[pl.DataFrame, RunView], Any]

_OF_MODEL = ("embedding", "outputs")
_ON = (*_OF_MODEL, "fields", "columns")
_LEAST = 2  # samples of a window that can be compared
_SHARED_BYTES = 256 << 20  # of references that several triggers compare with


@dataclass(frozen=True)
class Drift:
    """Look every so many samples whether those since the last training differ from those before it.

    The reference is the newest `reference` samples up to the last training, current are the newest `current` samples
    after it. The first look always trains: there is nothing to compare with yet.

    Parameters
    ----------
    metric : str or DriftMetric
        As in `dynkit.drift.test`, or a function ``(reference, current) -> float``.
    every : int
        Samples between two looks.
    criterion : Criterion
        `Threshold`, `DynamicQuantile` or `DynamicRollingAverage` of the score, or `PValue`, of `dynkit.drift`. The
        default fires above the 95 % quantile of the last ten scores.
    on : str or callable
        What is compared: ``"embedding"`` of the newest model, its ``"outputs"`` (probabilities), ``"fields"`` (the
        samples themselves), ``"columns"`` (numeric columns of the table), or a function ``(frame, run) -> (N, D)``.
    current, reference : int or str
        Number of samples, or a duration such as ``"4d"``; ``"all"`` as a reference is everything up to the training.
    overlap : bool
        Whether current may reach back before the last training.
    sample : int
        Most samples of each window that are compared, drawn uniformly; ``"all"`` is then what a reservoir holds.
    warmup : Trigger or None
        Decides during the first `warmup_looks` looks; their scores are the first that the criterion knows.
    warmup_looks : int
    seed : int
        Of the samples drawn, and of permutations.

    References
    ----------
    Böther et al., "Modyn: Data-Centric Machine Learning Pipeline Orchestration", SIGMOD 2025, section 4.
    """

    metric: str | DriftMetric = "mmd"
    every: int = 5000
    criterion: Criterion = field(default_factory=DynamicQuantile)
    on: str | Points = "embedding"
    current: int | str = 1000
    reference: int | str = 1000
    overlap: bool = False
    sample: int = 1000
    warmup: Trigger | None = None
    warmup_looks: int = 0
    seed: int = 0
    _history: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _prepared: dict[Any, Reference] = field(default_factory=dict, init=False, repr=False, compare=False)
    _shared: bool = field(default=False, init=False, repr=False, compare=False)  # with others that walk the same stream
    _known: dict[Any, dict[str, float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_looking(self.every, self.warmup, self.warmup_looks)
        for name in ("current", "reference"):
            value = getattr(self, name)
            if isinstance(value, str) and (name, value) != ("reference", "all"):
                check_duration(value, name)
            elif not isinstance(value, str):
                check_whole(name, value, _LEAST)
        check_whole("sample", self.sample, _LEAST)
        check_whole("seed", self.seed, 0)
        if isinstance(self.on, str) and self.on not in _ON:
            raise InvalidInput(f"on={self.on!r} is not known{did_you_mean(self.on, _ON)}")
        if not callable(self.criterion) or isinstance(self.criterion, type):
            raise InvalidInput(f"criterion={self.criterion!r} is not one; write dk.drift.Threshold(0.1), for example")
        resolve(self.metric)  # an unknown name is an error now

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_prepared": {}, "_known": {}}  # made again when needed

    def __call__(self, new: pl.DataFrame, run: RunView) -> Iterator[int]:
        """Row positions of `new` where drift was seen."""
        return looked(new, run, partial(self._look, new, run), self.every, self.warmup, self.warmup_looks)

    def decided_by(self, criterion: Criterion) -> "Drift":
        """Return this trigger with another criterion; what either has compared, the other need not compare again."""
        warmup, on = copy.deepcopy((self.warmup, self.on))  # they may have state
        other = dataclasses.replace(self, criterion=criterion, warmup=warmup, on=on)
        for name, value in (("_known", self._known), ("_prepared", self._prepared), ("_shared", True)):
            object.__setattr__(other, name, value)
        return other

    def _look(self, new: pl.DataFrame, run: RunView, row: int, warming: bool) -> bool:
        tell = partial(told, run, row, warming, trigger="drift", metric=_name(self.metric))
        seen = run.past.height + row + 1
        since = since_training(run, row)
        if since == seen or (self.on in _OF_MODEL and not run.trained[-1].model):
            return tell(True, reason="nothing to compare with")
        n = _count(new, run, row, self.current, seen if self.overlap else since)
        n_before = _count(new, run, row - since, self.reference, seen - since)
        if min(n, n_before) < _LEAST:
            return tell(False, reason="too few samples to compare")
        spans = {"reference": (seen - since - n_before, seen - since), "current": (seen - n, seen)}
        numbers = self._compared(new, run, row, spans)
        value = numbers["p_value" if isinstance(self.criterion, PValue) else "score"]
        decision = self.criterion(value, self._history)
        self._history.append(value)
        del self._history[: -getattr(self.criterion, "window", HISTORY)]
        windows = {name: list(span) for name, span in spans.items()}
        return tell(decision.fires, threshold=decision.threshold, **{**numbers, **windows})

    def _compared(
        self, new: pl.DataFrame, run: RunView, row: int, spans: dict[str, tuple[int, int]]
    ) -> dict[str, float]:
        """Return score, and p-value where it is asked for; the same windows and model are compared once."""
        model = run.trained[-1].model if self.on in _OF_MODEL else None
        about = model, *spans.values()
        wanted = "p_value" if isinstance(self.criterion, PValue) else "score"
        if wanted in self._known.get(about, {}):
            return self._known[about]

        def points(name: str) -> torch.Tensor:
            begin, end = spans[name]
            return self._points(newest(new, run, row - (spans["current"][1] - end), end - begin), run, end)

        before = model, spans["reference"]
        if before not in self._prepared:
            self._make_room()
            self._prepared[before] = prepared(self.metric, points("reference"))
        ready, current = self._prepared[before], points("current")
        if not self._shared:
            self._known.clear()
        if isinstance(self.criterion, PValue):
            rng = np.random.default_rng([self.seed, spans["current"][1]])
            tested = ready.tested(current, self.criterion.permutations, rng)
            self._known[about] = {"score": tested.score, "p_value": tested.p_value}
        else:
            self._known[about] = {"score": ready.score(current)}
        return self._known[about]

    def _make_room(self) -> None:
        """Forget references, the oldest first: all of them unless others may ask for them again."""
        room = _SHARED_BYTES if self._shared else 0
        while self._prepared and sum(one.samples.nbytes for one in self._prepared.values()) > room:
            del self._prepared[next(iter(self._prepared))]

    def _points(self, frame: pl.DataFrame, run: RunView, seen: int) -> torch.Tensor:
        """Return what is compared of some samples (N, D)."""
        if frame.height > self.sample:
            rng = np.random.default_rng([self.seed, seen, frame.height])
            frame = frame[np.sort(rng.choice(frame.height, self.sample, replace=False))]
        if self.on == "embedding":
            return run.embed(frame["key"])
        if self.on == "outputs":
            return probabilities(run.predict(frame["key"]))
        if self.on == "fields":
            fields = {name: value for name, value in run.read(frame["key"]).items() if name != "label"}
            return torch.cat([value.reshape(len(value), -1).float() for value in fields.values()], 1)
        if self.on == "columns":
            numbers = frame.select(pl.selectors.numeric()).drop("key", "label", strict=False)
            if not numbers.width:
                raise InvalidInput("the table has no numeric columns to compare; pass on='fields', or a function")
            numbers = numbers.fill_nan(None)
            missing = numbers.null_count().row(0)
            numbers = numbers.drop_nulls()
            if numbers.height < _LEAST:
                most = numbers.columns[int(np.argmax(missing))]
                raise InvalidInput(
                    f"of {frame.height} samples {numbers.height} have all numeric columns, {most!r} is missing most; "
                    "pass on=lambda frame, run: frame.select(...).to_numpy(), with columns that are there"
                )
            return torch.from_numpy(numbers.cast(pl.Float64).to_numpy(writable=True))
        assert callable(self.on)
        found = torch.as_tensor(self.on(frame, run))
        if len(found) != frame.height:
            raise PolicyError(f"the function of Drift(on=...) returned {len(found)} rows for {frame.height} samples")
        return found


def _name(metric: str | DriftMetric) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _count(new: pl.DataFrame, run: RunView, row: int, size: int | str, most: int) -> int:
    """Return how many samples up to `row` make a window of so many, or of a duration; at most `most`."""
    if isinstance(size, int):
        return min(size, most)
    if size == "all":
        return most
    time = newest(new, run, row, most)["timestamp"]
    if not len(time):
        return 0
    young = time > time.sort().tail(1).dt.offset_by(f"-{size}")
    return len(time) - int(young.arg_max() or 0)
