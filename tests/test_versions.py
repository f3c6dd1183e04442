"""Versions: whatever is done to a dataset, in whatever order and however it ends, it is what a dictionary would be."""

import datetime as dt
import gc
import os
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from pathlib import Path

import crashes
import numpy as np
import polars as pl
import pytest
from forks import running
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from streams import make_frame

import dynkit as dk
from dynkit import disk
from dynkit.data import store, writing
from dynkit.errors import Conflict, InvalidInput, NotFound, StorageError


class Changing(RuleBasedStateMachine):
    """All changes by two writers, and every version so far, against dictionaries."""

    @initialize(codec=st.sampled_from(["none", "zstd"]))
    def start(self, codec: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(writing, "_FANOUT", 3)  # so that a few appends are merged
        ws = dk.Workspace(self.folder.name)
        self.writers = [
            ws.create_dataset("d", fields=crashes.FIELDS, label="int64", compression=codec),
            dk.Workspace(self.folder.name).dataset("d"),
        ]
        self.states: dict[int, crashes.State] = {1: {}}
        self.next_key = 0

    def change(self, writer: int, kind: str, arguments: tuple) -> None:
        crashes.perform(self.writers[writer], kind, arguments)
        state, self.next_key = crashes.applied(self.states[max(self.states)], self.next_key, kind, arguments)
        self.states[max(self.states) + 1] = state

    @rule(n=st.integers(1, 9), seed=st.integers(0, 99), labelled=st.booleans(), writer=st.integers(0, 1))
    def append(self, n: int, seed: int, labelled: bool, writer: int) -> None:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, n) if labelled else None
        self.change(writer, "append", (rng.integers(0, 1000, n).astype(float), labels, rng.integers(0, 50, n)))

    @precondition(lambda self: self.states[max(self.states)])
    @rule(data=st.data(), writer=st.integers(0, 1))
    def delete(self, data: st.DataObject, writer: int) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.states[max(self.states)])), min_size=1, unique=True))
        self.change(writer, "delete", (np.array(keys, dtype=np.int64),))

    @precondition(lambda self: self.states[max(self.states)])
    @rule(data=st.data(), writer=st.integers(0, 1))
    def label(self, data: st.DataObject, writer: int) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.states[max(self.states)])), min_size=1, unique=True))
        self.change(writer, "label", (np.array(keys, dtype=np.int64), np.arange(len(keys)) + 5))

    @rule(erase=st.booleans(), writer=st.integers(0, 1))
    def compact(self, erase: bool, writer: int) -> None:
        self.writers[writer].compact(erase=erase)
        head = max(self.states)
        self.states[head + 1] = self.states[head]
        if erase:
            self.states = {head + 1: self.states[head + 1]}

    @rule()
    def reopen(self) -> None:
        self.writers[0] = dk.Workspace(self.folder.name).dataset("d")

    @rule()
    def collect(self) -> None:
        self.writers[0].gc()
        self.writers[0].verify()

    @invariant()
    def every_version_is_its_dictionary(self) -> None:
        if not getattr(self, "states", None):
            return
        for writer in self.writers:
            assert [version.number for version in writer.versions()] == sorted(self.states)
            crashes.check(writer, self.states[max(self.states)])
        for number, state in self.states.items():
            crashes.check(self.writers[1].at(number), state)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.patch.undo()
            self.folder.cleanup()


TestChanging = Changing.TestCase
TestChanging.settings = settings(max_examples=12, stateful_step_count=10, deadline=None)


