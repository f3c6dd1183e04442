"""Triggers that only count: so many samples, so much time. They keep no state; what they need is in the view."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from dynkit.errors import check_whole
from dynkit.time import check_duration, period_index, to_ns
from dynkit.types import RunView

__all__ = ["Amount", "Time"]


@dataclass(frozen=True)
class Amount:
    """Train after every `n` samples.

    Parameters
    ----------
    n : int
        Samples between two triggers, at least 1.
    """

    n: int

    def __post_init__(self) -> None:
        check_whole("n", self.n, 1)

    def __call__(self, new: pl.DataFrame, run: RunView) -> Iterable[int]:
        """Row positions of `new` that complete `n` samples."""
        return range(-(run.samples_since_trigger + 1) % self.n, new.height, self.n)


@dataclass(frozen=True)
class Time:
    """Train each time a period of the stream's own time is over, on all samples up to its end.

    Periods are ``[start + k * every, start + (k + 1) * every)``. A period is known to be over when a later sample
    arrives; the last one never is. Several periods without samples make one trigger.

    Parameters
    ----------
    every : str
        Duration such as ``"30d"``, ``"12h"`` or, by the calendar, ``"1mo"``.
    start : str or None
        Start of the first period, such as ``"2013-01-01"`` (UTC); None means the first sample's time. Samples
        before it belong to one period of their own.
    """

    every: str
    start: str | None = None

    def __post_init__(self) -> None:
        check_duration(self.every, "every")
        if self.start is not None:
            to_ns(self.start)

    def __call__(self, new: pl.DataFrame, run: RunView) -> Iterable[int]:
        """Row positions of `new` before the first sample of each further period."""
        start_ns = run.start_ns if self.start is None else to_ns(self.start)
        time_ns = new["timestamp"].to_physical().to_numpy()
        period = period_index(np.concatenate([[run.now_ns], time_ns]), start_ns, self.every)
        period = np.maximum.accumulate(period)  # a late sample begins no period
        positions: list[int] = (np.flatnonzero(np.diff(period)) - 1).tolist()
        return positions
