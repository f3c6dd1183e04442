"""Samples as they are stored and read: every kind of field, any selection, by any tool, in bounded memory."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch.utils.data import DataLoader

import dynkit as dk
from dynkit.data import arrays, mapping, shards
from dynkit.data import batches as batches_module
from dynkit.data import version as version_module
from dynkit.data.shards import ArrayWriter, write_group
from dynkit.errors import Conflict, InvalidInput, NotFound, StorageError

CODECS = ["none", "zstd", "lz4", "gzip"]


def filled(ws: dk.Workspace, codec: str = "none", rows: int = 1000, parts: int = 4, **options: object) -> dk.Dataset:
    """Samples whose values say which they are, in several segments."""
    dataset = ws.create_dataset("d", fields={"x": ("int32", (3,))}, label="int64", compression=codec, **options)  # type: ignore[arg-type]
    for part in np.array_split(np.arange(rows), parts):
        dataset.append(x=np.stack([part, part * 2, -part], 1).astype(np.int32), timestamp=part, label=part % 7)
    return dataset


@given(
    array=hnp.arrays(
        dtype=st.sampled_from(
            ["uint8", "int16", "uint32", "int64", "float16", "float32", "float64", "bool", "complex64"]
        ),
        shape=st.one_of(
            st.tuples(st.integers(1, 400), st.integers(1, 5)),
            st.tuples(st.integers(1, 50), st.integers(1, 3), st.just(7)),
        ),
        elements=st.integers(0, 1),
    ),
    codec=st.sampled_from(CODECS),
    cuts=st.lists(st.integers(0, 400), max_size=3),
    chunk_bytes=st.integers(1, 2000),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_zarr_reads_what_was_written_block_by_block(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, codec: str, cuts: list[int], chunk_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("array") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_BYTES", chunk_bytes)
        writer = ArrayWriter(folder, array.dtype, array.shape[1:], codec, {})
        for part in np.split(array, sorted(min(cut, len(array)) for cut in cuts)):
            writer.write(part)
        writer.close()
    np.testing.assert_array_equal(zarr.open_array(folder, mode="r")[...], array)


@pytest.mark.parametrize("codec", CODECS)
def test_zarr_python_tensorstore_and_zarrs_open_a_segment(ws: dk.Workspace, codec: str) -> None:
    ts = pytest.importorskip("tensorstore")
    pytest.importorskip("zarrs")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, (5000, 3, 8, 8), dtype=np.uint8)
    dataset = ws.create_dataset(
        "d", fields={"x": ("uint8", (3, 8, 8)), "h": ("float16", (5,)), "t": ("int32", (None,))}, compression=codec
    )
    tokens = [np.arange(i % 4, dtype=np.int32) for i in range(5000)]
    dataset.append(x=values, h=values[:, 0, 0, :5].astype(np.float16), t=tokens, timestamp=np.arange(5000))
    (group,) = (ws.path / "datasets/d/segments").glob("*.zarr")
    expected = {"x": values, "h": values[:, 0, 0, :5].astype(np.float16), "t": np.concatenate(tokens)}
    for name, array in expected.items():
        np.testing.assert_array_equal(zarr.open_group(group, mode="r")[name][...], array)
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            np.testing.assert_array_equal(zarr.open_group(group, mode="r")[name][...], array)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(group / name)}}
        np.testing.assert_array_equal(ts.open(spec, read=True).result().read().result(), array)


def test_every_kind_of_field_comes_back(ws: dk.Workspace) -> None:
    record = np.dtype([("dense", "<f4", (3,)), ("flag", "?"), ("sparse", "<i4", (2,))])
    pictures = [Image.fromarray(np.full((8, 6, 3), i, np.uint8)) for i in range(20)]
    encoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    records = np.zeros(20, record)
    records["dense"], records["flag"], records["sparse"] = np.arange(60).reshape(20, 3), np.arange(20) % 2, 7
    halves = torch.arange(40, dtype=torch.bfloat16).reshape(20, 2)
    columns = {
        "half": halves,
        "r": records,
        "tokens": [torch.arange(i % 3) for i in range(20)],
        "blob": [b"x" * (i % 4) for i in range(20)],
        "picture": encoded,
        "small": encoded,
        "scalar": np.arange(20.0),
    }
    fields = {
        "half": ("bfloat16", (2,)),
        "r": record,
        "tokens": ("int64", (None,)),
        "blob": "bytes",
        "picture": ("image", None),
        "small": ("image", (1, 4, 4)),
        "scalar": "float64",
    }
    dataset = ws.create_dataset("d", fields=fields)
    keys = dataset.append(**columns, timestamp=np.arange(20)[::-1])
    picked = np.random.default_rng(0).permutation(20)
    samples = dataset.read(keys[picked])
    assert samples["half"].dtype == torch.bfloat16
    assert samples["half"].equal(halves[picked])
    assert samples["dense"].equal(torch.from_numpy(records["dense"][picked].copy()))
    assert samples["flag"].tolist() == records["flag"][picked].tolist()
    assert samples["sparse"].unique().tolist() == [7]
    assert [one.tolist() for one in samples["tokens"].unbind()] == [list(range(i % 3)) for i in picked.tolist()]
    assert [bytes(one.tolist()) for one in samples["blob"].unbind()] == [b"x" * (i % 4) for i in picked.tolist()]
    assert samples["picture"].shape == (20, 3, 8, 6)
    assert samples["picture"][:, 2, 5, 5].tolist() == picked.tolist()
    assert samples["small"].shape == (20, 1, 4, 4)
    assert samples["scalar"].tolist() == picked.tolist()
    assert list(dataset.read(keys, ["scalar"])) == ["scalar"]
    with pytest.raises(NotFound, match="no field 'scaler'; did you mean 'scalar'"):
        dataset.read(keys, ["scaler"])
    batches = list(dataset.batches(keys[picked], batch_size=6, shuffle=False))
    assert torch.cat([batch["scalar"] for batch in batches]).tolist() == picked.tolist()
    assert [one.tolist() for batch in batches for one in batch["tokens"].unbind()] == [
        one.tolist() for one in samples["tokens"].unbind()
    ]
    assert torch.cat([batch["picture"] for batch in batches]).equal(samples["picture"])
    dataset.verify()


def test_images_of_different_sizes_need_one_declared(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"p": ("image", None)})
    dataset.append(p=[np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], timestamp=[1, 2])
    with pytest.raises(InvalidInput, match=r"have different sizes, \(3, 4, 4\) and \(3, 5, 4\)"):
        dataset.read([0, 1])
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        keys = dataset.append(p=[b"no image"], timestamp=[3])
        dataset.read(keys)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "fields is a mapping"),
        ({"x": ("uint9", (3,))}, "'uint9' is no type of a field"),
        ({"x": ("uint8", (0,))}, "positive whole numbers"),
        ({"x": ("uint8", (2, None))}, "positive whole numbers"),
        ({"a/b": "uint8"}, "field name 'a/b'"),
        ({"x": ("image", (2, 3))}, "an image has the shape"),
    ],
)
def test_fields_that_cannot_be_are_refused(ws: dk.Workspace, fields: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ws.create_dataset("d", fields=fields)
    assert ws.datasets() == []


def test_values_that_do_not_fit_a_field_are_refused(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (2,)), "t": ("int32", (None,))})
    good = {"x": np.zeros((2, 2), np.uint8), "t": [[1], [2, 3]], "timestamp": [1, 2]}
    for change, message in [
        ({"x": np.zeros((2, 3), np.uint8)}, r"has uint8 \(2,\) per sample, the new samples have uint8 \(3,\)"),
        ({"x": np.zeros((2, 2), np.float32)}, "the new samples have float32"),
        ({"x": np.zeros((3, 2), np.uint8)}, "different lengths"),
        ({"t": [np.zeros(2), np.zeros(1)]}, "holds int32, the new samples float64"),
        ({"t": [np.zeros((2, 2), np.int32), np.zeros((1, 2), np.int32)]}, "each sample is a sequence"),
        ({"timestamp": [1.5, 2.5]}, "timestamp column 'timestamp' is Float64"),
        ({"label": [1, 2]}, "label"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            dataset.append(**{**good, **change})
    assert dataset.version == 1
    with pytest.raises(InvalidInput, match="give either one block"):
        dataset.append()
    with pytest.raises(Conflict, match="exists with other fields"):
        ws.create_dataset("d", fields={"x": ("uint8", (3,))})
    assert len(ws.create_dataset("d", fields={"x": ("uint8", (2,)), "t": ("int32", (None,))})) == 0


@pytest.mark.parametrize("codec", CODECS)
def test_any_selection_in_any_order_is_what_numpy_picks(ws: dk.Workspace, codec: str) -> None:
    dataset = filled(ws, codec)
    rng = np.random.default_rng(0)
    for n in (0, 1, 17, 1000, 2500):
        keys = rng.integers(0, 1000, n)  # with repetitions
        for container in (keys, keys.astype(np.uint64), torch.from_numpy(keys), keys.tolist()):
            samples = dataset.read(container)
            assert samples["x"].tolist() == np.stack([keys, keys * 2, -keys], 1).tolist()
            assert samples["label"].tolist() == (keys % 7).tolist()
        batches = list(dataset.batches(keys, batch_size=64, shuffle=False))
        assert [len(batch["x"]) for batch in batches] == [64] * (n // 64) + [n % 64] * (n % 64 > 0)
        assert torch.cat([torch.empty(0, 3), *(batch["x"] for batch in batches)])[:, 0].tolist() == keys.tolist()


def test_rows_of_many_files_lie_side_by_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for row_bytes in (1, 7, 160, 4096, 5000):
        parts = [rng.integers(0, 256, (int(n), row_bytes), dtype=np.uint8) for n in rng.integers(1, 300, 5)]
        slot = mapping.slot_rows([row_bytes], map(len, parts))
        table = mapping.reserve(slot * 5, row_bytes)
        for i, part in enumerate(parts):
            part.tofile(tmp_path / f"{i}")
            mapping.map_file(table, tmp_path / f"{i}", i * slot, len(part))
        for i, part in enumerate(parts):
            np.testing.assert_array_equal(table[i * slot : i * slot + len(part)], part)
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0
        with pytest.raises(StorageError, match="cut short"):
            mapping.map_file(table, tmp_path / "0", 0, len(parts[0]) + 1)


def test_address_space_is_not_wasted_on_large_samples_of_odd_size() -> None:
    assert mapping.slot_rows([3072], [100]) * 3072 % (2 << 20) == 0
    many = [100] * 2000
    slot = mapping.slot_rows([1_000_003, 8], many)
    assert slot * 1_000_003 % 4096 == 0
    assert slot * 1_000_003 * len(many) < 1 << 46


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("last", ["keep", "drop", "join"])
def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(ws: dk.Workspace, windowed: bool, last: str) -> None:
    dataset = filled(ws, "zstd" if windowed else "none", rows=1025)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "CACHE_BYTES", 4 * 200 * dataset.open().row_bytes)
        patch.setattr(batches_module, "_SUPER_BATCH_BYTES", 100 * dataset.open().row_bytes)
        batches = dataset.batches(dataset.keys(), batch_size=32, seed=3, last=last)
        epochs = [[batch["x"][:, 0].tolist() for batch in batches] for _ in range(2)]
        again = [[batch["x"][:, 0].tolist() for batch in dataset.batches(None, 32, seed=3, last=last)]]
    sizes = {"keep": [32] * 32 + [1], "drop": [32] * 32, "join": [32] * 31 + [33]}[last]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == sizes
        assert len({x for batch in epoch for x in batch}) == sum(sizes)
    assert epochs[0] == again[0] != epochs[1]
    assert len(batches) == len(sizes)
    assert ("windows of" in batches.explain()) == windowed


def test_a_windowed_shuffle_mixes_as_it_says(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 12 * 20)  # twenty samples a chunk
    rows = 20_000
    dataset = filled(ws, "zstd", rows=rows, parts=1)
    row_bytes = dataset.open().row_bytes
    monkeypatch.setattr(batches_module, "CACHE_BYTES", 4 * 2_000 * row_bytes)  # windows of 100 chunks
    order = torch.cat([batch["x"][:, 0] for batch in dataset.batches(None, 50, seed=1)]).numpy()
    assert sorted(order.tolist()) == list(range(rows))
    windows = order.reshape(10, 2_000)
    # A window is a random tenth of the chunks: its mean is that of the data, within four standard errors of 100 chunks.
    assert (abs(windows.mean(axis=1) - rows / 2) < 4 * rows / np.sqrt(12 * 100)).all()
    # Inside a window neighbours of storage are apart: adjacent samples share a chunk as seldom as by chance (1 in 100).
    together = np.mean(windows[:, 1:] // 20 == windows[:, :-1] // 20)
    assert together < 0.02
    assert abs(np.corrcoef(order, np.arange(rows))[0, 1]) < 0.1
    # Each chunk is in one window (or two, where the cut goes through it).
    assert np.mean([len(set((window // 20).tolist())) for window in windows]) < 102


def test_the_way_of_reading_follows_from_the_data(ws: dk.Workspace) -> None:
    dataset = filled(ws, rows=200_000)
    assert dataset.batches().explain().startswith("mapped")
    assert "lie uncompressed on a local disk" in dataset.batches().explain()
    assert "do not fit in 1048576" in dataset.batches(cache_bytes=1 << 20).explain()
    assert sorted(torch.cat([batch["label"] for batch in dataset.batches(cache_bytes=1 << 20)]).tolist()) == sorted(
        (np.arange(200_000) % 7).tolist()
    )
    for options, message in [
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"last": "first"}, "last='first' must be one of keep, drop, join"),
        ({"cache_bytes": 5}, "cache_bytes=5 must be at least"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            dataset.batches(**options)
    with pytest.raises(NotFound, match="1 keys are not in version"):
        dataset.batches([200_000])


def test_the_decoded_chunks_of_all_fields_share_one_cache(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1200)
    monkeypatch.setattr(version_module, "CACHE_BYTES", 2400)  # two chunks, whichever field they are of
    decoded = []
    decode = shards.decode_chunk
    monkeypatch.setattr(arrays, "decode_chunk", lambda *args: decoded.append(args[2].nbytes) or decode(*args))
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (12,)), "y": ("int32", (3,))}, compression="zstd")
    dataset.append(x=np.ones((300, 12), np.uint8), y=np.ones((300, 3), np.int32), timestamp=np.arange(300))
    counts = []
    for field, key in [("x", 0), ("y", 0), ("x", 1), ("y", 100), ("x", 2), ("y", 1), ("y", 101)]:
        dataset.read([key], [field])
        counts.append(len(decoded))
    assert set(decoded) == {1200}
    assert counts == [1, 2, 2, 3, 3, 4, 5]  # what was not used for longest makes room


def test_a_batch_that_is_kept_stays_as_it_was(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_SUPER_BATCH_BYTES", 4000)  # memory is used again many times
    dataset = filled(ws, rows=20_000)
    kept = [batch["x"][3:5] for batch in dataset.batches(None, 50, seed=0)]
    copies = [batch["x"][3:5].clone() for batch in dataset.batches(None, 50, seed=0)]
    assert torch.cat(kept).equal(torch.cat(copies))


def test_transforms_weights_and_chosen_fields(ws: dk.Workspace) -> None:
    import polars as pl

    dataset = filled(ws)
    chosen = pl.DataFrame({"key": dataset.keys()[:100], "weight": np.arange(100.0)})
    batches = dataset.batches(chosen, 32, fields=["x"], transform=lambda batch: {**batch, "y": batch["x"].float() / 2})
    for batch in batches:
        assert set(batch) == {"x", "weight", "y"}
        assert batch["weight"].tolist() == batch["x"][:, 0].tolist() == (batch["y"][:, 0] * 2).tolist()


PEAK = """
import sys
import numpy as np, torch
import dynkit as dk
codec, root, cache = sys.argv[1], sys.argv[2], int(sys.argv[3])
dataset = dk.Workspace(root).dataset("d")
model = torch.nn.Linear(3072, 10)
dataset.read(dataset.keys()[:1])
def peak():
    return next(line.split()[1] for line in open("/proc/self/status").read().splitlines() if line.startswith("VmHWM"))
