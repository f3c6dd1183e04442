"""Datasets on disk: what goes in comes out, in time order, under any version, from any number of writers."""

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from streams import START, make_frame

import dynkit as dk
from dynkit.errors import Conflict, InvalidInput, NotFound, StorageError


def test_a_frame_becomes_a_table_and_a_float32_field(ws: dk.Workspace) -> None:
    frame = make_frame(50).with_columns(place=pl.lit("EWR"), flag=pl.col("a") > 0)
    dataset = ws.ingest("s", frame, timestamp="when", label="late", features=["b", "flag"])
    assert dataset.table().columns == ["key", "timestamp", "label", "a", "c", "place"]
    samples = dataset.read([3, 1])
    assert samples["x"].dtype == torch.float32
    np.testing.assert_array_equal(samples["x"].numpy(), frame[[3, 1]].select("b", "flag").to_numpy().astype(np.float32))
    assert samples["label"].tolist() == frame["late"][[3, 1]].to_list()


def test_all_other_columns_are_features_by_default(dataset: dk.Dataset) -> None:
    assert dataset.schema["features"] == ["a", "b", "c"]
    assert len(dataset) == 3000


def test_unsorted_samples_are_sorted_by_time_with_ties_in_their_order(ws: dk.Workspace) -> None:
    frame = make_frame(200).with_columns(when=pl.col("when").dt.truncate("1h")).sample(fraction=1, shuffle=True, seed=1)
    dataset = ws.ingest("s", frame, timestamp="when", label="late")
    expected = frame.sort("when", maintain_order=True)
    assert dataset.table()["timestamp"].dt.replace_time_zone(None).to_list() == expected["when"].to_list()
    np.testing.assert_array_equal(
        dataset.read(dataset.table()["key"])["x"].numpy(), expected.select("a", "b", "c").to_numpy().astype(np.float32)
    )


def test_table_of_an_interval_is_half_open(dataset: dk.Dataset) -> None:
    table = dataset.table("2013-01-02", dt.datetime(2013, 1, 3))
    assert table.height == 144
    assert str(table["timestamp"][0]) == "2013-01-02 00:00:00+00:00"
    assert dataset.table("2030-01-01").height == 0
    assert dataset.table("2013-01-03", "2013-01-02").height == 0


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "America/New_York"])
def test_times_of_any_unit_and_zone_keep_their_instant(ws: dk.Workspace, unit: str, zone: str | None) -> None:
    when = pl.Series("when", [START]).cast(pl.Datetime(unit)).dt.replace_time_zone(zone)  # type: ignore[arg-type]
    dataset = ws.ingest("s", pl.DataFrame({"when": when, "f": [1]}), timestamp="when")
    assert dataset.table()["timestamp"].dt.epoch("us").item() == when.dt.epoch("us").item()


@pytest.mark.parametrize("unit", ["D", "h", "m", "s", "ms", "ns"])
def test_dates_and_arrays_of_any_shape_are_accepted(ws: dk.Workspace, unit: str) -> None:
    images = np.random.default_rng(0).integers(0, 255, (10, 3, 4, 5), dtype=np.uint8)
    days = np.arange("2020-01-01", "2020-01-11", dtype="datetime64[D]").astype(f"datetime64[{unit}]")
    data = {"image": images, "day": days, "y": torch.arange(10) % 2, "group": ["a", "b"] * 5}
    dataset = ws.ingest("s", data, timestamp="day", label="y")
    assert dataset.schema["fields"] == {"image": {"dtype": "uint8", "shape": [3, 4, 5]}}
    np.testing.assert_array_equal(dataset.read(range(9, -1, -1))["image"].numpy(), images[::-1])
    assert dataset.table()["group"].to_list() == ["a", "b"] * 5
    assert dataset.table()["timestamp"].dt.day().to_list() == list(range(1, 11))


