"""Where the pack files of a workspace are: a folder, or a bucket and a folder with copies of its files.

Files are written in the folder and read there; with a bucket, one is sent there before the commit that refers to it,
and fetched when it is missing here. What the catalog does not refer to does not exist for anybody.
"""

import contextlib
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
import torch

from dynkit.catalog import Catalog, packs
from dynkit.data.store import Remote, storage_errors
from dynkit.errors import StorageError
from dynkit.models.packs import Pack, PackFile

__all__ = ["GoneError", "Place", "Recent", "Shelf"]


class GoneError(StorageError):
    """A tensor or a file was removed by `gc`."""


Place = tuple[int, ...]  # a frame in a file, and when that was last changed


class Recent:
    """Tensors decoded lately, up to so many bytes; not to be changed, so they are never given to a user."""

    def __init__(self, size_bytes: int) -> None:
        self._most = size_bytes // 4  # of one tensor, so that it does not drive out all others
        self._left = size_bytes
        self._tensors: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._places: dict[bytes, Place] = {}
        self._lock = threading.Lock()

    def get(self, key: bytes) -> torch.Tensor | None:
        """Return a tensor by its identity."""
        with self._lock:
            tensor = self._tensors.get(key)
            if tensor is not None:
                self._tensors.move_to_end(key)
            return tensor

    def put(self, key: bytes, tensor: torch.Tensor) -> None:
        """Keep a tensor, in place of the ones not used for longest."""
        with self._lock:
            if key in self._tensors or tensor.nbytes > self._most:
                return
            self._tensors[key] = tensor
            self._left -= tensor.nbytes
            while self._left < 0:
                oldest, tensor = self._tensors.popitem(last=False)
                self._left += tensor.nbytes
                self._places.pop(oldest, None)

    def checked(self, key: bytes, place: Place) -> None:
        """Note where a tensor was found as it should be."""
        with self._lock:
            if key in self._tensors:
                self._places[key] = place

    def was_checked(self, key: bytes, place: Place) -> bool:
        """Whether a tensor was found as it should be at this place."""
        return self._places.get(key) == place


class Shelf:
    """The pack files, and what is worth keeping in memory between two operations.

    Parameters
    ----------
    catalog : Catalog
    folder : Path or None
        Where files are here; None means where the workspace has them.
    recent_bytes : int
    """

    def __init__(self, catalog: Catalog, folder: Path | None = None, recent_bytes: int = 128 << 20) -> None:
        self.catalog = catalog
        url = catalog.storage
        self.folder = folder or (catalog.root / "cache" if url else catalog.root) / "models" / "packs"
        self._remote = Remote(f"{url.rstrip('/')}/models/packs", self.folder) if url else None
        self.indexes: dict[int, Pack] = {}
        self.recent = Recent(recent_bytes)

    @contextmanager
    def anew(self) -> Iterator["Shelf"]:
        """Read everything from where it is kept, nothing from memory or copies."""
        if self._remote is None:
            yield Shelf(self.catalog)
            return
        with tempfile.TemporaryDirectory(prefix="dynkit-") as folder:
            yield Shelf(self.catalog, Path(folder))

    def path(self, file: str) -> Path:
        """Return a file here; FileNotFoundError where it is gone."""
        path = self.folder / file
        if self._remote is not None and not path.exists():
            with storage_errors(f"cannot read model tensors {file}"), contextlib.suppress(FileNotFoundError):
                return self._remote.local(file)
        return path

    @contextmanager
    def writing(self) -> Iterator[PackFile]:
        """Make a file; it is removed when the block, which is to `publish` and commit it, fails."""
        with storage_errors(f"cannot write model tensors to {self.folder}"):
            file = PackFile(self.folder)
            try:
                with file:
                    yield file
            except Exception:  # an interrupt may come after the commit: then the file stays
                with contextlib.suppress(StorageError):
                    if not self._committed(file.name):  # the answer to a commit may be lost
                        self.discard([file.name])
                raise

    def _committed(self, file: str) -> bool:
        """Whether the catalog refers to a file."""
        with self.catalog.read() as connection:
            return connection.scalar(sa.select(packs.c.id).where(packs.c.file == file).limit(1)) is not None

    def publish(self, file: PackFile) -> None:
        """Make a file durable and visible.

        Raises
        ------
        GoneError
            When a `gc` that waits for nobody has removed it.
        """
        try:
            file.finish()
        except FileNotFoundError:
            raise GoneError(f"{file.name} was removed while it was written") from None
        if self._remote is not None:
            self._remote.keep(self.folder, [file.name])

    def check(self, file: PackFile) -> None:
        """Make sure, in the transaction that refers to a file, that no `gc` has removed it.

        Raises
        ------
        GoneError
        """
        if not (self.folder / file.name).exists():
            raise GoneError(f"{file.name} was removed before it was committed")

    def discard(self, files: Iterable[str]) -> None:
        """Remove files for good."""
        listed = list(files)
        for file in listed:
            with contextlib.suppress(OSError):
                (self.folder / file).unlink()
        if self._remote is not None:
            with storage_errors("cannot remove model tensors"):
                self._remote.remove(listed)

    def orphans(self, grace_s: float) -> list[str]:
        """Files that are in no catalog and that no writer can be about to commit; in a bucket, for a day at least."""
        old = time.time() - grace_s
        candidates = []
        for path in [*self.folder.glob("*.pack"), *self.folder.glob(".*.pack")]:
            with contextlib.suppress(FileNotFoundError):  # published or removed by another process
                if path.stat().st_mtime <= old:
                    candidates.append(path.name)
        known = set(self.sizes())
        if self._remote is not None:
            with storage_errors("cannot list model tensors"):
                candidates += self._remote.orphans(known, erase=not grace_s)
        return [file for file in dict.fromkeys(candidates) if file not in known]

    def sizes(self) -> dict[str, int]:
        """Files of the catalog and their bytes: a file ends with the index of its last pack."""
        query = sa.select(packs.c.file, sa.func.max(packs.c.offset + packs.c.size)).group_by(packs.c.file)
        with self.catalog.read() as connection:
            return {file: int(size) for file, size in connection.execute(query)}

    def size_bytes(self) -> int:
        """Bytes of all files, those that are in no catalog too as far as they are here."""
        here = {path.name: path.stat().st_size for path in self.folder.glob("*") if path.is_file()}
        return sum((here if self._remote is None else self.sizes()).values())
