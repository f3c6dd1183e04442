"""Segments: the immutable pieces that samples are stored in.

A segment is a Zarr group (``segments/<id>.zarr``) with an array per field, and an Arrow file (``segments/<id>.arrow``)
with key, timestamp, label and scalar columns of the same rows. It is written a block at a time, in bounded memory,
and described by an entry of the manifest: what a reader needs to find a row, and a hash of every file.
"""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from blake3 import blake3

from dynkit.data.fields import Field, Spans, Stored
from dynkit.data.shards import ArrayWriter, write_group
from dynkit.errors import StorageError

__all__ = [
    "SEGMENT_BYTES",
    "SegmentWriter",
    "arrays_of",
    "files_of",
    "new_id",
    "read_index",
    "shard_file",
    "write_index",
    "write_table",
]

SEGMENT_BYTES = 256 << 20
"""A segment is full when its fields have this size; the unit of what is fetched from remote storage."""

Entry = dict[str, Any]


def new_id() -> str:
    """Return a name that no other segment or file has."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class _ArraySpec:
    """How one Zarr array of a field is stored."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    codec: str
    attributes: dict[str, Any]


def arrays_of(name: str, field: Field, codec: str = "none") -> dict[str, _ArraySpec]:
    """Return the Zarr arrays of a field: one, or values and spans. Values of varying length stay as they are."""
    attributes = {} if field.kind == "array" and field.dtype != "bfloat16" else {"dynkit": field.to_json()}
    if not field.varies:
        return {name: _ArraySpec(field.stored_dtype, field.stored_shape, codec, attributes)}
    return {
        name: _ArraySpec(field.stored_dtype, (), "none", attributes),
        f"{name}.spans": _ArraySpec(np.dtype(np.int64), (2,), "none", {"dynkit": "start and length in the values"}),
    }


class SegmentWriter:
    """Writes one segment below `root`.

    Parameters
    ----------
    root : Path
        Folder of the dataset, or where its files are collected before they are sent away.
    fields : mapping of name to Field
        The label, when there is one, is one of them.
    codec : str
    """

    def __init__(self, root: Path, fields: Mapping[str, Field], codec: str) -> None:
        self.id = new_id()
        self._root = root
        self._group = root / "segments" / f"{self.id}.zarr"
        self._group.mkdir(parents=True)
        self._arrays = {
            array: ArrayWriter(self._group / array, spec.dtype, spec.shape, spec.codec, spec.attributes)
            for name, field in fields.items()
            for array, spec in arrays_of(name, field, codec).items()
        }
        self._index: list[pl.DataFrame] = []
        self.size_bytes = 0

    def write(self, index: pl.DataFrame, fields: Mapping[str, Stored]) -> None:
        """Append samples: a table with or without keys, and the stored rows of every field."""
        for name, stored in fields.items():
            if isinstance(stored, Spans):
                starts = stored.starts + self._arrays[name].rows
                self._arrays[f"{name}.spans"].write(np.stack([starts, stored.lengths], axis=1))
                self._arrays[name].write(stored.values)
                self.size_bytes += stored.values.nbytes + 16 * len(stored)
            else:
                self._arrays[name].write(stored)
                self.size_bytes += stored.nbytes
        self._index.append(index)

    def close(self, first_key: int, *, level: int | None) -> Entry:
        """Complete the segment; give keys from `first_key` on to samples that have none.

        Parameters
        ----------
        first_key : int
        level : int or None
            How many times its samples were merged from smaller segments; None when it is never merged again.
        """
        layouts = {name: array.close() for name, array in self._arrays.items()}
        group_hash = write_group(self._group)
        index = pl.concat(self._index)
        self._index = []
        if "key" not in index.columns:
            keys = np.arange(first_key, first_key + index.height, dtype=np.uint64)
            index = index.select(pl.Series("key", keys), pl.all())
        time_ns = index["timestamp"].to_physical()
        return {
            "id": self.id,
            "rows": index.height,
            "first_key": int(index["key"][0]),
            "end_key": int(index["key"][-1]) + 1,
            "first_ns": int(time_ns.min()),  # type: ignore[arg-type]  # a segment has samples
            "last_ns": int(time_ns.max()),  # type: ignore[arg-type]
            "sorted": time_ns.is_sorted(),
            "level": level,
            "bytes": self.size_bytes,
            "arrays": layouts,
            "index_hash": write_index(self._root, self.id, index),
            "group_hash": group_hash,
        }

    def abandon(self) -> None:
        """Close the files of a segment that will not be completed."""
        for array in self._arrays.values():
            array.abandon()


def write_index(root: Path, segment: str, index: pl.DataFrame) -> str:
    """Write the Arrow file of a segment; return its hash."""
    path = root / "segments" / f"{segment}.arrow"
    write_table(path, index)
    return blake3().update_mmap(path).hexdigest()


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write an Arrow file with the values of these rows and no others.

    The newest layout of texts would also write what the table was filtered from: erased samples.
    """
    table.write_ipc(path, compression="uncompressed", compat_level=pl.CompatLevel.oldest())


def read_index(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """Read columns of an Arrow file, memory-mapped.

    Raises
    ------
    StorageError
    """
    try:
        lazy = pl.scan_ipc(path)
        return (lazy if columns is None else lazy.select(columns)).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StorageError(f"index {path} cannot be read: {str(error).splitlines()[0]}") from error


def files_of(entry: Entry) -> Iterator[tuple[str, str]]:
    """Each file of a segment, relative to the dataset, with its hash."""
    segment = f"segments/{entry['id']}"
    yield f"{segment}.arrow", entry["index_hash"]
    yield f"{segment}.zarr/zarr.json", entry["group_hash"]
    for name, layout in entry["arrays"].items():
        yield f"{segment}.zarr/{name}/zarr.json", layout["metadata_hash"]
        if layout["rows"]:
            yield f"{segment}.zarr/{name}/{layout['file']}", layout["hash"]


def shard_file(entry: Entry, array: str) -> str:
    """Return the file with an array's rows, relative to the dataset."""
    return f"segments/{entry['id']}.zarr/{array}/{entry['arrays'][array]['file']}"
