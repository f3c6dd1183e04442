"""Check policies of your own the way the built-in ones are checked.

>>> from dynkit import testing, triggers
>>> testing.check_trigger(triggers.Amount(700))
>>> testing.check_trigger(lambda new, run: new.height // 2)
Traceback (most recent call last):
  ...
AssertionError: the trigger returned 50; expected True, False or row positions of `new`
"""

import copy
import datetime as dt
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import nn

from dynkit.data import as_keys
from dynkit.errors import Conflict, InvalidInput, NotFound, PolicyError
from dynkit.policies import as_chosen, as_positions
from dynkit.time import IntArray, to_datetime
from dynkit.training import losses, scores, seeded
from dynkit.training.scores import ScoreKind
from dynkit.types import DriftMetric, RunView, Selection, Trained, Trigger

__all__ = ["StreamView", "check_drift_metric", "check_selection", "check_trigger", "stream"]

_ROWS = 5000
_SPLITS = (100, 1, 37, 1000, _ROWS)
_FEATURES = 8
_STEPS = 20
_LOSS = "cross_entropy"


@dataclass
class StreamView:
    """A `RunView` over a table alone, with samples and small models that are made up for it.

    Parameters
    ----------
    start_ns, now_ns : int
    samples_since_trigger : int
    trained : list of Trained
    past : pl.DataFrame
        The table as far as it was seen. A sample is a field ``x`` of eight numbers, by which its label can be learnt.
    reports : list of dict
        What was reported.
    model : nn.Module or None
        Such as `fit` makes.
    epochs : int
    """

    start_ns: int = 0
    now_ns: int = 0
    samples_since_trigger: int = 0
    trained: list[Trained] = field(default_factory=list)
    past: pl.DataFrame = field(default_factory=lambda: pl.DataFrame({"key": []}, schema={"key": pl.Int64}))
    reports: list[dict[str, Any]] = field(default_factory=list)
    model: nn.Module | None = None
    epochs: int = 1

    @property
    def start(self) -> dt.datetime:
        """See `RunView`."""
        return to_datetime(self.start_ns)

    @property
    def now(self) -> dt.datetime:
        """See `RunView`."""
        return to_datetime(self.now_ns)

    def held_out(self, table: pl.DataFrame) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """None of them."""
        return np.zeros(table.height, dtype=np.bool_)

    def report(self, position: int, **numbers: Any) -> None:
        """See `RunView`."""
        self.reports.append({"position": self.past.height + position + 1, **numbers})

    def arrived(self, keys: Any) -> IntArray:
        """See `RunView`."""
        return np.searchsorted([trained.position for trained in self.trained], self._rows(keys), side="right")

    def read(self, keys: Any) -> dict[str, torch.Tensor]:
        """See `RunView`."""
        x = np.random.default_rng(0).normal(size=(self.past.height, _FEATURES))
        label = np.zeros(self.past.height, np.int64)
        if "label" in self.past.columns:
            label = self.past["label"].rank("dense").fill_null(1).to_numpy().astype(np.int64) - 1
        label %= _FEATURES
        x += 2 * np.eye(_FEATURES)[label]
        rows = self._rows(keys)
        return {"x": torch.from_numpy(x[rows].astype(np.float32)), "label": torch.from_numpy(label[rows])}

    def predict(self, keys: Any, *, model: nn.Module | None = None) -> torch.Tensor:
        """See `RunView`."""
        return scores.collect(self._model(model), [self.read(keys)], lambda outputs, batch: outputs)

    def score(self, kind: str, keys: Any, *, model: nn.Module | None = None) -> torch.Tensor:
        """See `RunView`."""
        return scores.collect(
            self._model(model),
            [self.read(keys)],
            lambda outputs, batch: scores.per_sample(cast(ScoreKind, kind), outputs, batch["label"], _LOSS),
        )

    def embed(self, keys: Any, *, model: nn.Module | None = None) -> torch.Tensor:
        """See `RunView`."""
        return scores.embeddings(self._model(model), [self.read(keys)])

    def gradients(self, keys: Any, *, model: nn.Module | None = None) -> torch.Tensor:
        """See `RunView`."""
        return scores.collect(
            self._model(model),
            [self.read(keys)],
            lambda outputs, batch: scores.gradients(outputs, batch["label"], _LOSS),
        )

    def fit(self, keys: Any, *, seed: int) -> nn.Module:
        """See `RunView`."""
        batch = self.read(keys)
        with seeded(seed):
            model = nn.Sequential(nn.Linear(_FEATURES, 16), nn.ReLU(), nn.Linear(16, _FEATURES))
            optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
            for _ in range(_STEPS):
                optimizer.zero_grad()
                loss = losses(_LOSS, model(batch["x"]), batch["label"]).mean()
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
                optimizer.step()
        return model.eval()

    def _model(self, model: nn.Module | None) -> nn.Module:
        found = self.model if model is None else model
        if found is None:
            raise Conflict("the run has no model yet; a policy can ask run.model is None first")
        return found

    def _rows(self, keys: Any) -> IntArray:
        known, wanted = self.past["key"].to_numpy(), as_keys(keys)
        order = np.argsort(known)
        rows = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)] if len(known) else order
        if len(rows) != len(wanted) or not (known[rows] == wanted).all():
            raise NotFound("a sample was asked for that is not in the table so far")
        return rows


