"""When a number is bad enough: hand-worked values, and what the criteria have in common."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dynkit as dk
from dynkit.drift import DynamicQuantile, DynamicRollingAverage, PValue, Threshold
from dynkit.errors import InvalidInput
from dynkit.policies import describe

ALL = [
    Threshold(0.3),
    DynamicQuantile(),
    DynamicQuantile(quantile=0.3, window=4),
    DynamicRollingAverage(),
    DynamicRollingAverage(deviation=0.2, window=3, absolute=True),
    PValue(),
]
NUMBERS = st.floats(-100, 100)


@pytest.mark.parametrize(
    ("criterion", "value", "history", "lower", "fires", "threshold"),
    [
        (Threshold(0.3), 0.3, [], False, True, 0.3),
        (Threshold(0.3), 0.29, [], False, False, 0.3),
        (Threshold(0.3), 0.3, [], True, True, 0.3),
        (Threshold(0.3), 0.31, [], True, False, 0.3),
        (DynamicQuantile(quantile=0.25, window=5), 4.0, [9, 1, 2, 3, 4, 5], False, False, 4.0),  # not at it
        (DynamicQuantile(quantile=0.25, window=5), 4.1, [9, 1, 2, 3, 4, 5], False, True, 4.0),
        (DynamicQuantile(quantile=0.25, window=5), 2.0, [9, 1, 2, 3, 4, 5], True, False, 2.0),
        (DynamicQuantile(quantile=0.25, window=5), 1.9, [9, 1, 2, 3, 4, 5], True, True, 2.0),
        (DynamicQuantile(quantile=0.1), 1.95, [1, 2], False, True, 1.9),
        (DynamicRollingAverage(deviation=0.5, window=2), 3.0, [100, 1, 3], False, True, 3.0),
        (DynamicRollingAverage(deviation=0.5, window=2), 2.9, [100, 1, 3], False, False, 3.0),
        (DynamicRollingAverage(deviation=0.5, window=2), 1.0, [100, 1, 3], True, True, 1.0),
        (DynamicRollingAverage(deviation=0.5, absolute=True), 2.5, [1, 3], False, True, 2.5),
        (DynamicRollingAverage(deviation=0.5, absolute=True), 1.6, [1, 3], True, False, 1.5),
        (DynamicRollingAverage(), 0.0, [0.0, 0.0], False, False, 0.0),  # nothing has changed
        (DynamicRollingAverage(deviation=0.5), -1.5, [-2.0], False, False, -1.0),  # half of the size, upwards
        (PValue(), 0.049, [], False, True, 0.05),
        (PValue(), 0.05, [], False, False, 0.05),
        (PValue(level=0.1), 0.07, [], True, True, 0.1),
    ],
)
def test_a_value_fires_where_its_rule_says(
    criterion: object, value: float, history: list, lower: bool, fires: bool, threshold: float
) -> None:
    decision = criterion(value, history, lower_is_worse=lower)
    assert decision.fires is fires
    assert decision.threshold == pytest.approx(threshold)


@pytest.mark.parametrize("criterion", ALL[1:5], ids=repr)
@given(NUMBERS, st.booleans())
def test_without_earlier_values_a_dynamic_criterion_never_fires(criterion: object, value: float, lower: bool) -> None:
    assert criterion(value, [], lower_is_worse=lower) == (False, None)


@pytest.mark.parametrize("criterion", ALL[:5], ids=repr)
@given(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=15))
def test_lower_is_worse_is_the_mirror_of_higher(criterion: object, value: float, history: list) -> None:
    mirrored = Threshold(-0.3) if isinstance(criterion, Threshold) else criterion
    up = criterion(value, history)
    down = mirrored(-value, [-past for past in history], lower_is_worse=True)
    assert up.threshold == pytest.approx(-down.threshold, abs=1e-9)
    if abs(value - up.threshold) > 1e-9:
        assert up.fires is down.fires


@pytest.mark.parametrize("criterion", ALL[:5], ids=repr)
@given(st.lists(NUMBERS, min_size=1, max_size=15), NUMBERS, st.floats(0, 10))
def test_what_is_worse_fires_too(criterion: object, history: list, value: float, more: float) -> None:
    assert criterion(value + more, history).fires or not criterion(value, history).fires


@given(st.lists(NUMBERS, min_size=5, max_size=15), NUMBERS)
def test_only_the_last_values_count(history: list, value: float) -> None:
    for criterion in (DynamicQuantile(window=5), DynamicRollingAverage(window=5)):
        assert criterion(value, history) == criterion(value, history[-5:]) == criterion(value, np.array(history))


def test_criteria_are_plain_records() -> None:
    assert [next(iter(describe(criterion))) for criterion in ALL] == [
        "threshold",
        "dynamic_quantile",
        "dynamic_quantile",
        "dynamic_rolling_average",
        "dynamic_rolling_average",
        "p_value",
    ]
    assert json.loads(json.dumps(describe(DynamicQuantile())))["dynamic_quantile"] == {"quantile": 0.05, "window": 10}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Threshold(float("nan")), "value=nan"),
        (lambda: DynamicQuantile(quantile=2), "quantile=2"),
        (lambda: DynamicQuantile(window=0), "window=0"),
        (lambda: DynamicRollingAverage(deviation=-1), "deviation=-1"),
        (lambda: PValue(level=0), "level=0"),
        (lambda: PValue(permutations=10), "permutations=20 or more"),
        (lambda: Threshold(1)(float("inf")), "value=inf"),
        (lambda: DynamicQuantile()(None, [1.0]), "value=None"),
    ],
)
def test_what_no_rule_can_use_is_named(make: object, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        make()


def test_a_permutation_test_can_fire_at_the_fewest_permutations_allowed() -> None:
    criterion = PValue(level=0.05, permutations=20)
    rng = np.random.default_rng(0)
    found = dk.drift.prepared("mmd", rng.normal(size=(100, 2))).tested(rng.normal(5, 1, (100, 2)), 20, rng)
    assert criterion(found.p_value, []).fires
