"""Triggers and selections: the public checks, and what they mean by brute force."""

import datetime as dt
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import make_frame, make_pipeline, replayed

import dynkit as dk
from dynkit import testing
from dynkit.errors import InvalidInput, PolicyError
from dynkit.policies import as_chosen, as_trigger, describe, digest

STREAM = testing.stream()


@given(st.integers(1, 6000), st.integers(1, 6000))
@settings(max_examples=30, deadline=None)
def test_amount_fires_after_every_n_samples_however_the_stream_is_split(n: int, split: int) -> None:
    fired = testing.positions(dk.triggers.Amount(n), STREAM, split)
    assert fired == list(range(n, STREAM.height + 1, n))


@given(st.sampled_from(["6h", "1d", "7d", "1mo", "1q"]), st.integers(1, 6000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_time_fires_when_a_period_is_over_however_the_stream_is_split(every: str, split: int, anchored: bool) -> None:
    trigger = dk.triggers.Time(every, start="2020-01-01" if anchored else None)
    truncated = STREAM["timestamp"].dt.truncate(every)  # periods of the calendar: the stream starts at one
    if every == "7d":  # Polars counts weeks from a Monday
        days = (STREAM["timestamp"] - dt.datetime(2020, 1, 1, tzinfo=dt.UTC)).dt.total_days()
        truncated = days // 7
    expected = (np.flatnonzero((truncated != truncated.shift(1)).fill_null(False).to_numpy())).tolist()
    assert testing.positions(trigger, STREAM, split) == expected


@pytest.mark.parametrize(
    "selection",
    [
        dk.selection.New(),
        dk.selection.All(),
        dk.selection.Random(fraction=0.3),
        dk.selection.Random(n=50),
        dk.selection.Recent(n=50),
        dk.selection.ClassBalanced(fraction=0.2),
    ],
)
def test_built_in_selections_pass_the_public_check(selection: object) -> None:
    testing.check_selection(selection)  # type: ignore[arg-type]


@pytest.mark.parametrize("trigger", [dk.triggers.Amount(333), dk.triggers.Time("36h")])
def test_built_in_triggers_pass_the_public_check(trigger: object) -> None:
    testing.check_trigger(trigger)  # type: ignore[arg-type]


def test_new_takes_the_samples_since_the_last_trigger() -> None:
    view = testing.StreamView(samples_since_trigger=7)
    keys = dk.selection.New()(STREAM, view, np.random.default_rng(0))
    assert keys.to_list() == STREAM["key"].to_list()[-7:]


@given(st.floats(0.001, 1), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_random_takes_the_fraction_evenly(fraction: float, seed: int) -> None:
    keys = dk.selection.Random(fraction=fraction)(STREAM, testing.StreamView(), np.random.default_rng(seed))
    assert len(keys) == max(1, round(fraction * STREAM.height))
    assert keys.is_sorted()


def test_random_is_uniform() -> None:
    pool = STREAM.head(10)
    counts = np.zeros(10)
    for seed in range(2000):
        counts[dk.selection.Random(n=3)(pool, testing.StreamView(), np.random.default_rng(seed)).to_numpy()] += 1
    assert abs(counts / 2000 - 0.3).max() < 0.04  # four standard deviations


def test_random_n_takes_all_of_a_smaller_pool() -> None:
    assert len(dk.selection.Random(n=99)(STREAM.head(5), testing.StreamView(), np.random.default_rng(0))) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.triggers.Amount(0), "n=0"),
        (lambda: dk.triggers.Amount(2.5), "n=2.5"),
        (lambda: dk.triggers.Amount(True), "n=True"),
        (lambda: dk.triggers.Time("30 days"), "every: '30 days'"),
        (lambda: dk.triggers.Time("30d", start="soon"), "'soon' is not a time"),
        (lambda: dk.selection.Random(), "either fraction or n"),
        (lambda: dk.selection.Random(0.5, n=3), "either fraction or n"),
        (lambda: dk.selection.Random(fraction=0), "fraction=0"),
        (lambda: dk.selection.Random(n=0), "n=0"),
        (lambda: as_trigger(dk.triggers.Amount), "is a class; pass an instance"),
        (lambda: as_trigger(5), "trigger=5 is not callable"),
        (lambda: as_trigger(lambda new: True), r"cannot be called with \(new, run\)"),
    ],
)
def test_wrong_parameters_are_named(make: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()  # type: ignore[operator]


class Backwards:
    def __call__(self, new: pl.DataFrame, run: object) -> list[int]:
        return [3, 1]


@pytest.mark.parametrize(
    "trigger",
    [
        lambda new, run: 3.5,
        Backwards(),
        lambda new, run: [new.height],
        lambda new, run: [1.0],
        lambda new, run: [2, 2],
    ],
)
def test_the_public_check_finds_broken_triggers(trigger: object) -> None:
    with pytest.raises(AssertionError):
        testing.check_trigger(trigger)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "selection",
    [
        lambda pool, run, rng: [],
        lambda pool, run, rng: [10**9],
        lambda pool, run, rng: [1, 1],
        lambda pool, run, rng: np.random.randint(0, 1000, 5),
        lambda pool, run, rng: pl.DataFrame({"key": [1], "weight": [-1.0]}),
        lambda pool, run, rng: pl.DataFrame({"key": [1], "epoch": [7]}),
        lambda pool, run, rng: pl.DataFrame({"key": [1, None]}),
        lambda pool, run, rng: [1.5],
        lambda pool, run, rng: pool["key"] > 5,
        lambda pool, run, rng: None,
    ],
)
def test_the_public_check_finds_broken_selections(selection: object) -> None:
    with pytest.raises(AssertionError):
        testing.check_selection(selection)  # type: ignore[arg-type]