def stream(rows: int = _ROWS, seed: int = 0) -> pl.DataFrame:
    """Make a table as policies see it: key, timestamp (with ties and gaps), label and a column ``group``."""
    rng = np.random.default_rng(seed)
    seconds = np.cumsum(rng.choice([0, 1, 60, 3600, 86_400], size=rows, p=[0.2, 0.3, 0.3, 0.19, 0.01]))
    seconds -= seconds[0]
    start = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    return pl.DataFrame(
        {
            "key": np.arange(rows, dtype=np.int64),
            "timestamp": pl.Series([start]).cast(pl.Datetime("ns", "UTC")).dt.epoch("ns")[0] + seconds * 10**9,
            "label": rng.integers(0, 3, rows),
            "group": rng.choice(["a", "b"], rows),
        }
    ).with_columns(pl.from_epoch("timestamp", time_unit="ns").dt.replace_time_zone("UTC"))


@contextmanager
def _asserting() -> Iterator[None]:
    """Let what a run refuses be an AssertionError."""
    try:
        yield
    except PolicyError as error:
        raise AssertionError(str(error)) from None


@_asserting()
def positions(trigger: Trigger, table: pl.DataFrame, split: int) -> list[int]:
    """Replay a table in blocks of `split` rows; return after how many samples the trigger fired."""
    trigger = copy.deepcopy(trigger)
    time_ns = table["timestamp"].to_physical()
    view = StreamView(start_ns=int(time_ns[0]), now_ns=int(time_ns[0]))
    fired: list[int] = []
    for start in range(0, table.height, split):
        new = table.slice(start, split)
        last = fired[-1] if fired else 0
        view.now_ns = int(time_ns[max(start - 1, 0)])
        view.samples_since_trigger = start - last
        view.past = table.head(start)
        for position in as_positions(trigger(new, view), new.height):
            seen = start + position + 1
            if seen > last:  # before the first new row there may be nothing new
                fired.append(seen)
                last = seen
                view.trained.append(Trained(len(fired) - 1, seen, int(time_ns[seen - 1]), f"{seen}", seen, 0.0))
                view.samples_since_trigger = -(position + 1)
                view.now_ns = int(time_ns[seen - 1])
    return fired


def check_trigger(trigger: Trigger, table: pl.DataFrame | None = None, *, splits: Iterable[int] = _SPLITS) -> None:
    """Check that a trigger answers with valid positions, the same ones however the stream is cut into blocks.

    Parameters
    ----------
    trigger : Trigger
        Left as it is; a copy is called.
    table : pl.DataFrame or None
        The stream; None takes `stream`.
    splits : iterable of int
        Rows per block. A trigger that answers True or False decides once per block; check it with one split.

    Raises
    ------
    AssertionError
        With what differed.
    """
    table = stream() if table is None else table
    if not table.height or not (splits := list(splits)):
        raise InvalidInput("a trigger is checked on a table with rows, and with at least one split")
    found = {split: positions(trigger, table, split) for split in splits}
    first, expected = next(iter(found.items()))
    for split, fired in found.items():
        assert fired == expected, (
            f"fired after {expected[:5]}... in blocks of {first}, {fired[:5]}... in blocks of {split}"
        )


