"""What lineage asks of the model store beyond reading: write a model, free what no model needs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from dynkit.catalog import Catalog, packs
from dynkit.models import ModelStore
from dynkit.models.reading import Packs

__all__ = ["free", "put", "stored_tensors"]


def put(
    store: ModelStore,
    state: Mapping[str, Any],
    also: Callable[[sa.Connection, str], None],
    parents: Sequence[str] = (),
    name: str | None = None,
) -> str:
    """Store a model, and what belongs to it in the same transaction."""
    return store.put(state, parents, name, also=also)


def free(catalog: Catalog, store: ModelStore, unwanted: set[str]) -> None:
    """Remove the tensors that no model has, so that the bytes of the `unwanted` ones are nowhere.

    Where another tensor is stored as a difference from one of them, all are stored anew.
    """
    store.gc(grace_s=0, garbage=0)
    if stored_tensors(catalog) & unwanted:
        store.repack()
        store.gc(grace_s=0, garbage=0)


def stored_tensors(catalog: Catalog) -> set[str]:
    """Identities of all tensors in the packs, whether a model has them or not."""
    with catalog.read() as connection:
        ids = list(connection.scalars(sa.select(packs.c.id)))
    with Packs(catalog).reading() as reader:
        reader.prepare(ids)
        return {frame.id.hex() for id in ids for frame in reader.pack(id).frames if frame is not None}
