"""The rows of one array over all segments of a version, read by number.

Rows are numbered across segments so that a number is an address in a mapped table, and a chunk of a compressed one.
`Mapped` copies rows out of the page cache; `Decoded` decodes each chunk that a call needs once, in threads, and keeps
the last ones for the next call.
"""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynkit.data.fields import Array, Spans, Stored, span_index
from dynkit.data.mapping import drop_pages, map_file, reserve
from dynkit.data.shards import decode_chunk, read_index, threads
from dynkit.disk import read_at
from dynkit.errors import StorageError
from dynkit.time import IntArray

__all__ = ["ArraySegment", "Chunks", "Decoded", "Mapped", "Memory", "take_rows", "take_stored"]

_PIECE_BYTES = 1 << 20  # copied without the interpreter's lock; less is over before a second thread has begun
_SPARES = 4  # arrays of one name: two with the reader, two ahead
_WORKERS = min(os.cpu_count() or 1, 8)


@dataclass(frozen=True)
class ArraySegment:
    """One segment's part of an array.

    Parameters
    ----------
    first_row : int
        Number of its first row.
    rows, chunk_rows : int
    codec : str
    file : callable
        Gives the local path of its shard; fetches it first when the store is remote.
    """

    first_row: int
    rows: int
    chunk_rows: int
    codec: str
    file: Callable[[], Path]


def _references(arrays: list[Array], i: int) -> int:
    return sys.getrefcount(arrays[i])


_UNUSED = _references([np.empty(0)], 0)


