"""Data that arrives: versions are followed, files are read once, and a live run trains as samples come."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from streams import START, make_frame, make_pipeline

import dynkit as dk
from dynkit.errors import Conflict, InvalidInput

QUICK = {"poll_s": 0.02, "settle_s": 0.0, "timeout_s": 0.2}


def test_versions_are_followed_as_they_are_committed(dataset: dk.Dataset) -> None:
    seen = []
    follower = threading.Thread(target=lambda: seen.extend(dataset.follow(timeout_s=1.0)))
    follower.start()
    time.sleep(0.1)
    for seed in range(3):
        dataset.append(make_frame(10, seed=seed))
    follower.join(30)
    assert [(version.version, len(version)) for version in seen] == [(2, 3010), (3, 3020), (4, 3030)]
    assert [version.version for version in dataset.follow(since=2, timeout_s=0.05)] == [3, 4]


def write(path: Path, frame: pl.DataFrame) -> None:
    """As careful writers do: the name appears when the content is there."""
    draft = path.with_name(f".{path.name}")
    frame.write_parquet(draft)
    draft.rename(path)


def test_files_are_read_once_across_restarts_and_again_when_edited(
    ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.parquet", make_frame(10, seed=1))
    write(folder / "b.parquet", make_frame(20, seed=2))
    (folder / "bad.parquet").write_bytes(b"not this")
    (folder / "notes.txt").write_text("not that")
    assert [len(new) for new in dataset.watch(folder, "*.parquet", **QUICK)] == [3010, 3030]
    assert "bad.parquet was not read" in caplog.text
    again = dk.Workspace(ws.path).dataset("stream")
    assert list(again.watch(folder, "*.parquet", **QUICK)) == []
    os.utime(folder / "a.parquet")
    assert list(again.watch(folder, "*.parquet", **QUICK)) == []  # only its time changed
    old = dataset.read(dataset.keys())["x"]
    write(folder / "a.parquet", make_frame(15, seed=3))
    assert [len(new) for new in again.watch(folder, "*.parquet", **QUICK)] == [3035]
    samples = {tuple(row) for row in again.read(again.keys())["x"].tolist()}
    edited = make_frame(15, seed=3).select("a", "b", "c").to_numpy().astype(np.float32)
    gone = make_frame(10, seed=1).select("a", "b", "c").to_numpy().astype(np.float32)
    assert {tuple(row) for row in edited.tolist()} <= samples
    assert not {tuple(row) for row in gone.tolist()} & samples
    assert len(old) == 3030
    write(folder / "bad.parquet", make_frame(5, seed=4))
    assert [len(new) for new in again.watch(folder, "*.parquet", **QUICK)] == [3040]
    again.compact(erase=True)
    assert list(again.watch(folder, "*.parquet", **QUICK)) == []
    with pytest.raises(InvalidInput, match="no folder"):
        next(again.watch(tmp_path / "none"))
    with pytest.raises(Conflict, match="is fixed"):
        next(again.at(again.version).watch(folder))


WATCH = """
import sys; sys.path.insert(0, {tests!r})
import dynkit as dk
dataset = dk.Workspace({root!r}).dataset("stream")
for new in dataset.watch({folder!r}, "*.parquet", poll_s=0.01, settle_s=0.0, timeout_s=2.0):
    pass
