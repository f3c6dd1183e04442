"""The store over time: a state machine against a dictionary, several writers, kills, flipped bits."""

import os
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import storms
import torch
from forks import running
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

import dynkit as dk
from dynkit.disk import read_at
from dynkit.errors import InvalidInput, NotFound, StorageError
from dynkit.models import manifest_id, reading, tensor_id, writing
from dynkit.models.encoding import decode
from dynkit.models.packs import PackFile
from dynkit.models.reading import DEPTH, Reader
from dynkit.models.shelf import Recent, Shelf

State = dict[str, torch.Tensor]


def equal(a: State, b: State) -> bool:
    """Bit by bit, so that NaN is itself and -0 is not 0."""
    return list(a) == list(b) and all(tensor_id(a[name]) == tensor_id(b[name]) for name in a)


def random_state(rng: np.random.Generator) -> State:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    shapes = [(), (0,), (7,), (40, 30), (6, 5, 3, 3), (1500,)]
    state = {}
    for i in range(rng.integers(1, 5)):
        shape = shapes[rng.integers(len(shapes))]
        state[f"t{i}"] = torch.from_numpy(np.asarray(rng.standard_normal(shape))).to(dtypes[rng.integers(len(dtypes))])
    return state


def child_of(state: State, kind: str, rng: np.random.Generator) -> State:
    """What people do to models."""
    changed = {}
    for name, tensor in state.items():
        noise = torch.from_numpy(np.asarray(rng.standard_normal(tensor.shape)))
        if not tensor.is_floating_point() or kind == "same":
            changed[name] = tensor.clone()
        elif kind == "tuned":
            changed[name] = (tensor.double() + 1e-3 * noise).to(tensor.dtype)
        elif kind == "pruned":
            changed[name] = torch.where(tensor.abs() > 0.5, tensor, torch.zeros_like(tensor))
        elif kind == "masked":
            changed[name] = tensor * (noise > 0)
        elif kind == "cast":
            changed[name] = tensor.half()
        elif kind == "extended" and tensor.dim():
            changed[name] = torch.cat([tensor, tensor[:2]])
        elif kind == "strange":
            special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40], dtype=torch.float64)
            changed[name] = torch.where(noise > 1, special[int(rng.integers(4))], tensor.double()).to(tensor.dtype)
        else:
            changed[name] = tensor * 0.99
    return changed


class Machine(RuleBasedStateMachine):
    """Everything that is put comes back, whatever is removed, collected and repacked in between."""

    ids = Bundle("ids")

    @initialize()
    def make(self) -> None:
        self.folder = Path(os.environ["DYNKIT_TEST_FOLDER"]) / str(time.monotonic_ns())
        self.store = dk.Workspace(self.folder).models
        self.known: dict[str, State] = {}

    @rule(target=ids, seed=st.integers(0, 99))
    def put(self, seed: int) -> str:
        return self._put(random_state(np.random.default_rng(seed)), [])

    @rule(
        target=ids,
        parents=st.lists(ids, min_size=1, max_size=3),
        kind=st.sampled_from(["same", "tuned", "pruned", "masked", "cast", "extended", "strange", "scaled", "mean"]),
        seed=st.integers(0, 99),
    )
    def derive(self, parents: list[str], kind: str, seed: int) -> str:
        here = [parent for parent in parents if parent in self.known]
        if not here:
            return multiple()
        state = child_of(self.known[here[0]], kind, np.random.default_rng(seed))
        if kind == "mean" and len({str({n: (t.shape, t.dtype) for n, t in self.known[p].items()}) for p in here}) == 1:
            floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
            state |= {name: sum(self.known[parent][name] for parent in here) / len(here) for name in floats}
        return self._put(state, here)

    def _put(self, state: State, parents: list[str]) -> str:
        model = self.store.put(state, parents)
        self.known[model] = {name: tensor.clone() for name, tensor in state.items()}
        return model

    @rule(model=ids)
    def remove(self, model: str) -> None:
        if self.known.pop(model, None) is None:
            with pytest.raises(NotFound):
                self.store.remove(model)
        else:
            self.store.remove(model)

    @rule(garbage=st.sampled_from([0.0, 0.25]))
    def gc(self, garbage: float) -> None:
        self.store.gc(grace_s=0, garbage=garbage)

    @rule()
    def repack(self) -> None:
        self.store.repack()

    @rule()
    def open_again(self) -> None:
        self.store = dk.Workspace(self.folder).models

    @rule(model=ids)
    def load(self, model: str) -> None:
        if model in self.known:
            assert equal(self.store.load(model), self.known[model])

    @invariant()
    def count(self) -> None:
        assert len(self.store) == len(self.known)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.fsck(deep=True) == []
            for model, state in self.store.load_many(list(self.known)).items():
                assert equal(state, self.known[model])
            with Reader(self.store._shelf) as reader:
                for model in self.known:
                    for ref in self.store._stored([model])[model].refs.values():
                        assert reader.reach(ref)[1] <= DEPTH
            self.store._catalog.close()
            shutil.rmtree(self.folder)


