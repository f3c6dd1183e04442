"""Whatever a user has becomes the same dataset."""

import datetime as dt
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from PIL import Image
from streams import START, make_frame
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import dynkit as dk
from dynkit.data import sources, writing
from dynkit.errors import Conflict, InvalidInput

ROWS = 300
X = np.random.default_rng(0).normal(size=(ROWS, 2, 3)).astype(np.float32)
Y = np.arange(ROWS) % 5
T = np.array(START, dtype="datetime64[us]") + np.arange(ROWS) * np.timedelta64(1, "h")
MAPPING = {"x": X, "y": Y, "when": T}


class Samples(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(X[i]), int(Y[i])


class Streamed(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, object]]:
        for i in range(ROWS):
            yield {"x": X[i], "y": int(Y[i]), "when": T[i].astype(object)}


def arrow_batches() -> object:
    pa = pytest.importorskip("pyarrow")
    return pa.table({"x": pl.Series(X).to_arrow(), "y": Y, "when": T})


def hugging_face() -> object:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset(arrow_batches()) if hasattr(datasets, "Dataset") else None


SOURCES = {
    "numpy": lambda folder: MAPPING,
    "torch tensors": lambda folder: {"x": torch.from_numpy(X), "y": torch.from_numpy(Y), "when": T},
    "iterator": lambda folder: (
        {name: value[i : i + 70] for name, value in MAPPING.items()} for i in range(0, ROWS, 70)
    ),
    "list of blocks": lambda folder: [
        {name: value[i : i + 70] for name, value in MAPPING.items()} for i in range(0, ROWS, 70)
    ],
    "polars": lambda folder: pl.DataFrame(MAPPING),
    "lazy polars": lambda folder: pl.DataFrame(MAPPING).lazy(),
    "arrow": lambda folder: arrow_batches(),
    "hugging face": lambda folder: hugging_face(),
    "torch iterable": lambda folder: Streamed(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_samples(ws: dk.Workspace, tmp_path: Path, source: str) -> None:
    data = SOURCES[source](tmp_path)
    dataset = ws.ingest("s", data, timestamp="when", label="y")
    samples = dataset.read(dataset.keys())
    assert samples["x"].reshape(ROWS, 2, 3).equal(torch.from_numpy(X))
    assert samples["label"].tolist() == Y.tolist()
    np.testing.assert_array_equal(dataset.table()["timestamp"].dt.replace_time_zone(None).dt.cast_time_unit("us"), T)


def test_files_of_every_kind_are_read(ws: dk.Workspace, tmp_path: Path) -> None:
    frame = make_frame(200)
    frame.write_parquet(tmp_path / "f.parquet")
    frame.write_csv(tmp_path / "f.csv")
    frame.write_csv(tmp_path / "f.tsv", separator="\t")
    frame.write_ipc(tmp_path / "f.arrow")
    (tmp_path / "parts").mkdir()
    frame.head(90).write_parquet(tmp_path / "parts/0.parquet")
    frame.tail(110).write_parquet(tmp_path / "parts/1.parquet")
    expected = ws.ingest("frame", frame, timestamp="when", label="late").read(range(200))
    for name in ("f.parquet", "f.csv", "f.tsv", "f.arrow", "parts"):
        dataset = ws.ingest(name, tmp_path / name, timestamp="when", label="late")
        samples = dataset.read(dataset.keys())
        torch.testing.assert_close(samples["x"], expected["x"])
        assert samples["label"].equal(expected["label"])
    np.savez(tmp_path / "f.npz", **MAPPING)
    assert len(ws.ingest("npz", tmp_path / "f.npz", timestamp="when", label="y")) == ROWS
    for missing, message in (("none.csv", "no file or folder"), ("f.txt", "no table that can be read")):
        (tmp_path / "f.txt").touch()
        with pytest.raises(InvalidInput, match=message):
            ws.ingest("bad", tmp_path / missing, timestamp="when")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="has no images and no tables"):
        ws.ingest("bad", tmp_path / "empty")
    (tmp_path / "broken.parquet").write_bytes(b"not this")
    with pytest.raises(InvalidInput, match=r"broken\.parquet cannot be read"):
        ws.ingest("bad", tmp_path / "broken.parquet", timestamp="when")
    assert "bad" not in ws.datasets()


def test_zarr_arrays_are_streamed_in_pieces(ws: dk.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    group = zarr.open_group(tmp_path / "z.zarr", mode="w")
    group.create_array("x", data=X)
    group.create_array("y", data=Y)
    for name, data in {
        "path": tmp_path / "z.zarr",
        "group": group,
        "arrays": {"x": group["x"], "y": group["y"]},
    }.items():
        dataset = ws.ingest(name, data, timestamp=T, label="y")
        assert dataset.read(dataset.keys())["x"].equal(torch.from_numpy(X))


def test_torch_datasets_take_times_of_their_own(ws: dk.Workspace) -> None:
    for name, data in {"map": Samples(), "tensors": TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))}.items():
        dataset = ws.ingest(name, data, timestamp=T, label="label")
        assert dataset.read(dataset.keys())["x"].equal(torch.from_numpy(X))
        assert dataset.read(dataset.keys())["label"].tolist() == Y.tolist()
    with pytest.raises(InvalidInput, match="no column 'timestamp' in the data"):
        ws.ingest("none", Samples(), label="label")
    with pytest.raises(InvalidInput, match=r"timestamp has 10 values for 300 samples|different lengths"):
        ws.ingest("few", Samples(), timestamp=T[:10], label="label")
    assert "few" not in ws.datasets()