def test_the_public_checks_need_something_to_check_on() -> None:
    with pytest.raises(InvalidInput, match="a table with rows"):
        testing.check_trigger(dk.triggers.Amount(5), testing.stream().head(0))
    with pytest.raises(InvalidInput, match="at least one split"):
        testing.check_trigger(dk.triggers.Amount(5), splits=[])
    with pytest.raises(InvalidInput, match="a pool with rows"):
        testing.check_selection(dk.selection.New(), testing.stream().head(0))


def compiled(source: str, **names: object) -> object:
    """A function as a notebook cell would define it."""
    space: dict[str, object] = {"__name__": "__main__", **names}
    exec(source, space)
    return space["f"]


def test_digest_is_the_same_for_the_same_source_and_changes_with_what_matters() -> None:
    source = "def f(new, run, n=3):\n    return LIMIT + sum([helper(i) for i in range(n)])\n"
    helper = compiled("def f(n): return n")
    base = digest(compiled(source, LIMIT=1, helper=helper))
    assert base == digest(compiled(source, LIMIT=1, helper=compiled("def f(n): return n")))
    assert base != digest(compiled(source, LIMIT=2, helper=helper))
    assert base != digest(compiled(source, LIMIT=1, helper=compiled("def f(n): return n + 1")))
    assert base != digest(compiled(source.replace("n=3", "n=4"), LIMIT=1, helper=helper))
    assert digest(dk.triggers.Amount(3)) != digest(dk.triggers.Amount(4))


def test_digest_is_the_same_in_another_process() -> None:
    code = (
        "from dynkit.policies import digest; from torch import nn; import dynkit as dk\n"
        "def make(): return nn.Linear(3, len({'a', 'b', 'c'}))\n"
        "print(digest([make, dk.Training(lr=1e-2), dk.triggers.Time('1mo'), {'x', 'y', 'zz'}]))"
    )
    found = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert len(found) == 1


