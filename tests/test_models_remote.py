"""Packs in a bucket of a real S3-protocol server."""

from pathlib import Path

import boto3
import pytest
import torch
from test_remote import bucket, server  # noqa: F401  # fixtures

import dynkit as dk
from dynkit.errors import StorageError


def keys(bucket: str, server: str) -> list[str]:  # noqa: F811
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    listed = boto3.client("s3", endpoint_url=server).list_objects_v2(Bucket=name, Prefix=prefix)
    return [entry["Key"] for entry in listed.get("Contents", []) if "/models/" in entry["Key"]]


def test_models_live_in_a_bucket(bucket: str, server: str, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("obstore")
    ws = dk.Workspace(tmp_path / "ws", storage=bucket)
    base = {"w": torch.randn(100, 100)}
    first = ws.models.put(base)
    second = ws.models.put({"w": base["w"] + 1e-4 * torch.randn(100, 100)}, [first])
    assert len(keys(bucket, server)) == 2
    expected = ws.models.load(second)
    for copy in (ws.path / "cache/models/packs").glob("*.pack"):
        copy.unlink()
    again = dk.Workspace(tmp_path / "ws").models
    assert again.load(second)["w"].equal(expected["w"])
    assert again.stats().pack_bytes == sum(p.stat().st_size for p in (ws.path / "cache/models/packs").glob("*.pack"))
    assert again.repack().files == 1
    assert len(keys(bucket, server)) == 1
    assert again.fsck(deep=True) == []
    again.remove(second)
    again.remove(first)
    again.gc(grace_s=0)
    assert keys(bucket, server) == []


def test_a_bucket_that_refuses_says_so(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    ws = dk.Workspace(tmp_path / "ws", storage="s3://no-such-bucket/prefix")
    with pytest.raises(StorageError, match="cannot write model tensors"):
        ws.models.put({"w": torch.zeros(3)})
    assert list(ws.models) == []
    assert list((ws.path / "cache/models/packs").glob("*.pack")) == []
