"""Triggers that decide by the votes of others.

Each trigger votes on its own; a vote stands until enough of them do, then training happens and all votes are void. The
triggers see the stream as if each were alone, but for what training changes: samples are counted from the last
training, whoever asked for it.
"""

import copy
import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import polars as pl

from dynkit.errors import InvalidInput, check_whole
from dynkit.policies import as_positions, as_trigger
from dynkit.time import to_datetime
from dynkit.types import RunView, Trigger

__all__ = ["AtLeast", "all_of", "any_of", "at_least", "majority"]


@dataclass(frozen=True)
class AtLeast:
    """Train once at least `n` of several triggers have fired since the last training.

    Parameters
    ----------
    n : int
        Votes that are needed, from 1 to the number of triggers.
    triggers : sequence of Trigger
        Built-in ones, functions of your own, or further votes.
    """

    n: int
    triggers: Sequence[Trigger]
    _votes: "_Votes" = field(default_factory=lambda: _Votes(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.triggers, list | tuple) or not self.triggers:
            raise InvalidInput(f"triggers={self.triggers!r} must be a list of at least one trigger")
        check_whole("n", self.n, 1)
        if self.n > len(self.triggers):
            raise InvalidInput(f"n={self.n} votes cannot come from {len(self.triggers)} triggers")
        object.__setattr__(self, "triggers", [as_trigger(trigger) for trigger in self.triggers])

    def __call__(self, new: pl.DataFrame, run: RunView) -> Iterator[int]:
        """Row positions of `new` at which enough triggers have voted."""
        start = 0
        self._votes.since(run)
        least = -1 if run.samples_since_trigger else 0  # before any new sample there is nothing to train on
        while start < new.height:
            rest = new.slice(start)
            before = copy.deepcopy(self.triggers)  # each may look further than the row at which all of them fire
            views = [_Ahead(run, new, start) for _ in self.triggers]
            fired = self._first(rest, [cast(RunView, view) for view in views], least)
            for i, view in enumerate(views):
                view.forward(fired, str(i))
            if fired is None:
                return
            if fired + 1 < rest.height:
                cast(list[Trigger], self.triggers)[:] = before
                head = rest.head(fired + 1)
                for trigger in self.triggers if head.height else ():  # up to here again, and no further
                    list(as_positions(trigger(head, cast(RunView, _Ahead(run, new, start))), head.height))
            self._votes.by.clear()
            yield start + fired
            self._votes.since(run)
            start += fired + 1
            least = 0

    def _first(self, rest: pl.DataFrame, views: Sequence[RunView], least: int) -> int | None:
        """Row of `rest`, from `least` on, at which enough votes are in; None when there is none."""
        asked = zip(self.triggers, views, strict=True)
        fires = [filter(least.__le__, as_positions(trigger(rest, view), rest.height)) for trigger, view in asked]
        coming = [next(positions, None) for positions in fires]
        while True:
            row = min((row for row in coming if row is not None), default=None)
            if row is None:
                return None
            for i, at in enumerate(coming):
                if at == row:
                    self._votes.by.add(i)
                    coming[i] = next(fires[i], None)
            if len(self._votes.by) >= self.n:
                return row


@dataclass
class _Votes:
    """Which triggers have voted since a training, and samples that were there at it."""

    by: set[int] = field(default_factory=set)
    at: int = 0

    def since(self, run: RunView) -> None:
        """Void them if there was another training, whoever asked for it."""
        at = run.past.height - run.samples_since_trigger
        if at != self.at:
            self.by.clear()
            self.at = at


def at_least(n: int, *triggers: Trigger) -> AtLeast:
    """Train once at least `n` of these triggers have fired since the last training."""
    return AtLeast(n, triggers)


def any_of(*triggers: Trigger) -> AtLeast:
    """Train as soon as one of these triggers fires.

    >>> from dynkit.triggers import Amount, Time
    >>> any_of(Amount(10_000), Time("30d"))
    AtLeast(n=1, triggers=[Amount(n=10000), Time(every='30d', start=None)])
    """
    return AtLeast(1, triggers)


def all_of(*triggers: Trigger) -> AtLeast:
    """Train once each of these triggers has fired since the last training."""
    return AtLeast(max(len(triggers), 1), triggers)


def majority(*triggers: Trigger) -> AtLeast:
    """Train once more than half of these triggers have fired since the last training."""
    return AtLeast(len(triggers) // 2 + 1, triggers)


class _Ahead:
    """The view of a run from further rows of the same block on; what is reported waits until it is forwarded."""

    def __init__(self, run: RunView, new: pl.DataFrame, start: int) -> None:
        self._run = run
        self._new = new
        self._start = start
        self._reports: list[tuple[int, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    @property
    def past(self) -> pl.DataFrame:
        return pl.concat([self._run.past, self._new.head(self._start)]) if self._start else self._run.past

    @property
    def samples_since_trigger(self) -> int:
        return self._run.samples_since_trigger + self._start

    @property
    def now_ns(self) -> int:
        newest = self._new["timestamp"].head(self._start).to_physical().max()
        return self._run.now_ns if newest is None else max(self._run.now_ns, int(newest))  # type: ignore[arg-type]  # a maximum of whole numbers

    @property
    def now(self) -> dt.datetime:
        return to_datetime(self.now_ns)

    def report(self, position: int, **numbers: Any) -> None:
        self._reports.append((position, numbers))

    def forward(self, last: int | None, voter: str) -> None:
        """Report what a voter saw up to a row; what came after was seen with a model that is no longer the newest."""
        for position, numbers in self._reports:
            if last is None or position <= last:
                inner = numbers.pop("voter", None)
                path = voter if inner is None else f"{voter}.{inner}"
                self._run.report(self._start + position, **numbers, voter=path)
