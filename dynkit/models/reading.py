"""Tensors out of packs: find the frame, decode what it is predicted from, decode it, compare the hash.

A tensor may depend on others that depend on others. How far is bounded when it is written (`Reader.admits`): at most
`DEPTH` frames deep, and at most `COST` times its own size of frames to read. A tensor of which only a recipe is stored,
such as the average of other models, may need `FREE_COST` times its size; one with bytes of its own is never based on
another if that exceeds its own bound.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import sqlalchemy as sa
import torch
from xxhash import xxh3_64_intdigest

from dynkit.disk import read_at
from dynkit.errors import StorageError
from dynkit.models.encoding import Frame, Ref, decode
from dynkit.models.packs import Pack, packs_at, read_pack
from dynkit.models.shelf import GoneError, Place, Shelf
from dynkit.models.tensors import digest, raw

__all__ = ["COST", "DEPTH", "Reader"]

DEPTH = 8
COST = 3.0
FREE_COST = 8.0
_ATTEMPTS = 5


class Reader:
    """One operation's view of the packs.

    Parameters
    ----------
    shelf : Shelf
    connection : sqlalchemy.Connection or None
        Of the transaction that it is part of.
    """

    def __init__(self, shelf: Shelf, connection: sa.Connection | None = None) -> None:
        self.catalog = shelf.catalog
        self._connection = connection
        self._shelf = shelf
        self._packs = shelf.indexes
        self._recent = shelf.recent
        self._checked: set[int] = set()
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._reach: dict[Ref, tuple[dict[Ref, int], int]] = {}
        self._planned: dict[Ref, Frame] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def prepare(self, packs: Iterable[int]) -> None:
        """Look up several packs at once; ones that are gone, or whose files are, are left out."""
        new = set(packs) - self._checked
        for _ in range(_ATTEMPTS):
            with self.catalog.read() if self._connection is None else nullcontext(self._connection) as connection:
                rows = packs_at(connection, new)
            there = {id for id, row in rows.items() if self._indexed(row)}
            if len(there) == len(rows):
                break  # else another process may just have moved some
        for id in new - there:
            self._packs.pop(id, None)
        self._checked |= new

    def _indexed(self, row: "sa.Row[Any]") -> bool:
        """Read the index of a pack, unless it is known; False where its file is gone."""
        try:
            if row.id not in self._packs or self._packs[row.id].file != row.file:
                self._packs[row.id] = read_pack(self._shelf.path(row.file), row)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unreadable(error, self._shelf.folder) from error
        return True

    def known(self, id: int) -> Pack | None:
        """Return the index of a pack, None where that or its file is gone."""
        if id not in self._checked:
            self.prepare([id])
        return self._packs.get(id)

    def pack(self, id: int) -> Pack:
        """Return the index of a pack."""
        pack = self.known(id)
        if pack is None:
            raise GoneError(f"pack {id} of model tensors is gone from {self._shelf.folder}, or from the catalog")
        return pack

    def find(self, ref: Ref) -> Frame | None:
        """Return how a tensor is stored, None where it is not any more."""
        pack = self.known(ref[0])
        return pack.frames[ref[1]] if pack is not None else None

    def closure(self, refs: Iterable[Ref]) -> dict[Ref, Frame | None]:
        """Find tensors and all that these are predicted from; None is of those that are not there any more."""
        found: dict[Ref, Frame | None] = {}
        waiting = list(refs)
        while waiting:
            ref = waiting.pop()
            if ref not in found:
                frame = found[ref] = self.find(ref)
                waiting += frame.bases if frame is not None else ()
        return found

    def frame(self, ref: Ref) -> Frame:
        """Return how a tensor is stored."""
        frame = self.pack(ref[0]).frames[ref[1]]
        if frame is None:
            raise GoneError(f"the tensor {ref} in {self._shelf.folder} was removed")
        return frame

    def data(self, ref: Ref) -> tuple[Frame, bytes]:
        """Read how a tensor is stored, and its stored bytes."""
        for attempt in range(_ATTEMPTS):
            self.frame(ref)
            pack = self.pack(ref[0])
            frame = pack.frames[ref[1]]
            assert frame is not None
            try:
                return frame, read_at(self._descriptor(pack.file), frame.size, pack.offsets[ref[1]])
            except OSError as error:
                if not isinstance(error, FileNotFoundError) or attempt == _ATTEMPTS - 1:
                    raise _unreadable(error, self._shelf.folder / pack.file) from error
                self._checked.discard(ref[0])  # another process has moved it
        raise AssertionError

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self._shelf.path(file), os.O_RDONLY)
            return self._files[file]

    def tensor(self, ref: Ref) -> torch.Tensor:
        """Read a tensor into memory of its own; of one in memory, the stored bytes are checked if the file has changed.

        Raises
        ------
        StorageError
            When it, or one that it is predicted from, is missing or damaged.
        """
        key, place = self.frame(ref).id, self._place(ref)
        remembered = self.remembers(ref)
        known = self.base(ref)
        if remembered and (place is None or not self._recent.was_checked(key, place)):
            frame, data = self.data(ref)
            if xxh3_64_intdigest(data) != frame.checksum:
                raise self._damaged(ref, frame)
        if place is not None:
            self._recent.checked(key, place)
        return known.clone()

    def remembers(self, ref: Ref) -> bool:
        """Whether a tensor is in memory."""
        return self._recent.get(self.frame(ref).id) is not None

    def _place(self, ref: Ref) -> Place | None:
        """Where a tensor is now; None where that cannot be told."""
        try:
            file = self._shelf.path(self.pack(ref[0]).file).stat()
        except OSError:
            return None  # who reads it says why
        return *ref, file.st_ino, file.st_size, file.st_ctime_ns

    def base(self, ref: Ref) -> torch.Tensor:
        """Return a tensor that others are predicted from; not to be changed."""
        tensor = self._recent.get(self.frame(ref).id)
        return self._decoded(ref) if tensor is None else tensor

    def _decoded(self, ref: Ref) -> torch.Tensor:
        """Decode a tensor; those that it is predicted from once, and held no longer than one of them needs them."""
        uses = Counter(base for frame in self.closure([ref]).values() if frame is not None for base in frame.bases)
        held: dict[Ref, torch.Tensor] = {}

        def base(ref: Ref) -> torch.Tensor:
            tensor = held.pop(ref, None)
            if tensor is None:
                tensor = self._recent.get(self.frame(ref).id)
            if tensor is None:
                tensor = decoded(ref)
            uses[ref] -= 1
            if uses[ref]:
                held[ref] = tensor
            return tensor

        def decoded(ref: Ref) -> torch.Tensor:
            frame, data = self.data(ref)
            bases = [base(one) for one in frame.bases]
            try:
                tensor = decode(frame, data, bases)
                sound = digest(frame.dtype, frame.shape, raw(tensor)) == frame.id
            except Exception:  # what a coder says of damaged bytes differs
                sound = False
            if not sound:
                raise self._damaged(ref, frame)
            self._recent.put(frame.id, tensor)
            return tensor

        return decoded(ref)

    def _damaged(self, ref: Ref, frame: Frame) -> StorageError:
        where = self._shelf.folder / self.pack(ref[0]).file
        return StorageError(f"a tensor in {where} is damaged: its content does not hash to {frame.id.hex()[:12]}")

    def reach(self, ref: Ref) -> tuple[dict[Ref, int], int]:
        """Return the stored bytes of all frames that a tensor needs, its own too, and how deep they go."""
        if ref not in self._reach:
            frame = self._planned.get(ref) or self.frame(ref)
            needed, depth = {ref: frame.size}, 0
            for base in frame.bases:
                more, below = self.reach(base)
                needed |= more
                depth = max(depth, below)
            self._reach[ref] = needed, depth + 1
        return self._reach[ref]

    def used(self, bases: Sequence[Ref], raw_bytes: int) -> float:
        """Return how much of its bounds, 0 to 1, a tensor of so many bytes has used up by these references."""
        reached = [self.reach(base) for base in bases]
        needed = {ref: size for more, _ in reached for ref, size in more.items()}
        return max(sum(needed.values()) / (COST * max(1, raw_bytes)), max((d for _, d in reached), default=0) / DEPTH)

    def plan(self, ref: Ref, frame: Frame) -> None:
        """Count with a tensor being stored in another way soon."""
        self._planned[ref] = frame
        self._reach.clear()

    def admits(self, raw_bytes: int) -> Callable[[Sequence[Ref], int], bool]:
        """Return what tells whether a tensor of so many bytes may depend on some, with a frame of some size."""

        def admitted(bases: Sequence[Ref], size: int) -> bool:
            needed: dict[Ref, int] = {}
            for base in bases:
                more, depth = self.reach(base)
                needed |= more
                if depth >= DEPTH:
                    return False
            return not bases or sum(needed.values()) + size <= (COST if size else FREE_COST) * raw_bytes

        return admitted


def _unreadable(error: OSError, path: Any) -> StorageError:
    return StorageError(f"model tensors {error.filename or path} cannot be read: {error.strerror or error}")
