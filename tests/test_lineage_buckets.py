"""Workspaces that share models through a bucket of a real S3-protocol server."""

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import boto3
import pytest
import torch
from test_lineage_remotes import big, edges
from test_remote import bucket, server  # noqa: F401  # fixtures

import dynkit as dk
from dynkit.catalog import Catalog
from dynkit.errors import NotFound, StorageError
from dynkit.lineage.buckets import Bucket

pytest.importorskip("obstore")


def objects(bucket: str, server: str) -> dict[str, int]:  # noqa: F811
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    pages = boto3.client("s3", endpoint_url=server).get_paginator("list_objects_v2").paginate(Bucket=name)
    listed = [entry for page in pages for entry in page.get("Contents", [])]
    return {entry["Key"].removeprefix(f"{prefix}/"): entry["Size"] for entry in listed}


def filled(path: Path, bucket: str, seed: int = 0) -> dk.Workspace:  # noqa: F811
    ws = dk.Workspace(path)
    base = ws.lineage.add(big(seed), name=f"main{seed}", tags=["x"], note="start")
    ws.lineage.add({**big(seed), "head": torch.zeros(10)}, parents=[base], name=f"side{seed}")
    ws.lineage.add_remote("origin", bucket)
    return ws


def test_models_go_through_a_bucket_with_what_belongs_to_them(bucket: str, server: str, tmp_path: Path) -> None:  # noqa: F811
    a = filled(tmp_path / "a", bucket)
    pushed = a.lineage.push()
    assert (len(pushed.models), pushed.known, pushed.edges, pushed.target) == (2, 0, 1, bucket)
    assert pushed.size_bytes == 4 * (100 * 100 + 10 + 10)
    b = dk.Workspace.clone(bucket, tmp_path / "b")
    assert edges(b) == edges(a)
    for name in ("main0", "side0"):
        model = a.models.resolve(name)
        assert b.models.resolve(name) == b.models.resolve(f"origin/{name}") == model
        assert all(tensor.equal(b.models.load(model)[key]) for key, tensor in a.models.load(model).items())
        assert b.lineage.show(model).notes == a.lineage.show(model).notes
    child = b.lineage.add({**big(0), "head": torch.ones(10)}, parents=["main0"], name="main0")
    assert b.lineage.push().models == (child,)
    assert a.lineage.pull().names == {"main0": (a.models.resolve("origin/side0") and pushed.models[0], child)}
    again = a.lineage.push()
    assert (again.models, again.size_bytes, again.known) == ((), 0, 3)
    assert a.models.fsck(deep=True) == b.models.fsck(deep=True) == []


def test_what_lies_in_the_bucket_is_packs_and_one_whole_small_file(bucket: str, server: str, tmp_path: Path) -> None:  # noqa: F811
    ws = filled(tmp_path / "a", bucket)
    for i in range(200):  # local history that a push does not take along
        ws.lineage.note("main0", f"note {i}" + "x" * 10_000)
    with ws.catalog.write() as connection:
        connection.exec_driver_sql("DELETE FROM notes")
    ws.lineage.push()
    found = objects(bucket, server)
    packs = [name for name in found if name.startswith("lineage/models/packs/")]
    assert sorted(found) == sorted(["lineage/catalog.sqlite", *packs])
    assert len(packs) == 2
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    copy = tmp_path / "copy.sqlite"
    boto3.client("s3", endpoint_url=server).download_file(name, f"{prefix}/lineage/catalog.sqlite", str(copy))
    assert copy.stat().st_size < 500_000 < (ws.path / "catalog.sqlite").stat().st_size
    with sqlite3.connect(copy) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert connection.execute("SELECT count(*) FROM models").fetchone() == (2,)
    connection.close()


