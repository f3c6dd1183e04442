"""Field arrays of one segment: written once as sharded Zarr v3, read back as memory-mapped tensors.

A shard without compression is its rows one after the other, followed by an index; so a shard file is mapped as it is
and a gather copies only the rows it needs. Whatever does not have that layout (another writer, a codec) is decoded
by zarr. Which of the two holds is decided from the shard's own index, not assumed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from dynkit.errors import StorageError

__all__ = ["open_field", "write_fields"]

_CHUNK_BYTES = 1 << 20
_SHARD_BYTES = 256 << 20
_INDEX_ENTRY_BYTES = 16  # offset and length of an inner chunk, little-endian uint64
_CRC32C_BYTES = 4

Array = np.ndarray[Any, Any]


def write_fields(path: Path, fields: dict[str, Array]) -> None:
    """Write arrays (N, ...) as a Zarr group at `path`, which must not exist."""
    group = zarr.open_group(path, mode="w-", zarr_format=3)
    for name, array in fields.items():
        row_bytes = max(array[:1].nbytes, 1)
        chunk_rows = max(1, min(len(array), _CHUNK_BYTES // row_bytes))
        shard_rows = chunk_rows * max(1, min(_SHARD_BYTES // (chunk_rows * row_bytes), -(-len(array) // chunk_rows)))
        stored = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(chunk_rows, *array.shape[1:]),
            shards=(shard_rows, *array.shape[1:]),
            compressors=None,
            filters=None,
            config={"write_empty_chunks": True},  # a chunk of zeros keeps its place in the file
        )
        stored[...] = array


def open_field(path: Path, name: str) -> list[torch.Tensor]:
    """Open one field as tensors, one per shard, in row order.

    Raises
    ------
    StorageError
        When the array or a shard is missing or cut short.
    """
    folder = path / name
    try:
        metadata = json.loads((folder / "zarr.json").read_text())
        mapped = _map_shards(folder, metadata)
        if mapped is not None:
            return mapped
        return [torch.from_numpy(np.asarray(zarr.open_array(folder, mode="r")[...]))]
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"field {name!r} of segment {path} cannot be read: {error}") from error


def _map_shards(folder: Path, metadata: dict[str, Any]) -> list[torch.Tensor] | None:
    """Map every shard file, or return None when the layout is not plain rows."""
    codecs = metadata["codecs"]
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
        return None
    sharding = codecs[0]["configuration"]
    inner = sharding["codecs"]
    plain = len(inner) == 1 and inner[0]["name"] == "bytes"
    if not plain or inner[0].get("configuration", {}).get("endian", "little") != "little":
        return None
    n_rows, *shape = metadata["shape"]
    shard_rows, *shard_shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    chunk_rows, *chunk_shape = sharding["chunk_shape"]
    if shard_shape != shape or chunk_shape != shape or sharding.get("index_location", "end") != "end":
        return None
    dtype = np.dtype(metadata["data_type"])
    chunk_bytes = chunk_rows * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    tensors = []
    for shard, first_row in enumerate(range(0, n_rows, shard_rows)):
        file = folder.joinpath("c", str(shard), *("0" for _ in shape))
        rows = min(shard_rows, n_rows - first_row)
        used_chunks = -(-rows // chunk_rows)
        index_bytes = shard_rows // chunk_rows * _INDEX_ENTRY_BYTES
        with file.open("rb") as stream:
            stream.seek(-(index_bytes + _CRC32C_BYTES), 2)
            index = np.frombuffer(stream.read(index_bytes), dtype="<u8").reshape(-1, 2)[:used_chunks]
        if not np.array_equal(index[:, 0], np.arange(used_chunks, dtype=np.uint64) * chunk_bytes):
            return None
        # Copy-on-write: the file stays as it is whatever happens to the tensor.
        array = np.memmap(file, dtype=dtype.newbyteorder("<"), mode="c", shape=(rows, *shape))
        tensors.append(torch.from_numpy(array))
    return tensors