@pytest.mark.timeout(600)
def test_a_writer_killed_at_two_hundred_moments_loses_nothing_and_shows_nothing_half(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields=crashes.FIELDS, label="int64")
    states: dict[int, crashes.State] = {1: {}}
    next_key = 0
    rng = np.random.default_rng(0)
    operations = set()
    longest_s = 0.06
    with running(crashes, ws.path) as told:
        for _ in range(200):
            assert told(f"{rng.random() * longest_s}") == "9"  # it was at work until it was killed
            before = max(states)
            for number in range(before, dataset.version):
                kind, arguments = crashes.operation(number, states[number], next_key)
                operations.add(kind)
                states[number + 1], next_key = crashes.applied(states[number], next_key, kind, arguments)
                crashes.check(dataset.at(number + 1), states[number + 1])
            made = max(states) - before
            longest_s *= 1.1 if not made else 0.9 if made > 2 else 1.0  # a slow disk: kill later; and not too late
    assert operations == {"append", "delete", "label", "compact"}
    assert max(states) > 100
    orphans = dataset.gc()
    assert orphans  # some were killed between writing and committing
    assert not any((ws.path / "datasets/d" / orphan).exists() for orphan in orphans)
    assert dataset.gc() == []
    dataset.verify()
    crashes.check(dataset, states[max(states)])


def planted(ws: dk.Workspace, codec: str) -> tuple[dk.Dataset, bytes, np.ndarray]:
    """A dataset with one sample whose bytes are nowhere else."""
    pattern = b"PLANTED-IN-A-SAMPLE!"
    values = np.random.default_rng(0).integers(0, 4, (500, 20), dtype=np.uint8)
    values[123] = np.frombuffer(pattern, np.uint8)
    dataset = ws.create_dataset(
        "p", fields={"x": ("uint8", (20,)), "b": "bytes"}, compression=codec, columns={"c": "str"}
    )
    texts = [f"text {i}" for i in range(500)]
    texts[123] = pattern.decode()
    data = [pattern if i == 123 else b"-" * (i % 9) for i in range(500)]
    keys = dataset.append(x=values, b=data, c=texts, timestamp=np.arange(500))
    return dataset, pattern, keys


def holds(folder: Path, pattern: bytes) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and pattern in file.read_bytes()]


def test_erased_bytes_are_nowhere(ws: dk.Workspace) -> None:
    dataset, pattern, keys = planted(ws, "none")
    folder = ws.path / "datasets/p"
    dataset.delete(keys[[123]])
    assert len(holds(folder, pattern)) == 3  # array, bytes and index: a deletion is a note
    with pytest.raises(NotFound, match="1 keys are not in version"):
        dataset.read(keys[[123]])
    assert len(dataset.at(2)) == 500
    dataset.compact(erase=True)
    assert holds(folder, pattern) == []
    with pytest.raises(NotFound, match="has no version 2; it has 4 to 4"):
        dataset.at(2)
    assert len(dataset) == 499
    np.testing.assert_array_equal(dataset.keys(), np.delete(keys, 123))
    dataset.verify()


def test_all_samples_can_be_deleted_and_others_added(ws: dk.Workspace) -> None:
    dataset, _, keys = planted(ws, "zstd")
    dataset.delete(keys)
    assert (len(dataset), dataset.table().height, dataset.keys().tolist()) == (0, 0, [])
    dataset.compact(erase=True)
    assert list(dataset.batches()) == []
    new = dataset.append(x=np.zeros((2, 20), np.uint8), b=[b"1", b"2"], c=["a", "b"], timestamp=np.arange(2))
    assert new.min() > keys.max()
    assert len(dataset) == 2


def test_deleting_by_a_condition(dataset: dk.Dataset) -> None:
    late = dataset.table().filter(pl.col("label") == 1)["key"]
    assert dataset.delete(pl.col("label") == 1) == 2
    assert len(dataset) == 3000 - len(late)
    with pytest.raises(NotFound, match="not in version 2"):
        dataset.delete(late)
    with pytest.raises(InvalidInput, match="lable"):
        dataset.delete(pl.col("lable") == 1)
    with pytest.raises(InvalidInput, match="not a condition"):
        dataset.delete(pl.col("label") + 1)
    assert dataset.version == 2


