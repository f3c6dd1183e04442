"""What triggers share that look at the stream every so many samples."""

import heapq
from collections.abc import Callable, Iterator
from typing import Any

import polars as pl

from dynkit.errors import InvalidInput, check_whole
from dynkit.policies import as_positions
from dynkit.types import RunView, Trigger

__all__ = ["check_looking", "looked", "newest", "since_training", "told"]


def check_looking(every: int, warmup: Trigger | None, warmup_looks: int) -> None:
    """Refuse settings that cannot be.

    Raises
    ------
    InvalidInput
    """
    check_whole("every", every, 1)
    check_whole("warmup_looks", warmup_looks, 0)
    if (warmup is None) != (warmup_looks == 0):
        raise InvalidInput("give both warmup and warmup_looks: warmup=Amount(5000), warmup_looks=10; or neither")


def looked(
    new: pl.DataFrame,
    run: RunView,
    look: Callable[[int, bool], bool],
    every: int,
    warmup: Trigger | None,
    warmup_looks: int,
) -> Iterator[int]:
    """Look after every so many samples of the stream, and give the rows at which to train.

    Parameters
    ----------
    new : pl.DataFrame
    run : RunView
    look : callable
        ``(row, warming) -> bool``: whether to train after this row of `new`; also asked while warming up, so that it
        knows what is usual.
    every : int
        Samples between two looks.
    warmup : Trigger or None
        Decides instead during the first `warmup_looks` looks.
    warmup_looks : int
    """
    seen = run.past.height
    warm = min(max(every * warmup_looks - seen, 0), new.height)
    looks = range(-(seen + 1) % every, new.height, every)
    if not (looks or warm):
        return
    warming = as_positions(warmup(new.head(warm), run), warm) if warmup is not None and warm else iter(())
    for row, is_warmup in heapq.merge(((row, False) for row in looks), ((row, True) for row in warming)):
        if is_warmup or look(row, row < warm):
            yield row


def told(run: RunView, row: int, warming: bool, fires: bool, **numbers: Any) -> bool:
    """Report a look and return whether to train, which it is not the look's to say while warming up."""
    fired = bool(fires and not warming)
    run.report(row, fired=fired, **numbers, **({"warmup": True} if warming else {}))
    return fired


def since_training(run: RunView, row: int) -> int:
    """Return number of samples after the last training, up to and including `row` of `new`."""
    return run.samples_since_trigger + row + 1


def newest(new: pl.DataFrame, run: RunView, row: int, n: int) -> pl.DataFrame:
    """Return the newest `n` samples up to and including `row` of `new`; rows below 0 lie in the past."""
    here = new.head(max(row + 1, 0))
    if here.height >= n:
        return here.tail(n)
    past = run.past.head(max(run.past.height + min(row + 1, 0), 0)).tail(n - here.height)
    return pl.concat([past, here]) if past.height else here
