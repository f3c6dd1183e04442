"""One workspace's catalog, wherever it is.

The catalog is the one place where processes meet: the notebook's kernel, the worker that trains, a terminal, with
PostgreSQL those of other machines. Modules above keep their own queries next to their own logic and run them through
`read` and `write`.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from dynkit.catalog.databases import Database, PostgreSQL, SQLite, insert_missing
from dynkit.catalog.tables import SCHEMA_VERSION, info, metadata
from dynkit.errors import Conflict, InvalidInput, NotFound, StorageError

__all__ = ["Catalog"]

_FILE = "catalog.sqlite"
_URL_FILE = "catalog.url"


class Catalog:
    """The tables of one workspace.

    Parameters
    ----------
    root : path or None
        The workspace directory, made when missing. None means ``$DYNKIT_WORKSPACE``, else ``./dynkit-workspace``.
    storage : str or None
        URL such as ``s3://bucket/prefix`` where the datasets are; None means where the workspace was made with, at
        first the directory itself.
    url : str or None
        ``postgresql://user@host/database`` of the database that has the tables; None means where the workspace was made
        with, at first a file in the directory.

    Raises
    ------
    StorageError
        When the directory cannot be made or written, the catalog is damaged or of another schema version.
    Conflict
        When the workspace keeps its datasets or tables elsewhere, or the database belongs to another directory.
    InvalidInput
        When the URL is none, or has a password.
    """

    def __init__(
        self, root: str | os.PathLike[str] | None = None, storage: str | None = None, url: str | None = None
    ) -> None:
        if storage is not None and not re.match("[a-z][a-z0-9+.-]+://[^/]+", storage):
            raise InvalidInput(f"storage={storage!r} must be a place in a bucket, such as 's3://bucket/prefix'")
        self.root = self.locate(root)
        self._database = _database(self.root, url)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the workspace {self.root}: {error.strerror or error}") from error
        self._engine = self._database.engine()
        self._prepare(storage)

    @staticmethod
    def locate(root: str | os.PathLike[str] | None = None) -> Path:
        """Return where a workspace is or would be made; makes nothing.

        Raises
        ------
        InvalidInput
            When that cannot be a folder.
        """
        given = os.fspath(root or os.environ.get("DYNKIT_WORKSPACE") or "dynkit-workspace")
        if re.match("[a-z][a-z0-9+.-]+:/", given):
            raise InvalidInput(
                f"{given!r} is no folder; a workspace is one, and may keep its files elsewhere: "
                "dk.Workspace('my-workspace', storage='s3://bucket/prefix')"
            )
        try:
            return Path(given).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise InvalidInput(f"{given!r} cannot be a folder: {error}") from None

    @classmethod
    def existing(cls, root: str | os.PathLike[str] | None = None) -> "Catalog":
        """Open a workspace that is there.

        Raises
        ------
        NotFound
        """
        path = cls.locate(root)
        if not any((path / file).exists() for file in (_FILE, _URL_FILE)):
            raise NotFound(f"no workspace at {path}; dk.Workspace({str(path)!r}) makes one")
        return cls(path)

    def __reduce__(self) -> tuple[type["Catalog"], tuple[str]]:
        return Catalog, (str(self.root),)

    @property
    def where(self) -> str:
        """File or URL of the tables."""
        return str(self._database)

    def _prepare(self, storage: str | None) -> None:
        with self.read() as connection:
            found = sa.inspect(connection).has_table(info.name)
        if not found:
            with self.write() as connection:
                if not sa.inspect(connection).has_table(info.name):  # of two first openers, one makes them
                    self._remember()
                    metadata.create_all(connection)
                    rows = [{"key": "schema", "value": str(SCHEMA_VERSION)}, {"key": "storage", "value": storage or ""}]
                    insert_missing(connection, info, rows)
        with self.read() as connection:
            known = {row.key: row.value for row in connection.execute(sa.select(info))}
        version = known.get("schema")
        if version != str(SCHEMA_VERSION):
            raise StorageError(
                f"the workspace {self.root} has catalog schema {version}; this dynkit reads {SCHEMA_VERSION}: "
                "install the dynkit release that wrote it, or use another workspace"
            )
        self.storage: str | None = known.get("storage") or None
        if storage is not None and storage != self.storage:
            raise Conflict(
                f"the workspace {self.root} keeps its datasets in {self.storage or 'its own folder'}, not in "
                f"{storage}; use another folder"
            )
        self._join()

    def _join(self) -> None:
        """Let this directory be one of those that share a database, if they share the files as well."""
        if isinstance(self._database, SQLite) or (self.root / _URL_FILE).exists():
            return
        if self.storage is None:
            raise Conflict(
                f"the database {self.where} belongs to a workspace that keeps its files in its own directory; open "
                "that, or use another database: only one made with storage='s3://bucket/prefix' can be shared"
            )
        self._remember()

    def _remember(self) -> None:
        """Note the database in the directory."""
        if isinstance(self._database, PostgreSQL):
            (self.root / _URL_FILE).write_text(f"{self._database.url}\n")

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Connect to a consistent snapshot of the tables."""
        with self._connect(write=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Begin a write transaction: all of it is committed at the end of the block, or nothing."""
        with self._connect(write=True) as connection:
            yield connection

    @contextmanager
    def _connect(self, *, write: bool) -> Iterator[sa.Connection]:
        try:
            with (
                self._engine.connect().execution_options(dynkit_write=write) as connection,
                connection.begin(),
            ):
                yield connection
        except sa.exc.IntegrityError as error:
            raise Conflict(f"another process removed or added what this needs; try again ({error.orig})") from error
        except sa.exc.DatabaseError as error:
            raise StorageError(f"the catalog {self.where} cannot be used: {error.orig}") from error
        except sa.exc.TimeoutError as error:
            raise StorageError(f"the catalog {self.where} is in use by too many threads at once; try again") from error

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Wait until nobody else looks after the files in this folder, and let nobody until the block ends."""
        with self._database.alone(self._engine, folder):
            yield

    def size_bytes(self, tables: Iterable[sa.Table]) -> int:
        """Bytes that some tables take with their indexes."""
        with self.read() as connection:
            return self._database.size_bytes(connection, [table.name for table in tables])

    def scrub(self) -> None:
        """Write the tables anew, so that bytes of deleted rows are nowhere in them; waits for readers and writers."""
        self._database.scrub(self._engine, metadata.tables)

    def close(self) -> None:
        """Close all connections; the catalog opens new ones when used again."""
        self._engine.dispose()


def _database(root: Path, url: str | None) -> Database:
    """Return the database that a workspace was made with, or is to be made with."""
    noted = root / _URL_FILE
    known = noted.read_text().strip() if noted.exists() else None
    if url is None:
        return SQLite(root / _FILE) if known is None else PostgreSQL(known)
    given = PostgreSQL(url)
    if known not in (None, given.url):
        raise Conflict(f"the workspace {root} has its catalog in {known}; if the database has moved, edit {noted}")
    if (root / _FILE).exists():
        raise Conflict(f"the workspace {root} has its catalog in {root / _FILE}; use another folder")
    return given