before = peak()
for batch in dataset.batches(dataset.keys(), batch_size=256, cache_bytes=cache):
    torch.nn.functional.cross_entropy(model(batch["x"].flatten(1).float()), batch["label"]).backward()
print(before, peak())
"""


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_training_on_ten_times_the_cache_keeps_to_it(ws: dk.Workspace, codec: str) -> None:
    cache = 40 << 20
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (3072,))}, label="int64", compression=codec)
    rng = np.random.default_rng(0)
    for _ in range(5):
        values = rng.integers(0, 256, (28_000, 3072), dtype=np.uint8)
        dataset.append(x=values, timestamp=np.arange(28_000), label=rng.integers(0, 10, 28_000))
    assert dataset.open().row_bytes * len(dataset) > 10 * cache
    command = [sys.executable, "-c", PEAK, codec, str(ws.path), str(cache)]
    before, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert peak - before < (cache >> 10) + 300 * 1024


def test_a_torch_dataset_gives_every_sample_once_to_workers_and_ranks(ws: dk.Workspace) -> None:
    dataset = filled(ws)
    single = DataLoader(dataset.torch(), batch_size=64)
    assert torch.cat([batch["x"] for batch in single])[:, 0].tolist() == list(range(1000))
    ranks = [dataset.torch(shuffle=True, seed=1, rank=rank, world_size=3, batch_size=50) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [7, 7, 7]
    seen = []
    for samples in ranks:
        samples.set_epoch(2)
        loader = DataLoader(samples, batch_size=None, num_workers=2, multiprocessing_context="forkserver")
        seen.append([x for batch in loader for x in batch["x"][:, 0].tolist()])
    assert sorted(x for part in seen for x in part) == list(range(1000))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert seen[0] != sorted(seen[0])
    alone = [batch["x"][:, 0].tolist() for batch in DataLoader(ranks[0], batch_size=None)]
    assert [x for batch in alone for x in batch] == seen[0]  # the same batches in the same order
    assert len(alone) == len(ranks[0])
    assert {len(dataset.torch(rank=rank, world_size=3, drop_last=True)) for rank in range(3)} == {333}
    with pytest.raises(InvalidInput, match="rank=3 must be in 0 to world_size - 1 = 2"):
        dataset.torch(rank=3, world_size=3)


@pytest.mark.parametrize("batch_size", [None, 32])
def test_a_torch_dataset_goes_on_in_the_middle_of_an_epoch(ws: dk.Workspace, batch_size: int | None) -> None:
    dataset = filled(ws)

    def items(samples: object) -> list:
        return [item["x"][..., 0].tolist() for item in samples]  # type: ignore[attr-defined]

    options = {"shuffle": True, "seed": 5, "batch_size": batch_size}
    whole = items(dataset.torch(**options))  # type: ignore[arg-type]
    samples = dataset.torch(**options)  # type: ignore[arg-type]
    iterator = iter(samples)
    first = [next(iterator)["x"][..., 0].tolist() for _ in range(7)]
    state = samples.state_dict()
    continued = dataset.torch(**options)  # type: ignore[arg-type]
    continued.load_state_dict(state)
    assert first + items(continued) == whole
    samples.set_epoch(1)
    assert items(samples) != whole


def test_a_forked_process_reads_on(ws: dk.Workspace) -> None:
    dataset = filled(ws, "zstd")
    list(dataset.batches())  # threads are at work before the fork
    loader = DataLoader(dataset.torch(batch_size=100), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert sum(len(batch["x"]) for batch in loader) == 1000


def test_a_group_without_arrays_is_a_group(tmp_path: Path) -> None:
    write_group(tmp_path)
    assert list(zarr.open_group(tmp_path, mode="r").array_keys()) == []


def test_large_labels_and_bytes_are_read_in_threads_without_waiting_for_each_other(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"b": "bytes", "z": ("complex128", (None,))}, label=("float32", (256,)))
    n = 20_000
    data = [bytes([i % 256]) * 600 for i in range(n)]
    labels = np.repeat(np.arange(n, dtype=np.float32)[:, None], 256, 1)
    dataset.append(b=data, z=[np.ones(9, np.complex128)] * n, timestamp=np.arange(n), label=labels)
    iterators = [iter(dataset.batches(None, 64, seed=seed)) for seed in range(4)]
    for _ in range(100):
        for iterator in iterators:
            batch = next(iterator)
            assert (batch["b"].values()[::600] == batch["label"][:, 0].long() % 256).all()


def test_a_single_sample_left_over_joins_in_windows_too(ws: dk.Workspace) -> None:
    dataset = ws.create_dataset("d", fields={"x": ("uint8", (3, 32, 32))}, compression="zstd")
    dataset.append(x=np.zeros((1345, 3, 32, 32), np.uint8), timestamp=np.arange(1345))
    sizes = [len(batch["x"]) for batch in dataset.batches(None, 64, last="join")]
    assert sizes == [64] * 20 + [65]


def test_what_a_transform_does_to_weights_stays_in_its_batch(ws: dk.Workspace) -> None:
    import polars as pl

    dataset = filled(ws)
    chosen = pl.DataFrame({"key": dataset.keys(), "weight": np.ones(1000)})
    batches = dataset.batches(chosen, 100, shuffle=False, transform=lambda b: {**b, "weight": b["weight"].mul_(2)})
    for _ in range(3):
        assert {float(w) for batch in batches for w in batch["weight"]} == {2.0}
    with pytest.raises(InvalidInput, match="has no weights"):
        dataset.torch(chosen)
    assert batches.keys().tolist() == dataset.keys().tolist()
    shuffled = dataset.batches(None, 100, seed=1)
    assert shuffled.keys()[:100].tolist() == next(iter(shuffled))["x"][:, 0].tolist()


def test_a_resumed_epoch_goes_on_when_it_is_set_again(ws: dk.Workspace) -> None:
    samples = filled(ws).torch(shuffle=True)
    iterator = iter(samples)
    first = [next(iterator)["x"][0].item() for _ in range(20)]
    resumed = samples._dataset.torch(shuffle=True)
    resumed.load_state_dict(samples.state_dict())
    resumed.set_epoch(0)
    rest = [sample["x"][0].item() for sample in resumed]
    assert sorted(first + rest) == list(range(1000))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": "int64"}, "'weight' is the name of a column that dynkit adds"),
        ({"label": "int64"}, "'label' is the name of a column that dynkit adds"),
        ({"x": "int64", "r": np.dtype([("x", "f4")])}, "'x' is the name of two fields"),
        ({"r": np.dtype([("a", "S3")])}, "use native numbers"),
        ({"r": np.dtype([("a", ">f4")])}, "use native numbers"),
    ],
)
def test_fields_whose_names_or_types_a_batch_cannot_have(ws: dk.Workspace, fields: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ws.create_dataset("d", fields=fields, label="int64")


def test_numbers_of_python_are_cast_only_if_they_fit(ws: dk.Workspace) -> None:
    record = np.dtype([("a", "u1"), ("b", "f8")], align=True)
    fields = {"x": ("uint8", (1,)), "s": ("bfloat16", (None,)), "t": ("int8", (None,)), "r": record}
    dataset = ws.create_dataset("d", fields=fields, label="int64", columns={"c": "str"})
    halves = [torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.bfloat16)]
    good = {
        "x": [[1], [2]],
        "s": halves,
        "t": [[1], []],
        "r": np.zeros(2, record),
        "timestamp": [1, 2],
        "c": [None, None],
    }
    keys = dataset.append(**good, label=[None, None])
    samples = dataset.read(keys)
    assert samples["s"].dtype == torch.bfloat16
    assert samples["x"].tolist() == [[1], [2]]
    assert samples["b"].dtype == torch.float64
    for change in ({"x": [[300], [1]]}, {"t": [[300], []]}, {"x": [[-1], [1]]}, {"x": [[0.5], [1.0]]}):
        with pytest.raises(InvalidInput, match="do not fit"):
            dataset.append(**{**good, **change})