def test_a_folder_of_images_without_classes_has_no_labels(ws: dk.Workspace, tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i}.bmp")
    dataset = ws.ingest("i", tmp_path)
    assert dataset.read(dataset.keys())["image"][:, 0, 0, 0].sort().values.tolist() == [0, 1, 2]


def test_a_folder_of_images_has_classes_and_times(ws: dk.Workspace, tmp_path: Path) -> None:
    for i in range(12):
        folder = tmp_path / "images" / ("cat" if i % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5, 3), i, np.uint8)).save(folder / f"{i:02}.png")
        os.utime(folder / f"{i:02}.png", (1_000_000 + i, 1_000_000 + i))
    dataset = ws.ingest("i", tmp_path / "images", label="label")
    samples = dataset.read(dataset.keys())
    assert samples["image"][:, 0, 0, 0].tolist() == list(range(12))
    classes = dataset.schema["label"]["classes"]
    assert [classes[code] for code in samples["label"]] == ["cat" if i % 3 else "dog" for i in range(12)]
    assert dataset.table()["file"][0] == "dog/00.png"
    assert dataset.table()["timestamp"][3] == dt.datetime.fromtimestamp(1_000_003, dt.UTC)


def test_columns_of_lists_bytes_and_arrays_become_fields(ws: dk.Workspace) -> None:
    frame = pl.DataFrame(
        {
            "when": T[:3],
            "tokens": [[1, 2], [], [3]],
            "blob": [b"a", b"", b"bc"],
            "box": pl.Series([[1.0, 2.0]] * 3, dtype=pl.Array(pl.Float32, 2)),
            "text": ["p", "q", None],
        }
    )
    dataset = ws.ingest("s", frame, timestamp="when")
    samples = dataset.read([2, 0, 1])
    assert [one.tolist() for one in samples["tokens"].unbind()] == [[3], [1, 2], []]
    assert [bytes(one.tolist()) for one in samples["blob"].unbind()] == [b"bc", b"a", b""]
    assert samples["box"].shape == (3, 2)
    assert dataset.table()["text"].to_list() == ["p", "q", None]
    dataset.append(frame[::-1])
    assert len(dataset) == 6