def test_whatever_happens_a_model_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("DYNKIT_TEST_FOLDER", str(tmp_path))
    how = settings(max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=how)


def test_no_kill_loses_or_spoils_a_model(ws: dk.Workspace) -> None:
    kills = int(os.environ.get("DYNKIT_KILLS", "30"))
    last_s = 0.2
    rng = np.random.default_rng(0)
    before: set[str] = set()
    with running(storms, ws.path) as told:
        while kills > 0:
            assert told(f"1 {rng.uniform(0, last_s)}") == "9"
            here = set(ws.models)
            assert before <= here
            if here == before:
                last_s = min(1.1 * last_s, 5.0)  # a busy machine: kill later
            else:
                before, kills = here, kills - 1
    states = ws.models.load_many(list(ws.models))
    assert len(states) > 3
    assert all(manifest_id({n: tensor_id(t) for n, t in state.items()}) == id for id, state in states.items())
    assert ws.models.fsck(deep=True) == []
    ws.models.gc(grace_s=0)
    assert not list((ws.path / "models/packs").glob(".*.pack"))
    assert ws.models.fsck(deep=True) == []


def test_four_writers_with_gc_and_repack_beside_them(ws: dk.Workspace) -> None:
    with running(storms, ws.path) as told:
        assert told("4 3.0 removes") == "9 9 9 9"
    states = ws.models.load_many(list(ws.models))
    assert len(states) > 4
    assert all(manifest_id({n: tensor_id(t) for n, t in state.items()}) == id for id, state in states.items())
    assert ws.models.fsck(deep=True) == []


def test_a_flipped_bit_is_found_and_the_models_that_it_spoils_are_named(ws: dk.Workspace) -> None:
    base = {"a": torch.randn(100, 100), "b": torch.randn(50)}
    first = ws.models.put(base)
    second = ws.models.put({"a": base["a"] + 1e-4 * torch.randn(100, 100), "b": base["b"]}, [first])
    other = ws.models.put({"c": torch.randn(20)})
    (pack,) = [p for p in (ws.path / "models/packs").glob("*.pack") if p.stat().st_size > 25_000]
    content = bytearray(pack.read_bytes())
    content[1000] ^= 4
    pack.write_bytes(content)
    for deep in (False, True):
        (damage,) = ws.models.fsck(deep=deep)
        assert damage.tensor == tensor_id(base["a"])
        assert set(damage.models) == {first, second}
    for model in (first, second):
        with pytest.raises(StorageError, match=tensor_id(base["a"])[:12]):
            ws.models.verify(model)
        with pytest.raises(StorageError, match="is damaged"):
            dk.Workspace(ws.path).models.load(model)
    ws.models.verify(other)


def test_a_flipped_bit_anywhere_never_goes_unnoticed(ws: dk.Workspace, tmp_path: Path) -> None:
    model = ws.models.put({"a": torch.randn(30, 30), "b": torch.arange(5)})
    (pack,) = (ws.path / "models/packs").glob("*.pack")
    sound = pack.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(sound), 40).tolist():
        broken = bytearray(sound)
        broken[place] ^= 1 << int(rng.integers(8))
        pack.write_bytes(broken)
        assert [damage.models for damage in dk.Workspace(ws.path).models.fsck()] != []
        with pytest.raises(StorageError):
            dk.Workspace(ws.path).models.load(model)
    pack.write_bytes(sound)
    assert ws.models.fsck(deep=True) == []