def test_at_an_instant_and_the_difference_of_two_versions(dataset: dk.Dataset) -> None:
    time.sleep(0.01)
    between = dt.datetime.now(dt.UTC)
    new = dataset.append(make_frame(10, seed=4))
    dataset.delete([5, 6])
    dataset.label([7, 8], [9, int(dataset.at(1).read([8])["label"])])  # the second one as it was
    assert dataset.at(between).version == 1
    assert dataset.at(dt.datetime.now(dt.UTC)).version == 4
    with pytest.raises(NotFound, match="had no version at"):
        dataset.at("2001-01-01")
    diff = dataset.diff(1, dataset.versions()[-1])
    assert [part.tolist() for part in diff] == [new.tolist(), [5, 6], [7]]
    assert [version.operation for version in dataset.versions()] == ["create", "append", "delete", "label"]
    assert "append" in dataset.versions()._repr_html_()
    for change in (lambda old: old.delete([1]), lambda old: old.compact(), lambda old: old.label([1], [0])):
        with pytest.raises(Conflict, match="version 1 of 'stream' is fixed"):
            change(dataset.at(1))


def test_splits_hold_for_samples_to_come_and_holdouts_are_not_trained_on(dataset: dk.Dataset) -> None:
    dataset.split("test", fraction=0.25, holdout=True)
    dataset.split("odd", where=pl.col("label") == 1)
    before = dataset.keys(split="test")
    assert 0.2 < len(before) / 3000 < 0.3
    dataset.append(make_frame(1000, seed=3))
    after = dataset.keys(split="test")
    assert set(before) <= set(after)
    assert len(after) > len(before) + 150
    assert len(dataset.keys(split="odd")) == int((dataset.table()["label"] == 1).sum())
    assert dataset.split("test", fraction=0.25, holdout=True) == dataset.version  # again is nothing new
    with pytest.raises(Conflict, match="split 'test' exists with another rule"):
        dataset.split("test", fraction=0.5)
    with pytest.raises(NotFound, match="did you mean 'test'"):
        dataset.keys(split="tset")
    with pytest.raises(InvalidInput, match="either fraction or where"):
        dataset.split("none")
    batches = dataset.batches("test", batch_size=100)
    assert sum(len(batch["x"]) for batch in batches) == len(after)


def test_labels_come_late_and_in_any_type(ws: dk.Workspace) -> None:
    values = {"x": np.zeros((3, 1), np.float32), "timestamp": np.arange(3)}
    texts = ws.create_dataset("t", fields={"x": ("float32", (1,))}, label="str")
    keys = texts.append(**values, label=["cat", None, "dog"])
    texts.label(keys[[1]], ["bird"])
    assert texts.read(keys)["label"].tolist() == [0, 2, 1]
    assert texts.table()["label"].to_list() == ["cat", "bird", "dog"]
    assert texts.schema["label"]["classes"] == ["cat", "dog", "bird"]
    texts.append(**values, label=["fish", "cat", "dog"])
    assert texts.read(texts.keys())["label"].tolist().count(3) == 1
    assert texts.at(2).read(keys)["label"].tolist() == [0, -100, 1]
    several = ws.create_dataset("s", fields={"x": ("float32", (1,))}, label=("float32", (2,)))
    keys = several.append(**values)
    assert several.read(keys)["label"].isnan().all()
    several.label(keys[:1], np.array([[1.0, 2.0]], np.float32))
    several.compact()
    assert several.read(keys)["label"][0].tolist() == [1.0, 2.0]
    assert several.read(keys)["label"][1:].isnan().all()
    with pytest.raises(InvalidInput, match="labels are"):
        several.label(keys[:1], [1.0])
    with pytest.raises(InvalidInput, match="2 keys and 1 labels"):
        texts.label(keys[:2], ["cat"])
    with pytest.raises(InvalidInput, match="1 of the labels are null"):
        texts.label(keys[:2], ["cat", None])
    with pytest.raises(InvalidInput, match="labels are"):
        texts.label(keys[:2], [1, 2])


def test_several_label_columns_are_one_label(ws: dk.Workspace) -> None:
    frame = make_frame(20).with_columns(second=pl.when(pl.col("a") > 0).then(1))
    dataset = ws.ingest("s", frame, timestamp="when", label=["late", "second"], features=["b"])
    labels = dataset.read(dataset.keys())["label"]
    assert labels.shape == (20, 2)
    known = frame["second"].is_not_null().to_numpy()
    assert labels[known].tolist() == frame.filter(pl.Series(known)).select("late", "second").to_numpy().tolist()
    assert (labels[~known] == -100).all()