def test_digest_follows_a_users_module_and_the_state_of_objects(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, helpers\nfrom dynkit.policies import digest\n"
        "class Policy:\n    def __init__(self): self.n = {3: 4}\n    def __call__(self, new, run): return False\n"
        "def net(): return helpers.make()\n"
        "torch.manual_seed(0); module = torch.nn.Linear(2, 2).bfloat16()\n"
        "print(digest(net), digest(Policy()), digest(module), digest(torch.nn.ReLU))"
    )

    def found() -> list[str]:
        return subprocess.check_output([sys.executable, "-c", code], text=True).split()

    (tmp_path / "helpers.py").write_text("def make(): return 1\n")
    first = found()
    assert found() == first
    (tmp_path / "helpers.py").write_text("def make(): return 2\n")
    assert [a == b for a, b in zip(first, found(), strict=True)] == [False, True, True, True]


def test_describe_gives_names_and_parameters() -> None:
    assert describe(dk.selection.Random(n=3)) == {"random": {"fraction": None, "n": 3}}
    assert describe([dk.windows.Tumbling("3d"), describe]) == [{"tumbling": {"every": "3d", "start": None}}, "describe"]


def test_recent_takes_the_newest() -> None:
    keys = dk.selection.Recent(n=7)(STREAM, testing.StreamView(), np.random.default_rng(0))
    assert keys.to_list() == STREAM["key"].to_list()[-7:]
    assert (
        len(dk.selection.Recent(fraction=0.5)(STREAM, testing.StreamView(), np.random.default_rng(0)))
        == STREAM.height // 2
    )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 120), st.integers(0, 5))
def test_class_balanced_fills_classes_like_water(sizes: list[int], n: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat([f"c{i}" for i in range(len(sizes))], sizes))
    pool = pl.DataFrame({"key": np.arange(len(labels)) * 3, "label": labels})
    pool = pl.concat([pool, pl.DataFrame({"key": [9999], "label": [None]}, schema=pool.schema)])
    keys = dk.selection.ClassBalanced(n=n)(pool, testing.StreamView(), np.random.default_rng(seed))
    counts = pool.filter(pl.col("key").is_in(keys.to_list()))["label"].value_counts()
    taken = dict(counts.iter_rows())
    assert len(keys) == keys.n_unique() == min(n, sum(sizes)) and keys.is_sorted()
    level = max(taken.values())
    for i, size in enumerate(sizes):  # a class has all it has, or as many as any other but for the last one
        assert taken.get(f"c{i}", 0) in {size, level, level - 1} and taken.get(f"c{i}", 0) <= size
        assert taken.get(f"c{i}", 0) >= min(size, level - 1)


def test_class_balanced_is_uniform_within_a_class() -> None:
    pool = pl.DataFrame({"key": range(12), "label": [0] * 10 + [1] * 2})
    counts = np.zeros(12)
    for seed in range(3000):
        counts[dk.selection.ClassBalanced(n=4)(pool, testing.StreamView(), np.random.default_rng(seed)).to_numpy()] += 1
    assert (counts[10:] == 3000).all()
    assert np.abs(counts[:10] / 3000 - 0.2).max() < 0.04


def test_class_balanced_says_that_it_needs_labels() -> None:
    with pytest.raises(InvalidInput, match="needs labels"):
        dk.selection.ClassBalanced(n=4)(STREAM.drop("label"), testing.StreamView(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (lambda pool: pool["key"] > 10, r"return pool.filter\(mask\)"),
        (lambda pool: pool["key"] + 0.5, "not whole numbers"),
        (lambda pool: pool.select("key", weight=pl.lit("a")), "must return keys or a frame"),
        (lambda pool: pool.select("key", epoch=pl.lit(3)), "from 0 to 0"),
    ],
)
def test_what_is_no_selection_is_told(chosen, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PolicyError, match=message):
        as_chosen(chosen(STREAM), 1)


def test_columns_of_the_dataset_are_no_instructions(tmp_path) -> None:  # type: ignore[no-untyped-def]
    frame = make_frame(1000).with_columns(score=pl.lit("high"), epoch=pl.lit(7))
    dataset = dk.Workspace(tmp_path).ingest("s", frame, timestamp="when", label="late", features=["a", "b", "c"])
    run = replayed(make_pipeline(dataset, selection=lambda pool, run, rng: pool.filter(pl.col("key") % 2 == 0)))
    assert run.selection(0).columns == ["key"]
    assert run.selection(0).height == 250
