"""One immutable state of a dataset: its table in replay order, and its samples by key."""

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from dynkit.data.arrays import ArraySegment, Chunks, Decoded, Mapped, Memory
from dynkit.data.fields import Array, Field, Spans, Stored, span_index
from dynkit.data.labels import column_types, label_type, label_values, stored_fields
from dynkit.data.manifest import Manifest
from dynkit.data.mapping import slot_rows
from dynkit.data.segments import arrays_of, read_index, shard_file
from dynkit.data.shards import CHUNK_BYTES, threads
from dynkit.data.store import Folder, Remote
from dynkit.errors import InvalidInput, NotFound, StorageError, did_you_mean
from dynkit.time import IntArray

__all__ = ["CACHE_BYTES", "Version"]

CACHE_BYTES = 512 << 20  # of decoded samples, where nobody says otherwise
_TABLE_KEYS = 1 << 25  # a table from key to row takes 4 bytes a key
_LATE = "\0late"  # no name of a column ends like this
_RECHUNK_ROWS = 10_000_000  # a longer table stays memory-mapped


class Version:
    """One immutable state of a dataset.

    Parameters
    ----------
    store : Store
    manifest : dict
        Content of ``versions/<number>.json``.
    """

    def __init__(self, store: Folder | Remote, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self.number: int = manifest["version"]
        self.segments: list[dict[str, Any]] = manifest["segments"]
        self._local = partial(_local, store, self.number)  # no method: what keeps it would keep the version
        self.rows = sum(int(entry["rows"]) for entry in self.segments)
        self.rows -= sum(int(entry["rows"]) for entry in manifest["tombstones"])
        self.stored_fields = stored_fields(self.schema)
        self.fields = {name: field for name, field in self.stored_fields.items() if name != "label"}
        self.label = self.stored_fields.get("label")
        self.memory = Memory()  # of super-batches, for every epoch again
        self.windows = Memory()  # of windows of decoded samples, as well
        self._kept = Chunks(CACHE_BYTES)
        self._bases = _first_rows(  # of each segment, and the end
            [entry["rows"] for entry in self.segments], [field.row_bytes for field in self.stored_fields.values()]
        )

    @property
    def schema(self) -> dict[str, Any]:
        """Which source columns became timestamp, label, features, columns and fields."""
        schema: dict[str, Any] = self.manifest["schema"]
        return schema

    @cached_property
    def compressed(self) -> bool:
        """Whether any field must be decoded."""
        return any(layout["codec"] != "none" for entry in self.segments for layout in entry["arrays"].values())

    @cached_property
    def row_bytes(self) -> int:
        """Mean size of a sample as stored, decoded."""
        rows = sum(int(entry["rows"]) for entry in self.segments)
        return max(1, sum(int(entry["bytes"]) for entry in self.segments) // max(rows, 1))

    # ---- the table ----

    @cached_property
    def deleted(self) -> IntArray:
        """Keys of tombstones, sorted."""
        frames = [self.side("tombstones", entry)["key"] for entry in self.manifest["tombstones"]]
        if not frames:
            return np.empty(0, np.int64)
        keys: IntArray = np.sort(pl.concat(frames).to_numpy().astype(np.int64))
        return keys

    @cached_property
    def late_labels(self) -> pl.DataFrame | None:
        """Labels given after the append, the last one of each key: key, label; sorted by key."""
        frames = [self.side("labels", entry) for entry in self.manifest["labels"]]
        if not frames:
            return None
        return pl.concat(frames).unique("key", keep="last", maintain_order=True).sort("key")

    @cached_property
    def table(self) -> pl.DataFrame:
        """All samples in replay order (timestamp, key): key, timestamp, label, scalar columns."""
        return self.columns()

    def columns(self, names: Sequence[str] | None = None) -> pl.DataFrame:
        """Read columns of the table, all of them by default; key and timestamp are always among them."""
        wanted = None if names is None else ["key", "timestamp", *(n for n in names if n not in ("key", "timestamp"))]
        if not self.segments:
            return self._empty().select(wanted or pl.all())
        paths = [self.store.local(f"segments/{entry['id']}.arrow") for entry in self.segments]
        table = pl.concat([read_index(path, wanted) for path in paths], rechunk=self.rows <= _RECHUNK_ROWS)
        if len(self.deleted):
            table = table.filter(~np.isin(table["key"].to_numpy(), self.deleted.view(np.uint64)))
        if self.late_labels is not None and "label" in table.columns:
            late = f"label{_LATE}"
            table = table.join(self.late_labels, on="key", how="left", maintain_order="left", suffix=_LATE)
            table = table.with_columns(label=pl.coalesce(late, "label")).drop(late)
        return table if self._in_time_order else table.sort("timestamp", "key")

    def keys(self) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        """Keys in replay order (N,), without reading the table where they follow from the manifest."""
        if self._in_time_order and self._dense and not len(self.deleted):
            first = self.segments[0]["first_key"] if self.segments else 0
            return np.arange(first, first + self.rows, dtype=np.uint64)
        return self.columns([])["key"].to_numpy(writable=True)

    @cached_property
    def _in_time_order(self) -> bool:
        """Whether rows as stored are in replay order."""
        ends = [(entry["first_ns"], entry["last_ns"]) for entry in self.segments]
        return all(entry["sorted"] for entry in self.segments) and all(
            before[1] <= after[0] for before, after in pairwise(ends)
        )

    @cached_property
    def _dense(self) -> bool:
        """Whether keys have no gaps."""
        rows = sum(entry["rows"] for entry in self.segments)
        return not self.segments or self.segments[-1]["end_key"] - self.segments[0]["first_key"] == rows

    def _empty(self) -> pl.DataFrame:
        columns = column_types(self.schema["columns"])
        label = {"label": label_type(self.schema["label"])} if self.label is not None else {}
        return pl.DataFrame(schema={"key": pl.UInt64, "timestamp": pl.Datetime("ns", "UTC"), **label, **columns})

    def side(self, kind: str, entry: dict[str, Any]) -> pl.DataFrame:
        """Read a small table of the manifest: tombstones, labels or sources."""
        return read_index(self._local(f"{kind}/{entry['id']}.arrow"))

    # ---- samples ----

    def rows_of(self, keys: IntArray) -> IntArray:
        """Find the row of each key (N,), as 32-bit numbers where they are enough.

        Raises
        ------
        NotFound
            When a key is not in this version.
        """
        rows = self._find(keys)
        if len(rows) and int(rows.min()) < 0:
            missing = keys[rows < 0]
            raise NotFound(f"{len(missing)} keys are not in version {self.number}: {missing[:3].tolist()}...")
        return rows

    def _find(self, keys: IntArray) -> IntArray:
        """Return the row of each key, -1 where there is none."""
        if not len(keys) or not self.segments:
            return np.full(len(keys), -1, np.int64)
        first, end = self.segments[0]["first_key"], self.segments[-1]["end_key"]
        if int(keys.min()) < first or int(keys.max()) >= end:
            inside = (keys >= first) & (keys < end)
            rows: IntArray = np.full(len(keys), -1, np.int64)
            rows[inside] = self._find(keys[inside])
            return rows
        if self._plain:
            firsts = np.array([entry["first_key"] for entry in self.segments])
            shift: IntArray = self._bases[:-1] - firsts
            return keys + (shift[0] if len(firsts) == 1 else shift[np.searchsorted(firsts, keys, side="right") - 1])
        found: IntArray = self._lookup.take(keys - first if first else keys, mode="clip")  # all are inside
        return found

    @property
    def _plain(self) -> bool:
        """Whether rows follow from keys by segment: no gaps, and one segment, or too many keys for a table of all."""
        few = len(self.segments) == 1 or self.segments[-1]["end_key"] - self.segments[0]["first_key"] > _TABLE_KEYS
        return few and self._dense and not len(self.deleted)

    @cached_property
    def _lookup(self) -> "np.ndarray[Any, Any]":
        """Row of each key from the first on, -1 for none."""
        first, end = self.segments[0]["first_key"], self.segments[-1]["end_key"]
        lookup = np.full(end - first, -1, np.int32 if self._bases[-1] < 2**31 else np.int64)
        for entry, base in zip(self.segments, self._bases.tolist(), strict=False):
            places: Any = slice(entry["first_key"] - first, entry["end_key"] - first)
            if entry["end_key"] - entry["first_key"] != entry["rows"]:
                index = read_index(self._local(f"segments/{entry['id']}.arrow"), ["key"])
                places = index["key"].to_numpy().astype(np.int64) - first
            lookup[places] = np.arange(base, base + entry["rows"])
        lookup[self.deleted[(self.deleted >= first) & (self.deleted < end)] - first] = -1  # of other segments, too
        return lookup

    @cached_property
    def _arrays(self) -> dict[str, Mapped | Decoded]:
        """Return a reader of every stored array."""
        return {
            array: self._reader(array, spec.dtype.itemsize * int(np.prod(spec.shape, dtype=np.int64)))
            for name, field in self.stored_fields.items()
            for array, spec in arrays_of(name, field).items()
        }

    def _first_rows(self, array: str) -> IntArray:
        """Return number of the first row of each segment's part of an array, and of the end."""
        layouts = [entry["arrays"][array] for entry in self.segments]
        if array not in self.fields or not self.fields[array].varies:
            return self._bases
        return _first_rows([layout["rows"] for layout in layouts], [layout["row_bytes"] for layout in layouts])

    def _reader(self, array: str, row_bytes: int) -> Mapped | Decoded:
        firsts = self._first_rows(array)
        layouts = [entry["arrays"][array] for entry in self.segments]
        parts = [
            ArraySegment(
                first_row=int(first),
                rows=layout["rows"],
                chunk_rows=layout["chunk_rows"],
                codec=layout["codec"],
                file=partial(self._local, shard_file(entry, array)),
            )
            for entry, layout, first in zip(self.segments, layouts, firsts.tolist(), strict=False)
        ]
        if any(layout["codec"] != "none" for layout in layouts):
            return Decoded(array, parts, row_bytes, self._kept)
        mapped = Mapped(parts, int(firsts[-1]), row_bytes)
        if isinstance(self.store, Folder):
            mapped.open()
        return mapped

    def chunk_of(self, rows: IntArray) -> IntArray:
        """Return a number for each row (N,), the same for neighbours that are read together: its chunk or pages."""
        readers = [reader for reader in self._arrays.values() if isinstance(reader, Decoded)]
        if not readers:
            return rows // max(1, CHUNK_BYTES // self.row_bytes)
        return max(readers, key=lambda reader: reader.row_bytes).chunks_of(rows)[0]

    def drop_pages(self) -> None:
        """Give the memory of mapped samples back to the system."""
        for reader in self._arrays.values():
            if isinstance(reader, Mapped):
                reader.drop()

    def gather(self, keys: IntArray, fields: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Copy the fields and labels of these samples, in this order.

        Parameters
        ----------
        keys : (N,) int64
        fields : sequence of str or None
            Names of fields, and ``"label"``; None means all.

        Returns
        -------
        dict
            Field name to tensor (N, ...), and ``label`` (N, ...) when the dataset has labels.

        Raises
        ------
        NotFound
            When a key is not in this version.
        """
        return self.tensors(self.gather_stored(self.rows_of(keys), fields))

    def gather_stored(
        self,
        rows: IntArray,
        fields: Sequence[str] | None = None,
        memory: Memory | None = None,
    ) -> dict[str, Stored]:
        """Copy fields and labels as they are stored.

        Parameters
        ----------
        rows : (N,) int64
            What `rows_of` says of the samples.
        fields : sequence of str or None
        memory : Memory or None
            Of a reader who reads everything once; for others decoded chunks are kept for the next call.
        """
        wanted = self.stored_fields
        if isinstance(fields, str):
            fields = [fields]
        if fields is not None:
            for name in fields:
                if name not in wanted:
                    raise NotFound(f"no field {name!r}{did_you_mean(name, wanted)}")
            wanted = {name: wanted[name] for name in fields}
        return {
            name: self.labels(rows, memory) if name == "label" else self.stored(name, field, rows, memory)
            for name, field in wanted.items()
        }

    def tensors(self, stored: dict[str, Stored]) -> dict[str, torch.Tensor]:
        """Make tensors of stored samples; here images are decoded."""
        batch: dict[str, torch.Tensor] = {}
        for name, rows in stored.items():
            field = self.stored_fields[name]
            batch.update({name: _images(name, field, rows)} if field.kind == "image" else field.tensors(name, rows))
        return batch

    def stored(self, name: str, field: Field, rows: IntArray, memory: Memory | None = None) -> Stored:
        """Copy rows of a field as they are stored; see `gather_stored`."""
        if field.varies:
            starts, lengths = self._spans(name, rows, memory)
            index = span_index(starts, lengths)
            out = None if memory is None else memory.rows(name, len(index), field.stored_dtype.itemsize)
            elements = self._arrays[name].take(index, out)
            return Spans(elements.view(field.stored_dtype).reshape(-1), lengths)
        reader = self._arrays[name]
        taken = reader.take(rows, None if memory is None else memory.rows(name, len(rows), field.row_bytes))
        return taken.view(field.stored_dtype).reshape(len(rows), *field.stored_shape)

    def _spans(self, name: str, rows: IntArray, memory: Memory | None) -> tuple[IntArray, IntArray]:
        """Where each sample's values begin in the array of all segments, and how many they are."""
        name_of_spans = f"{name}.spans"
        out = None if memory is None else memory.rows(name_of_spans, len(rows), 16)
        spans = self._arrays[name_of_spans].take(rows, out).view(np.int64).reshape(-1, 2)
        segment = np.searchsorted(self._bases, rows, side="right") - 1
        return spans[:, 0] + self._first_rows(name)[segment], spans[:, 1]

    def labels(self, rows: IntArray, memory: Memory | None = None) -> Array:
        """Labels of the samples in these rows, with those that came late."""
        assert self.label is not None
        labels = self.stored("label", self.label, rows, memory)
        assert isinstance(labels, np.ndarray)
        late_rows, late = self._late
        if len(late_rows):
            place = np.minimum(np.searchsorted(late_rows, rows), len(late_rows) - 1)
            found = late_rows[place] == rows
            labels[found] = late[place[found]]
        return labels

    @cached_property
    def _late(self) -> tuple[IntArray, Array]:
        """Rows whose labels came late, sorted, and these labels."""
        if self.late_labels is None:
            return np.empty(0, np.int64), np.empty(0)
        rows = self._find(self.late_labels["key"].to_numpy().astype(np.int64))
        there = np.flatnonzero(rows >= 0)  # not deleted since
        order = there[np.argsort(rows[there])]
        return rows[order], label_values(self.late_labels["label"], self.schema["label"])[order]


def _local(store: Folder | Remote, number: int, path: str) -> Path:
    """Where a file of a version is here."""
    try:
        return store.local(path)
    except FileNotFoundError:
        raise StorageError(f"{path} of version {number} is missing") from None


def _first_rows(rows: list[int], row_bytes: list[int]) -> IntArray:
    """Return the first row of each of these files when they are mapped side by side, and the end."""
    slot = slot_rows(row_bytes, rows)
    firsts: IntArray = np.cumsum([0, *(-(-n // slot) * slot for n in rows)], dtype=np.int64)
    return firsts


def _images(name: str, field: Field, files: Stored) -> torch.Tensor:
    """Decode images in threads: (N, C, H, W) uint8."""
    assert isinstance(files, Spans)
    pieces = np.split(files.values, files.starts[1:]) if len(files) else []
    images = list(threads().map(field.decode, pieces))
    if len({image.shape for image in images}) > 1:
        sizes = sorted({image.shape for image in images})
        raise InvalidInput(
            f"images of field {name!r} have different sizes, {sizes[0]} and {sizes[-1]} among them; declare one: "
            f'fields={{{name!r}: ("image", (3, 224, 224))}} resizes when reading'
        )
    return torch.from_numpy(np.stack(images) if images else np.empty((0, *(field.shape or (3, 0, 0))), np.uint8))
