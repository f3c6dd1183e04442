"""Triggers that look and triggers that vote: against hand-worked tables, brute force, and any split of the stream."""

import datetime as dt
import pickle

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import make_frame, make_pipeline, replayed
from torch import nn

import dynkit as dk
from dynkit import testing
from dynkit.drift.criteria import DynamicQuantile, DynamicRollingAverage, PValue, Threshold
from dynkit.errors import InvalidInput, PolicyError
from dynkit.triggers import (
    Amount,
    AvoidableMisclassifications,
    Cost,
    Drift,
    Performance,
    Time,
    all_of,
    any_of,
    at_least,
    majority,
)
from dynkit.triggers.performance import forecast
from dynkit.types import Trained

TABLE = testing.stream()


class EveryThird:
    """A trigger with memory: counts rows of its own, whatever else trains."""

    def __init__(self, n: int) -> None:
        self.n, self.rows = n, 0

    def __call__(self, new, run):  # type: ignore[no-untyped-def]
        places = [i for i in range(new.height) if (self.rows + i + 1) % self.n == 0]
        self.rows += new.height
        return places


leaves = st.one_of(
    st.integers(1, 300).map(Amount),
    st.sampled_from(["6h", "1d", "5d"]).map(Time),
    st.integers(20, 300).map(EveryThird),
)
votes = st.recursive(
    leaves,
    lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda some: st.integers(1, len(some)).map(lambda n: at_least(n, *some))
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None)
@given(votes)
def test_votes_do_not_depend_on_how_the_stream_is_cut(trigger) -> None:  # type: ignore[no-untyped-def]
    testing.check_trigger(trigger, TABLE.head(600), splits=(100, 1, 37, 600))


def fired(trigger, table: pl.DataFrame = TABLE, split: int = 1000) -> list[int]:  # type: ignore[no-untyped-def]
    return testing.positions(trigger, table, split)


def test_any_counts_from_the_last_training_whoever_asked() -> None:
    day = fired(Time("10d"))
    expected, last = [], 0
    for i in range(1, TABLE.height + 1):  # brute force, sample by sample
        if (i in day and i > last) or i - last == 400:
            expected.append(i)
            last = i
    assert fired(any_of(Amount(400), Time("10d"))) == expected
    assert len(expected) > 12 and set(expected) & set(day)


def test_all_needs_every_vote_since_the_last_training() -> None:
    ends = set(fired(Time("1d")))
    expected, last, day, amount = [], 0, False, False
    for i in range(1, TABLE.height + 1):
        day |= i in ends and i > last
        amount |= i - last == 300
        if day and amount:
            expected.append(i)
            last, day, amount = i, False, False
    assert fired(all_of(Amount(300), Time("1d"))) == expected
    assert len(expected) > 5


def test_majority_is_more_than_half() -> None:
    three = [EveryThird(100), EveryThird(150), EveryThird(10_000)]
    assert fired(majority(*three), TABLE.head(620)) == [150, 300, 450, 600]
    assert majority(Amount(1), Amount(2)).n == 2
    assert fired(majority(EveryThird(70))) == fired(EveryThird(70))


def at(*rows: int, known_after: int = 0):  # type: ignore[no-untyped-def]
    """A trigger that fires at these rows of the stream, once so many more are there."""

    def trigger(new, run):  # type: ignore[no-untyped-def]
        first = run.past.height - known_after
        return [row - first - known_after for row in rows if first <= row < first + new.height]

    return trigger


def test_inner_votes_are_void_after_a_training_that_others_asked_for() -> None:
    assert fired(any_of(all_of(at(10), at(30)), at(20)), TABLE.head(100)) == [21]


@pytest.mark.parametrize("split", [1, 7, 100])
def test_inner_votes_do_not_outlive_a_training_however_the_stream_is_cut(split: int) -> None:
    inner = at_least(2, at(10, 20), at(10), at(10, known_after=1))
    assert fired(at_least(2, inner, at(15, 40)), TABLE.head(100), split) == [16]


