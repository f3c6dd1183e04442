"""Check policies of your own the way the built-in ones are checked.

>>> from dynkit import testing, triggers
>>> testing.check_trigger(triggers.Amount(700))
>>> testing.check_trigger(lambda new, run: new.height // 2)
Traceback (most recent call last):
  ...
AssertionError: the trigger returned 50; expected True, False or row positions
"""

import copy
import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from dynkit.time import to_datetime
from dynkit.types import RunView, Selection, Trained, Trigger

__all__ = ["StreamView", "check_selection", "check_trigger", "stream"]

_ROWS = 5000
_SPLITS = (100, 1, 37, 1000, _ROWS)


@dataclass
class StreamView:
    """A `RunView` over a table alone: no models, nothing to read.

    Parameters
    ----------
    start_ns, now_ns : int
    samples_since_trigger : int
    trained : list of Trained
    past : pl.DataFrame
    reports : list of dict
        What was reported.
    """

    start_ns: int = 0
    now_ns: int = 0
    samples_since_trigger: int = 0
    trained: list[Trained] = field(default_factory=list)
    past: pl.DataFrame = field(default_factory=pl.DataFrame)
    reports: list[dict[str, Any]] = field(default_factory=list)
    model: None = None

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

    def read(self, keys: Any, **options: Any) -> Any:
        """Refuse: there are no samples behind the table."""
        raise LookupError("the test stream has a table only; pass one of your own with samples to test reading")

    predict = embed = gradients = fit = read

    def score(self, kind: str, keys: Any, **options: Any) -> Any:
        """Refuse, as `read`."""
        return self.read(keys)


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
        decision = trigger(new, view)
        if isinstance(decision, bool | np.bool_) or decision is None:
            decision = [new.height - 1] if decision else []
        assert isinstance(decision, Iterable), (
            f"the trigger returned {decision!r}; expected True, False or row positions"
        )
        for position in decision:
            assert -1 <= position < new.height, f"position {position} is outside the {new.height} new rows"
            seen = start + int(position) + 1
            if seen > last:
                fired.append(seen)
                last = seen
                view.trained.append(Trained(len(fired) - 1, seen, int(time_ns[seen - 1]), f"{seen}", seen, 0.0))
                view.samples_since_trigger = -(int(position) + 1)
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
    found = {split: positions(trigger, table, split) for split in splits}
    first, expected = next(iter(found.items()))
    for split, fired in found.items():
        assert fired == sorted(set(fired)), f"positions must increase: {fired}"
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
        Makes the run's view for the pool; None takes one in which the newest fifth is new.
    unique : bool
        Whether a sample may be picked once only.

    Raises
    ------
    AssertionError
        With what is wrong.
    """
    pool = stream() if pool is None else pool
    picked = []
    for _ in range(2):
        seen = StreamView(samples_since_trigger=pool.height // 5) if view is None else view(pool)
        chosen = copy.deepcopy(selection)(pool, seen, np.random.default_rng(7))
        frame = chosen if isinstance(chosen, pl.DataFrame) else pl.DataFrame({"key": chosen})
        assert "key" in frame.columns, f"expected keys or a frame with a column key, not {frame.columns}"
        picked.append(frame)
    keys = picked[0]["key"]
    assert len(keys) > 0, "nothing was selected"
    assert keys.is_in(pool["key"].to_list()).all(), "keys that are not in the pool were selected"
    assert not unique or keys.n_unique() == len(keys), "a sample was selected twice"
    assert picked[0].equals(picked[1]), "the same seed selected different samples; draw from `rng` only"
    if "weight" in picked[0].columns:
        weight = picked[0]["weight"]
        assert weight.is_finite().all() and (weight >= 0).all(), "weights must be finite and not negative"