def test_a_flipped_byte_and_a_missing_file_are_named(dataset: dk.Dataset) -> None:
    dataset.verify()
    folder = dataset.catalog.root / "datasets/stream"
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(StorageError, match=path.name):
            dataset.verify()
        path.write_bytes(content)
    dataset.verify()
    for path in folder.glob("segments/*.arrow"):
        path.unlink()
        with pytest.raises(StorageError, match=f"{path.name} is missing"):
            dataset.verify()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_told_and_harms_nothing(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        ws = dk.Workspace(tmp_path / "ws")
        dataset = ws.create_dataset("d", fields={"x": ("uint8", (1000,))}, label="int64")
        keys = dataset.append(x=np.ones((1000, 1000), np.uint8), timestamp=np.arange(1000), label=np.arange(1000))
        for _ in range(2):
            with pytest.raises(StorageError, match="No space left on device; nothing was committed"):
                dataset.append(x=np.zeros((9000, 1000), np.uint8), timestamp=np.arange(9000))
        assert (dataset.version, len(dataset)) == (2, 1000)
        assert dataset.read(keys)["x"].min() == 1
        dataset.verify()
        dataset.append(x=np.zeros((1000, 1000), np.uint8), timestamp=np.arange(1000))  # what was left is given back
        assert dataset.gc() == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_equal_samples_are_found_by_content(ws: dk.Workspace) -> None:
    rng = np.random.default_rng(0)
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (13,)), "t": ("int32", (None,))}, label="int64")
    values = rng.integers(0, 255, (300, 13), dtype=np.uint8)
    tokens = [rng.integers(0, 9, i % 5).astype(np.int32) for i in range(300)]
    keys = dataset.append(x=values, t=tokens, timestamp=np.arange(300), label=np.arange(300) % 3)
    assert dataset.duplicates().height == 0
    again = dataset.append(x=values[:9], t=tokens[:9], timestamp=np.arange(9), label=np.arange(9) % 3)
    other = dataset.append(x=values[:9], t=tokens[:9], timestamp=np.arange(9), label=np.arange(9) % 3 + 1)
    found = dataset.duplicates()
    assert sorted(zip(found["key"], found["first"], strict=True)) == sorted(
        (max(pair), min(pair)) for pair in zip(again.tolist(), keys[:9].tolist(), strict=True)
    ) or set(found["key"]) | set(found["first"]) == {*again.tolist(), *keys[:9].tolist()}
    before = dataset.hashes(keys)
    dataset.label(other[:1], [0])
    assert (dataset.hashes(keys) == before).all()
    assert dataset.hashes(other)[0] == before[0]


def test_many_small_appends_become_few_segments(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("int64", ())})
    keys = [dataset.append(x=np.array([i, -i]), timestamp=np.array([i, i + 10])) for i in range(100)]
    assert len(dataset.open().segments) < 40
    assert dataset.read(np.concatenate(keys))["x"].tolist() == [v for i in range(100) for v in (i, -i)]
    assert dataset.at(50).read(np.concatenate(keys[:49]))["x"].tolist() == [v for i in range(49) for v in (i, -i)]
    assert dataset.keys().tolist() == dataset.table().sort("timestamp", "key")["key"].to_list()


