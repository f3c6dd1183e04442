"""Stream detectors against river, value by value; any cut of a stream into blocks."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import drift as river
from river.drift import binary

import dynkit as dk
from dynkit.drift import streams
from dynkit.errors import InvalidInput


class RiverKSWIN(river.KSWIN):
    """River's, with our draws: a test takes the next one."""

    class Draws:
        def __init__(self, older: int, size: int, seed: int) -> None:
            self.draws, self.taken = streams._draws(older, size, seed), 0

        def sample(self, places: range, size: int) -> list[int]:
            self.taken += 1
            return self.draws[(self.taken - 1) % len(self.draws)].tolist()

    def _reset(self) -> None:
        super()._reset()
        self._rng = self.Draws(self.window_size - self.stat_size, self.stat_size, self.seed)


PAIRS = {  # ours, river's
    "adwin": (dk.drift.ADWIN(), river.ADWIN()),
    "adwin, every value": (
        dk.drift.ADWIN(delta=0.1, clock=1, max_buckets=3, min_window_length=2, grace_period=1),
        river.ADWIN(delta=0.1, clock=1, max_buckets=3, min_window_length=2, grace_period=1),
    ),
    "kswin": (dk.drift.KSWIN(), RiverKSWIN(seed=0)),
    "kswin, small": (
        dk.drift.KSWIN(alpha=0.05, window_size=40, stat_size=10, seed=3),
        RiverKSWIN(alpha=0.05, window_size=40, stat_size=10, seed=3),
    ),
    "page_hinkley": (dk.drift.PageHinkley(), river.PageHinkley()),
    "page_hinkley, up": (
        dk.drift.PageHinkley(mode="up", threshold=5, min_instances=10),
        river.PageHinkley(mode="up", threshold=5, min_instances=10),
    ),
    "page_hinkley, down": (
        dk.drift.PageHinkley(mode="down", threshold=3, alpha=0.99),
        river.PageHinkley(mode="down", threshold=3, alpha=0.99),
    ),
}
OF_ERRORS = {
    "ddm": (dk.drift.DDM(), binary.DDM()),
    "ddm, early": (
        dk.drift.DDM(warm_start=5, drift_threshold=1.5),
        binary.DDM(warm_start=5, drift_threshold=1.5, warning_threshold=1),
    ),
    "eddm": (dk.drift.EDDM(), binary.EDDM()),
    "eddm, early": (dk.drift.EDDM(warm_start=5, beta=0.8), binary.EDDM(warm_start=5, beta=0.8)),
    "hddm_a": (dk.drift.HDDM_A(), binary.HDDMA()),
    "hddm_a, two sides": (
        dk.drift.HDDM_A(drift_confidence=0.05, two_sided=True),
        binary.HDDMA(drift_confidence=0.05, warning_confidence=0.1, two_sided_test=True),
    ),
    "hddm_w": (dk.drift.HDDM_W(), binary.HDDMW()),
    "hddm_w, two sides": (
        dk.drift.HDDM_W(drift_confidence=0.05, weight=0.2, two_sided=True),
        binary.HDDMW(drift_confidence=0.05, warning_confidence=0.1, lambda_val=0.2, two_sided_test=True),
    ),
}


def numbers(seed: int, rows: int = 3000, columns: int = 4) -> np.ndarray:
    """Streams that change at random places, of continuous and of few values."""
    rng = np.random.default_rng(seed)
    changes = rng.random((rows, columns)) < 3 / rows
    level = np.cumsum(changes * rng.normal(scale=2, size=(rows, columns)), axis=0)
    values = rng.normal(size=(rows, columns)) + level
    values[:, -1] = np.round(values[:, -1])
    return values


