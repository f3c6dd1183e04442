"""Reading selections of samples, side by side with what people use today.

All peers read the same samples in random order (dynkit shuffles them as well), interleaved, in one process; the table
shows the median of five rounds. A peer that is not installed is left out. MosaicML streaming wants other versions of
what others need: install `mosaicml-streaming` in an environment of its own and name its Python in STREAMING_PYTHON.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from racing import in_own_environment, raced

import dynkit as dk

SHAPES = {"160 B": ((160,), 2_000_000, 512), "3 KB": ((3, 32, 32), 200_000, 512), "150 KB": ((3, 224, 224), 5_000, 64)}
SHARES = (0.01, 0.1, 1.0)


@pytest.fixture(autouse=True)
def all_threads() -> None:
    """As outside of tests: torch's number of threads is that of the cores."""
    torch.set_num_threads(os.cpu_count() or 1)


def have(module: str) -> bool:
    """Whether a peer can be imported, with all that it needs."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def samples_of(rng: np.random.Generator, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes that compress by about a half, as natural images do."""
    coarse = rng.integers(0, 256, (rows, -(-int(np.prod(shape)) // 4)), dtype=np.uint8)
    return np.repeat(coarse, 4, axis=1)[:, : int(np.prod(shape))].reshape(rows, *shape).copy()


def show(title: str, seconds: dict[str, float], rows: dict[str, int], first: str = "dynkit") -> None:
    speed = {name: rows[name] / seconds[name] for name in seconds}
    print(f"\n{title}")
    for name in seconds:
        print(f"  {name:<34}{speed[name]:>14,.0f} samples/s   dynkit is {speed[first] / speed[name]:>9.2f}x")


MOSAIC = """
import sys
import numpy as np
from streaming import MDSWriter, StreamingDataset

folder, n, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
flat = np.memmap(folder + "/flat.bin", dtype=np.uint8, mode="r").reshape(-1, width)
with MDSWriter(out=folder + "/mds", columns={"x": f"ndarray:uint8:{width}"}) as out:
    for row in flat[:n]:
        out.write({"x": row})
samples = StreamingDataset(local=folder + "/mds", batch_size=1, shuffle=False)
print("ready", flush=True)
for line in sys.stdin:
    print(sum(len(samples[int(i)]["x"]) == width for i in line.split()), flush=True)
"""


def mapped_peers(
    folder: Path, array: np.ndarray, stack: ExitStack
) -> Iterator[tuple[str, Callable[[np.ndarray, int], int], int]]:
    """Name, a reader of these rows in batches, and how many rows it is fast enough for."""
    array.tofile(folder / "flat.bin")
    mapped = np.memmap(folder / "flat.bin", dtype=array.dtype, mode="r", shape=array.shape)

    def batches(rows: np.ndarray, size: int) -> Iterator[torch.Tensor]:
        for i in range(0, len(rows), size):
            yield torch.from_numpy(mapped[rows[i : i + size]])

    def memmap(rows: np.ndarray, size: int) -> int:
        return sum(len(batch) for batch in batches(rows, size))  # a loop that holds its batch, as ours is measured

    yield "np.memmap fancy indexing", memmap, len(array)
    flat = array.reshape(len(array), -1)
    if have("datasets"):
        import datasets
        import pyarrow as pa

        values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
        with (
            pa.OSFile(str(folder / "hf.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, pa.schema([("x", values.type)])) as w,
        ):
            step = max(1, (64 << 20) // flat.shape[1])
            for low in range(0, len(flat), step):
                w.write_batch(pa.record_batch([values[low : low + step]], names=["x"]))
        hugging = datasets.Dataset.from_file(str(folder / "hf.arrow")).with_format("numpy")

        def hf(rows: np.ndarray, size: int) -> int:
            return sum(len(hugging[rows[i : i + size]]["x"]) for i in range(0, len(rows), size))

        yield "Hugging Face datasets (arrow)", hf, 50_000
    if have("lance"):
        import lance
        import pyarrow as pa

        values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
        lanced = lance.write_dataset(pa.table({"x": values}), str(folder / "l.lance"))

        def take(rows: np.ndarray, size: int) -> int:
            return sum(lanced.take(rows[i : i + size]).num_rows for i in range(0, len(rows), size))

        yield "Lance take", take, 5_000
    import zarr

    store = zarr.create_array(
        str(folder / "z.zarr"),
        shape=flat.shape,
        dtype=flat.dtype,
        chunks=(max(1, (1 << 20) // flat.shape[1]), flat.shape[1]),
        shards=(max(1, (1 << 20) // flat.shape[1]) * 64, flat.shape[1]),
        compressors=None,
    )
    store[...] = flat
    if have("tensorstore"):
        import tensorstore as ts

        opened = ts.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "z.zarr")}}, read=True
        ).result()

        def tensorstore(rows: np.ndarray, size: int) -> int:
            return sum(len(opened[rows[i : i + size]].read().result()) for i in range(0, len(rows), size))

        yield "TensorStore, sharded Zarr", tensorstore, 1_000
    opened_zarr: Any = zarr.open_array(str(folder / "z.zarr"), mode="r")

    def oindex(rows: np.ndarray, size: int) -> int:
        return sum(len(opened_zarr.oindex[rows[i : i + size]]) for i in range(0, len(rows), size))

    yield "zarr-python oindex", oindex, 512
    if "STREAMING_PYTHON" in os.environ:
        n = min(len(flat), 100_000)
        own = in_own_environment("STREAMING_PYTHON", MOSAIC, folder, n, flat.shape[1])
        mosaic = stack.enter_context(subprocess.Popen(**own, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert mosaic.stdin and mosaic.stdout
        assert mosaic.stdout.readline() == "ready\n"

        def mds(rows: np.ndarray, size: int) -> int:
            print(*rows % n, file=mosaic.stdin, flush=True)
            return int(mosaic.stdout.readline())

        yield "MosaicML streaming", mds, 5_000
    if have("webdataset"):
        import webdataset

        n = min(len(flat), 5_000)
        with webdataset.TarWriter(str(folder / "w.tar")) as tar:
            for i, row in enumerate(flat[:n]):
                tar.write({"__key__": f"{i:08d}", "x.bin": row.tobytes()})

        def web(rows: np.ndarray, size: int) -> int:
            source = webdataset.WebDataset(str(folder / "w.tar"), shardshuffle=False, empty_check=False)
            return sum(1 for _, _ in zip(rows, source, strict=False))

        yield "WebDataset (in order, no selection)", web, n


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # WebDataset leaves its tar file open
@pytest.mark.parametrize("record", SHAPES)
def test_uncompressed_selection(record: str) -> None:
    shape, rows, size = SHAPES[record]
    rng = np.random.default_rng(0)
    array = samples_of(rng, rows, shape)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        dataset = dk.Workspace(folder / "ws").create_dataset("s", fields={"x": ("uint8", shape)}, compression="none")
        step = -(-rows // 7)  # seven segments
        for low in range(0, rows, step):
            dataset.append(x=array[low : low + step], timestamp=np.arange(low, min(low + step, rows)))
        keys = dataset.keys()
        peers = list(mapped_peers(folder, array, stack))
        del array
        for share in SHARES:
            chosen = rng.permutation(rows)[: int(share * rows)]
            selected = keys[chosen]

            def ours(selected: np.ndarray = selected) -> int:
                return sum(len(batch["x"]) for batch in dataset.batches(selected, batch_size=size, seed=0))

            readers: dict[str, Callable[[], int]] = {"dynkit": ours}
            counts = {"dynkit": len(chosen)}
            for peer, read, limit in peers:
                some = chosen[:limit]
                readers[peer] = lambda read=read, some=some: read(some, size)  # type: ignore[misc]
                counts[peer] = len(some)
            show(f"{record}, random {share:.0%} of {rows:,} in seven segments", raced(readers), counts)


def test_compressed_epoch() -> None:
    shape, rows, _ = SHAPES["3 KB"]
    rows //= 2
    rng = np.random.default_rng(0)
    array = samples_of(rng, rows, shape)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = dk.Workspace(folder / "ws").create_dataset("s", fields={"x": ("uint8", shape)}, compression="zstd")
        dataset.append(x=array, timestamp=np.arange(rows))
        keys = dataset.keys()
        import zarr

        path = folder / "z.zarr"
        peer = zarr.create_array(
            str(path),
            shape=array.shape,
            dtype="uint8",
            chunks=(341, *shape),
            shards=(341 * 64, *shape),
            compressors=zarr.codecs.ZstdCodec(level=3),
        )
        peer[...] = array

        def sequential() -> int:
            opened: Any = zarr.open_array(str(path), mode="r")
            return sum(len(opened[i : i + 341 * 64]) for i in range(0, rows, 341 * 64))

        def zarrs() -> int:
            with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
                return sequential()

        def tensorstore() -> int:
            import tensorstore as ts

            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
            opened = ts.open(spec, read=True).result()
            return sum(len(opened[i : min(i + 341 * 64, rows)].read().result()) for i in range(0, rows, 341 * 64))

        def ours(chosen: np.ndarray) -> int:
            return sum(len(batch["x"]) for batch in dataset.batches(chosen, batch_size=512, seed=0))

        tenth = keys[rng.permutation(rows)[: rows // 10]]
        readers: dict[str, Callable[[], int]] = {"dynkit": lambda: ours(keys)}
        readers["dynkit, random 10 %"] = lambda: ours(tenth)
        readers["zarr-python, in order"] = sequential
        if have("zarrs"):
            readers["zarrs, in order"] = zarrs
        if have("tensorstore"):
            readers["TensorStore, in order"] = tensorstore
        seconds = raced(readers)
        show("zstd, 3 KB, random 100 %", seconds, dict.fromkeys(readers, rows))
        print(f"  wall time of a random 10 %: {seconds['dynkit, random 10 %'] / seconds['dynkit']:.2f} of the epoch")


class Recommender(torch.nn.Module):
    """Embedding bag and a small network over records of 26 categories and 13 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(100_000, 16, mode="sum")
        self.head = torch.nn.Sequential(torch.nn.Linear(29, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    def forward(self, sparse: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.bag(sparse), dense], dim=1)).squeeze(1)


def test_training_with_selection() -> None:
    rng = np.random.default_rng(0)
    rows, size = 1_000_000, 8192
    record = np.dtype([("dense", "<f4", (13,)), ("sparse", "<i4", (26,)), ("pad", "<i4")])
    array = np.zeros(rows, record)
    array["dense"], array["sparse"] = rng.normal(size=(rows, 13)), rng.integers(0, 100_000, (rows, 26))
    label = rng.integers(0, 2, rows)
    dense, sparse = torch.from_numpy(array["dense"].copy()), torch.from_numpy(array["sparse"].copy())
    target = torch.from_numpy(label).float()
    with tempfile.TemporaryDirectory() as name:
        dataset = dk.Workspace(name).create_dataset("s", fields={"r": record}, label="float32")
        for low in range(0, rows, rows // 7):
            some = slice(low, low + rows // 7)
            dataset.append(r=array[some], timestamp=np.arange(rows)[some], label=label[some].astype(np.float32))
        keys = dataset.keys()
        for share in (0.1, 0.5, 1.0):
            n = int(share * rows) // size * size
            chosen = keys[rng.permutation(rows)[:n]]

            def train(batches: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], n: int = n) -> int:
                torch.manual_seed(0)
                model = Recommender()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                for s, d, y in batches:
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(s, d), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                return n

            def in_ram(n: int = n) -> int:
                return train(
                    (sparse[i : i + size], dense[i : i + size], target[i : i + size]) for i in range(0, n, size)
                )

            def ours(chosen: np.ndarray = chosen) -> int:
                batches = dataset.batches(chosen, batch_size=size, seed=0)
                return train((b["sparse"], b["dense"], b["label"]) for b in batches)

            seconds = raced({"dynkit": ours, "tensor in RAM, no selection": in_ram})
            show(f"recommendation model, {share:.0%} selected", seconds, dict.fromkeys(seconds, n))


def test_loader_share_of_image_training() -> None:
    rng = np.random.default_rng(0)
    rows = 40_960
    with tempfile.TemporaryDirectory() as name:
        dataset = dk.Workspace(name).create_dataset("s", fields={"x": ("uint8", (3, 32, 32))}, label="int64")
        dataset.append(x=samples_of(rng, rows, (3, 32, 32)), timestamp=np.arange(rows), label=rng.integers(0, 10, rows))
        layers = [torch.nn.Conv2d(3, 32, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, 2), torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.LazyLinear(10))
        optimizer = (
            torch.optim.SGD(model.parameters(), lr=0.01) if model(torch.zeros(1, 3, 32, 32)) is not None else None
        )
        assert optimizer is not None
        begin, waiting = time.perf_counter(), 0.0
        batches = iter(dataset.batches(dataset.keys(), batch_size=256))
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            waiting += time.perf_counter() - before
            if batch is None:
                break
            loss = torch.nn.functional.cross_entropy(model(batch["x"].float() / 255), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total = time.perf_counter() - begin
        print(f"\nimage model: waiting for the loader {waiting / total:.2%} of {total:.1f} s")


def test_ingest() -> None:
    import zarr

    rng = np.random.default_rng(0)
    array = samples_of(rng, 150_000, (3, 32, 32))
    for compression in ("none", "zstd"):
        with tempfile.TemporaryDirectory() as name:
            counter = iter(range(1000))

            def ours(compression: str = compression, name: str = name, counter: Iterator[int] = counter) -> int:
                dataset = dk.Workspace(name).create_dataset(
                    f"s{next(counter)}", fields={"x": ("uint8", (3, 32, 32))}, compression=compression
                )
                return len(dataset.append(x=array, timestamp=np.arange(len(array))))

            def plain(compression: str = compression, name: str = name, counter: Iterator[int] = counter) -> int:
                stored = zarr.create_array(
                    f"{name}/z{next(counter)}",
                    shape=array.shape,
                    dtype="uint8",
                    chunks=(341, 3, 32, 32),
                    shards=(341 * 64, 3, 32, 32),
                    compressors=None if compression == "none" else zarr.codecs.ZstdCodec(level=3),
                )
                stored[...] = array
                return len(array)

            seconds = raced({"dynkit": ours, "zarr-python": plain}, 3)
            show(f"ingest, {compression}", seconds, dict.fromkeys(seconds, len(array)))


def test_many_appends() -> None:
    rng = np.random.default_rng(0)
    rows = 300
    array = samples_of(rng, 1001 * rows, (160,))
    with tempfile.TemporaryDirectory() as name:
        ws = dk.Workspace(name)
        many = ws.create_dataset("many", fields={"x": ("uint8", (160,))})
        seconds = []
        for i in range(1001):
            some = slice(i * rows, (i + 1) * rows)
            begin = time.perf_counter()
            many.append(x=array[some], timestamp=np.arange(1001 * rows)[some])
            seconds.append(time.perf_counter() - begin)
        one = ws.create_dataset("one", fields={"x": ("uint8", (160,))})
        one.append(x=array, timestamp=np.arange(len(array)))
        early, late = np.median(seconds[:32]), np.median(seconds[-32:])
        print(
            f"\nappends: {early * 1e3:.1f} ms at first, {late * 1e3:.1f} ms after 1 000, the 1 001st {seconds[-1] * 1e3:.1f} ms"
        )
        print(f"  segments after 1 001 appends: {len(many.open().segments)}")
        keys = rng.permutation(len(array))
        read = {
            f"{dataset.name} append(s)": lambda dataset=dataset: sum(
                len(b["x"]) for b in dataset.batches(keys, batch_size=512)
            )
            for dataset in (many, one)
        }
        show("reading all of it", raced(read), dict.fromkeys(read, len(keys)), first="many append(s)")
        assert pl.Series(many.keys()).equals(pl.Series(one.keys()))


LARGE = """
import sys, time
import numpy as np
import dynkit as dk
from dynkit.data import Dataset  # imports are not what is measured
begin = time.perf_counter()
dataset = dk.Workspace(sys.argv[1]).dataset("d")
n = len(dataset)
opened = time.perf_counter() - begin
begin = time.perf_counter()
keys = dataset.keys()
chosen = np.random.default_rng(0).choice(keys, n // 100, replace=False)
selected = time.perf_counter() - begin
begin = time.perf_counter()
read = sum(len(batch["x"]) for batch in dataset.batches(chosen, batch_size=8192))
seconds = time.perf_counter() - begin
(peak,) = (line.split()[1] for line in open("/proc/self/status").read().splitlines() if line.startswith("VmHWM"))
print(f"{n:,} samples: open {opened:.2f} s, random 1 % selected {selected:.2f} s, read {seconds:.2f} s, "
      f"peak memory {int(peak) / 1e6:.2f} GB")
"""


def test_a_hundred_million_samples() -> None:
    with tempfile.TemporaryDirectory() as name:
        dataset = dk.Workspace(name).create_dataset("d", fields={"x": ("uint8", (4,))}, label="int64")
        rows = 10_000_000
        for i in range(10):
            times = np.arange(i * rows, (i + 1) * rows)
            dataset.append(x=np.zeros((rows, 4), np.uint8), timestamp=times, label=times % 2)
        print(
            "\n"
            + subprocess.run([sys.executable, "-c", LARGE, name], check=True, capture_output=True, text=True).stdout
        )


STREAM = """
import sys
import numpy as np
import dynkit as dk

def stream():
    rng = np.random.default_rng(0)
    block = rng.integers(0, 256, (100_000, 160), dtype=np.uint8)
    for i in range(625):
        yield {"x": block, "timestamp": (i * 100_000 + np.arange(100_000)).astype("datetime64[s]")}

dataset = dk.Workspace(sys.argv[1]).ingest("d", stream(), progress=False)
(peak,) = (line.split()[1] for line in open("/proc/self/status").read().splitlines() if line.startswith("VmHWM"))
print(f"ingest of {len(dataset):,} samples, 10 GB: peak memory {int(peak) / 1e3:.0f} MB")
"""


def test_ingest_of_ten_gigabytes() -> None:
    with tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", STREAM, name], check=True, capture_output=True, text=True)
        print(f"\n{done.stdout.strip()}, {time.perf_counter() - begin:.0f} s")
