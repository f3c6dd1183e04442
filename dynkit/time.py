"""Time is int64 nanoseconds UTC inside and datetimes at the surface; intervals are ``[start, end)``.

Durations are Polars' duration strings: ``"30d"``, ``"12h"``, ``"1d12h"``; ``mo``, ``q`` and ``y`` follow the
calendar and stand alone. A naive datetime means UTC.
"""

import datetime as dt
import functools
import re

import numpy as np
import polars as pl

from dynkit.errors import InvalidInput

__all__ = ["Instant", "IntArray", "boundaries", "check_duration", "period_index", "to_datetime", "to_ns", "to_seconds"]

Instant = dt.datetime | dt.date | str
IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]

_FIXED_NS = {
    "ns": 1,
    "us": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86_400 * 10**9,
    "w": 7 * 86_400 * 10**9,
}
_CALENDAR_MONTHS = {"mo": 1, "q": 3, "y": 12}
_PART = re.compile(r"(\d+)(ns|us|ms|mo|[smhdwqy])")
_MAX_PERIODS = 1_000_000
_CACHED_MONTHS = 64
_LAST_NS = 2**63 - 1  # in the year 2262


def to_ns(instant: Instant) -> int:
    """Nanoseconds since 1970 UTC of a datetime, a date or an ISO 8601 string.

    >>> to_ns("2013-02-01")
    1359676800000000000
    """
    if isinstance(instant, str):
        try:
            instant = dt.datetime.fromisoformat(instant)
        except ValueError:
            raise InvalidInput(f"{instant!r} is not a time; write it like '2013-02-01' or '2013-02-01T12:30'") from None
    if not isinstance(instant, dt.datetime):
        if not isinstance(instant, dt.date):
            raise InvalidInput(f"{instant!r} is not a time; pass a datetime, a date or a string like '2013-02-01'")
        instant = dt.datetime(instant.year, instant.month, instant.day)
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=dt.UTC)
    return (instant - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1) * 1000


def to_datetime(ns: int) -> dt.datetime:
    """UTC datetime of nanoseconds since 1970, cut to microseconds."""
    return dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=ns // 1000)


def check_duration(duration: str, what: str) -> None:
    """Raise InvalidInput unless `duration` is one; `what` names the parameter in the message."""
    _parse(duration, what)


def to_seconds(duration: str, what: str) -> float:
    """Seconds of a duration that does not follow the calendar; `what` names the parameter in the message.

    >>> to_seconds("1m30s", "pause")
    90.0
    """
    fixed_ns, _ = _parse(duration, what)
    if not fixed_ns:
        raise InvalidInput(f"{what}: {duration!r} follows the calendar; write it like '4w' or '30s'")
    return fixed_ns / 1e9


def _parse(duration: str, what: str = "duration") -> tuple[int, int]:
    """Return (nanoseconds, months); one of them is 0."""
    parts = _PART.findall(duration) if isinstance(duration, str) else []
    months = sum(int(n) * _CALENDAR_MONTHS[unit] for n, unit in parts if unit in _CALENDAR_MONTHS)
    fixed_ns = sum(int(n) * _FIXED_NS[unit] for n, unit in parts if unit in _FIXED_NS)
    if not parts or "".join(n + unit for n, unit in parts) != duration or bool(months) == bool(fixed_ns):
        raise InvalidInput(
            f"{what}: {duration!r} is not a duration; write a number and a unit like '30d', '12h', '1d12h', or '1mo' "
            "(units: ns us ms s m h d w, or alone: mo q y)"
        )
    return fixed_ns, months


def boundaries(start_ns: int, end_ns: int, every: str) -> IntArray:
    """Instants ``start + k * every`` for k = 0, 1, ... up to the first at or after `end_ns`.

    Raises
    ------
    InvalidInput
        When there would be more than a million.
    """
    fixed_ns, months = _parse(every)
    if fixed_ns:
        n = max(-((start_ns - end_ns) // fixed_ns), 0)
        if n > _MAX_PERIODS:
            raise InvalidInput(f"a period of {every!r} splits this time span into {n} parts; use a longer one")
        return start_ns + np.arange(n + 1, dtype=np.int64) * fixed_ns
    first, last = to_datetime(start_ns), to_datetime(end_ns)
    n = ((last.year - first.year) * 12 + last.month - first.month) // months + 2
    edges = _months(start_ns, months, -(-n // _CACHED_MONTHS) * _CACHED_MONTHS)
    return edges[: int(np.searchsorted(edges, end_ns, side="left")) + 1]


@functools.lru_cache(maxsize=64)  # a trigger asks for the same ones with every block of rows
def _months(start_ns: int, months: int, n: int) -> IntArray:
    """Give the first `n` boundaries of a calendar period; they follow the start's day of the month."""
    start_us, below_us = divmod(start_ns, 1000)
    steps = pl.Series([f"{k * months}mo" for k in range(n)])
    found = pl.select(pl.lit(start_us).cast(pl.Datetime("us")).dt.offset_by(pl.lit(steps)).dt.epoch("us")).to_series()
    edges: IntArray = np.minimum(found.to_numpy(), _LAST_NS // 1000 - 1) * 1000 + below_us
    return edges


def period_index(time_ns: IntArray, start_ns: int, every: str) -> IntArray:
    """Index k of the period ``[start + k * every, start + (k + 1) * every)`` of each time at or after start.

    Times before `start_ns` get -1.
    """
    fixed_ns, _ = _parse(every)
    if fixed_ns:
        return np.maximum((time_ns - start_ns) // fixed_ns, -1)
    if not len(time_ns):
        return np.zeros(0, dtype=np.int64)
    edges = boundaries(start_ns, int(time_ns.max()) + 1, every)
    return np.searchsorted(edges, time_ns, side="right").astype(np.int64) - 1
