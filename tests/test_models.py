"""The model store: identity is content, equal tensors are stored once, damage is found."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynkit as dk
from dynkit.errors import InvalidInput, NotFound, StorageError
from dynkit.models import ModelStore, manifest_id, tensor_id

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 9)), max_size=6)
)
@settings(max_examples=30, deadline=None)
def test_tensors_of_any_dtype_and_shape_come_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[torch.dtype, list[int], int]]
) -> None:
    state = {}
    for i, (dtype, shape, seed) in enumerate(specs):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
        state[f"t{i}"] = values.to(dtype)
    store = dk.Workspace(tmp_path_factory.mktemp("ws")).models
    loaded = store.load(store.put(state))
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].equal(tensor)


def test_identity_is_content_not_name_order_or_layout(ws: dk.Workspace) -> None:
    a, b = torch.randn(4, 3), torch.randn(2)
    store = ws.models
    assert store.put({"a": a, "b": b}) == store.put({"b": b, "a": a.t().contiguous().t()})
    assert store.put({"a": a, "c": b}) != store.put({"a": a, "b": b})
    assert tensor_id(a) != tensor_id(a.reshape(3, 4))
    assert tensor_id(torch.zeros(4, dtype=torch.int32)) != tensor_id(torch.zeros(4, dtype=torch.float32))
    assert tensor_id(torch.tensor(0.0)) != tensor_id(torch.tensor(-0.0))


def test_identity_is_the_written_format() -> None:
    """Fixed values: an identity must never change between releases."""
    from blake3 import blake3

    tensor = torch.tensor([[1.0, 2.0]])
    by_hand = blake3(b"float32:1,2:" + b"\x00\x00\x80\x3f\x00\x00\x00\x40").hexdigest()
    assert tensor_id(tensor) == by_hand
    assert manifest_id({"w": by_hand}) == blake3(f'[["w","{by_hand}"]]'.encode()).hexdigest()


def test_equal_tensors_are_stored_once(ws: dk.Workspace) -> None:
    big, small = torch.randn(1000), torch.randn(3)
    ws.models.put({"big": big, "tied": big, "small": small})
    before = ws.models.stats().pack_bytes
    assert before < 4 * 1000 + 200
    ws.models.put({"big": big, "small": small + 1})
    assert ws.models.stats().pack_bytes - before < 200


def test_a_real_module_loads_back(ws: dk.Workspace) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    other.load_state_dict(ws.models.load(ws.models.put(module.state_dict())[:12]))
    assert all(a.equal(b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True))


def test_wrong_use_is_told(ws: dk.Workspace) -> None:
    with pytest.raises(InvalidInput, match="entry 'extra' is a dict"):
        ws.models.put({"extra": {"a": 1}})
    with pytest.raises(NotFound, match="no model begins with 'abc'"):
        ws.models.load("abc")
    ws.models.put({"a": torch.zeros(1)})
    ws.models.put({"a": torch.ones(1)})
    with pytest.raises(InvalidInput, match="'' is no model"):
        ws.models.load("")


def test_damage_and_loss_are_found(ws: dk.Workspace) -> None:
    model = ws.models.put({"a": torch.arange(10.0)})
    pack = next((ws.path / "models/packs").glob("*.pack"))
    content = bytearray(pack.read_bytes())
    content[5] ^= 1
    pack.write_bytes(content)
    with pytest.raises(StorageError, match="is damaged"):
        ws.models.load(model)
    pack.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        ws.models.load(model)


def test_a_failed_commit_leaves_no_model_and_no_pack(ws: dk.Workspace) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        ws.models.put({"a": torch.zeros(3)}, also=refuse)
    assert list((ws.path / "models/packs").glob("*")) == []
    with pytest.raises(NotFound):
        ws.models.load(manifest_id({"a": tensor_id(torch.zeros(3))}))


def test_a_store_that_cannot_be_written_says_so(ws: dk.Workspace, tmp_path: Path) -> None:
    (ws.path / "models").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write model tensors"):
        ModelStore(ws.catalog).put({"a": torch.zeros(3)})