"""


def test_two_watchers_read_every_file_once(ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    code = WATCH.format(tests=str(Path(__file__).parent), root=str(ws.path), folder=str(folder))
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    for i in range(20):
        write(folder / f"{i}.parquet", make_frame(7, seed=100 + i))
        time.sleep(0.02)
    assert [process.wait(120) for process in processes] == [0, 0]
    for _ in dataset.watch(folder, "*.parquet", **QUICK):
        pass
    assert len(dataset) == 3000 + 20 * 7
    assert dataset.duplicates().height == 0


def test_a_live_run_trains_as_samples_arrive_and_ends_when_asked(ws: dk.Workspace) -> None:
    dataset = ws.ingest("live", make_frame(700), timestamp="when", label="late")
    run = make_pipeline(dataset, name="live").start(live=True)

    def trained() -> int:
        return sum(event.kind == "trained" for event in run.events())

    def until(condition: object) -> None:
        end = time.monotonic() + 60
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < end, run.status
            time.sleep(0.05)

    until(lambda: trained() == 1)  # Amount(500) of 700
    dataset.append(make_frame(400, seed=1, start=START.replace(year=2012)))  # late samples: seen when they arrive
    until(lambda: trained() == 2)
    dataset.delete(np.arange(1020, 1070))
    dataset.append(make_frame(500, seed=2, start=START.replace(year=2014)))
    until(lambda: trained() == 3)
    run.finish()
    assert run.wait(60) == "finished"
    events = [event for event in run.events() if event.kind == "triggered"]
    assert [event.data["position"] for event in events] == [500, 1000, 1550]  # fifty of those that waited were deleted
    assert all(0 <= event.data["latency_s"] < 30 for event in events)
    assert events[1].data["latency_s"] < 5
    assert run.composite().height > 0


def test_a_live_run_goes_on_after_its_process_was_killed(ws: dk.Workspace) -> None:
    dataset = ws.ingest("live", make_frame(1200), timestamp="when", label="late")
    run = make_pipeline(dataset, name="live").start(live=True)
    end = time.monotonic() + 60
    while sum(event.kind == "trained" for event in run.events()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(run.pid, 9)
    while run.status == "running" and time.monotonic() < end:
        time.sleep(0.05)
    dataset.append(make_frame(400, seed=1))
    run.resume()
    run.finish()
    assert run.wait(60) == "finished"
    positions = [event.data["position"] for event in run.events() if event.kind == "triggered"]
    assert sorted(set(positions)) == [500, 1000, 1500]


def test_a_live_run_goes_on_after_its_version_was_erased(ws: dk.Workspace) -> None:
    dataset = ws.ingest("live", make_frame(500), timestamp="when", label="late")
    events = make_pipeline(dataset, trigger=dk.triggers.Amount(400)).replay(live=True)
    run = ws.run(next(event for event in events if event.kind == "trained").run)
    events.close()  # type: ignore[attr-defined]
    dataset.append(make_frame(400, seed=1))
    dataset.compact(erase=True)
    run.resume()
    run.finish()
    assert run.wait(60) == "finished"
    assert len(run.trained) == 2


def test_samples_without_a_label_or_held_out_are_not_trained_on(ws: dk.Workspace) -> None:
    frame = make_frame(2000).with_columns(late=pl.when(pl.int_range(pl.len()) % 4 > 0).then("late"))
    dataset = ws.ingest("part", frame, timestamp="when", label="late", features=["a", "b", "c"])
    dataset.split("test", fraction=0.3, holdout=True)
    held = set(dataset.keys(split="test").tolist())
    pipeline = make_pipeline(
        dataset,
        selection=dk.selection.New(),
        evaluation=dk.Evaluation(windows=dk.windows.Tumbling("3d"), metrics=["accuracy"], split="test"),
    )
    *_, last = pipeline.replay()
    run = ws.run(last.run)
    unlabelled = set(dataset.table().filter(pl.col("label").is_null())["key"].to_list())
    for path in sorted((ws.path / "runs" / run.id / "selections").glob("*.arrow")):
        keys = set(pl.read_ipc(path)["key"].to_list())
        assert 200 < len(keys) < 300  # of 500: three of four have a label, 70 % are not held out
        assert not keys & (held | unlabelled)
    judged = [event.data["samples"] for event in run.events() if event.kind == "evaluated"]
    assert sum(judged) == len(held - unlabelled)


def test_a_trigger_before_any_label_is_skipped(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("none", fields={"x": ("float32", (3,))}, label="int64")
    keys = dataset.append(x=np.zeros((600, 3), np.float32), timestamp=np.arange(600))
    events = list(make_pipeline(dataset).replay())
    assert [event.kind for event in events] == ["started", "triggered", "skipped", "finished"]
    dataset.label(keys, np.arange(600) % 2)
    assert "trained" in [event.kind for event in make_pipeline(dataset).replay()]


class EveryHundredAndThirty:
    """A trigger that counts by itself."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, new: pl.DataFrame, run: object) -> list[int]:
        positions = []
        for i in range(new.height):
            self.seen += 1
            if self.seen % 130 == 0:
                positions.append(i)
        return positions


