"""Pack files: frames back to back, then their index.

What one `put` writes is a pack: a row of the catalog that says in which file and where its index is. The frames end
where the index begins. A reference to a tensor, (pack, slot), never changes; what it points to may: `gc` and `repack`
write new files, put the rows over to them in one transaction and remove the old ones. A slot of nothing is ``None``.

The index is BLAKE3 identities (32 bytes each), then JSON with the rest, zstd. A file becomes visible under its name
when all of it is on the disk, and is never changed.
"""

import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from numcodecs.zstd import Zstd
from xxhash import xxh3_64_intdigest

from dynkit import catalog as tables
from dynkit.disk import flush
from dynkit.errors import StorageError
from dynkit.models.encoding import Frame

__all__ = ["Pack", "PackFile", "Written", "packs_at", "read_pack"]

_ID_BYTES = 32
_LEVEL = 9  # of zstd; an index is small


@dataclass(frozen=True)
class Pack:
    """Index of a pack.

    Parameters
    ----------
    id : int
    file : str
    frames : tuple of Frame or None
        By slot.
    offsets : tuple of int
        Where their bytes begin in the file.
    """

    id: int
    file: str
    frames: tuple[Frame | None, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """Where a new file has the index of a pack."""

    offset: int
    size: int


class PackFile:
    """A file of packs in the making.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.name = f"{secrets.token_hex(8)}.pack"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / self.name
        self._draft = folder / f".{self.name}"
        self._stream = self._draft.open("wb")

    def __enter__(self) -> "PackFile":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stream.close()
        self._draft.unlink(missing_ok=True)

    def add(self, frames: Iterable[tuple[Frame | None, Any]]) -> Written:
        """Append a pack."""
        index = []
        for frame, data in frames:
            index.append(frame)
            if frame is not None:
                self._stream.write(data)
        offset = self._stream.tell()
        size = self._stream.write(_packed(index))
        return Written(offset, size)

    def finish(self) -> None:
        """Make it durable and visible."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._draft.rename(self._path)
        flush(self._path.parent)


def _packed(frames: Sequence[Frame | None]) -> bytes:
    """Index of a pack as bytes."""
    ids = b"".join(frame.id for frame in frames if frame is not None)
    rows = [None if frame is None else _trimmed(astuple(frame)[1:]) for frame in frames]
    rest = Zstd(_LEVEL).encode(json.dumps(rows, separators=(",", ":")).encode())
    body = len(ids).to_bytes(4, "little") + ids + bytes(rest)
    return xxh3_64_intdigest(body).to_bytes(8, "little") + body


_DEFAULTS = ("none", (), (), 0, 0.0)  # of the last fields of a Frame


def _trimmed(fields: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leave out what is as always."""
    known = len(fields) - len(_DEFAULTS)
    while len(fields) > known and fields[-1] == _DEFAULTS[len(fields) - known - 1]:
        fields = fields[:-1]
    return fields


def _unpacked(data: bytes) -> list[Frame | None]:
    if xxh3_64_intdigest(data[8:]) != int.from_bytes(data[:8], "little"):
        raise ValueError("its checksum does not fit")
    split = 12 + int.from_bytes(data[8:12], "little")
    ids = iter(data[at : at + _ID_BYTES] for at in range(12, split, _ID_BYTES))
    rows = json.loads(Zstd().decode(data[split:]))
    return [None if row is None else _frame(next(ids), row) for row in rows]


def _frame(key: bytes, row: list[Any]) -> Frame:
    known = len(row) - 5  # of the fields that `_trimmed` may leave out
    fields: list[Any] = [*row, *_DEFAULTS[known:]]
    dtype, shape, size, checksum, coder, predictor, options, bases, side, step = fields
    return Frame(
        key,
        dtype,
        tuple(shape),
        size,
        checksum,
        coder,
        predictor,
        tuple(options),
        tuple((pack, slot) for pack, slot in bases),
        side,
        step,
    )


def read_pack(path: Path, row: "sa.Row[Any]") -> Pack:
    """Read the index of a pack.

    Raises
    ------
    FileNotFoundError
        Also when another process has just moved it.
    StorageError
        When it is damaged.
    """
    with path.open("rb") as stream:
        stream.seek(row.offset)
        data = stream.read(row.size)
    try:
        frames = _unpacked(data)
    except Exception as error:
        raise StorageError(f"the index of pack {row.id} in {path} is damaged: {error}") from error
    offset = row.offset - sum(frame.size for frame in frames if frame is not None)
    offsets = []
    for frame in frames:
        offsets.append(offset)
        offset += 0 if frame is None else frame.size
    return Pack(row.id, row.file, tuple(frames), tuple(offsets))


def packs_at(connection: sa.Connection, ids: Iterable[int] | None = None) -> "dict[int, sa.Row[Any]]":
    """Return rows of packs by id; None means all."""
    table = tables.packs
    if ids is None:
        return {row.id: row for row in connection.execute(sa.select(table))}
    rows: dict[int, sa.Row[Any]] = {}
    for part in tables.batched(list(ids)):
        query = sa.select(table).where(table.c.id.in_(part))
        rows |= {row.id: row for row in connection.execute(query)}
    return rows
