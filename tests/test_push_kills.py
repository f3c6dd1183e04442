"""Pushes killed at any moment lose and spoil nothing, here or there, and the next one goes on."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pushes
import pytest
import sqlalchemy as sa
import torch
from forks import running
from test_lineage_buckets import objects
from test_remote import bucket, server  # noqa: F401  # fixtures

import dynkit as dk
from dynkit.catalog import Catalog, edges
from dynkit.lineage.buckets import Bucket
from dynkit.models import ModelStore
from dynkit.models.shelf import Shelf

KILLS = int(os.environ.get("DYNKIT_KILLS", "30"))
_BACKLOG = 8  # models that a push has to copy

There = Callable[[], AbstractContextManager[Catalog]]


def grow(ws: dk.Workspace, rng: np.random.Generator, count: int) -> None:
    """Add models: roots, children that share a layer, and a name that moves on to a child."""
    models = list(ws.models)
    for _ in range(count):
        if not models or rng.random() < 0.2:
            state, parents = {f"t{i}": torch.from_numpy(rng.normal(size=(60, 60))).float() for i in range(3)}, []
        else:
            parents = [models[rng.integers(len(models))] if rng.random() < 0.7 else ws.models.resolve("newest")]
            state = ws.models.load(parents[0])
            state["t1"] = state["t1"] + 1e-3 * torch.from_numpy(rng.normal(size=(60, 60))).float()
        model = ws.lineage.add(state, parents=parents, tags=[f"tag{len(models) % 3}"], note=f"number {len(models)}")
        if not models or parents == [ws.models.names()["newest"]]:
            ws.lineage.name(model, "newest", instead_of=parents[0] if parents else None)
        models.append(model)


def facts(catalog: Catalog, models: set[str]) -> dict[str, tuple[object, ...]]:
    """What belongs to each of these models, whose parents are among them."""
    with catalog.read() as connection:
        pairs = {(row.parent, row.child) for row in connection.execute(sa.select(edges))}
    lineage = dk.Workspace(catalog.root).lineage
    cards = {model: lineage.show(model) for model in models}
    return {
        model: (card.created_ns, card.tags, card.notes, card.origins[0].how, sorted(p for p, c in pairs if c == model))
        for model, card in cards.items()
    }


def killed_pushes(ws: dk.Workspace, there: There, kills: int) -> int:
    """Kill so many pushes; return how many of them left models there that are not all."""
    rng = np.random.default_rng(0)
    before: set[str] = set()
    longest_s, partial = 1.0, 0
    with running(pushes, ws.path) as told:
        while kills:
            grow(ws, rng, max(0, _BACKLOG - len(ws.models) + len(before)))
            code, seconds = told(f"{rng.uniform(0, longest_s)}").split()
            here = set(ws.models)
            with there() as catalog:
                store = ModelStore(catalog)
                now = set(store)
                assert before <= now <= here
                new = now - before
                assert facts(catalog, new) == facts(ws.catalog, new)
                mine, theirs = ws.models.load_many(list(new)), store.load_many(list(new))
                assert all(tensor.equal(theirs[m][name]) for m, state in mine.items() for name, tensor in state.items())
                name = store.names().get("newest")
                assert name is None or name in now
            if code == "-9":
                kills -= 1
                partial += len(new) > 0 and now != here
            else:
                assert (code, now) == ("0", here)
                longest_s = float(seconds)
            before = now
    return partial


def check_end(ws: dk.Workspace, there: There) -> None:
    """After one more push all is there, and after gc nothing else."""
    ws.lineage.push()
    with there() as catalog:
        store = ModelStore(catalog)
        assert set(store) == set(ws.models)
        assert facts(catalog, set(store)) == facts(ws.catalog, set(store))
        assert store.names() == ws.models.names()
        store.gc(grace_s=0)
        assert store.fsck(deep=True) == []
    assert ws.models.fsck(deep=True) == []


def test_no_kill_of_a_push_to_a_directory_loses_or_spoils_a_model(tmp_path: Path) -> None:
    ws, other = dk.Workspace(tmp_path / "ws"), dk.Workspace(tmp_path / "other")
    ws.lineage.add_remote("origin", other.path)
    there = lambda: nullcontext(other.catalog)  # noqa: E731
    partial = killed_pushes(ws, there, KILLS)
    assert partial > KILLS // 10
    check_end(ws, there)
    files = {path.name for path in (other.path / "models/packs").iterdir()}
    assert files == {*Shelf(other.catalog).sizes(), ".lock"}


def test_no_kill_of_a_push_to_a_bucket_loses_or_spoils_a_model(bucket: str, server: str, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("obstore")
    ws = dk.Workspace(tmp_path / "ws")
    ws.lineage.add_remote("origin", bucket)

    @contextmanager
    def there() -> Iterator[Catalog]:
        remote = Bucket(bucket)
        with remote.opened(tmp_path / "look", create=True) as catalog:
            yield catalog
            remote.save(catalog, last=True)  # gc may have changed it

    partial = killed_pushes(ws, there, KILLS // 3)
    check_end(ws, there)
    assert partial > 0
    with there() as catalog:
        known = {f"lineage/models/packs/{file}" for file in Shelf(catalog).sizes()}
    packs = {name for name in objects(bucket, server) if name != "lineage/catalog.sqlite"}
    assert packs == known