def bad(**changes: object) -> pl.DataFrame:
    return make_frame(10).with_columns(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (bad(when=None), {}, "timestamp column 'when' is Null"),
        (bad(when=pl.when(pl.col("a") > 0).then("when")), {}, "timestamp column 'when' has .* null values"),
        (bad(when=pl.lit("2013-01-01")), {}, "is String, not a datetime; convert it first: .*to_datetime"),
        (bad(when=pl.lit(5)), {}, "is Int32, not a datetime"),
        (bad(when=pl.lit(5).cast(pl.Int64)), {}, "convert it first: pl.from_epoch"),
        (bad(when=pl.lit(dt.datetime(3000, 1, 1))), {}, "outside the years 1677 to 2262"),
        (bad(late=None), {}, "label column 'late' has no values"),
        (bad(late=pl.lit("1.5").str.to_decimal(scale=2)), {}, "label column 'late' is Decimal"),
        (bad(late=pl.lit(2**70, pl.Int128)), {}, "label column 'late' has values beyond 64 bits"),
        (bad(a=pl.lit("EWR")), {}, "feature column 'a' is String, not a number; encode it"),
        (bad(a=pl.lit(None, pl.Float64)), {}, "feature column 'a' has 10 null values; fill them first"),
        (bad(a=pl.lit(float("nan"))), {}, "feature column 'a' has 10 values that are NaN"),
        (bad(a=pl.lit(1e300)), {}, "too large for float32"),
        (bad(key=pl.lit(1)), {"features": ["a"]}, "'key' is the name of a column that dynkit adds"),
        (bad(deep=pl.concat_list(pl.lit("a"), pl.lit("b"))), {"features": ["a"]}, "column 'deep' is List"),
        (bad(deep=pl.concat_list("a", pl.lit(None))), {"features": ["a"]}, "field column 'deep' has 10 null values"),
        (bad(none=None), {"features": ["a"]}, "column 'none' is Null"),
        (bad(price=pl.lit("1.5").str.to_decimal(scale=2)), {"features": ["a"]}, "column 'price' is Decimal"),
        ({"when": [START], "x": np.zeros((1, 2), dtype=np.longdouble), "late": [1]}, {}, "fields hold booleans"),
        (bad(late=pl.lit(-100)), {}, "label column 'late' has the number -100, which in a batch means"),
        (bad(), {"timestamp": "wen"}, "no column 'wen' in the data; did you mean 'when'"),
        (bad(), {"label": "lat"}, "no column 'lat' in the data; did you mean 'late'"),
        (bad(), {"features": ["a", "a"]}, "must be a list of different column names"),
        (bad(), {"features": "a"}, "must be a list of different column names"),
        (bad(), {"features": ["a", "late"]}, "must be different columns"),
        (bad().head(0), {}, "no rows"),
        (bad().select("when", "late"), {}, "no features"),
        ({"when": [START] * 3, "x": np.zeros((2, 2)), "late": [1, 0, 1]}, {}, "different lengths"),
        ({"when": [START], "x": np.array([[object()]]), "late": [1]}, {}, "Python objects"),
        ({"when": [START], "x": 3, "late": [1]}, {}, "single value"),
        ([1, 2], {}, "cannot read samples from list"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(
    ws: dk.Workspace, frame: object, options: dict[str, object], message: str
) -> None:
    chosen = {"timestamp": "when", "label": "late", **options}
    with pytest.raises(InvalidInput, match=message):
        ws.ingest("s", frame, **chosen)  # type: ignore[arg-type]
    assert ws.datasets() == []


def test_duplicate_columns_of_pandas_are_refused(ws: dk.Workspace) -> None:
    pd = pytest.importorskip("pandas")
    doubled = pd.DataFrame([[START, 1.0, 2.0]], columns=["when", "a", "a"])
    with pytest.raises(InvalidInput, match="duplicate column names"):
        ws.ingest("s", doubled, timestamp="when")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 101])
def test_names_that_are_no_folder_are_refused(ws: dk.Workspace, name: str) -> None:
    with pytest.raises(InvalidInput, match="name"):
        ws.ingest(name, make_frame(10), timestamp="when")


def test_the_same_ingest_again_is_the_same_dataset_and_another_is_refused(
    ws: dk.Workspace, dataset: dk.Dataset
) -> None:
    again = ws.ingest("stream", make_frame(), timestamp="when", label="late")
    assert again.version == 1
    with pytest.raises(Conflict, match=r"exists with other samples .*append"):
        ws.ingest("stream", make_frame(seed=1), timestamp="when", label="late")


def test_versions_stay_readable_and_read_only(dataset: dk.Dataset) -> None:
    before = dataset.table()
    later = make_frame(100, seed=1, start=START + dt.timedelta(hours=1))
    assert dataset.append(later).tolist() == list(range(3000, 3100))
    assert (dataset.version, len(dataset), len(dataset.at(1))) == (2, 3100, 3000)
    assert dataset.at(1).table().equals(before)
    assert dataset.table()["timestamp"].is_sorted()
    assert dataset.read([3000])["x"][0].tolist() == pytest.approx(later.row(0)[1:4])
    with pytest.raises(Conflict, match="version 1 of 'stream' is fixed"):
        dataset.at(1).append(later)
    for number in (0, 9):
        with pytest.raises(NotFound, match=f"has no version {number}; it has 1 to 2"):
            dataset.at(number)


def test_columns_may_come_in_another_order(ws: dk.Workspace) -> None:
    frame = make_frame(30).with_columns(place=pl.lit("EWR"), gate=pl.lit(3))
    dataset = ws.ingest("s", frame, timestamp="when", label="late", features=["b", "a"])
    dataset.append(frame.select(*reversed(frame.columns)))
    assert dataset.table().columns == ["key", "timestamp", "label", "c", "place", "gate"]
    x = dataset.read(range(60))["x"]
    assert x[30:].equal(x[:30])