def test_segments_of_several_groups_are_compacted(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SEGMENT_BYTES", 100)
    dataset = ws.create_dataset("d", fields={"x": ("int64", ())}, label="int64")
    keys = np.concatenate([dataset.append(x=np.arange(10), timestamp=np.arange(10)) for _ in range(6)])
    dataset.delete(keys[[3, 55]])
    dataset.label(keys[[4]], [7])
    before = dataset.version
    dataset.compact()
    left = np.delete(keys, [3, 55])
    assert dataset.read(left)["x"].tolist() == np.delete(np.tile(np.arange(10), 6), [3, 55]).tolist()
    assert dataset.read(keys[[4]])["label"].tolist() == [7]
    assert dataset.diff(1 + 6, dataset.version).relabeled.tolist() == [4]  # seen through the compaction
    assert [len(part) for part in dataset.diff(before, dataset.version)] == [0, 0, 0]


def test_nothing_to_do_makes_no_version(dataset: dk.Dataset) -> None:
    assert dataset.delete([]) == dataset.label([], []) == dataset.delete(pl.col("label") > 5) == 1
    assert dataset.read([0])["x"].shape == (1, 3)


def test_a_split_waits_for_an_erasure_like_every_writer(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ws.create_dataset("d", fields={"x": "int64"})
    dataset.append(x=np.arange(5), timestamp=np.arange(5))
    order: list[str] = []
    commit = writing.commit

    def slow(store: object, operation: str, change: object) -> int:
        order.append(operation)
        if operation == "erase":
            writer = threading.Thread(
                target=lambda: dk.Workspace(ws.path).dataset("d").split("s", fraction=0.5, holdout=True)
            )
            writer.start()
            threads.append(writer)
            time.sleep(0.2)
            order.append("erased")
        return commit(store, operation, change)  # type: ignore[arg-type]

    threads: list[threading.Thread] = []
    monkeypatch.setattr(writing, "commit", slow)
    dataset.compact(erase=True)
    threads[0].join()
    assert order == ["erase", "erased", "split"]
    assert set(dataset.splits) == {"s"}
    dataset.verify()


def test_an_erasure_while_somebody_follows(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": "int64"}, label="str")
    for i in range(3):
        dataset.append(x=np.array([i]), timestamp=[i], label=["a"])
    following = dataset.follow(since=0, timeout_s=0.1)
    assert next(following).version == 1
    dataset.compact(erase=True)
    assert [version.version for version in following] == [5]
    assert len(ws.create_dataset("d", fields={"x": "int64"}, label="str")) == 3  # the declaration is the same


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_after_the_commit_leaves_what_was_committed(
    ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (2,))})

    def flush(*paths: Path) -> None:
        disk.flush(*paths)
        if paths[-1].name == "versions":  # the new version is there; that it will stay is being made sure of
            raise error

    monkeypatch.setattr(store, "flush", flush)
    with pytest.raises((KeyboardInterrupt, StorageError)):
        dataset.append(x=np.ones((2, 2), np.uint8), timestamp=[1, 2])
    monkeypatch.undo()
    dataset.verify()
    assert dataset.read(dataset.keys())["x"].tolist() == [[1, 1], [1, 1]]


def test_a_column_may_have_any_name_where_labels_come_late(ws: dk.Workspace) -> None:
    frame = make_frame(3).select("when", "a", label=pl.lit(0), late=pl.int_range(3), label_right=pl.int_range(3))
    dataset = ws.ingest("d", frame, timestamp="when", label="label", features=["a"])
    dataset.label([1], [5])
    for _ in range(2):
        table = dataset.table()
        assert table["label"].to_list() == [0, 5, 0]
        assert table["late"].to_list() == table["label_right"].to_list() == [0, 1, 2]
        dataset.compact(erase=True)


def test_a_condition_says_something_of_each_sample(ws: dk.Workspace) -> None:
    dataset = ws.ingest("d", make_frame(4), timestamp="when", label="late", features=["a"])
    for condition in (pl.col("b").drop_nulls().head(2) > 0, pl.col("b").head(0) > 0):
        with pytest.raises(InvalidInput, match="values for 4 samples; one for each is needed"):
            dataset.delete(condition)
    assert len(dataset) == 4
    assert len(dataset.at(dataset.delete(pl.lit(True)))) == 0


def test_versions_without_a_common_sample_differ_in_all(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (2,))}, label="int64")
    dataset.append(x=np.ones((2, 2), np.uint8), timestamp=[1, 2], label=[0, 1])
    found = dataset.diff(1, 2)
    assert (len(found.added), len(found.removed), len(found.relabeled)) == (2, 0, 0)
    with pytest.raises(InvalidInput, match="2 keys and 0 labels"):
        dataset.label([0, 1], [])
    with pytest.raises(InvalidInput, match="labels=1 is a single value"):
        dataset.label([0, 1], 1)