class Memory:
    """Arrays that are written again once nobody holds what was made of them.

    A page of fresh memory costs more than the copy into it. A tensor made of an array, or of a part of it, holds a
    reference to the array; when the count is back at that of the list alone, the array is free.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, list[Array]] = {}
        self._lock = threading.Lock()

    def rows(self, name: str, n: int, row_bytes: int) -> Array:
        """Memory for rows (n, row_bytes) of the array of this name."""
        with self._lock:
            arrays = self._arrays.setdefault(name, [])
            for i in range(len(arrays)):
                if len(arrays[i]) >= n and _references(arrays, i) == _UNUSED:
                    return arrays[i][:n]
            fresh = np.empty((n, row_bytes), np.uint8)
            arrays[:] = [*arrays[1 - _SPARES :], fresh]
            return fresh[:n]


class Mapped:
    """Rows of uncompressed segments, mapped side by side when first needed."""

    def __init__(self, segments: Sequence[ArraySegment], rows: int, row_bytes: int) -> None:
        self._segments = segments
        self._firsts = np.array([segment.first_row for segment in segments], dtype=np.int64)
        self._lazy = set(range(len(segments)))
        self._table = reserve(rows, row_bytes)

    def open(self) -> None:
        """Map every segment now."""
        self._map(sorted(self._lazy))

    def take(self, rows: IntArray, out: Array | None = None) -> Array:
        """Copy rows (N,) of the array, as bytes (N, row_bytes), into `out` if given."""
        if self._lazy and len(rows):
            needed = np.unique(np.searchsorted(self._firsts, rows, side="right") - 1)
            self._map([int(i) for i in needed if int(i) in self._lazy])
        return take_rows(self._table, rows, out)

    def drop(self) -> None:
        """Give the memory of what was read back to the system."""
        drop_pages(self._table)

    def _map(self, which: Sequence[int]) -> None:
        for i in which:
            segment = self._segments[i]
            if segment.rows:
                map_file(self._table, segment.file(), segment.first_row, segment.rows)
            self._lazy.discard(i)


class Chunks:
    """Decoded chunks of all arrays of a version that are kept for the next call: the last used, up to so many bytes."""

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes
        self._chunks: OrderedDict[tuple[str, int], Array] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, array: str, number: int) -> Array | None:
        """Return a chunk of an array."""
        with self._lock:
            chunk = self._chunks.get((array, number))
            if chunk is not None:
                self._chunks.move_to_end((array, number))
            return chunk

    def put(self, array: str, number: int, chunk: Array) -> None:
        """Keep a chunk, in place of the ones not used for longest."""
        with self._lock:
            if (array, number) in self._chunks:
                return  # another thread was faster
            self._chunks[array, number] = chunk
            self._left -= chunk.nbytes
            while self._left < 0:
                self._left += self._chunks.popitem(last=False)[1].nbytes


class Decoded:
    """Rows of compressed segments.

    Parameters
    ----------
    array : str
        Its name.
    segments : sequence of ArraySegment
        In the order of their rows.
    row_bytes : int
    kept : Chunks
    """

    def __init__(self, array: str, segments: Sequence[ArraySegment], row_bytes: int, kept: Chunks) -> None:
        self._array = array
        self._segments = segments
        self.row_bytes = row_bytes
        self._kept = kept
        self._firsts = np.array([segment.first_row for segment in segments], dtype=np.int64)
        self._chunk_rows = np.array([segment.chunk_rows for segment in segments], dtype=np.int64)
        chunks = [-(-segment.rows // segment.chunk_rows) for segment in segments]
        self._first_chunks = np.cumsum([0, *chunks], dtype=np.int64)
        self._indexes: dict[int, Array] = {}

    def chunks_of(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Chunk of each row, numbered across segments, and the row's place in it."""
        segment = np.searchsorted(self._firsts, rows, side="right") - 1
        chunk, within = np.divmod(rows - self._firsts[segment], self._chunk_rows[segment])
        return self._first_chunks[segment] + chunk, within

    def take(self, rows: IntArray, out: Array | None = None) -> Array:
        """Copy rows (N,) of the array, as bytes (N, row_bytes); each chunk is decoded once.

        Parameters
        ----------
        rows : (N,) int64
        out : (N, row_bytes) uint8 or None
            Memory for the result. Who brings it reads everything once: decoded chunks are not kept then.
        """
        if not len(rows):
            return np.empty((0, self.row_bytes), np.uint8)
        chunk, within = self.chunks_of(rows)
        ordered = bool((chunk[1:] >= chunk[:-1]).all())
        order = None if ordered else np.argsort(chunk, kind="stable")
        if order is not None:
            chunk, within = chunk[order], within[order]
        edges = np.flatnonzero(np.diff(chunk, prepend=-1, append=-1))
        keep = out is None
        decoded = np.empty((len(rows), self.row_bytes), np.uint8) if out is None or order is not None else out

        def fill(part: range) -> None:
            for i in part:
                low, high = edges[i], edges[i + 1]
                self._fill(int(chunk[low]), within[low:high], decoded[low:high], keep)

        for segment in np.unique(np.searchsorted(self._first_chunks, chunk[edges[:-1]], side="right") - 1):
            self._open(int(segment))  # here, so that an error is raised once
        n = len(edges) - 1
        list(threads().map(fill, (range(start, min(start + 4, n)) for start in range(0, n, 4))))
        if order is None:
            return decoded
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return take_rows(decoded, inverse, out)

    def _fill(self, chunk: int, within: IntArray, out: Array, keep: bool) -> None:
        """Put these rows of a chunk into `out`."""
        decoded = self._kept.get(self._array, chunk)
        if decoded is None:
            segment = int(np.searchsorted(self._first_chunks, chunk, side="right")) - 1
            rows = int(self._chunk_rows[segment])
            whole = len(within) == rows and bool((within == np.arange(rows)).all())
            decoded = out if whole else np.empty((rows, self.row_bytes), np.uint8)
            offset, size = self._open(segment)[chunk - int(self._first_chunks[segment])].tolist()
            path = self._segments[segment].file()
            try:
                with path.open("rb", buffering=0) as shard:  # a mapping would stay in this process's memory
                    data = read_at(shard.fileno(), size, offset)
                decode_chunk(self._segments[segment].codec, data, decoded.reshape(-1))
            except (OSError, RuntimeError, ValueError) as error:
                raise StorageError(f"a chunk of {path} cannot be decoded: {error}") from error
            if keep:
                self._kept.put(self._array, chunk, decoded.copy() if whole else decoded)
            if whole:
                return
        np.take(decoded, within, axis=0, out=out, mode="clip")

    def _open(self, segment: int) -> Array:
        """Read the index of a segment's shard."""
        index = self._indexes.get(segment)
        if index is None:
            part = self._segments[segment]
            path = part.file()
            try:
                index = read_index(path, -(-part.rows // part.chunk_rows))
            except StorageError:
                raise
            except OSError as error:
                raise StorageError(f"shard {path} cannot be read: {error.strerror}") from error
            self._indexes[segment] = index
        return index


def take_rows(table: Array, rows: IntArray, out: Array | None = None) -> Array:
    """Copy rows of a table (M, row_bytes) in this order; several threads copy when there is much."""
    if out is None:
        out = np.empty((len(rows), table.shape[1]), np.uint8)
    if table.shape[1] in (2, 4, 8):  # one number a row
        number = f"u{table.shape[1]}"
        np.take(table.view(number)[:, 0], rows, out=out.view(number)[:, 0], mode="clip")
        return out
    step = max(1, _PIECE_BYTES // max(1, table.shape[1]))
    pieces = iter(range(0, len(rows), step))

    def copy() -> None:
        for low in pieces:
            np.take(table, rows[low : low + step], axis=0, out=out[low : low + step], mode="clip")

    helpers = [threads().submit(copy) for _ in range(min(_WORKERS, len(rows) // step) - 1)]
    copy()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun is not waited for
            helper.result()
    return out


def take_stored(name: str, stored: Stored, rows: IntArray, memory: Memory | None = None) -> Stored:
    """Copy samples of a field, in this order."""
    if isinstance(stored, Spans):
        lengths = stored.lengths[rows]
        return Spans(stored.values[span_index(stored.starts[rows], lengths)], lengths)
    table = stored.reshape(len(stored), -1).view(np.uint8)
    taken = take_rows(table, rows, None if memory is None else memory.rows(name, len(rows), table.shape[1]))
    return taken.view(stored.dtype).reshape(len(rows), *stored.shape[1:])