@pytest.mark.parametrize(
    "dtype", [pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64, pl.Int8, pl.Int128, pl.Boolean, pl.Float32]
)
def test_labels_of_every_number_type_are_read(ws: dk.Workspace, dtype: pl.DataType) -> None:
    dataset = ws.ingest("s", make_frame(20).with_columns(pl.col("late").cast(dtype)), timestamp="when", label="late")
    assert dataset.read([5, 3])["label"].tolist() == make_frame(20)["late"][[5, 3]].to_list()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (make_frame(10).drop("c"), "no column 'c'"),
        (make_frame(10).with_columns(d=pl.lit(1)), "column 'd': the dataset has no such one"),
        (
            make_frame(10).with_columns(pl.col("late").cast(pl.Float64)),
            "label: the dataset has int64, the new samples float64",
        ),
    ],
)
def test_appending_other_columns_is_refused(dataset: dk.Dataset, frame: pl.DataFrame, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        dataset.append(frame)
    assert dataset.version == 1


def test_what_a_field_cannot_hold_is_refused(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("float16", (2,)), "y": "float32"})
    good = {"x": [[1.0, float("inf")]], "y": np.ones(1, np.float32), "timestamp": [1]}
    for wrong, message in [
        ({"x": [[1e9, 1.0]]}, "field 'x' holds float16, the new samples float64 that do not fit"),
        ({"y": pl.Series([None], dtype=pl.Float32)}, "field column 'y' has 1 null values"),
        ({"timestamp": np.array([2**63], np.uint64)}, "times outside the years 1677 to 2262"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            dataset.append(**{**good, **wrong})
    assert dataset.append(**good).tolist() == [0]


@pytest.mark.parametrize("dtype", [pl.Datetime("us"), pl.Datetime("ms", "Europe/Paris"), pl.Duration("ns"), pl.Date])
def test_a_column_of_times_may_have_no_value_for_a_while(ws: dk.Workspace, dtype: pl.DataType) -> None:
    frame = make_frame(10).with_columns(seen=pl.lit(86_400_000).cast(dtype))
    dataset = ws.ingest("s", frame, timestamp="when", label="late", features=["a"])
    dataset.append(frame.with_columns(seen=None))
    assert dataset.table()["seen"].dtype == dtype
    assert dataset.table()["seen"].null_count() == 10


def test_keys_that_are_not_there_are_named(dataset: dk.Dataset) -> None:
    for keys in ([0, 3000], [-1], [10**12]):
        with pytest.raises(NotFound, match="keys are not in version 1"):
            dataset.read(keys)
    with pytest.raises(InvalidInput, match="keys must be"):
        dataset.read([0.5])
    assert dataset.read([])["x"].shape == (0, 3)


def test_what_a_reader_does_to_a_batch_does_not_reach_the_dataset(dataset: dk.Dataset) -> None:
    before = dataset.read([0, 1, 2])["x"].clone()
    dataset.read([0, 1, 2])["x"].zero_()
    dataset.read([2, 0])["x"].zero_()
    assert dataset.read([0, 1, 2])["x"].equal(before)
    assert dk.Workspace(dataset.catalog.root).dataset("stream").read([0, 1, 2])["x"].equal(before)


def test_a_missing_dataset_names_the_nearest(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    with pytest.raises(NotFound, match="did you mean 'stream'"):
        ws.dataset("steam")


APPEND = """
import sys; sys.path.insert(0, {tests!r})
from streams import make_frame
import dynkit as dk
dataset = dk.Workspace({root!r}).dataset("stream")
for i in range(8):
    dataset.append(make_frame(20, seed={seed} + i))
"""


def test_two_processes_appending_at_once_lose_nothing(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    tests = str(Path(__file__).parent)
    code = [APPEND.format(tests=tests, root=str(ws.path), seed=seed) for seed in (100, 200)]
    processes = [subprocess.Popen([sys.executable, "-c", one]) for one in code]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert dataset.version == 17
    table = dataset.table()
    assert sorted(table["key"].to_list()) == list(range(3000 + 16 * 20))
    stored = {tuple(row) for row in dataset.read(table["key"])["x"].tolist()}
    for seed in [*range(100, 108), *range(200, 208)]:
        wanted = make_frame(20, seed=seed).select("a", "b", "c").to_numpy().astype(np.float32)
        assert {tuple(row) for row in wanted.tolist()} <= stored
    for version in range(1, 18):
        assert len(dataset.at(version)) == 3000 + 20 * (version - 1)


def test_damage_on_disk_is_told_with_the_file(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    folder = ws.path / "datasets/stream"
    shard = next((folder / "segments").glob("*.zarr/x/c/0/0"))
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    with pytest.raises(StorageError, match=r"shard .*x/c/0/0 is cut short: 100 bytes"):
        ws.dataset("stream").read([0])
    shard.unlink()
    with pytest.raises(StorageError, match=r"shard .*x/c/0/0 cannot be read: No such file"):
        ws.dataset("stream").read([0])
    next((folder / "segments").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(StorageError, match=r"index .* cannot be read"):
        ws.dataset("stream").table()
    (folder / "versions/00000001.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(StorageError, match="format 99"):
        ws.dataset("stream")


def test_a_segment_is_plain_zarr(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    path = next((ws.path / "datasets/stream/segments").glob("*.zarr"))
    np.testing.assert_array_equal(zarr.open_group(path, mode="r")["x"][:], dataset.read(range(3000))["x"].numpy())
