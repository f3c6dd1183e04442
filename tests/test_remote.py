"""The same datasets on an S3-protocol server, a real one in a process of its own."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch

import dynkit as dk
from dynkit.data.store import Remote
from dynkit.errors import Conflict, NotFound, StorageError


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.kill()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket=name)
    return f"s3://{name}/prefix"


def filled(ws: dk.Workspace, **options: object) -> tuple[dk.Dataset, np.ndarray]:
    dataset = ws.create_dataset("d", fields={"x": ("int32", (100,)), "t": ("int32", (None,))}, label="int64", **options)  # type: ignore[arg-type]
    rows = np.arange(900)
    keys = [
        dataset.append(
            x=np.repeat(part[:, None], 100, 1).astype(np.int32),
            t=[np.full(i % 3, i, np.int32) for i in part.tolist()],
            timestamp=part,
            label=part % 3,
        )
        for part in np.array_split(rows, 3)
    ]
    return dataset, np.concatenate(keys)


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_everything_works_on_remote_storage(bucket: str, tmp_path: Path, compression: str) -> None:
    ws = dk.Workspace(tmp_path / "a", storage=bucket)
    dataset, keys = filled(ws, compression=compression)
    assert not (tmp_path / "a/datasets").exists()
    order = np.random.default_rng(0).permutation(keys)
    assert dataset.read(order)["x"][:, 7].tolist() == order.tolist()
    dataset.delete(keys[:10])
    dataset.label(keys[10:12], [8, 9])
    other = dk.data.Dataset(dk.Workspace(tmp_path / "b", storage=bucket).catalog, "d")  # elsewhere, with an empty cache
    assert len(other) == 890
    assert other.read(keys[10:13])["label"].tolist() == [8, 9, 12 % 3]
    epoch = torch.cat([batch["x"][:, 0] for batch in other.batches(batch_size=64)])
    assert sorted(epoch.tolist()) == list(range(10, 900))
    assert ("fetched" if compression == "none" else "compressed") in other.batches().explain()
    assert [one.tolist() for one in other.read(keys[10:13])["t"].unbind()] == [[10], [11, 11], []]
    other.verify()
    other.compact(erase=True)
    assert len(other.versions()) == 1
    assert other.read(keys[10:])["x"][:, 0].tolist() == list(range(10, 900))
    assert dk.Workspace(tmp_path / "a").dataset("d").version == other.version  # the workspace remembers its storage
    with pytest.raises(NotFound, match="has no version 2"):
        dataset.at(2)
    other.verify()


def test_two_writers_never_lose_a_commit_there(bucket: str, tmp_path: Path) -> None:
    dataset, _ = filled(dk.Workspace(tmp_path / "a", storage=bucket))
    others = [dk.data.Dataset(dk.Workspace(tmp_path / f"w{i}", storage=bucket).catalog, "d") for i in range(3)]

    def append(writer: dk.Dataset, value: int) -> None:
        for _ in range(5):
            writer.append(x=np.full((2, 100), value, np.int32), t=[[], [1]], timestamp=[1, 2])

    threads = [threading.Thread(target=append, args=(writer, -1 - i)) for i, writer in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (dataset.version, len(dataset)) == (4 + 15, 900 + 30)
    values = dataset.read(dataset.keys())["x"][:, 0]
    assert [int((values == -1 - i).sum()) for i in range(3)] == [10, 10, 10]


def test_a_pipeline_trains_from_remote_storage(bucket: str, tmp_path: Path) -> None:
    from streams import make_frame, make_pipeline

    remote = dk.Workspace(tmp_path / "a", storage=bucket).ingest("s", make_frame(), timestamp="when", label="late")
    local = dk.Workspace(tmp_path / "b").ingest("s", make_frame(), timestamp="when", label="late")
    scores = []
    for dataset in (remote, local):
        *_, last = make_pipeline(dataset).replay()
        scores.append(dk.Workspace(dataset.catalog.root).run(last.run).composite()["value"].drop_nulls().to_list())
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    run = make_pipeline(remote, name="background").start()
    assert run.wait(120) == "finished"


def test_what_goes_wrong_there_is_told(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = dk.Workspace(tmp_path / "a", storage=bucket)
    dataset, _ = filled(ws)
    with pytest.raises(Conflict, match="keeps its datasets in"):
        dk.Workspace(tmp_path / "a", storage="s3://elsewhere/x")
    store = dataset._store
    assert isinstance(store, Remote)
    shard = next(entry["arrays"]["x"] for entry in dataset.open().segments)
    path = f"segments/{dataset.open().segments[0]['id']}.zarr/x/{shard['file']}"
    content = bytearray(store.read(path))
    content[5] ^= 1
    store._obstore.put(store._store, path, bytes(content))
    with pytest.raises(StorageError, match=r"x/c/0/0 is damaged"):
        dataset.verify()
    with pytest.raises(StorageError, match=r"NoSuchBucket|404|does not exist"):
        dk.Workspace(tmp_path / "c", storage="s3://no-such-bucket/x").create_dataset("d", fields={"x": "int64"})


def test_an_append_whose_answer_is_lost_is_there_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, keys = filled(dk.Workspace(tmp_path / "ws", storage=bucket))
    obstore = dataset._store._obstore
    put = obstore.put

    def twice(store, path, data, **options):  # type: ignore[no-untyped-def]
        if path.startswith("versions/"):
            put(store, path, data, **options)  # as when a proxy answers with an error what the server has done
        return put(store, path, data, **options)

    monkeypatch.setattr(obstore, "put", twice)
    more = dataset.append(x=np.ones((3, 100), np.int32), t=[[1], [2], [3]], timestamp=[1000, 1001, 1002])
    monkeypatch.undo()
    assert len(dataset) == len(keys) + 3
    assert dataset.read(more)["x"][:, 0].tolist() == [1, 1, 1]
