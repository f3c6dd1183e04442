"""Where the files of a dataset are: a folder, or a prefix of an S3-protocol bucket.

Both keep files that never change, and can create a file only if it is not there, in one step: that is all a commit
needs. Reading always goes through a local file (`local`): the file itself, or the copy of it that the first read
fetched. Everything above sees folders only.
"""

import contextlib
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from dynkit.disk import flush, locked
from dynkit.errors import Conflict, DynkitError, StorageError

__all__ = ["ORPHAN_AGE_S", "Folder", "Remote", "Store", "open_store", "storage_errors"]

_PART_BYTES = 8 << 20  # of a parallel download
_CONNECTIONS = 16
ORPHAN_AGE_S = 24 * 3600.0  # a remote writer may be at work on a younger file
_LOCK_WAIT_S = 30.0


class Store(Protocol):
    """The files of one dataset; paths are relative to it, with forward slashes."""

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder; empty when there is no such folder."""

    def exists(self, path: str) -> bool:
        """Whether a file is there."""

    def read(self, path: str) -> bytes:
        """Content of a small file; FileNotFoundError when it is not there."""

    def create(self, path: str, data: bytes) -> bool:
        """Make a file durable, unless it is there: then False. A reader sees all of it or nothing."""

    def local(self, path: str) -> Path:
        """Return a local file with this content; FileNotFoundError when it is not there."""

    def checksum(self, path: str) -> str:
        """BLAKE3 of what is stored, not of a copy; FileNotFoundError when it is not there."""

    @contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[Path]:
        """Return a folder to write new files below; `keep` makes them part of the dataset.

        While somebody is inside `alone`, nobody else is inside.
        """
        yield Path()

    def keep(self, root: Path, paths: Iterable[str]) -> None:
        """Make files written below `root` durable, before a commit refers to them."""

    def orphans(self, known: set[str], *, erase: bool = False) -> list[str]:
        """Files that are not `known`; called `alone`. To `erase`, also those that a remote writer may be at work on."""

    def remove(self, paths: Iterable[str]) -> None:
        """Delete files for good, with folders that become empty."""


class Folder:
    """A folder on a local disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.newest: tuple[int, Any] = (0, None)  # the last version that was seen, and its manifest if it was read

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        try:
            return [path.name for path in (self.root / folder).iterdir()]
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        """See `Store`."""
        return (self.root / path).exists()

    def read(self, path: str) -> bytes:
        """See `Store`."""
        return (self.root / path).read_bytes()

    def create(self, path: str, data: bytes) -> bool:
        """See `Store`."""
        target = self.root / path
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            draft.write_bytes(data)
            flush(draft)
            os.link(draft, target)  # fails when the target exists, in one step
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        flush(target.parent)
        return True

    def local(self, path: str) -> Path:
        """See `Store`."""
        return self.root / path

    def checksum(self, path: str) -> str:
        """See `Store`."""
        return str(blake3().update_mmap(self.root / path).hexdigest())

    @contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[Path]:
        """See `Store`; the folder itself, because nobody sees files that no version refers to."""
        for sub in ("versions", "segments", "tombstones", "labels", "sources"):
            (self.root / sub).mkdir(parents=True, exist_ok=True)
        end_s = time.monotonic() + _LOCK_WAIT_S

        def waiting() -> None:
            if time.monotonic() > end_s:
                raise Conflict(
                    f"another process has been writing to {self.root} for {_LOCK_WAIT_S:.0f} s; try again later"
                )

        with locked(self.root / ".lock", waiting, shared=not alone):
            yield self.root

    def keep(self, root: Path, paths: Iterable[str]) -> None:
        """See `Store`."""
        files = [root / path for path in paths]
        folders = {folder for file in files for folder in file.parents if root in folder.parents}
        flush(*files, *sorted(folders, reverse=True))

    def orphans(self, known: set[str], *, erase: bool = False) -> list[str]:
        """See `Store`."""
        files = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir())
        return sorted(path for path in files if path not in known and path != ".lock")

    def remove(self, paths: Iterable[str]) -> None:
        """See `Store`."""
        folders = set()
        for path in paths:
            (self.root / path).unlink(missing_ok=True)
            folders |= {folder for folder in (self.root / path).parents if self.root in folder.parents}
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            if folder.parent != self.root:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # only when it is empty
        flush(*(folder for folder in folders if folder.exists()))


