"""What lineage asks of the model store beyond reading: write a model, free what no model needs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from dynkit.catalog import Catalog, models, tensors
from dynkit.models import ModelStore

__all__ = ["free", "put", "stored_tensors"]


def put(
    store: ModelStore, state: Mapping[str, Any], also: Callable[[sa.Connection, str], None], parents: Iterable[str] = ()
) -> str:
    """Store a model, and what belongs to it in the same transaction; the store may use `parents` to save space."""
    return store.add(state, also)


def free(catalog: Catalog, store: ModelStore) -> None:
    """Remove the tensors that no model needs, so that their bytes are nowhere."""
    with catalog.read() as connection:
        ids = list(connection.scalars(sa.select(models.c.id)))
        rows = connection.execute(sa.select(tensors)).all()
    used = {tensor for model in ids for tensor in store.manifest(model).values()}
    for pack in {row.pack for row in rows if row.id not in used}:
        live = {row.id: store._read(row) for row in rows if row.pack == pack and row.id in used}
        with store._written_pack(live) as places, catalog.write() as connection:
            connection.execute(sa.delete(tensors).where(tensors.c.pack == pack))
            if places:
                connection.execute(sa.insert(tensors), places)
        (store._packs / pack).unlink()


def stored_tensors(catalog: Catalog) -> set[str]:
    """Identities of all tensors in the store."""
    with catalog.read() as connection:
        return set(connection.scalars(sa.select(tensors.c.id)))
