"""What the models are, and what they take on disk."""

from dataclasses import dataclass

import sqlalchemy as sa

from dynkit import html
from dynkit.catalog import edges, layouts, models, names, packs, tensors
from dynkit.models.shelf import Shelf

__all__ = ["Stats", "measured"]


@dataclass(frozen=True)
class Stats:
    """Sizes of a model store.

    Parameters
    ----------
    models : int
    tensors : int
        Different ones.
    raw_bytes : int
        Sum over the models of their tensors' bytes.
    pack_bytes : int
        All files in the folder of packs: coded tensors and their indexes, also of what `gc` would remove.
    catalog_bytes : int
        Pages of the catalog's tables of models, names, layouts, tensors, packs and edges, with their indexes.
    """

    models: int
    tensors: int
    raw_bytes: int
    pack_bytes: int
    catalog_bytes: int

    @property
    def stored_bytes(self) -> int:
        """All that the store needs on disk."""
        return self.pack_bytes + self.catalog_bytes

    @property
    def ratio(self) -> float:
        """Raw bytes for each stored one."""
        return self.raw_bytes / self.stored_bytes

    def _facts(self) -> list[tuple[str, str]]:
        return [
            ("models", f"{self.models:,}"),
            ("different tensors", f"{self.tensors:,}"),
            ("raw", _size(self.raw_bytes)),
            ("stored", _size(self.stored_bytes)),
            ("of it catalog", _size(self.catalog_bytes)),
            ("ratio", f"{self.ratio:.2f}"),
        ]

    def __repr__(self) -> str:
        return "\n".join(f"{name:<18}{value:>12}" for name, value in self._facts())

    def _repr_html_(self) -> str:
        return html.table(["", "models"], self._facts(), numbers=["models"])


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def measured(shelf: Shelf) -> Stats:
    """Measure the store."""
    with shelf.catalog.read() as connection:
        count = connection.scalar(sa.select(sa.func.count()).select_from(models))
        raw_bytes = connection.scalar(sa.select(sa.func.sum(models.c.raw_bytes)))
        different = connection.scalar(sa.select(sa.func.count()).select_from(tensors))
    catalog_bytes = shelf.catalog.size_bytes([models, names, layouts, tensors, packs, edges])
    return Stats(count or 0, different or 0, int(raw_bytes or 0), shelf.size_bytes(), catalog_bytes)
