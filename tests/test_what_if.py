"""What-if: the same as running it, where it says so."""

import numpy as np
import pytest
from streams import make_pipeline, replayed
from test_triggers import shifted

import dynkit as dk
from dynkit.drift import DynamicQuantile, Threshold
from dynkit.errors import Conflict, InvalidInput
from dynkit.triggers import Amount, Cost, Drift, Performance, Time, any_of


@pytest.fixture
def dataset(tmp_path) -> dk.Dataset:  # type: ignore[no-untyped-def]
    return dk.Workspace(tmp_path).ingest("s", shifted(), timestamp="when", label="late")


def drift(threshold: float = 0.02, on: str = "fields") -> Drift:
    return Drift(every=200, on=on, current=200, reference=400, criterion=Threshold(threshold))


def positions(run: dk.Run) -> list[int]:
    return [trained.position for trained in run.trained]


def test_thresholds_fire_where_they_really_would(dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, trigger=any_of(drift(), Time("20d"))))
    thresholds = [0.0005, 0.002, 0.01, 0.05, 0.3]
    found = dk.what_if(run, drift_threshold=thresholds).frame
    assert found["variant"].to_list() == ["the run", *(f"drift_threshold={one}" for one in thresholds)]
    assert found["positions"][0].to_list() == positions(run)
    assert found["exact"].all()
    for threshold, expected in zip(thresholds, found["positions"][1:], strict=True):
        really = replayed(make_pipeline(dataset, trigger=any_of(drift(threshold), Time("20d"))))
        assert positions(really) == expected.to_list()
    counts = found["triggers"].to_list()[1:]
    assert counts[0] > counts[-1] and counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    "trigger",
    [
        Amount(700),
        Time("3d"),
        Drift(metric="energy", every=300, on="fields", current=300, reference=300, criterion=DynamicQuantile(0.3)),
        Cost(rate=1e6, every=100, training_s=lambda samples: 10 + samples / 100),
        lambda new, run: new.height > 500 and run.samples_since_trigger > 900,
    ],
)
def test_a_trigger_that_looks_at_samples_only_is_exact(dataset: dk.Dataset, trigger) -> None:  # type: ignore[no-untyped-def]
    run = replayed(make_pipeline(dataset))
    frame = dk.what_if(run, trigger=trigger).frame
    assert frame["exact"].to_list() == [True, True]
    assert frame["positions"][1].to_list() == positions(replayed(make_pipeline(dataset, trigger=trigger)))
    assert frame["triggers"][1] > 1


def test_the_run_itself_is_what_it_was_even_when_it_looks_at_models(dataset: dk.Dataset) -> None:
    trigger = Performance(every=300, criterion=Threshold(0.75))
    run = replayed(make_pipeline(dataset, trigger=trigger))
    frame = dk.what_if(run, {"same": trigger, "stricter": Performance(every=300, criterion=Threshold(0.95))}).frame
    assert frame["positions"][1].to_list() == positions(run)
    assert frame["exact"].to_list() == [True, True, False]
    assert frame["triggers"][2] > frame["triggers"][1]


def test_it_says_what_it_cannot_tell(dataset: dk.Dataset, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = replayed(make_pipeline(dataset))
    with pytest.raises(InvalidInput, match="no Drift"):
        dk.what_if(run, drift_threshold=0.1)
    with pytest.raises(InvalidInput, match="either trigger or drift_threshold"):
        dk.what_if(run)
    steps = make_pipeline(dataset, name="early").replay()
    event = next(steps)
    steps.close()
    with pytest.raises(Conflict, match="interrupted"):
        dk.what_if(dk.Workspace(tmp_path).run(event.run), trigger=Amount(10))


def test_it_shows_itself(dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, trigger=drift()))
    found = dk.what_if(run, drift_threshold=[0.01, 0.1])
    assert "drift_threshold=0.1: " in repr(found)
    assert "<table" in found._repr_html_()


def test_nothing_is_trained_or_committed(dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, trigger=drift()))
    before = len(run.events()), len(dk.Workspace(run.folder.parents[1]).runs())
    dk.what_if(run, drift_threshold=0.001)
    assert (len(run.events()), len(dk.Workspace(run.folder.parents[1]).runs())) == before


class Every:
    """A trigger with memory."""

    def __init__(self, n: int) -> None:
        self.n, self.rows = n, 0

    def __call__(self, new, run):  # type: ignore[no-untyped-def]
        places = [i for i in range(new.height) if (self.rows + i + 1) % self.n == 0]
        self.rows += new.height
        return places


def test_variants_do_not_share_the_memory_of_their_warmup(dataset: dk.Dataset) -> None:
    trigger = Drift(
        every=200, on="fields", current=100, reference=100, criterion=Threshold(9.0), warmup=Every(300), warmup_looks=7
    )
    run = replayed(make_pipeline(dataset, trigger=trigger))
    frame = dk.what_if(run, drift_threshold=np.float32([9.0, 9.5])).frame
    assert [found.to_list() for found in frame["positions"]] == [positions(run)] * 3


def test_a_run_that_never_trained_can_be_asked(dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, trigger=Amount(10**6)))
    frame = dk.what_if(run, trigger={"500": Amount(1500), "drift": drift()}).frame
    assert frame["positions"].to_list()[:2] == [[], [1500, 3000]]
    assert frame["exact"].to_list()[1] and frame["triggers"][2] >= 2
