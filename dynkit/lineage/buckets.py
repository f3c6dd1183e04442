"""A remote in a bucket: packs, and beside them a catalog of their models that travels as one file.

    <url>/lineage/catalog.sqlite       replaced as a whole, only by who knows what it replaces
    <url>/lineage/models/packs/        as those of a workspace that keeps its models in a bucket

To pull is to fetch the catalog and to read models through it. To push is to fetch it, to write models into that copy,
which sends their packs, and to put it in the place of the one that was fetched. When somebody else has done so in
between, the push starts over on theirs. Before its catalog is there, nobody sees a pack: a push that is killed leaves
packs without a catalog, which a later push removes.
"""

import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from dynkit.catalog import Catalog
from dynkit.data.store import ORPHAN_AGE_S, Remote, storage_errors
from dynkit.errors import NotFound, StorageError
from dynkit.models.shelf import Shelf

__all__ = ["Bucket", "OvertakenError", "is_url"]

_FILE = "catalog.sqlite"
_WORTH = 10.0  # how much longer a push works than it saves


class OvertakenError(Exception):
    """Somebody else replaced the catalog that was fetched; what was not saved is to be done again."""


def is_url(location: object) -> bool:
    """Whether a remote is a bucket, not a directory."""
    return "://" in str(location)


class Bucket:
    """A remote at a URL.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``.

    Raises
    ------
    StorageError
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._storage = f"{self.url}/lineage"
        with storage_errors(f"cannot use {self.url}"):
            self._remote = Remote(self._storage, Path())  # what changes is not cached
        self._tag: str | None = None
        self._worth = _WORTH

    def check(self) -> None:
        """Make sure that a catalog is there.

        Raises
        ------
        NotFound, StorageError
        """
        self._fetch()

    @contextmanager
    def opened(self, cache: Path, *, create: bool = False) -> Iterator[Catalog]:
        """Fetch the catalog and open the copy; where there is none, `create` one. Packs stay in the `cache`."""
        packs = cache.resolve() / blake3(self.url.encode()).hexdigest(16)
        packs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="dynkit-") as folder:
            root = Path(folder)
            content = self._fetch(create=create)
            if content is not None:
                (root / _FILE).write_bytes(content)
            (root / "cache").symlink_to(packs)
            catalog = Catalog(root)
            catalog.storage = self._storage  # the packs are beside the catalog, wherever it is
            self._saved_s, self._took_s = time.monotonic(), 0.0
            try:
                yield catalog
            finally:
                catalog.close()

    def _fetch(self, *, create: bool = False) -> bytes | None:
        found: tuple[bytes | None, str | None]
        with storage_errors(f"cannot read {self.url}"):
            try:
                found = self._remote.fetch(_FILE)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise StorageError(f"there is no bucket for {self.url}; make it first") from error
                if not create:
                    raise NotFound(f"nothing was pushed to {self.url}; add it as a remote, then push to it") from None
                found = None, None
        content, self._tag = found
        return content

    def save(self, catalog: Catalog, *, last: bool = False) -> bool:
        """Put the copy in the place of what was fetched, if that is worth the time by now.

        Raises
        ------
        OvertakenError
        """
        started_s = time.monotonic()
        if not last and started_s - self._saved_s < self._worth * self._took_s:
            return False
        draft = catalog.root / f"{_FILE}.out"
        _copy(catalog.root / _FILE, draft)
        with storage_errors(f"cannot write to {self.url}"):
            tag = self._remote.swap(_FILE, draft, self._tag)
        draft.unlink()
        if tag is None:
            self._worth /= 2  # next time there is less to be done again
            raise OvertakenError
        self._tag, self._saved_s = tag, time.monotonic()
        self._took_s = self._saved_s - started_s
        return True

    def tidy(self, catalog: Catalog) -> None:
        """Remove the packs of pushes that did not come to their end, once nobody can be at work on them."""
        shelf = Shelf(catalog)
        shelf.discard(shelf.orphans(ORPHAN_AGE_S))


def _copy(file: Path, draft: Path) -> None:
    """Copy what is committed into a file that is complete in itself, without what was deleted."""
    connection = sqlite3.connect(file)
    try:
        connection.execute("VACUUM INTO ?", (str(draft),))
    except sqlite3.Error as error:
        raise StorageError(f"the catalog {file} cannot be copied to {draft}: {error}") from error
    finally:
        connection.close()
