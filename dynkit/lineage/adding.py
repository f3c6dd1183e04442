"""Put into the graph what people bring: models with their parents, names, tags and notes."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch

from dynkit.catalog import insert_missing, names, notes
from dynkit.errors import Conflict, InvalidInput
from dynkit.lineage import placing
from dynkit.lineage.origins import Origin, insert_origin
from dynkit.lineage.rebuilding import as_group, as_state, call, link, pickled
from dynkit.lineage.storing import put
from dynkit.models import ModelStore, tensor_id
from dynkit.models.records import check_name
from dynkit.models.store import dense_tensors, read_safetensors
from dynkit.policies import digest

__all__ = ["Model", "add", "add_group", "commit", "point", "state_of", "write_notes"]

State = Mapping[str, torch.Tensor]
Model = torch.nn.Module | State | str | Path


def add(
    store: ModelStore,
    model: Model | Callable[..., Any],
    parents: Sequence[str],
    *,
    how: str,
    **place: Any,
) -> str:
    """Store a model of a user's, or what a function of the parents' states makes; `place` as in `commit`."""
    code = None
    metadata: dict[str, str] = {}
    started_s = time.perf_counter()
    made = callable(model) and not isinstance(model, torch.nn.Module)
    if made:
        code = pickled(model, "function")
        state: State = as_state(call(code, [store.load(parent) for parent in parents]))
    else:
        state, metadata = state_of(model)
    if not isinstance(how, str):
        raise InvalidInput(f"how={how!r} must be text for people")
    origin = Origin(
        model="",
        how="made" if made else "added",
        parents=tuple(parents),
        recipe={"how": how},
        digest=digest(model) if made else "",
        seconds=time.perf_counter() - started_s,
        created_ns=time.time_ns(),
    )
    return commit(store, state, origin, code=code, metadata=metadata, **place)


def add_group(store: ModelStore, function: Callable[..., Any], parents: Sequence[str], *, how: str) -> dict[str, str]:
    """Store what a function of the parents' states makes, each model with its name in the group in its recipe."""
    code = pickled(function, "function")
    started_s = time.perf_counter()
    group = as_group(call(code, [store.load(parent) for parent in parents]))
    seconds = (time.perf_counter() - started_s) / len(group)
    base = Origin("", "made", tuple(parents), digest=digest(function), seconds=seconds, created_ns=time.time_ns())
    return {
        member: commit(store, state, replace(base, recipe={"how": f"{how} ({member})", "member": member}), code=code)
        for member, state in group.items()
    }


def commit(
    store: ModelStore,
    state: State,
    origin: Origin,
    *,
    code: bytes | None = None,
    before: Sequence[str] = (),
    name: str | None = None,
    tags: Iterable[str] = (),
    note: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Store a model with its origin, edges, name and notes, at once; `before`: models it is the next version of."""
    tags, state = _texts(tags), dense_tensors(state)

    def also(connection: sa.Connection, model: str) -> None:
        link(connection, "derived", origin.parents, model)
        link(connection, "version", before, model)
        insert_origin(connection, replace(origin, model=model), code)
        manifest = {key: tensor_id(tensor) for key, tensor in state.items()}
        placing.index(connection, model, state, manifest)
        write_notes(connection, model, tags, note)

    return put(store, state, also, origin.parents, name, metadata)


def state_of(model: Any) -> tuple[State, dict[str, str]]:
    """Return the tensors of what a user has, and the metadata that a file has with them."""
    if isinstance(model, str | Path) and Path(model).suffix == ".safetensors":
        return read_safetensors(model)
    if isinstance(model, torch.nn.Module | Mapping):
        return model.state_dict() if isinstance(model, torch.nn.Module) else model, {}
    told = str(model) if isinstance(model, Path) else repr(model)
    raise InvalidInput(f"{told:.80} is no model; pass an nn.Module, a state dict or the path of a .safetensors file")


def point(connection: sa.Connection, name: str, model: str, *, expected: str | None) -> None:
    """Let a name mean a model, if it means `expected` now (None: nothing, or the model already)."""
    check_name(name)
    now = connection.scalar(sa.select(names.c.model).where(names.c.name == name))
    if now == model:
        return
    if now != expected:
        what = "is free" if now is None else f"names model {now[:12]}"
        hint = "" if now is None else f"; move it with name(model, {name!r}, instead_of={now[:12]!r})"
        raise Conflict(f"the name {name!r} {what}{hint}")
    if now is None:
        connection.execute(sa.insert(names), {"name": name, "model": model, "changed_ns": time.time_ns()})
    else:
        connection.execute(sa.update(names).where(names.c.name == name).values(model=model, changed_ns=time.time_ns()))


def write_notes(connection: sa.Connection, model: str, tags: Iterable[str], note: str | None) -> None:
    """Add tags and a note, unless they are there."""
    texts = [*(("tag", tag) for tag in _texts(tags)), *([("note", note)] if note else [])]
    rows = [{"model": model, "kind": kind, "text": text, "created_ns": time.time_ns()} for kind, text in texts]
    insert_missing(connection, notes, rows)


def _texts(tags: Iterable[str]) -> list[str]:
    listed = [] if isinstance(tags, str) else list(tags)
    if isinstance(tags, str) or not all(isinstance(tag, str) for tag in listed):
        raise InvalidInput(f"tags={tags!r} must be a list of text, such as tags=['reviewed']")
    return listed
