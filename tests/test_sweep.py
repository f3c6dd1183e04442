"""Sweeps: every combination runs, what they share is trained once, and the results are those of running each alone."""

import json
import multiprocessing as mp
import threading

import pytest
from streams import make_frame, make_pipeline, replayed

import dynkit as dk
from dynkit.disk import locked
from dynkit.errors import InvalidInput


@pytest.fixture
def dataset(tmp_path) -> dk.Dataset:  # type: ignore[no-untyped-def]
    return dk.Workspace(tmp_path).ingest("s", make_frame(2000), timestamp="when", label="late")


def models(run: dk.Run) -> list[str]:
    return [trained.model for trained in run.trained]


def reused(run: dk.Run) -> list[str | None]:
    return [event.data.get("reused") for event in run.events() if event.kind == "trained"]


def test_equal_trainings_are_done_once(dataset: dk.Dataset) -> None:
    first = make_pipeline(dataset, trigger=dk.triggers.Amount(500))
    more = make_pipeline(dataset, trigger=dk.triggers.any_of(dk.triggers.Amount(500), dk.triggers.Amount(700)))
    alone = replayed(more)
    *_, one = first.replay(reuse=True)
    *_, two = more.replay(reuse=True)
    ws = dk.Workspace(dataset.catalog.root)
    assert reused(ws.run(two.run))[0] is not None
    assert models(ws.run(two.run)) == models(alone) == models(ws.run(one.run))
    assert ws.run(two.run).matrix().equals(alone.matrix())
    assert ws.run(two.run).models()["samples_passed"].equals(alone.models()["samples_passed"])


def test_another_seed_setting_or_selection_is_another_training(dataset: dk.Dataset) -> None:
    *_, one = make_pipeline(dataset).replay(reuse=True)
    ws = dk.Workspace(dataset.catalog.root)
    for change in (
        {"seed": 4},
        {"training": dk.Training(batch_size=64, lr=2e-2, warm_start=True)},
        {"selection": dk.selection.Random(fraction=0.7)},
    ):
        *_, other = make_pipeline(dataset, **change).replay(reuse=True)
        assert reused(ws.run(other.run)) == [None] * 4
    *_, same = make_pipeline(dataset, evaluation=dk.Evaluation(windows=dk.windows.Tumbling("5d"))).replay(reuse=True)
    assert reused(ws.run(same.run)) == [one.run] * 4
    *_, without = make_pipeline(dataset).replay()
    assert reused(ws.run(without.run)) == [None] * 4


def test_a_sweep_runs_the_grid_and_shares_what_it_can(dataset: dk.Dataset) -> None:
    base = make_pipeline(dataset, selection=dk.selection.All())
    grid = {
        "trigger": {"500": dk.triggers.Amount(500), "1000": dk.triggers.Amount(1000)},
        "evaluation": {
            "3d": base.evaluation,
            "5d": dk.Evaluation(windows=dk.windows.Tumbling("5d"), metrics=["accuracy"]),
        },
    }
    sweep = dk.sweep(base, jobs=2, **grid).wait(240)
    assert [run.status for run in sweep.runs] == ["finished"] * 4
    shared = [sum(one is not None for one in reused(run)) for run in sweep.runs]
    assert sum(shared[:2]) == 4 and sum(shared[2:]) == 2  # of two runs with the same trainings, one trains each
    frame = sweep.frame().filter(metric="accuracy")
    assert frame.select("trigger", "evaluation").rows() == [
        ("500", "3d"),
        ("500", "5d"),
        ("1000", "3d"),
        ("1000", "5d"),
    ]
    assert frame["trainings"].to_list() == [4, 4, 2, 2]
    alone = replayed(make_pipeline(dataset, selection=dk.selection.All()))
    assert models(sweep.runs[0]) == models(alone)
    assert "finished" in sweep._repr_html_() and "finished" in repr(sweep)
    again = dk.sweep(base, jobs=2, **grid).wait(60)
    assert [run.id for run in again.runs[1:]] == [run.id for run in sweep.runs[1:]]
    assert models(again.runs[0]) == models(alone)  # that one is newer


def test_a_finished_run_is_found_again_behind_an_interrupted_one(dataset: dk.Dataset) -> None:
    base = make_pipeline(dataset)
    done = replayed(base)
    interrupted = base.replay()
    next(interrupted)
    interrupted.close()
    assert [run.id for run in dk.sweep(base, seed=[base.seed]).wait().runs] == [done.id]


def test_a_run_that_is_being_started_is_cancelled_too(dataset: dk.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    starting, cancelled = threading.Event(), threading.Event()
    start = dk.Pipeline.start

    def slow(pipeline, **options):  # type: ignore[no-untyped-def]
        starting.set()
        assert cancelled.wait(60)
        return start(pipeline, **options)

    monkeypatch.setattr(dk.Pipeline, "start", slow)
    sweep = dk.sweep(make_pipeline(dataset, training=dk.Training(epochs=10_000)), seed=[0])
    assert starting.wait(60)
    sweep.cancel()
    cancelled.set()
    assert [run.status for run in sweep.wait(120).runs] == ["cancelled"]


def test_a_sweep_can_be_cancelled(dataset: dk.Dataset) -> None:
    slow = dk.Training(epochs=10_000, batch_size=16, device="cpu")
    sweep = dk.sweep(make_pipeline(dataset, training=slow), seed=[0, 1, 2])
    while not sweep.runs:
        pass
    sweep.cancel().wait(60)
    assert [run.status for run in sweep.runs] == ["cancelled"]
    assert sweep.frame().is_empty()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"triger": []}, "did you mean 'trigger'"),
        ({"seed": []}, "list of different values"),
        ({"seed": [1, 1]}, "list of different values"),
        ({"trigger": dk.triggers.Time("1d")}, "list of different values"),
        ({"trigger": [dk.triggers.Amount]}, "is a class"),
        ({"jobs": 0}, "jobs=0"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(dataset: dk.Dataset, grid, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput, match=message):
        dk.sweep(make_pipeline(dataset), **grid)
    assert not dk.Workspace(dataset.catalog.root).runs()


def test_reuse_and_carried_optimizers_exclude_each_other(dataset: dk.Dataset) -> None:
    training = dk.Training(warm_start=True, carry_optimizer=True)
    with pytest.raises(InvalidInput, match="carry_optimizer"):
        next(make_pipeline(dataset, training=training).replay(reuse=True))


def _count(path, counter, times) -> None:  # type: ignore[no-untyped-def]
    for _ in range(times):
        with locked(path, lambda: None):
            counter.write_text(json.dumps(json.loads(counter.read_text()) + 1))


def test_a_lock_is_one_process_at_a_time(tmp_path) -> None:
    counter = tmp_path / "n"
    counter.write_text("0")
    context = mp.get_context("spawn")
    workers = [context.Process(target=_count, args=(tmp_path / "lock", counter, 5)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counter.read_text() == "10"


def test_labels_may_be_numbers_and_optimizers_may_be_carried(dataset: dk.Dataset) -> None:
    training = dk.Training(warm_start=True, carry_optimizer=True)
    sweep = dk.sweep(make_pipeline(dataset, training=training), seed={0.5: 1}).wait(120)
    assert repr(sweep).startswith("0.5 ")
    assert [run.status for run in sweep.runs] == ["finished"]