class Remote:
    """A prefix of a bucket that speaks the S3 protocol, with a local read cache.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``; region, endpoint and keys come from the usual ``AWS_*`` variables.
    cache : Path
        Where fetched files are kept until they are deleted; they never change.
    """

    def __init__(self, url: str, cache: Path) -> None:
        try:
            import obstore
        except ImportError:
            raise StorageError("buckets need obstore; type: pip install 'dynkit[s3]'") from None
        self.newest: tuple[int, Any] = (0, None)
        self._obstore = obstore
        options: dict[str, Any] = {}
        if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            options["client_options"] = {"allow_http": True}
        self._store = obstore.store.from_url(url, **options)
        self._cache = cache

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        listed = self._obstore.list_with_delimiter(self._store, f"{folder}/")
        return [entry["path"].rsplit("/", 1)[-1] for entry in listed["objects"]]

    def exists(self, path: str) -> bool:
        """See `Store`."""
        try:
            self._obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def read(self, path: str) -> bytes:
        """See `Store`."""
        return bytes(self._obstore.get(self._store, path).bytes())

    def create(self, path: str, data: bytes) -> bool:
        """See `Store`."""
        try:
            self._obstore.put(self._store, path, data, mode="create", use_multipart=False)
        except self._obstore.exceptions.AlreadyExistsError:
            return self.read(path) == data  # it is ours, and only the answer to a first try was lost
        return True

    def local(self, path: str) -> Path:
        """See `Store`; fetched in parallel parts the first time."""
        target = self._cache / path
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        size = self._obstore.head(self._store, path)["size"]
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with draft.open("wb") as stream, ThreadPoolExecutor(_CONNECTIONS) as pool:
                stream.truncate(size)

                def fetch(start: int) -> None:
                    end = min(start + _PART_BYTES, size)
                    part = self._obstore.get_range(self._store, path, start=start, end=end)
                    os.pwrite(stream.fileno(), part, start)

                list(pool.map(fetch, range(0, size, _PART_BYTES)))
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        return target

    def checksum(self, path: str) -> str:
        """See `Store`."""
        return str(blake3(self.read(path)).hexdigest())

    def fetch(self, path: str) -> tuple[bytes, str]:
        """Content of a file that changes, and the tag of this content; FileNotFoundError when it is not there."""
        found = self._obstore.get(self._store, path)
        return bytes(found.bytes()), str(found.meta["e_tag"])

    def swap(self, path: str, file: Path, tag: str | None) -> str | None:
        """Put a file in place of the content with this tag (None: of nothing); None when there is another by now."""
        mode: Any = "create" if tag is None else {"e_tag": tag}
        errors = self._obstore.exceptions
        try:
            return str(self._obstore.put(self._store, path, file, mode=mode, use_multipart=False)["e_tag"])
        except (errors.AlreadyExistsError, errors.PreconditionError):
            return None

    @contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[Path]:
        """See `Store`; a temporary folder. A bucket has no locks: who erases must know that nobody appends."""
        folder = Path(tempfile.mkdtemp(prefix="dynkit-"))
        try:
            for sub in ("segments", "tombstones", "labels", "sources"):
                (folder / sub).mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, root: Path, paths: Iterable[str]) -> None:
        """See `Store`."""
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(lambda path: self._obstore.put(self._store, path, root / path), paths))

    def orphans(self, known: set[str], *, erase: bool = False) -> list[str]:
        """See `Store`."""
        old = math.inf if erase else time.time() - ORPHAN_AGE_S
        return sorted(
            entry["path"]
            for page in self._obstore.list(self._store)
            for entry in page
            if entry["path"] not in known and entry["last_modified"].timestamp() < old
        )

    def remove(self, paths: Iterable[str]) -> None:
        """See `Store`; also from the cache."""
        listed = list(paths)
        for path in listed:
            (self._cache / path).unlink(missing_ok=True)
        if listed:
            self._obstore.delete(self._store, listed)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn what the operating system or a remote store says into one StorageError."""
    try:
        yield
    except DynkitError:
        raise
    except OSError as error:
        raise StorageError(f"{what}: {error.strerror or error}; nothing was committed") from error
    except Exception as error:
        if type(error).__module__.startswith("obstore"):
            first = str(error).splitlines()[0]
            raise StorageError(f"{what}: {first}; nothing was committed") from error
        raise


def open_store(root: Path, storage: str | None, name: str) -> Folder | Remote:
    """Open the store of a dataset: below the workspace's folder, or below its storage URL."""
    if storage is None:
        return Folder(root / "datasets" / name)
    return Remote(f"{storage.rstrip('/')}/datasets/{name}", root / "cache" / "datasets" / name)