def test_votes_travel_with_the_state_of_what_they_hold() -> None:
    trigger = all_of(EveryThird(100), EveryThird(150))
    view = testing.StreamView(past=TABLE.head(0), now_ns=int(TABLE["timestamp"].to_physical()[0]))
    assert list(trigger(TABLE.head(120), view)) == []
    again = pickle.loads(pickle.dumps(trigger))
    view.past, view.samples_since_trigger = TABLE.head(120), 120
    assert list(again(TABLE.slice(120, 100), view)) == [29]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: any_of(), "at least one trigger"),
        (lambda: at_least(3, Amount(1), Amount(2)), "3 votes cannot come from 2"),
        (lambda: any_of(Amount), "is a class"),
        (lambda: Drift(every=0), "every=0"),
        (lambda: Drift(on="embeding"), "did you mean 'embedding'"),
        (lambda: Drift(metric="mmmd"), "mmd"),
        (lambda: Drift(current="4 days"), "is not a duration"),
        (lambda: Drift(warmup=Amount(3)), "both warmup and warmup_looks"),
        (lambda: Drift(criterion=0.1), "Threshold"),
        (lambda: Performance(metric="mae", criterion=AvoidableMisclassifications(3)), "metric='accuracy'"),
        (lambda: Performance(mode="sideways"), "hindsight"),
        (lambda: AvoidableMisclassifications(5, expected_accuracy=80), "from 0 to 1"),
        (lambda: Cost(0), "rate=0"),
        (lambda: Cost(1, regret="all"), "'latency' or 'misclassification'"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_written(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((InvalidInput, dk.errors.NotFound), match=message):
        make()


# -- what the model did -------------------------------------------------------------------------------------------


class Zero(nn.Module):
    """Always says class 0, so that its accuracy is the share of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + torch.tensor([1.0, 0.0])


def keep(model, batches, context) -> None:  # type: ignore[no-untyped-def]
    """A training that changes a weight which the outputs do not depend on much, so that each model is another one."""
    with torch.no_grad():
        model.weight += 1e-6 * batches.samples


def errors_per_look(errors: list[int], every: int = 100) -> pl.DataFrame:
    """A frame in which a model that says 0 makes so many errors in each look."""
    labels = np.concatenate([np.arange(every) < wrong for wrong in errors]).astype(np.int64)
    return make_frame(len(labels)).with_columns(late=pl.Series(labels))


def looks(tmp_path, errors: list[int], trigger, **options):  # type: ignore[no-untyped-def]
    """Replay; return positions trained at, and the numbers that were reported."""
    dataset = dk.Workspace(tmp_path).ingest("s", errors_per_look(errors), timestamp="when", label="late")
    for name, rule in options.items():
        dataset.split(name, **rule)
    run = replayed(
        make_pipeline(
            dataset, model=Zero, trigger=trigger, selection=dk.selection.New(), training=dk.Training(fit=keep)
        )
    )
    told = [event.data for event in run.events() if event.kind == "decided"]
    return [trained.position for trained in run.trained], told


def test_performance_fires_when_a_look_is_at_the_threshold(tmp_path) -> None:
    errors = [0, 10, 30, 20, 31, 5]
    positions, told = looks(tmp_path, errors, Performance(every=100, criterion=Threshold(0.7)))
    assert positions == [100, 300, 500]
    assert told[0]["reason"] == "no model yet"
    assert [one["score"] for one in told[1:]] == pytest.approx([0.9, 0.7, 0.8, 0.69, 0.95])
    assert [one["fired"] for one in told] == [True, False, True, False, True, False]
    assert [one["position"] for one in told] == [100, 200, 300, 400, 500, 600]


def test_performance_by_the_rolling_average(tmp_path) -> None:
    criterion = DynamicRollingAverage(deviation=0.1, window=2, absolute=True)
    positions, told = looks(tmp_path, [0, 10, 10, 15, 30, 30, 50], Performance(every=100, criterion=criterion))
    # scores .9 .9 .85 .7 .7 .5; means of the two before: -, .9, .9, .875, .775, .7
    assert [one["threshold"] for one in told[1:]] == [None, *map(pytest.approx, [0.8, 0.8, 0.775, 0.675, 0.6])]
    assert positions == [100, 500, 700]


def test_performance_by_the_quantile_of_the_last_scores(tmp_path) -> None:
    positions, told = looks(
        tmp_path, [0, 10, 20, 15, 16], Performance(every=100, criterion=DynamicQuantile(quantile=0.5, window=2))
    )
    # scores .9 .8 .85 .84; medians of the two before: -, .9, .85, .825
    assert [one["threshold"] for one in told[1:]] == [None, *map(pytest.approx, [0.9, 0.85, 0.825])]
    assert positions == [100, 300]


def test_avoidable_misclassifications_by_hand(tmp_path) -> None:
    # expected 90 %: 10 errors of 100 are fine. counted: 5, 5, then 25 -> 30 >= 30 fires; after it from zero: 15, 29, 44
    criterion = AvoidableMisclassifications(30, expected_accuracy=0.9)
    errors = [0, 15, 4, 35, 25, 24, 25]
    positions, told = looks(tmp_path, errors, Performance(every=100, criterion=criterion))
    assert [one["avoidable"] for one in told[1:]] == [5, 5, 30, 15, 29, 44]
    assert positions == [100, 400, 700]


def test_better_looks_may_reduce_the_count(tmp_path) -> None:
    criterion = AvoidableMisclassifications(30, expected_accuracy=0.9, allow_reduction=True)
    _, told = looks(tmp_path, [0, 15, 4, 35], Performance(every=100, criterion=criterion))
    assert [one["avoidable"] for one in told[1:]] == [5, -1, 24]


@pytest.mark.parametrize("every", [1, 3, 4, 20])
def test_avoidable_misclassifications_are_counted_however_small_a_look_is(tmp_path, every: int) -> None:
    criterion = AvoidableMisclassifications(10, expected_accuracy=0.5)  # half of the errors are fine: 20 of them fire
    positions, _ = looks(tmp_path, [100, 100], Performance(every=every, criterion=criterion))
    assert set(np.diff(positions)) == {-(-20 // every) * every}


@pytest.mark.parametrize("criterion", [Threshold, DynamicQuantile])
def test_a_criterion_is_an_object_not_its_class(criterion: type) -> None:
    for trigger in (Drift, Performance):
        with pytest.raises(InvalidInput, match=r"criterion=<class .* is not one; write dk.drift.Threshold"):
            trigger(criterion=criterion)


def test_a_criterion_of_ones_own_sees_all_scores_before(tmp_path) -> None:
    seen = []

    def criterion(value, history, *, lower_is_worse=False):  # type: ignore[no-untyped-def]
        seen.append(list(history))
        return dk.drift.Threshold(0.0)(value)

    looks(tmp_path, [0, 10, 30, 20, 10], Performance(every=100, criterion=criterion))
    assert seen == [pytest.approx(scores) for scores in ([], [0.9], [0.9, 0.7], [0.9, 0.7, 0.8])]


def test_without_a_holdout_the_first_look_says_what_to_expect(tmp_path) -> None:
    _, told = looks(tmp_path, [0, 20, 30, 40], Performance(every=100, criterion=AvoidableMisclassifications(25)))
    assert [one["expected"] for one in told[1:]] == pytest.approx([0.8, 0.8, 0.8])
    assert [one["avoidable"] for one in told[1:]] == [0, 10, 30]


def test_a_holdout_says_what_to_expect(tmp_path) -> None:
    errors = [10, 30, 30]
    rule = {"where": pl.col("key") < 50, "holdout": True}
    dataset = dk.Workspace(tmp_path).ingest("s", errors_per_look(errors), timestamp="when", label="late")
    dataset.split("judge", **rule)
    trigger = Performance(every=100, criterion=AvoidableMisclassifications(1000))
    run = replayed(make_pipeline(dataset, model=Zero, trigger=trigger, training=dk.Training(fit=keep)))
    told = [event.data for event in run.events() if event.kind == "decided"]
    assert [one["expected"] for one in told[1:]] == pytest.approx([0.8, 0.8])  # 10 errors among the first 50
    assert run.trained[0].samples == 40  # 80 % of the 50 that are not held out


def test_lookahead_fires_a_look_earlier(tmp_path) -> None:
    errors = [0, 10, 14, 18, 22, 26, 30, 34]
    hindsight, _ = looks(tmp_path / "h", errors, Performance(every=100, criterion=Threshold(0.71)))
    ahead, told = looks(tmp_path / "a", errors, Performance(every=100, criterion=Threshold(0.71), mode="lookahead"))
    assert hindsight == [100, 700, 800]
    assert ahead == [100, 600, 700, 800]
    assert told[5]["forecast"] == pytest.approx(forecast([0.9, 0.86, 0.82, 0.78, 0.74]))


def test_forecast_is_a_ridge_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    scores = np.random.default_rng(0).random(12)
    ridge = linear.Ridge(alpha=0.5).fit(np.arange(12)[:, None], scores)
    assert forecast(scores.tolist()) == pytest.approx(ridge.predict([[12]])[0])


def test_warmup_decides_first_and_its_looks_are_known_after(tmp_path) -> None:
    trigger = Performance(every=100, criterion=DynamicQuantile(quantile=0.5), warmup=Amount(150), warmup_looks=4)
    positions, told = looks(tmp_path, [0, 10, 12, 11, 10, 40], trigger)
    assert positions == [150, 300, 600]
    assert [one.get("score") for one in told] == [None, *map(pytest.approx, [1.0, 0.88, 0.89, 0.9, 0.6])]
    # the first look with a model, at 200, is of the 50 samples after the training at 150, which have no errors


def test_looks_without_labels_decide_nothing(tmp_path) -> None:
    frame = errors_per_look([0, 50, 50]).with_columns(late=pl.when(pl.int_range(pl.len()) < 100).then(pl.col("late")))
    dataset = dk.Workspace(tmp_path).ingest("s", frame, timestamp="when", label="late")
    trigger = Performance(every=100)
    run = replayed(make_pipeline(dataset, model=Zero, trigger=trigger, training=dk.Training(fit=keep)))
    told = [event.data for event in run.events() if event.kind == "decided"]
    assert [one.get("reason") for one in told] == ["no model yet", "no labels to judge by", "no labels to judge by"]
    assert len(run.trained) == 1


def test_estimated_accuracy_needs_no_new_labels(tmp_path) -> None:
    """Half of the stream is noise that the model is unsure of, without labels: the estimate falls there."""
    frame = make_frame(4000)
    late = pl.int_range(pl.len()) >= 3000
    rng = np.random.default_rng(5)
    frame = frame.with_columns(
        pl.when(late).then(pl.Series(rng.normal(scale=0.05, size=4000))).otherwise(pl.col("a")).alias("a"),
        pl.when(late).then(pl.Series(rng.normal(scale=0.05, size=4000))).otherwise(pl.col("b")).alias("b"),
        pl.when(~late).then(pl.col("late")).alias("late"),
    )
    dataset = dk.Workspace(tmp_path).ingest("s", frame, timestamp="when", label="late")
    training = dk.Training(epochs=10, batch_size=64, lr=1e-2)
    trigger = Performance(every=500, criterion=Threshold(0.8), labels="estimated")
    run = replayed(make_pipeline(dataset, trigger=trigger, training=training, selection=dk.selection.All()))
    told = [event.data for event in run.events() if event.kind == "decided"]
    before, after = [one["score"] for one in told[2:6]], [one["score"] for one in told[6:7]]
    assert min(before) > 0.85 and max(after) < 0.8
    assert told[7]["reason"] == "no labels to judge by"
    assert [trained.position for trained in run.trained][:2] == [500, 3500]
    seen = run.decisions().drop_nulls("low")
    assert (
        seen.height == 5
        and seen.select((pl.col("low") <= pl.col("score")) & (pl.col("score") <= pl.col("high"))).to_series().all()
    )
    assert set(seen["disagree"]) <= {False, True}
    drawn = dk.plots.estimates(run.decisions(), run.composite())
    values = {(one["accuracy"], one["value"]) for one in next(iter(drawn.chart.to_dict()["datasets"].values()))}
    assert {("estimated", score) for score in seen["score"]} < values
    assert {("true", score) for score in run.composite().filter(metric="accuracy")["value"]} < values
    drawn.save(tmp_path / "estimates.png")


def test_without_estimates_there_is_no_curve_of_them(tmp_path) -> None:
    dataset = dk.Workspace(tmp_path).ingest("s", make_frame(600), timestamp="when", label="late")
    run = replayed(make_pipeline(dataset, trigger=Performance(every=200)))
    with pytest.raises(InvalidInput, match="no trigger has estimated anything"):
        dk.plots.estimates(run.decisions())


# -- what waiting costs -------------------------------------------------------------------------------------------


def seconds(times: list[int]) -> pl.DataFrame:
    """A stream with samples at these seconds."""
    stamps = [dt.datetime(2020, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=s) for s in times]
    return pl.DataFrame({"key": np.arange(len(times)), "timestamp": pl.Series(stamps).cast(pl.Datetime("ns", "UTC"))})


def test_latency_regret_by_hand() -> None:
    table = seconds([0, 10, 20, 40, 41, 60, 80, 81])
    view = testing.StreamView(past=table.head(0))
    trigger = Cost(rate=10, every=2, training_s=lambda samples: 5.0 + samples)
    assert list(trigger(table.head(2), view)) == [1]  # no training yet
    # trained after 2 samples. looks at samples 4, 6, 8 with 2, 4, 6 waiting:
    #   at  40 s: 20 + 0 = 20;               20 / 10 = 2   <  7
    #   at  60 s: 40 + 20 + 19 + 0 = 79;     79 / 10 = 7.9 <  9
    #   at  81 s: 61 + 41 + 40 + 21 + 1 + 0 = 164;    16.4 >= 11: fires
    view.past, view.samples_since_trigger = table.head(2), 0
    view.trained = [dk.types.Trained(0, 2, 0, "m", 2, 1.0)] if hasattr(dk, "types") else [Trained(0, 2, 0, "m", 2, 1.0)]
    assert list(trigger(table.slice(2), view)) == [5]
    assert [report.get("score") for report in view.reports] == [None, 20.0, 79.0, 164.0]
    assert [report.get("threshold") for report in view.reports] == [None, 70.0, 90.0, 110.0]


def test_latency_regret_of_many_samples_that_wait_for_long_only_grows() -> None:
    table = seconds(list(range(0, 12_000 * 3600, 3600)))  # 7e13 ns of waiting do not fit in a whole number
    view = testing.StreamView(past=table.head(1))
    view.trained = [Trained(0, 1, 0, "m", 1, 1.0)]
    assert list(Cost(rate=1e12, every=1000, training_s=lambda samples: 1e6)(table.slice(1), view)) == []
    scores = [report["score"] for report in view.reports]
    assert len(scores) == 12 and (np.diff(scores) > 0).all()
    assert scores[-1] == pytest.approx(3600 * 11_999 * 11_998 / 2)


def test_regret_starts_anew_after_each_training_and_a_higher_rate_waits_longer() -> None:
    table = seconds(list(range(0, 20_000, 10)))
    slow, fast = (fired(Cost(rate=rate, every=10, training_s=lambda samples: 10.0), table) for rate in (4_000, 400))
    gaps = np.diff(slow)
    assert len(set(gaps.tolist())) == 1  # regular samples, regular triggers
    n = int(gaps[0])
    assert sum(10 * i for i in range(n)) >= 40_000 > sum(10 * i for i in range(n - 10))
    assert len(fast) > len(slow) > 5


def test_training_seconds_are_a_ridge_regression_of_what_was_measured() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    samples, took = [100, 300, 200], [1.0, 2.5, 2.2]
    view = testing.StreamView(past=seconds([0, 1, 2]))
    view.trained = [Trained(i, i + 1, 0, "m", n, s) for i, (n, s) in enumerate(zip(samples, took, strict=True))]
    view.samples_since_trigger = 0
    list(Cost(rate=1, every=1)(seconds([3, 4]).tail(1), view))
    ridge = linear.Ridge(alpha=1).fit(np.array(samples)[:, None], took)
    assert view.reports[-1]["training_s"] == pytest.approx(ridge.predict([[1]])[0])


def test_misclassification_regret_by_hand(tmp_path) -> None:
    # samples every 600 s, looks of 100: 60 000 s apart. expected 90 %.
    # avoidable: 10, 0, 20 -> area 10 * 30000 = 3e5; + 10 * 60000 = 9e5; + 10 * 60000 + 20 * 30000 = 21e5 >= 20e5 fires
    # then from zero: 5 -> 1.5e5
    trigger = Cost(rate=1e5, regret="misclassification", every=100, training_s=lambda n: 20.0, expected_accuracy=0.9)
    positions, told = looks(tmp_path, [0, 20, 5, 30, 15], trigger)
    assert [one["score"] for one in told[1:]] == pytest.approx([3e5, 9e5, 21e5, 1.5e5])
    assert positions == [100, 400]


# -- how the samples changed --------------------------------------------------------------------------------------


def shifted(rows: int = 4000, at: int = 2000, by: float = 1.5) -> pl.DataFrame:
    moved = pl.int_range(pl.len()) >= at
    return make_frame(rows).with_columns(pl.when(moved).then(pl.col("c") + by).otherwise(pl.col("c")).alias("c"))


def drifts(tmp_path, trigger, frame: pl.DataFrame | None = None, **changes):  # type: ignore[no-untyped-def]
    dataset = dk.Workspace(tmp_path).ingest(
        "s",
        shifted() if frame is None else frame,
        timestamp="when",
        label="late",
        features=changes.pop("features", None),
    )
    run = replayed(make_pipeline(dataset, trigger=trigger, **changes))
    return run, [event.data for event in run.events() if event.kind == "decided"]


@pytest.mark.parametrize("on", ["fields", "embedding", "outputs"])
@pytest.mark.parametrize("metric", ["mmd", "energy", "c2st"])
def test_drift_is_found_in_the_look_after_the_change(tmp_path, on: str, metric: str) -> None:
    frame = make_frame(3000, seed=1).with_columns(
        pl.when(pl.int_range(pl.len()) >= 2000).then(pl.col("a") + 3).otherwise(pl.col("a")).alias("a")
    )
    trigger = Drift(metric=metric, every=500, current=500, reference=500, on=on, criterion=PValue(0.004, 300))
    run, _ = drifts(tmp_path, trigger, frame, training=dk.Training(epochs=5, batch_size=64, lr=1e-2))
    assert [trained.position for trained in run.trained] == [500, 2500]


def test_the_same_drift_is_seen_once_because_the_reference_moves(tmp_path) -> None:
    run, told = drifts(tmp_path, Drift(every=500, on="fields", criterion=Threshold(0.05), current=500, reference=500))
    assert [trained.position for trained in run.trained] == [500, 2500]
    assert [one["reference"] for one in told[1:]] == [[0, 500]] * 4 + [[2000, 2500]] * 3
    assert [one["current"] for one in told[1:]] == [[end - 500, end] for end in range(1000, 4001, 500)]


def test_windows_are_the_newest_samples_before_and_after_the_training(tmp_path) -> None:
    seen = []

    def points(frame, run):  # type: ignore[no-untyped-def]
        seen.append((frame["key"][0], frame["key"][-1], frame.height))
        return np.zeros((frame.height, 1))

    drifts(tmp_path / "1", Drift(every=1000, on=points, current=600, reference=300, criterion=Threshold(9.0)))
    assert seen == [(700, 999, 300), (1400, 1999, 600), (2400, 2999, 600), (3400, 3999, 600)]  # the reference once
    seen.clear()
    drifts(
        tmp_path / "2",
        Drift(every=1000, on=points, current=1500, reference="1d", overlap=True, sample=5000, criterion=Threshold(9.0)),
    )
    assert seen == [(856, 999, 144), (500, 1999, 1500), (1500, 2999, 1500), (2500, 3999, 1500)]
    seen.clear()
    drifts(
        tmp_path / "3",
        Drift(every=1000, on=points, current="2d", reference="all", sample=400, criterion=Threshold(9.0)),
    )
    assert seen[0][2] == 400 and seen[1] == (1712, 1999, 288)


def test_columns_of_the_table_can_be_compared(tmp_path) -> None:
    trigger = Drift(every=500, on="columns", criterion=PValue(0.01), current=500, reference=500)
    run, _ = drifts(tmp_path, trigger, shifted(), features=["a", "b"], model=lambda: nn.Linear(2, 2))
    assert [trained.position for trained in run.trained] == [500, 2500]


def test_samples_with_missing_values_are_left_out_of_columns(tmp_path) -> None:
    frame = shifted().with_columns(
        a=pl.when(pl.int_range(pl.len()) % 7 == 0).then(None).otherwise("a"),
        b=pl.when(pl.int_range(pl.len()) % 5 == 0).then(float("nan")).otherwise("b"),
    )
    trigger = Drift(every=500, on="columns", sample=frame.height)
    table = testing.StreamView(past=frame)
    assert len(trigger._points(frame, table, 0)) == sum(i % 7 > 0 and i % 5 > 0 for i in range(frame.height))
    with pytest.raises(InvalidInput, match="of 500 samples 0 have all numeric columns, 'a' is missing most"):
        trigger._points(frame.head(500).with_columns(a=pl.lit(None, pl.Float64)), table, 0)


def test_no_numeric_columns_is_an_error_that_helps(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="on='fields'"):
        drifts(tmp_path, Drift(every=500, on="columns"))


def test_a_function_that_loses_samples_is_told(tmp_path) -> None:
    with pytest.raises(PolicyError, match="returned 3 rows for 500 samples"):
        drifts(tmp_path, Drift(every=500, on=lambda frame, run: np.zeros((3, 1))))


def test_drift_decides_the_same_however_the_stream_is_cut() -> None:
    def points(frame, run):  # type: ignore[no-untyped-def]
        return frame.select(pl.col("label").cast(pl.Float64), pl.col("key").sqrt()).to_numpy()

    trigger = Drift(every=300, on=points, criterion=DynamicQuantile(0.2), current=200, reference=300)
    testing.check_trigger(trigger, TABLE.head(3000), splits=(1000, 1, 170))
    assert len(fired(trigger)) > 2
    testing.check_trigger(any_of(trigger, Amount(700)), TABLE.head(3000), splits=(1000, 1, 170))


def test_a_run_with_drift_continues_to_the_same_end(tmp_path) -> None:
    trigger = any_of(
        Drift(every=200, criterion=DynamicQuantile(0.3), current=200, reference=200),
        Performance(every=250, criterion=Threshold(0.6)),
    )
    dataset = dk.Workspace(tmp_path).ingest("s", shifted(), timestamp="when", label="late")
    pipeline = make_pipeline(dataset, trigger=trigger)
    whole = replayed(pipeline)
    told = [event.data for event in whole.events() if event.kind == "decided"]
    steps = pipeline.replay()
    for event in steps:
        if event.kind == "trained" and event.data["index"] == 3:
            break
    steps.close()
    again = dk.Workspace(tmp_path).run(event.run).resume()
    assert again.wait(120) == "finished"
    assert again.trained[-1].model == whole.trained[-1].model
    assert [e.data for e in again.events() if e.kind == "decided"] == told
    assert len(whole.trained) > 4


# -- what can be seen of it ---------------------------------------------------------------------------------------


def test_decisions_can_be_read_and_drawn(tmp_path) -> None:
    trigger = any_of(
        Drift(every=500, on="fields", criterion=Threshold(0.05), current=500, reference=500),
        Performance(every=1000, criterion=Threshold(0.3)),
    )
    run, told = drifts(tmp_path, trigger)
    frame = run.decisions()
    assert frame.columns[:6] == ["timestamp", "position", "trigger", "score", "threshold", "fired"]
    assert frame.height == len(told)
    fired = frame.filter("fired")
    assert set(fired["position"]) == {trained.position for trained in run.trained}
    times = shifted()["when"].dt.replace_time_zone("UTC").cast(pl.Datetime("ns", "UTC"))
    assert frame["timestamp"].equals(times[frame["position"] - 1], check_names=False)
    picture = dk.plots.decisions(frame)
    assert picture.svg().startswith("<svg")
    assert len(picture.chart.to_dict()["vconcat"]) == 2
    counted = replayed(make_pipeline(dk.Dataset(run._catalog, "s"), trigger=Amount(1000)))
    assert counted.decisions().is_empty()
    with pytest.raises(InvalidInput, match="only count"):
        dk.plots.decisions(counted.decisions())


# -- what went wrong once -----------------------------------------------------------------------------------------


def test_a_late_sample_ends_no_period() -> None:
    days = [1, 5, 2, 5, 3, 6]
    stamps = [dt.datetime(2013, 1, day, tzinfo=dt.UTC) for day in days]
    table = pl.DataFrame({"key": range(6), "timestamp": pl.Series(stamps).cast(pl.Datetime("ns", "UTC"))})
    first = int(table["timestamp"].to_physical()[0])
    view = testing.StreamView(start_ns=first, now_ns=first)
    assert list(Time("1d")(table, view)) == [0, 4]


def test_a_skipped_training_is_as_if_nothing_had_fired(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = make_frame(1500).with_columns(late=pl.when(pl.int_range(pl.len()) >= 600).then(pl.col("late")))
    dataset = dk.Workspace(tmp_path).ingest("s", frame, timestamp="when", label="late", features=["a", "b", "c"])
    found = []
    for rows in (1000, 100, 250):
        monkeypatch.setattr("dynkit.pipeline.replay.BLOCK_ROWS", rows)  # how a user's stream is cut cannot be chosen
        trigger = Drift(every=100, on="fields", current=100, reference=100, criterion=Threshold(9.0))
        found.append([trained.position for trained in replayed(make_pipeline(dataset, trigger=trigger)).trained])
    assert found == [[700]] * 3
    for regret in ("latency", "misclassification"):
        trigger = Cost(rate=1e12, regret=regret, every=100, training_s=lambda samples: 1.0)
        run = replayed(make_pipeline(dataset, trigger=trigger))
        assert [trained.position for trained in run.trained] == [700]


def test_a_voter_is_never_asked_about_nothing(tmp_path) -> None:
    asked = []

    def own(new, run):  # type: ignore[no-untyped-def]
        asked.append(new.height)
        return False

    dataset = dk.Workspace(tmp_path).ingest("s", make_frame(2500), timestamp="when", label="late")
    run = replayed(make_pipeline(dataset, trigger=any_of(Time("10000m"), own)))  # a period ends at a block's edge
    assert [trained.position for trained in run.trained] == [1000, 2000]
    assert min(asked) > 0


def test_numbers_of_numpy_can_be_reported(tmp_path) -> None:
    def own(new, run):  # type: ignore[no-untyped-def]
        run.report(new.height - 1, trigger="own", score=np.float32(0.5), fired=np.bool_(True), seen=np.arange(2))
        return True

    dataset = dk.Workspace(tmp_path).ingest("s", make_frame(500), timestamp="when", label="late")
    decided = replayed(make_pipeline(dataset, trigger=own)).decisions()
    assert decided.select("score", "fired", "seen").row(0) == (0.5, True, [0, 1])
    with pytest.raises(PolicyError, match=r"score=.* only numbers, texts"):
        replayed(make_pipeline(dataset, trigger=lambda new, run: run.report(0, score=object())))


def test_two_triggers_of_a_kind_are_told_apart_and_warmup_is_no_firing(tmp_path) -> None:
    options = {"every": 200, "on": "fields", "current": 200, "reference": 200, "criterion": Threshold(9.0)}
    trigger = any_of(
        Drift("mmd", **options),  # type: ignore[arg-type]
        all_of(Drift("ks", **options, warmup=Amount(700), warmup_looks=6), Amount(1)),  # type: ignore[arg-type]
    )
    run, _ = drifts(tmp_path, trigger, make_frame(1400))
    frame = run.decisions()
    assert set(frame.select("voter", "metric").unique().rows()) == {("0", "mmd"), ("1.0", "ks")}
    assert len(dk.plots.decisions(frame).chart.to_dict()["vconcat"]) == 2
    ks = frame.filter(metric="ks")
    assert ks["warmup"].to_list() == [True] * 6 + [None]
    assert not ks["fired"].any()


def test_resuming_reports_no_decision_twice(tmp_path) -> None:
    trigger = any_of(
        Drift(every=1000, on="fields", current=100, reference=100, criterion=Threshold(9.0)),
        Performance(every=300, criterion=Threshold(0.0)),
    )
    dataset = dk.Workspace(tmp_path).ingest("s", make_frame(3000), timestamp="when", label="late")
    pipeline = make_pipeline(dataset, trigger=trigger)
    whole = replayed(pipeline).decisions()
    steps = pipeline.replay()
    for n, event in enumerate(steps):  # noqa: B007
        if n == 9:
            break
    steps.close()
    again = dk.Workspace(tmp_path).run(event.run).resume()
    assert again.wait(120) == "finished"
    assert again.decisions().equals(whole)
