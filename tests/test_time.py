"""Durations and periods against Python's datetime and brute force."""

import datetime as dt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynkit.errors import InvalidInput
from dynkit.time import boundaries, check_duration, period_index, to_datetime, to_ns

HOUR_NS = 3600 * 10**9
EVERY = {"90m": 5400 * 10**9, "1d": 24 * HOUR_NS, "1d12h": 36 * HOUR_NS, "1w": 168 * HOUR_NS}


@given(st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1)))
def test_nanoseconds_and_datetimes_convert_back(moment: dt.datetime) -> None:
    assert to_datetime(to_ns(moment)).replace(tzinfo=None) == moment


def test_zones_dates_and_text_mean_the_same_instant() -> None:
    zone = dt.timezone(dt.timedelta(hours=-5))
    instants = [
        dt.datetime(2013, 2, 1),
        dt.date(2013, 2, 1),
        "2013-02-01",
        "2013-01-31T19:00:00-05:00",
        dt.datetime(2013, 1, 31, 19, tzinfo=zone),
    ]
    assert len({to_ns(instant) for instant in instants}) == 1


@given(
    st.sampled_from(sorted(EVERY)), st.integers(0, 10**18), st.lists(st.integers(0, 400 * 24 * HOUR_NS), max_size=20)
)
def test_period_of_fixed_length_is_integer_division(every: str, start: int, offsets: list[int]) -> None:
    times = start + np.array(offsets, dtype=np.int64)
    assert period_index(times, start, every).tolist() == [offset // EVERY[every] for offset in offsets]


@given(st.dates(dt.date(2000, 1, 1), dt.date(2020, 1, 1)), st.lists(st.integers(0, 2000), min_size=1, max_size=20))
def test_calendar_months_follow_the_calendar(first: dt.date, days: list[int]) -> None:
    start = first.replace(day=1)
    times = np.array([to_ns(start + dt.timedelta(days=d)) for d in days], dtype=np.int64)
    expected = []
    for d in days:
        day = start + dt.timedelta(days=d)
        expected.append((day.year - start.year) * 12 + day.month - start.month)
    assert period_index(times, to_ns(start), "1mo").tolist() == expected


def test_times_before_the_start_are_in_period_minus_one() -> None:
    times = np.array([-5, -1, 0, 1], dtype=np.int64)
    assert period_index(times, 0, "1ns").tolist() == [-1, -1, 0, 1]
    assert period_index(times * 10**15, 0, "1mo")[:2].tolist() == [-1, -1]


@given(st.integers(-(10**6), 10**6), st.integers(0, 10**6), st.integers(1, 10**5))
def test_boundaries_cover_the_span_and_no_more(start: int, length: int, every: int) -> None:
    edges = boundaries(start, start + length, f"{every}ns")
    assert edges[0] == start
    assert edges[-1] >= start + length
    assert len(edges) == 1 or edges[-2] < start + length
    assert (np.diff(edges) == every).all()


@pytest.mark.parametrize("every", ["10y", "1y", "1mo", "7q"])
def test_calendar_periods_reach_to_the_end_of_time(every: str) -> None:
    edges = boundaries(to_ns("1700-01-01"), to_ns("2262-04-01"), every)
    assert (np.diff(edges) > 0).all()
    assert edges[-1] >= to_ns("2262-04-01") > edges[-2]


def test_month_ends_do_not_drift() -> None:
    edges = boundaries(to_ns("2013-01-31"), to_ns("2013-05-31"), "1mo")
    assert [to_datetime(edge).day for edge in edges.tolist()] == [31, 28, 31, 30, 31]


@pytest.mark.parametrize("bad", ["", "3", "d", "3x", "-3d", "1.5d", "3 d", "1mo3d", "0d", "3d5", None, 30])
def test_bad_durations_are_refused_by_name(bad: object) -> None:
    with pytest.raises(InvalidInput, match=r"every: .* is not a duration"):
        check_duration(bad, "every")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["soon", "2013-13-01", 5, None])
def test_bad_instants_are_refused(bad: object) -> None:
    with pytest.raises(InvalidInput, match="is not a time"):
        to_ns(bad)  # type: ignore[arg-type]


def test_too_many_periods_are_refused() -> None:
    with pytest.raises(InvalidInput, match="use a longer one"):
        boundaries(0, 10**18, "1ns")
