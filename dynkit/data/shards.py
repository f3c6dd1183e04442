"""One Zarr v3 array as one shard: rows are appended to a file, and any of them are read back.

An array that is not compressed is its rows one after the other followed by the shard's index, so the file can be
mapped as it is. A compressed one is encoded and decoded a chunk at a time, in threads, straight from and to the
caller's memory. zarr-python, TensorStore and zarrs open both; what they need to know is in ``zarr.json``.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from blake3 import blake3
from numcodecs import Blosc, GZip, Zstd

from dynkit.data.fields import Array
from dynkit.errors import InvalidInput, StorageError, did_you_mean

__all__ = ["CHUNK_BYTES", "ArrayWriter", "check_compression", "decode_chunk", "read_index", "threads", "write_group"]

CHUNK_BYTES = 1 << 20
"""Rows of one chunk, decoded, together: large enough to compress well, small enough to shuffle by."""

# name: (codec, its Zarr v3 metadata)
CODECS: dict[str, tuple[Any, dict[str, Any]]] = {
    "zstd": (Zstd(level=3), {"name": "zstd", "configuration": {"level": 3, "checksum": False}}),
    "lz4": (
        Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE, typesize=1),
        {
            "name": "blosc",
            "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 1, "blocksize": 0},
        },
    ),
    "gzip": (GZip(level=5), {"name": "gzip", "configuration": {"level": 5}}),
}


def check_compression(name: str) -> str:
    """Return `name` if it is a codec, ``"none"`` or ``"auto"``."""
    known = ["auto", "none", *CODECS]
    if name not in known:
        raise InvalidInput(f"compression={name!r} is not known{did_you_mean(str(name), known)}")
    return name


@cache
def threads() -> ThreadPoolExecutor:
    """Threads for work that holds no lock: encoding, decoding, copying."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="dynkit")


os.register_at_fork(after_in_child=threads.cache_clear)  # a forked child has none of its parent's threads


class ArrayWriter:
    """Appends rows to a new array.

    Parameters
    ----------
    folder : Path
        Of the array; must not exist.
    dtype : numpy dtype
    shape : tuple of int
        Of one row.
    codec : str
        A key of `CODECS`, or ``"none"``.
    attributes : dict
        Kept in ``zarr.json``.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype[Any], shape: tuple[int, ...], codec: str, attributes: dict[str, Any]
    ) -> None:
        self._folder, self._dtype, self._shape, self._codec, self._attributes = folder, dtype, shape, codec, attributes
        self._row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self._chunk_rows = max(1, CHUNK_BYTES // max(self._row_bytes, 1))
        self._file = folder.joinpath("c", "0", *("0" for _ in shape))
        self._file.parent.mkdir(parents=True)
        self._stream = self._file.open("xb", buffering=0)
        self._hasher = blake3(max_threads=blake3.AUTO)
        self._sizes: list[int] = []  # of encoded chunks
        self._left = np.empty(0, np.uint8)  # bytes of a chunk that is not full yet
        self.rows = 0

    def write(self, rows: Array) -> None:
        """Append rows (N, *shape) of the array's dtype."""
        self.rows += len(rows)
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        if self._codec == "none":
            self._append(data)
            return
        chunk_bytes = self._chunk_rows * self._row_bytes
        if len(self._left):
            data = np.concatenate([self._left, data])
        full = len(data) - len(data) % chunk_bytes
        self._encode(data[:full].reshape(-1, chunk_bytes))
        self._left = data[full:].copy()

    def close(self) -> dict[str, Any]:
        """Complete the array; return what a reader needs to know of it."""
        if self.rows < self._chunk_rows:
            self._chunk_rows = max(self.rows, 1)
        chunk_bytes = self._chunk_rows * self._row_bytes
        missing = -self.rows % self._chunk_rows * self._row_bytes  # a Zarr chunk is always whole
        padding = np.zeros(missing, np.uint8)
        n_chunks = -(-self.rows // self._chunk_rows)
        if self._codec == "none":
            self._append(padding)
            self._sizes = [chunk_bytes] * n_chunks
        elif len(self._left):
            self._encode(np.concatenate([self._left, padding]).reshape(1, chunk_bytes))
        if n_chunks:
            sizes = np.array(self._sizes, dtype="<u8")
            index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8").tobytes()
            checksum = google_crc32c.value(index).to_bytes(4, "little")
            self._append(np.frombuffer(index + checksum, np.uint8))
        self._stream.close()
        if not n_chunks:
            self._file.unlink()  # an array without rows has no shard
        metadata = self._metadata(max(n_chunks, 1)).encode()
        (self._folder / "zarr.json").write_bytes(metadata)
        return {
            "rows": self.rows,
            "row_bytes": self._row_bytes,
            "chunk_rows": self._chunk_rows,
            "codec": self._codec,
            "file": str(self._file.relative_to(self._folder)),
            "hash": self._hasher.hexdigest(),
            "metadata_hash": blake3(metadata).hexdigest(),
        }

    def abandon(self) -> None:
        """Close the file of an array that will not be completed."""
        self._stream.close()

    def _append(self, data: Array) -> None:
        view = data.data
        self._hasher.update(view)
        while len(view):
            view = view[self._stream.write(view) :]

    def _encode(self, chunks: Array) -> None:
        codec = CODECS[self._codec][0]
        for encoded in threads().map(codec.encode, chunks):
            self._sizes.append(len(encoded))
            self._append(np.frombuffer(encoded, np.uint8))

    def _metadata(self, n_chunks: int) -> str:
        compressor = [] if self._codec == "none" else [CODECS[self._codec][1]]
        little = {"name": "bytes", **({"configuration": {"endian": "little"}} if self._dtype.itemsize > 1 else {})}
        index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        return json.dumps(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [self.rows, *self._shape],
                "data_type": self._dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [n_chunks * self._chunk_rows, *self._shape]},
                },
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": [0.0, 0.0] if self._dtype.kind == "c" else False if self._dtype.kind == "b" else 0,
                "codecs": [
                    {
                        "name": "sharding_indexed",
                        "configuration": {
                            "chunk_shape": [self._chunk_rows, *self._shape],
                            "codecs": [little, *compressor],
                            "index_codecs": index_codecs,
                            "index_location": "end",
                        },
                    }
                ],
                "attributes": self._attributes,
            },
            indent=1,
        )


def write_group(folder: Path) -> str:
    """Make the folder a Zarr group; return the hash of its metadata."""
    metadata = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=1).encode()
    (folder / "zarr.json").write_bytes(metadata)
    return blake3(metadata).hexdigest()


def read_index(file: Path, n_chunks: int) -> Array:
    """Read offset and size of every chunk of a shard, (n_chunks, 2) uint64.

    Raises
    ------
    StorageError
        When the file is cut short or its index damaged.
    """
    size = n_chunks * 16
    with file.open("rb") as stream:
        length = stream.seek(0, os.SEEK_END)
        if length < size + 4:
            raise StorageError(f"shard {file} is cut short")
        stream.seek(length - size - 4)
        index, checksum = stream.read(size), stream.read(4)
    if google_crc32c.value(index).to_bytes(4, "little") != checksum:
        raise StorageError(f"shard {file} has a damaged index")
    return np.frombuffer(index, dtype="<u8").reshape(n_chunks, 2)


def decode_chunk(codec: str, data: Any, out: Array) -> None:
    """Decode one chunk into `out` (bytes of a whole chunk, contiguous)."""
    CODECS[codec][0].decode(data, out=out)