def test_a_file_that_changes_is_checked_again_though_its_tensors_are_in_memory(ws: dk.Workspace) -> None:
    state = {"a": torch.randn(30, 30)}
    model = ws.models.put(state)
    (pack,) = (ws.path / "models/packs").glob("*.pack")
    sound = pack.read_bytes()
    broken = bytearray(sound)
    broken[1000] ^= 4
    for _ in range(2):
        assert all(equal(ws.models.load(model), state) for _ in range(3))
        time.sleep(0.02)  # times of files go in steps
        pack.write_bytes(broken)
        with pytest.raises(StorageError, match="is damaged"):
            ws.models.load(model)
        pack.write_bytes(sound)
    pack.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        ws.models.load(model)


def test_gc_keeps_what_others_are_predicted_from_and_frees_the_rest(ws: dk.Workspace) -> None:
    base, other = torch.randn(200, 200), torch.randn(200, 200)
    first = ws.models.put({"a": base, "b": other})
    second = ws.models.put({"a": base + 1e-4 * torch.randn(200, 200)}, [first])
    expected = ws.models.load(second)
    ws.models.remove(first)
    freed = ws.models.gc(garbage=0)
    assert freed.tensors == 1
    assert 100_000 < freed.size_bytes < 160_000
    assert equal(dk.Workspace(ws.path).models.load(second), expected)
    assert other.numpy().tobytes()[:64] not in b"".join(p.read_bytes() for p in (ws.path / "models/packs").iterdir())
    ws.models.remove(second)
    ws.models.gc()
    assert list((ws.path / "models/packs").glob("*.pack")) == []


def test_gc_leaves_files_of_writers_that_may_be_about_to_commit(ws: dk.Workspace) -> None:
    ws.models.put({"a": torch.zeros(3)})
    waiting = ws.path / "models/packs/0123.pack"
    waiting.write_bytes(b"x")
    ws.models.gc()
    assert waiting.exists()
    ws.models.gc(grace_s=0)
    assert not waiting.exists()


def test_a_reader_goes_on_when_gc_moves_what_it_reads(ws: dk.Workspace) -> None:
    state = {"a": torch.randn(1000), "b": torch.randn(1000)}
    model, removed = ws.models.put(state), ws.models.put({"c": torch.randn(3000)})
    opened = ws.models.open(model)
    dk.Workspace(ws.path).models.repack()
    assert opened["a"].equal(state["a"])
    dk.Workspace(ws.path).models.remove(removed)
    dk.Workspace(ws.path).models.gc(garbage=0)
    assert equal(dict(opened), state)
    assert equal(ws.models.load(model), state)


def test_repack_uses_a_lineage_that_became_known_later(ws: dk.Workspace) -> None:
    import sqlalchemy as sa

    from dynkit.catalog import edges

    base = {"w": torch.randn(200, 200)}
    child = {"w": base["w"] + 1e-4 * torch.randn(200, 200)}
    first, second = ws.models.put(base), ws.models.put(child)
    with ws.catalog.write() as connection:
        connection.execute(sa.insert(edges), {"parent": first, "child": second, "kind": "derived", "run": ""})
    before = ws.models.stats().stored_bytes
    assert ws.models.repack().tensors == 1
    assert ws.models.stats().stored_bytes < before * 0.9
    assert len(list((ws.path / "models/packs").glob("*.pack"))) == 1
    assert equal(dk.Workspace(ws.path).models.load(second), child)


def test_gc_keeps_what_a_later_put_could_find(ws: dk.Workspace) -> None:
    base, large = torch.randn(300, 300), torch.randn(1000, 1000)
    tuned = base + 1e-4 * torch.randn(300, 300)
    first = ws.models.put({"b": base})
    both = ws.models.put({"a": large, "b": tuned}, [first])
    ws.models.put({"a": large})
    ws.models.remove(both)
    ws.models.remove(first)
    ws.models.gc(grace_s=0)  # takes the base; what was predicted from it stays in the file of the large one
    again = ws.models.put({"b": tuned})
    assert equal(dk.Workspace(ws.path).models.load(again), {"b": tuned})
    assert ws.models.fsck(deep=True) == []