def test_a_stateful_trigger_goes_on_in_a_live_run(ws: dk.Workspace) -> None:
    dataset = ws.ingest("live", make_frame(50), timestamp="when", label="late")
    pipeline = make_pipeline(dataset, trigger=EveryHundredAndThirty())
    events = pipeline.replay(live=True)
    next(events)
    for seed in range(6):
        dataset.append(make_frame(100, seed=seed))
    trained = 0
    for event in events:
        trained += event.kind == "trained"
        if trained == 3:
            break
    events.close()
    run = ws.run(event.run)
    run.resume()
    run.finish()
    assert run.wait(60) == "finished"
    positions = [event.data["position"] for event in run.events() if event.kind == "triggered"]
    assert positions == [130, 260, 390, 520, 650]


def continued(ws: dk.Workspace, pipeline: dk.Pipeline) -> dk.Run:
    """Interrupt a run after its third training, and let it finish."""
    events = pipeline.replay()
    for event in events:
        if event.kind == "trained" and event.data["index"] == 2:
            break
    events.close()  # type: ignore[attr-defined]
    run = ws.run(event.run)
    run.resume()
    assert run.wait(60) == "finished"
    return run


def test_a_run_that_skipped_a_trigger_goes_on(ws: dk.Workspace) -> None:
    frame = make_frame(600).with_columns(late=pl.when(pl.int_range(pl.len()) >= 150).then("late"))
    dataset = ws.ingest("s", frame, timestamp="when", label="late", features=["a", "b", "c"])
    pipeline = make_pipeline(dataset, trigger=dk.triggers.Amount(100), training=dk.Training(batch_size=64))
    run = continued(ws, pipeline)
    assert [one.position for one in run.trained] == [200, 300, 400, 500, 600]


def test_a_trigger_for_which_nothing_is_chosen_is_skipped_also_on_continuing(ws: dk.Workspace) -> None:
    row = pl.int_range(pl.len())
    frame = make_frame(600).with_columns(late=pl.when((row < 150) | (row >= 420)).then("late"))
    dataset = ws.ingest("s", frame, timestamp="when", label="late", features=["a", "b", "c"])
    pipeline = make_pipeline(dataset, trigger=dk.triggers.Amount(100), selection=dk.selection.New())
    run = continued(ws, pipeline)
    assert [one.position for one in run.trained] == [100, 200, 500, 600]
    skipped = [event.data for event in run.events() if event.kind == "skipped"]
    assert [(one["position"], one["reason"]) for one in skipped] == [
        (position, "the selection chose no sample") for position in (300, 400)
    ]


def test_a_file_is_tried_again_after_trouble_that_passes(
    ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", make_frame(10, seed=1))
    append, troubles = dk.data.writing.append, iter([Conflict("busy"), OSError("gone for a moment")])

    def troubled(*arguments: object, **options: object) -> object:
        for trouble in troubles:
            raise trouble
        return append(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(dk.data.writing, "append", troubled)
    assert [len(new) for new in dataset.watch(tmp_path, "*.parquet", **QUICK)] == [3010]
    os.utime(tmp_path / "a.parquet", (4e9, 4e9))  # a clock that is ahead does not keep the watcher waiting
    assert list(dataset.watch(tmp_path, "*.parquet", poll_s=0.01, settle_s=0.1, timeout_s=0.2)) == []