def test_one_version_or_nothing(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[pl.DataFrame]:
        yield make_frame(50)
        yield make_frame(50, seed=1).rename({"a": "z"})

    with pytest.raises(InvalidInput, match="no column 'a'"):
        ws.ingest("s", broken(), timestamp="when", label="late")
    assert ws.datasets() == []
    folder = ws.path / "datasets/s/segments"
    assert not folder.exists() or list(folder.iterdir()) == []

    def interrupted() -> Iterator[pl.DataFrame]:
        yield make_frame(50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ws.ingest("s", interrupted(), timestamp="when", label="late")
    assert ws.datasets() == []
    monkeypatch.setattr(writing, "SEGMENT_BYTES", 200)  # every block is a segment
    whole = ws.ingest("s", (make_frame(50, seed=i) for i in range(4)), timestamp="when", label="late")
    assert (len(whole), whole.version, len(whole.open().segments)) == (200, 1, 4)
    again = ws.ingest("s", (make_frame(50, seed=i) for i in range(4)), timestamp="when", label="late")
    assert again.version == 1
    with pytest.raises(Conflict, match="exists with other samples"):
        ws.ingest("s", (make_frame(50, seed=i) for i in range(3)), timestamp="when", label="late")


STREAM = """
import sys
import numpy as np
import dynkit as dk
blocks, size = int(sys.argv[2]), 20_000
def stream():
    rng = np.random.default_rng(0)
    for i in range(blocks):
        yield {"x": rng.integers(0, 256, (size, 1000), dtype=np.uint8), "timestamp": np.arange(size).astype("datetime64[s]"),
               "y": np.arange(size)}
dataset = dk.Workspace(sys.argv[1]).ingest("d", stream(), label="y", progress=False)
(peak,) = (line.split()[1] for line in open("/proc/self/status").read().splitlines() if line.startswith("VmHWM"))
print(len(dataset), int(peak) // 1024)
"""


def test_a_stream_larger_than_its_memory_is_ingested(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STREAM, str(tmp_path / "ws"), "60"]
    rows, peak_mb = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert rows == 1_200_000
    assert peak_mb < 500


def test_a_killed_ingest_leaves_nothing_to_be_seen(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STREAM, str(tmp_path / "ws"), "100000"]) as process:
        segments = tmp_path / "ws/datasets/d/segments"
        while process.poll() is None and not any(path.stat().st_size > 0 for path in segments.glob("*.zarr/x/c/0/0")):
            pass
        process.send_signal(signal.SIGKILL)
    ws = dk.Workspace(tmp_path / "ws")
    assert ws.datasets() == []
    dataset = ws.ingest("d", make_frame(100), timestamp="when", label="late")
    assert any("segments" in path for path in dataset.gc())
    dataset.verify()


def test_lines_of_json_have_times(ws: dk.Workspace, tmp_path: Path) -> None:
    lines = [f'{{"when": "2024-01-0{i}T12:00:00", "a": {i}.5, "y": {i % 2}}}\n' for i in range(1, 6)]
    (tmp_path / "f.ndjson").write_text("".join(lines))
    dataset = ws.ingest("j", tmp_path / "f.ndjson", timestamp="when", label="y")
    assert dataset.table()["timestamp"].dt.day().to_list() == [1, 2, 3, 4, 5]
    dataset.append(tmp_path / "f.ndjson")
    assert len(dataset) == 10


def test_a_column_of_a_csv_may_become_fractional_late(ws: dk.Workspace, tmp_path: Path) -> None:
    rows = "".join(f"2024-01-01,{i},0\n" for i in range(5000))
    (tmp_path / "f.csv").write_text(f"when,a,y\n{rows}2024-01-02,1.5,1\n")
    dataset = ws.ingest("c", tmp_path / "f.csv", timestamp="when", label="y")
    assert dataset.read(dataset.keys()[-1:])["x"].tolist() == [[1.5]]


def test_labels_of_several_numbers_may_have_any_name(ws: dk.Workspace) -> None:
    t, y = np.datetime64("2024-01-01") + np.arange(10), np.arange(40).reshape(10, 4)
    dataset = ws.ingest("l", {"when": t, "x": np.zeros((10, 2)), "y": y}, timestamp="when", label="y")
    dataset.append({"when": t + 10, "x": np.zeros((10, 2)), "y": y})
    assert dataset.read(dataset.keys())["label"][:10].tolist() == y.tolist()


def test_what_cannot_be_a_file_or_a_column_is_told(ws: dk.Workspace, tmp_path: Path) -> None:
    for name in ("b.npz", "b.ndjson", "b.parquet", "b.arrow"):
        for content in (b"hello\n", b""):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InvalidInput, match=f"{name} cannot be read"):
                ws.ingest("z", tmp_path / name, timestamp="when")
    for name in ("key", "timestamp", "x"):
        with pytest.raises(InvalidInput, match=f"column '{name}' would be there twice"):
            ws.create_dataset("d", fields={"x": "float32"}, columns={name: "int64"})