def test_a_commit_whose_answer_is_lost_keeps_its_file(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": torch.randn(100)}
    dialect, published = ws.catalog._engine.dialect, []
    publish = writing._publish
    monkeypatch.setattr(writing, "_publish", lambda *arguments: published.append(publish(*arguments)))
    commit = dialect.do_commit

    def committed(connection: object) -> None:
        commit(connection)
        if published and published.pop() is None:
            raise sqlite3.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", committed)
    with pytest.raises(StorageError, match="closed the connection"):
        ws.models.put(state, name="m")
    monkeypatch.undo()
    assert equal(dk.Workspace(ws.path).models.load("m"), state)


def test_more_threads_than_connections_may_put(ws: dk.Workspace) -> None:
    states = [{"w": torch.randn(50)} for _ in range(48)]
    with ThreadPoolExecutor(24) as pool:
        models = list(pool.map(ws.models.put, states))
    assert all(equal(ws.models.load(model), state) for model, state in zip(models, states, strict=True))


def test_a_tensor_that_changes_meanwhile_is_refused(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100_000)
    coded = writing.coded_tensor

    def changed(*arguments, **options):  # type: ignore[no-untyped-def]
        weight.add_(1.0)
        return coded(*arguments, **options)

    monkeypatch.setattr(writing, "coded_tensor", changed)
    with pytest.raises(InvalidInput, match="a tensor changed while it was stored"):
        ws.models.put({"w": weight})
    monkeypatch.undo()
    assert len(ws.models) == 0


def test_tensors_that_a_prediction_cannot_cope_with_are_stored_some_other_way(ws: dk.Workspace) -> None:
    base = torch.randn(300, 300)
    strange = base + torch.randn(300, 1) @ torch.randn(1, 300)
    strange[200, 150] = float("nan")
    huge = torch.randn(200, 200).double()
    parent = {"low": base, "huge": huge, "rows": torch.arange(40, dtype=torch.int32).view(10, 4).to(torch.uint16)}
    child = {
        "low": strange,
        "huge": torch.full_like(huge, torch.finfo(torch.float64).min),
        "rows": torch.cat([parent["rows"].int().flip(0), torch.zeros(3, 4, dtype=torch.int32)]).to(torch.uint16),
    }
    model = ws.models.put(child, [ws.models.put(parent)])
    assert equal(dk.Workspace(ws.path).models.load(model), child)
    ws.models.repack()


def test_a_path_may_have_any_character(tmp_path: Path) -> None:
    for name in ("lr?1", "lr?2", "a%20b", "c#d"):
        ws = dk.Workspace(tmp_path / name)
        ws.models.put({"w": torch.ones(2)}, name=f"of {name}")
        assert list(dk.Workspace(tmp_path / name).models.names()) == [f"of {name}"]
        assert (tmp_path / name / "catalog.sqlite").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a%20b", "c#d", "lr?1", "lr?2"]


def test_many_bytes_are_read_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(10_000)
    (tmp_path / "file").write_bytes(data)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 999), offset))  # as from 2 GB on
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    assert read_at(descriptor, 5_000, 1_234) == data[1_234:6_234]
    with pytest.raises(OSError, match="ends too early"):
        read_at(descriptor, 5_000, 6_000)
    os.close(descriptor)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_names_and_states_that_cannot_be_are_refused(ws: dk.Workspace) -> None:
    zeros, ones = (ws.models.put({"w": torch.full((3,), value)}) for value in (0.0, 1.0))
    for name in (zeros, ""):
        with pytest.raises(InvalidInput, match="not look like the identity of a model"):
            ws.models.put({"w": torch.ones(4)}, name=name)
        with pytest.raises(InvalidInput, match="not look like the identity of a model"):
            ws.lineage.name(ones, name)
    for nothing in (None, ""):
        with pytest.raises(InvalidInput, match="is no model; give an identity"):
            ws.models.load(nothing)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="'weight' has no values yet: call the module once"):
        ws.models.put(torch.nn.LazyLinear(2).state_dict())
    with pytest.raises(InvalidInput, match="must be dense and have data"):
        ws.models.put({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})
    with pytest.raises(InvalidInput, match=r"not Linear; give module.state_dict\(\)"):
        ws.models.put(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    child = ws.models.put({"w": torch.full((3,), 2.0)}, parents=ones)
    assert ws.lineage.ancestors(child) == {ones}
    with pytest.raises(StorageError, match="cannot write"):
        ws.models.export_safetensors(ones, ws.path / "nowhere" / "x.safetensors")


def test_a_gc_that_waits_for_nobody_loses_no_model(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of a pack and its commit, and while the pack is being written."""
    publish = Shelf.publish
    for before in (False, True):

        def interrupted(shelf: Shelf, file: PackFile, before: bool = before) -> None:
            monkeypatch.setattr(Shelf, "publish", publish)
            if not before:
                publish(shelf, file)
            dk.Workspace(ws.path).models.gc(grace_s=0, garbage=0)
            if before:
                publish(shelf, file)

        monkeypatch.setattr(Shelf, "publish", interrupted)
        state = {"w": torch.randn(50, 50)}
        assert equal(dk.Workspace(ws.path).models.load(ws.models.put(state)), state)
    assert ws.models.fsck(deep=True) == []


def test_views_that_torch_computes_later_are_stored_as_what_they_are(ws: dk.Workspace) -> None:
    complex64 = torch.randn(5, 3, dtype=torch.complex64)
    state = {"conjugate": complex64.mH, "negative": complex64.conj().imag}
    for model in (ws.models.put(state), ws.lineage.add(lambda: state)):
        loaded = ws.models.load(model)
        assert all(loaded[name].equal(tensor) for name, tensor in state.items())


def test_what_several_tensors_are_predicted_from_is_decoded_once(
    ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [torch.randn(100, 100) for _ in range(2)]
    models = [ws.models.put({"w": step}) for step in steps]
    for _ in range(5):  # each the average of the two before
        steps.append((steps[-1] + steps[-2]) / 2)
        models.append(ws.models.put({"w": steps[-1]}, parents=models[-2:]))
    monkeypatch.setattr(Recent, "put", lambda *args: None)  # as for tensors too large to be kept
    decoded = []
    monkeypatch.setattr(reading, "decode", lambda *args: decoded.append(args[0].id) or decode(*args))
    assert dk.Workspace(ws.path).models.load(models[-1])["w"].equal(steps[-1])
    assert len(decoded) == len(set(decoded)) == 7


def test_a_file_that_somebody_removed_harms_only_models_that_need_it(ws: dk.Workspace) -> None:
    state, other = {"w": torch.randn(300, 300)}, {"w": torch.randn(300, 300)}
    packs = ws.path / "models" / "packs"
    before = set(packs.glob("*.pack"))
    lost = ws.models.put(state, name="lost")
    (file,) = set(packs.glob("*.pack")) - before
    ws.models.put(other, name="other")
    file.unlink()
    store = dk.Workspace(ws.path).models
    assert [damage.models for damage in store.fsck()] == [(lost,)]
    with pytest.raises(StorageError, match="is gone from"):
        store.load("lost")
    child = store.put({"w": state["w"] + 1e-4}, [lost])
    assert equal(store.load(child), {"w": state["w"] + 1e-4})
    store.gc(grace_s=0)
    assert [damage.models for damage in store.fsck()] == [(lost,)]
    store.remove(lost)
    store.gc(grace_s=0)
    assert store.fsck(deep=True) == []
    assert store.put(state) == lost
    store.repack()
    assert equal(dk.Workspace(ws.path).models.load(lost), state)
    assert equal(dk.Workspace(ws.path).models.load("other"), other)


def test_a_model_whose_file_was_removed_is_mended_by_putting_it_again(ws: dk.Workspace) -> None:
    state = {"w": torch.randn(300, 300)}
    model = ws.models.put(state)
    for file in (ws.path / "models" / "packs").glob("*.pack"):
        file.unlink()
    store = dk.Workspace(ws.path).models
    store.remove(model)
    store.gc(grace_s=0)
    assert equal(dk.Workspace(ws.path).models.load(store.put(state)), state)
