"""Models in the catalog: which tensor each name of a model is.

The names of a model's tensors are its layout, which many models share; the tensors are references, coded together. So a
model costs a row of some 200 bytes, however many tensors it has in common with others.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from blake3 import blake3
from numcodecs.zstd import Zstd

from dynkit.catalog import batched, layouts, models, names, upsert
from dynkit.errors import Conflict, InvalidInput, NotFound
from dynkit.models.coding import pack_numbers, unpack_numbers
from dynkit.models.encoding import Ref

__all__ = ["Stored", "check_name", "insert_model", "move_name", "resolved", "stored"]

_SLOT_BITS = 24  # of a reference as one number
_LEVEL = 9  # of zstd


@dataclass(frozen=True)
class Stored:
    """A model as the catalog has it: the tensor of each name, in the order of the state dict."""

    id: str
    refs: dict[str, Ref]
    raw_bytes: int
    metadata: dict[str, Any]
    created_ns: int


def stored(connection: sa.Connection, ids: Iterable[str] | None = None) -> dict[str, Stored]:
    """Read models by their whole identities; None means all, oldest first."""
    query = sa.select(models, layouts.c.names).join_from(models, layouts).order_by(models.c.created_ns, models.c.id)
    found: dict[str, Stored] = {}
    wanted = None if ids is None else list(ids)
    parts = [query] if wanted is None else [query.where(models.c.id.in_(part)) for part in batched(wanted)]
    layout_names: dict[bytes, list[str]] = {}
    for part in parts:
        for row in connection.execute(part):
            if row.names not in layout_names:
                layout_names[row.names] = json.loads(Zstd().decode(row.names))
            refs = [(number >> _SLOT_BITS, number & ((1 << _SLOT_BITS) - 1)) for number in unpack_numbers(row.tensors)]
            by_name = dict(zip(layout_names[row.names], refs, strict=True))
            found[row.id] = Stored(row.id, by_name, row.raw_bytes, row.metadata, row.created_ns)
    return found


def insert_model(
    connection: sa.Connection, id: str, refs: Mapping[str, Ref], raw_bytes: int, metadata: dict[str, Any]
) -> None:
    """Insert a model; of one that is there, add to its metadata."""
    known = connection.scalar(sa.select(models.c.metadata).where(models.c.id == id))
    if known is not None:
        if metadata:
            connection.execute(sa.update(models).where(models.c.id == id).values(metadata={**known, **metadata}))
        return
    listed = json.dumps(list(refs), separators=(",", ":")).encode()
    digest = blake3(listed).digest(16)
    layout = connection.scalar(sa.select(layouts.c.id).where(layouts.c.digest == digest))
    if layout is None:
        row = {"digest": digest, "names": bytes(Zstd(_LEVEL).encode(listed))}
        layout = connection.execute(sa.insert(layouts).returning(layouts.c.id), row).scalar_one()
    model = {
        "id": id,
        "layout": layout,
        "tensors": pack_numbers([pack << _SLOT_BITS | slot for pack, slot in refs.values()]),
        "raw_bytes": raw_bytes,
        "metadata": metadata,
        "created_ns": time.time_ns(),
    }
    connection.execute(sa.insert(models), model)


def resolved(connection: sa.Connection, model: str) -> str:
    """Return the identity of a name, of an identity, or of a beginning of one that fits only one model.

    Raises
    ------
    InvalidInput, NotFound
    """
    if not isinstance(model, str) or not model:
        raise InvalidInput(f"{model!r} is no model; give an identity, the beginning of one, or a name")
    named = connection.scalar(sa.select(names.c.model).where(names.c.name == model))
    if named is not None:
        return str(named)
    query = sa.select(models.c.id).where(models.c.id >= model, models.c.id < model + "\U0010ffff").limit(2)
    found = connection.scalars(query).all()
    if len(found) != 1:
        problem = "more than one model begins" if found else "no model begins"
        also = "" if found else ", and none has this name"
        raise NotFound(f"{problem} with {model!r}{also}; store.names() lists names, run.models() the models of a run")
    return str(found[0])


def check_name(name: str) -> None:
    """Refuse names that could mean another model.

    Raises
    ------
    InvalidInput
    """
    if (
        not isinstance(name, str)
        or not name
        or re.fullmatch("[0-9a-f]{64}", name)
        or re.search("[\ud800-\udfff]", name)
    ):
        raise InvalidInput(f"the name {name!r} must be a text, and not look like the identity of a model")


def move_name(connection: sa.Connection, name: str, model: str, expected: Iterable[str]) -> None:
    """Let a name be a model's, if it is nobody's or one of the `expected`.

    Raises
    ------
    Conflict
    """
    check_name(name)
    holder = connection.scalar(sa.select(names.c.model).where(names.c.name == name))
    if holder is not None and holder != model and holder not in set(expected):
        raise Conflict(
            f"the name {name!r} belongs to the model {holder[:12]}, which is not a parent of this one; "
            "choose another name, or give that model as a parent"
        )
    row = {"name": name, "model": model, "changed_ns": time.time_ns()}
    upsert(connection, names, row)