def check_selection(
    selection: Selection,
    pool: pl.DataFrame | None = None,
    *,
    view: Callable[[pl.DataFrame], RunView] | None = None,
    unique: bool = True,
) -> None:
    """Check that a selection picks samples of its pool, at least one, and the same ones for the same seed.

    Parameters
    ----------
    selection : Selection
        Left as it is; a copy is called.
    pool : pl.DataFrame or None
        None takes `stream`.
    view : callable, optional
        Makes the run's view for the pool; None takes two: at the first trigger, without a model, and at the fifth, at
        which the newest fifth of the pool is new.
    unique : bool
        Whether a sample may be picked once only.

    Raises
    ------
    AssertionError
        With what is wrong.
    """
    pool = stream() if pool is None else pool
    if not pool.height:
        raise InvalidInput("a selection is checked on a pool with rows")
    for make in (_at_first_trigger, _at_fifth_trigger) if view is None else (view,):
        _check_chosen([_selected(selection, pool, make(pool)) for _ in range(2)], pool, unique)


def _at_first_trigger(pool: pl.DataFrame) -> StreamView:
    return StreamView(samples_since_trigger=pool.height, past=pool)


def _at_fifth_trigger(pool: pl.DataFrame) -> StreamView:
    view = StreamView(past=pool)
    for index in range(4):
        seen = pool.height * (index + 1) // 5
        view.trained.append(Trained(index, seen, int(pool["timestamp"].to_physical()[seen - 1]), f"{index}", seen, 0.0))
    view.samples_since_trigger = pool.height - seen
    view.model = view.fit(pool["key"].head(seen), seed=0)
    return view


@_asserting()
def _selected(selection: Selection, pool: pl.DataFrame, view: RunView) -> pl.DataFrame:
    chosen = copy.deepcopy(selection)(pool, view, np.random.default_rng(7))
    return as_chosen(chosen, view.epochs)


def _check_chosen(picked: list[pl.DataFrame], pool: pl.DataFrame, unique: bool) -> None:
    keys = picked[0]["key"]
    assert len(keys) > 0, "nothing was selected"
    assert keys.is_in(pool["key"].to_list()).all(), "keys that are not in the pool were selected"
    each = picked[0].select("key", *({"epoch"} & set(picked[0].columns)))
    assert not unique or each.n_unique() == len(keys), "a sample was selected twice"
    assert picked[0].equals(picked[1]), "the same seed selected different samples; draw from `rng` only"


def check_drift_metric(metric: str | DriftMetric, *, columns: int = 4, rows: int = 1000) -> None:
    """Check that a drift metric is a distance of two sets, whatever the order of their rows, and nothing else.

    The sets are standard normal, the current one moved along its first column.

    Parameters
    ----------
    metric : str or callable
        A name of `dynkit.drift.METRICS`, or a callable ``(reference, current) -> float``.
    columns : int
        Of both sets.
    rows : int
        Of the reference; the current set has four fifths of it.

    Raises
    ------
    AssertionError
        With what differed.
    """
    import torch  # not needed to check triggers and selections

    from dynkit.drift import resolve

    measure, rng = resolve(metric), np.random.default_rng(7)
    x, y = (torch.from_numpy(rng.normal(size=(n, columns))) for n in (rows, 4 * rows // 5))
    step = torch.eye(columns, dtype=torch.float64)[0]
    before = x.clone(), y.clone()

    def score(reference: torch.Tensor, current: torch.Tensor) -> float:
        value = float(measure(reference, current))
        assert np.isfinite(value), f"the score is {value}; expected a finite number"
        return value

    far, near, new, same = score(x, y + 2 * step), score(x, y + step), score(x, y), score(x, x.clone())
    assert far > near > new, f"moved by 2, 1 and 0 deviations: {far:g}, {near:g}, {new:g}; further must be larger"
    assert abs(same) < far / 10, f"the reference itself is at {same:g}, where {far:g} is far; the same must be near 0"
    assert score(x, y + 2 * step) == far, "called again, the score differs; draw from a seed of the metric's own"
    shuffled = score(
        x[torch.from_numpy(rng.permutation(len(x)))], (y + 2 * step)[torch.from_numpy(rng.permutation(len(y)))]
    )
    assert abs(shuffled - far) < far / 2, f"the rows in another order give {shuffled:g} in place of {far:g}"
    swapped = score(y + 2 * step, x)
    assert far / 3 < swapped < 3 * far, f"reference and current exchanged give {swapped:g} in place of {far:g}"
    single = score(x.float(), (y + 2 * step).float())
    assert abs(single - far) < far / 20, f"float32 gives {single:g} in place of {far:g}"
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]), "the metric changed its input"