def test_a_workspace_that_keeps_its_models_there_can_share_them_there(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    ws = dk.Workspace(tmp_path / "a", storage=bucket)
    model = ws.lineage.add(big(1), name="m")
    ws.lineage.add_remote("origin", bucket)
    ws.lineage.push()
    ws.models.gc(grace_s=0)
    assert dk.Workspace.clone(bucket, tmp_path / "b").models.load("m")["body"].equal(big(1)["body"])
    ws.lineage.push()
    assert ws.models.load(model)["body"].equal(big(1)["body"])


def test_of_two_who_push_at_once_both_arrive(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    writers = [filled(tmp_path / f"w{seed}", bucket, seed) for seed in range(3)]
    for seed, ws in enumerate(writers):
        for i in range(8):
            ws.lineage.add(
                {**big(seed), "head": torch.full((10,), i + 1.0)}, parents=[f"main{seed}"], name=f"{seed}-{i}"
            )
    told: list[int] = []
    threads = [threading.Thread(target=lambda ws=ws: told.append(len(ws.lineage.push().models))) for ws in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [10, 10, 10]
    everything = dk.Workspace.clone(bucket, tmp_path / "all")
    assert edges(everything) == set().union(*map(edges, writers))
    assert set(everything.models) == set().union(*(ws.models for ws in writers))
    assert everything.models.fsck(deep=True) == []
    assert {name for name in everything.models.names() if "/" not in name} == set().union(
        *(ws.models.names() for ws in writers)
    )


def test_who_replaces_what_somebody_else_replaced_is_told(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    """The push of another in the middle of one: what that one saved before stays and counts, the rest is done again."""
    slow, quick = filled(tmp_path / "slow", bucket), filled(tmp_path / "quick", bucket, 1)
    saves = Bucket.save
    between = iter([False, True])

    def save(self: Bucket, catalog: Catalog, *, last: bool = False) -> bool:
        if next(between, False):
            quick.lineage.push()
        return saves(self, catalog, last=True)

    with pytest.MonkeyPatch.context() as patch:  # the real ones, with another push in between
        patch.setattr(Bucket, "save", save)
        done = slow.lineage.push()
    assert (len(done.models), done.known) == (2, 0)
    assert done.edges == 1
    assert set(dk.Workspace.clone(bucket, tmp_path / "all").models) == {*slow.models, *quick.models}


def test_packs_of_pushes_that_did_not_end_are_removed_once_they_are_old(
    bucket: str,  # noqa: F811
    server: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ws = filled(tmp_path / "a", bucket)
    ws.lineage.push()
    whole = objects(bucket, server).keys()
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    left = {"Bucket": name, "Key": f"{prefix}/lineage/models/packs/0123.pack", "Body": b"half"}
    boto3.client("s3", endpoint_url=server).put_object(**left)
    ws.lineage.push()
    assert len(objects(bucket, server)) == len(whole) + 1
    monkeypatch.setattr("dynkit.lineage.buckets.ORPHAN_AGE_S", 0.0)  # a day later
    ws.lineage.push()
    assert objects(bucket, server).keys() == whole
    assert dk.Workspace.clone(bucket, tmp_path / "b").models.fsck(deep=True) == []


def test_what_goes_wrong_there_is_told(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    ws = dk.Workspace(tmp_path / "a")
    ws.lineage.add(big(0))
    with pytest.raises(NotFound, match="nothing was pushed to s3://"):
        dk.Workspace.clone(bucket, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    ws.lineage.add_remote("empty", bucket)
    with pytest.raises(NotFound, match="nothing was pushed"):
        ws.lineage.pull("empty")
    ws.lineage.add_remote("nowhere", "s3://no-such-bucket/x")
    for act in (ws.lineage.push, ws.lineage.pull):
        with pytest.raises(StorageError, match="there is no bucket for s3://no-such-bucket/x"):
            act("nowhere")
    with pytest.raises(StorageError, match="cannot use foo://b/x"):
        ws.lineage.add_remote("odd", "foo://b/x")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StorageError, match=r"pip install 'dynkit\[s3\]'"):
        ws.lineage.push("empty")


def test_the_command_pushes_pulls_and_clones(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    ws = dk.Workspace(tmp_path / "a")
    model = ws.lineage.add(big(0), name="m")

    def dynkit(*arguments: str) -> str:
        command = [sys.executable, "-c", "from dynkit.cli import main; main()", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    dynkit("remote", "add", "origin", bucket, "-w", str(ws.path))
    assert "1 models" in dynkit("push", "-w", str(ws.path))
    assert model[:12] in dynkit("clone", bucket, str(tmp_path / "b"))
    assert "0 models" in dynkit("pull", "-w", str(tmp_path / "b"))
