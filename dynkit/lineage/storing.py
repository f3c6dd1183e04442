"""What lineage asks of the model store beyond reading: write a model, free what no model needs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from dynkit.models import ModelStore

__all__ = ["free", "put", "unneeded"]


def put(
    store: ModelStore,
    state: Mapping[str, Any],
    also: Callable[[sa.Connection, str], None],
    parents: Sequence[str] = (),
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Store a model, and what belongs to it in the same transaction."""
    return store.put(state, parents, name, metadata, also=also)


def free(store: ModelStore) -> None:
    """Remove the tensors that no model has, so that their bytes are nowhere.

    Where another tensor is stored as a difference from one of them, all are stored anew.
    """
    store.gc(grace_s=0, garbage=0)
    if unneeded(store):
        store.repack()
        store.gc(grace_s=0, garbage=0)


def unneeded(store: ModelStore) -> set[str]:
    """Identities of the stored tensors that no model has."""
    found = store.tensors()
    return found - {tensor for model in store for tensor in store.manifest(model).values()}