def errors(seed: int, rows: int = 3000, columns: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rates = rng.choice([0.0, 0.02, 0.1, 0.3, 0.6, 1.0], size=(6, columns)).repeat(rows // 6, axis=0)
    return (rng.random(rates.shape) < rates).astype(float)


def by_river(detector: object, values: np.ndarray) -> np.ndarray:
    return streams._River(detector).update(values)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", [*PAIRS, *OF_ERRORS])
def test_a_detector_fires_where_rivers_does(name: str, seed: int) -> None:
    ours, theirs = copy.deepcopy((PAIRS | OF_ERRORS)[name])
    rows = 1200 if "kswin" in name else 6000
    values = numbers(seed, rows) if name in PAIRS else errors(seed, rows)
    found, expected = ours.update(values), by_river(theirs, values)
    assert found.dtype == bool and found.shape == values.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [*PAIRS, *OF_ERRORS])
def test_the_streams_of_that_comparison_do_change(name: str) -> None:
    ours, _ = (PAIRS | OF_ERRORS)[name]
    fired = sum(
        copy.deepcopy(ours).update(numbers(seed, 6000) if name in PAIRS else errors(seed, 6000)).sum()
        for seed in range(6)
    )
    assert fired > 5


@given(st.sampled_from([*PAIRS, *OF_ERRORS]), st.integers(0, 100), st.lists(st.integers(0, 2500), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_cut_into_blocks_fires_at_the_same_values(name: str, seed: int, cuts: list[int]) -> None:
    whole = copy.deepcopy((PAIRS | OF_ERRORS)[name][0])
    values = numbers(seed, 2500, 3) if name in PAIRS else errors(seed, 2400, 3)
    expected = whole.update(values)
    kept = copy.deepcopy((PAIRS | OF_ERRORS)[name][0])
    found = []
    for block in np.split(values, sorted(min(cut, len(values)) for cut in cuts)):
        kept = pickle.loads(pickle.dumps(kept))
        found.append(kept.update(block))
    np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("name", [*PAIRS, *OF_ERRORS])
def test_one_value_at_a_time_is_a_block_too(name: str) -> None:
    whole, kept = (copy.deepcopy((PAIRS | OF_ERRORS)[name][0]) for _ in range(2))
    values = (numbers(1, 400, 1) if name in PAIRS else errors(1, 402, 1))[:, 0]
    assert (np.concatenate([kept.update(values[i : i + 1]) for i in range(len(values))]) == whole.update(values)).all()


def test_columns_do_not_know_of_each_other() -> None:
    values = numbers(7, 3000, 5)
    for detector in (dk.drift.ADWIN(), dk.drift.KSWIN(), dk.drift.PageHinkley()):
        together = copy.deepcopy(detector).update(values)
        alone = [copy.deepcopy(detector).update(values[:, i]) for i in range(5)]
        np.testing.assert_array_equal(together, np.stack(alone, 1))


def test_what_is_kept_is_small() -> None:
    for detector in (dk.drift.ADWIN(), dk.drift.KSWIN(), dk.drift.PageHinkley(), dk.drift.HDDM_W()):
        detector.update(errors(0, 30_000, 1))
        assert len(pickle.dumps(detector)) < 6_000


def test_rivers_detectors_are_taken_as_they_are() -> None:
    values = numbers(3, 2000, 2)
    theirs = dk.drift.as_detector(river.ADWIN())
    found = np.concatenate([theirs.update(values[:700]), theirs.update(values[700:])])
    np.testing.assert_array_equal(found, dk.drift.ADWIN().update(values))
    ours = dk.drift.KSWIN()
    assert dk.drift.as_detector(ours) is ours
    for wrong in (river.ADWIN, 5, "adwin"):
        with pytest.raises(InvalidInput, match="no detector"):
            dk.drift.as_detector(wrong)


def test_parameters_are_the_record_of_a_detector() -> None:
    detector = dk.drift.KSWIN(alpha=0.01)
    detector.update(np.zeros(50))
    assert repr(detector) == "KSWIN(alpha=0.01, window_size=100, stat_size=30, seed=0)"
    assert detector == dk.drift.KSWIN(alpha=0.01)
    assert [field.name for field in dataclasses.fields(detector)] == ["alpha", "window_size", "stat_size", "seed"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0, np.nan], "NaN"),
        (np.zeros((2, 2, 2)), "one column a stream"),
        (["a"], "as numbers"),
        (5.0, "shape"),
    ],
)
def test_what_is_no_stream_is_named(values: object, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        dk.drift.PageHinkley().update(values)


def test_errors_are_0_or_1() -> None:
    with pytest.raises(InvalidInput, match=r"DDM takes 1 for an error and 0 for none; 0.5 is neither"):
        dk.drift.DDM().update([0, 1, 0.5])
    detector = dk.drift.EDDM()
    detector.update(np.zeros((5, 2)))
    with pytest.raises(InvalidInput, match="3 streams came after those of 2"):
        detector.update(np.zeros((5, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: dk.drift.ADWIN(delta=0),
        lambda: dk.drift.ADWIN(clock=0),
        lambda: dk.drift.KSWIN(window_size=50),
        lambda: dk.drift.KSWIN(alpha=1),
        lambda: dk.drift.PageHinkley(mode="sideways"),
        lambda: dk.drift.DDM(warm_start=0),
        lambda: dk.drift.HDDM_A(drift_confidence=0),
        lambda: dk.drift.HDDM_W(weight=1),
    ],
)
def test_impossible_parameters_are_refused(make: object) -> None:
    with pytest.raises(InvalidInput, match="="):
        make()