def test_a_version_that_nobody_uses_leaves_memory_at_once(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (2,))}, compression="zstd")
    dataset.append(x=np.ones((2, 2), np.uint8), timestamp=[1, 2])
    gc.collect()
    gc.disable()
    try:
        version = dataset.at(2).open()
        version.gather(np.arange(2))
        watched = weakref.ref(version)
        del version
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_names_of_classes_are_erased_with_the_last_sample_that_had_them(ws: dk.Workspace, codec: str) -> None:
    frame = make_frame(4).select("when", "a", label=pl.Series(["cat", "alicesecret", "dog", "bobsecret"]))
    dataset = ws.ingest("d", frame, timestamp="when", label="label", features=["a"], compression=codec)
    dataset.delete([1])
    dataset.label([3], ["cat"])
    folder = ws.path / "datasets" / "d"
    assert holds(folder, b"alicesecret") and holds(folder, b"bobsecret")
    dataset.compact(erase=True)
    assert not holds(folder, b"alicesecret") and not holds(folder, b"bobsecret")
    assert dataset.table()["label"].to_list() == ["cat", "dog", "cat"]
    assert dataset.read(dataset.keys())["label"].tolist() == [0, 2, 0]
    dataset.append(frame)
    assert dataset.read(dataset.keys())["label"].sort().values.tolist() == [0, 0, 0, 2, 2, 4, 5]
    dataset.verify()


def test_a_lock_ends_with_its_block_though_a_child_was_forked_in_it(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (2,))})
    with dataset._store.writing():
        child = os.fork()
        if not child:
            signal.pause()
    try:
        assert dataset.gc() == []  # needs to be alone
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_damage_is_not_rewritten_with_a_fresh_hash(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("float32", (2,))})
    for moment in range(3):
        dataset.append(x=np.ones((5, 2), np.float32), timestamp=[moment] * 5)
    shard = next((ws.path / "datasets/d/segments").rglob("c/0/0"))
    shard.write_bytes(b"\xff" * 4 + shard.read_bytes()[4:])
    for erase in (False, True):
        with pytest.raises(StorageError, match=r"c/0/0 is damaged: its hash does not fit; nothing was rewritten"):
            dataset.compact(erase=erase)
    with pytest.raises(StorageError, match="c/0/0"):
        dataset.verify()


def test_masked_values_are_missing_labels_and_no_samples(ws: dk.Workspace) -> None:
    y = np.ma.masked_array([0, 1, 0, 1], mask=[False, True, False, True])
    data = {"when": np.datetime64("2024-01-01") + np.arange(4), "x": np.zeros((4, 2), np.float32), "y": y}
    dataset = ws.ingest("d", data, timestamp="when", label="y")
    assert dataset.table()["label"].to_list() == [0, None, 0, None]
    with pytest.raises(InvalidInput, match="array 'x' has masked values"):
        ws.ingest("e", {**data, "x": np.ma.masked_greater(data["x"], -1)}, timestamp="when", label="y")
    with pytest.raises(InvalidInput, match=r"array 'x' has shape \(4, 0\): nothing per sample"):
        ws.ingest("e", {**data, "x": np.zeros((4, 0))}, timestamp="when", label="y")


def test_sequences_of_another_type_are_refused(ws: dk.Workspace) -> None:
    frame = make_frame(3).select("when", tok=pl.Series([[1, 2, 3], [4], [5, 6]]))
    dataset = ws.ingest("d", frame, timestamp="when")
    for dtype in (pl.Int32, pl.Float64):
        with pytest.raises(InvalidInput, match="field 'tok' holds int64, the new samples"):
            dataset.append(frame.with_columns(pl.col("tok").cast(pl.List(dtype))))
    assert len(dataset) == 3
