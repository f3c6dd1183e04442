"""What differs between the databases that a catalog may be in: how to connect, begin, measure and erase.

`SQLite` is a file in write-ahead mode: readers never wait, and a write transaction takes its lock at the start
(``BEGIN IMMEDIATE``), so that two writers queue instead of failing. The log needs a local disk.

`PostgreSQL` is a database that several machines reach. Writers queue there, too: each transaction begins by taking the
same advisory lock, and sees all that was committed before. Readers never wait; each has one snapshot. A connection
lives as long as its transaction, so that a process may fork, or be killed, at any time.
"""

import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from dynkit.disk import locked
from dynkit.errors import InvalidInput, StorageError

__all__ = ["FEW", "Database", "PostgreSQL", "SQLite", "batched", "insert_missing", "upsert"]

FEW = 500
"""Values that one query may list."""

_WAIT_S = 60
_WRITERS, _UPKEEP = 0x64796E6B0001, 0x64796E6B0002  # advisory locks of a PostgreSQL database
_HEARTBEAT_S = 30  # after which a silent client is asked whether it is there


class Database(Protocol):
    """Where the tables are; its text is for people."""

    def engine(self) -> sa.Engine:
        """Make what connects to it."""

    def size_bytes(self, connection: sa.Connection, tables: Iterable[str]) -> int:
        """Bytes that some tables take with their indexes."""

    def scrub(self, engine: sa.Engine, tables: Iterable[str]) -> None:
        """Write tables anew, so that bytes of deleted rows are nowhere in them; waits for readers and writers."""

    @contextmanager
    def alone(self, engine: sa.Engine, folder: Path) -> Iterator[None]:
        """Wait until nobody else looks after the files of this workspace; only processes that end let others in."""
        yield


@dataclass(frozen=True)
class SQLite:
    """A file on a local disk."""

    file: Path

    def __str__(self) -> str:
        return str(self.file)

    def engine(self) -> sa.Engine:
        """See `Database`."""
        engine = sa.create_engine(sa.URL.create("sqlite", database=str(self.file)))
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine

    def size_bytes(self, connection: sa.Connection, tables: Iterable[str]) -> int:
        """See `Database`; all of the file where SQLite was built without the table of pages."""
        query = sa.text("SELECT sum(pgsize) FROM dbstat JOIN sqlite_schema USING (name) WHERE tbl_name IN :tables")
        try:
            size = connection.scalar(query.bindparams(sa.bindparam("tables", list(tables), expanding=True)))
        except sa.exc.OperationalError:
            pages, page = (connection.scalar(sa.text(f"PRAGMA {what}")) for what in ("page_count", "page_size"))
            size = pages * page
        return int(size)

    def scrub(self, engine: sa.Engine, tables: Iterable[str]) -> None:
        """See `Database`."""
        raw = engine.raw_connection()
        try:
            cursor = raw.cursor()
            cursor.execute("VACUUM")
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            row = cursor.fetchone()
            cursor.close()
        except sqlite3.Error as error:
            raise StorageError(f"the catalog {self} cannot be written anew: {error}") from error
        finally:
            raw.close()
        if row is None or row[0]:
            raise StorageError(f"somebody is reading the catalog {self}, so its log keeps deleted rows")

    @contextmanager
    def alone(self, engine: sa.Engine, folder: Path) -> Iterator[None]:
        """See `Database`."""
        with locked(folder / ".lock"):
            yield


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions begin in _begin_sqlite, not when sqlite3 guesses
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_WAIT_S * 1000}")
    cursor.execute("PRAGMA page_size = 1024")  # of a new file: a small workspace has many tables of a few rows
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a committed trigger survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("dynkit_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


@dataclass(frozen=True)
class PostgreSQL:
    """A database of a server.

    Parameters
    ----------
    url : str
        ``postgresql://user@host/database``, without a password: libpq finds it in ``~/.pgpass`` or ``$PGPASSWORD``, so
        that it is in no notebook and no workspace.

    Raises
    ------
    InvalidInput, StorageError
    """

    url: str

    def __post_init__(self) -> None:
        try:
            parsed = sa.make_url(self.url)
        except (sa.exc.ArgumentError, ValueError):
            parsed = None
        if parsed is None or parsed.get_backend_name() != "postgresql" or not parsed.database:
            veiled = re.sub(r":[^:/]*@", ":***@", self.url)
            raise InvalidInput(f"catalog={veiled!r} must be like 'postgresql://user@host/database'")
        if parsed.password or "password" in parsed.query:
            raise InvalidInput(
                "the catalog's URL has a password, which would stay in the notebook and the workspace; write it into "
                f"~/.pgpass or $PGPASSWORD, and give catalog={_without_password(parsed)!r}"
            )
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise StorageError("a catalog in PostgreSQL needs psycopg; type: pip install 'dynkit[postgres]'") from None

    def __str__(self) -> str:
        return self.url

    def engine(self) -> sa.Engine:
        """See `Database`."""
        url = sa.make_url(self.url).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url, isolation_level="READ COMMITTED", poolclass=sa.NullPool, use_native_hstore=False)
        sa.event.listen(engine, "connect", _configure_postgresql)
        sa.event.listen(engine, "begin", _begin_postgresql)
        return engine

    def size_bytes(self, connection: sa.Connection, tables: Iterable[str]) -> int:
        """See `Database`."""
        size = sa.func.pg_total_relation_size
        return sum(int(connection.scalar(sa.select(size(name))) or 0) for name in tables)

    def scrub(self, engine: sa.Engine, tables: Iterable[str]) -> None:
        """See `Database`; what the server's log and backups keep is in the hands of who runs it."""
        refused: list[str] = []
        with self._autocommit(engine) as connection:
            connection.add_notice_handler(lambda notice: refused.append(str(notice.message_primary)))
            _await_readers(connection, str(self))
            connection.execute("VACUUM (FULL, ANALYZE) " + ", ".join(f'"{name}"' for name in tables))
        if refused:
            raise StorageError(f"the catalog {self} was not written anew: {refused[0]}")

    @contextmanager
    def alone(self, engine: sa.Engine, folder: Path) -> Iterator[None]:
        """See `Database`."""
        with self._autocommit(engine) as connection:
            connection.execute("SET lock_timeout = 0")
            connection.execute("SELECT pg_advisory_lock(%s)", (_UPKEEP,))
            yield  # the lock ends with the connection

    @contextmanager
    def _autocommit(self, engine: sa.Engine) -> Iterator[Any]:
        """Open a connection of psycopg whose statements are transactions of their own."""
        import psycopg

        try:
            with closing(engine.raw_connection()) as raw:
                connection: Any = raw.driver_connection
                connection.autocommit = True
                yield connection
        except (psycopg.Error, sa.exc.OperationalError) as error:
            raise StorageError(f"the catalog {self} cannot be used: {getattr(error, 'orig', error)}") from error


def _without_password(url: sa.URL) -> str:
    query = {name: value for name, value in url.query.items() if name != "password"}
    return sa.URL.create(url.drivername, url.username, None, url.host, url.port, url.database, query).render_as_string()


def _configure_postgresql(connection: Any, record: Any) -> None:
    settings = {
        "lock_timeout": _WAIT_S * 1000,
        "tcp_keepalives_idle": _HEARTBEAT_S,  # so the lock of a machine that is gone is let go
        "tcp_keepalives_interval": _HEARTBEAT_S // 3,
        "tcp_keepalives_count": 3,
    }
    connection.execute("; ".join(f"SET {name} = {value}" for name, value in settings.items()))
    connection.commit()


def _begin_postgresql(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("dynkit_write", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS})")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


_OLDER = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
AND (age(backend_xmin) > age(%(now)s::xid) OR age(backend_xid) > age(%(now)s::xid))
"""


def _await_readers(connection: Any, where: str) -> None:
    """Wait until no transaction goes on that may still see what was deleted: its rows would be kept."""
    (now,) = connection.execute("SELECT pg_current_xact_id()::xid::text").fetchone()
    end_s = time.monotonic() + _WAIT_S
    while connection.execute(_OLDER, {"now": now}).fetchone()[0]:
        if time.monotonic() > end_s:
            raise StorageError(f"somebody is reading the catalog {where}, so it keeps deleted rows")
        time.sleep(0.05)


_INSERT: dict[str, Callable[[sa.Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
Rows = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def batched(values: list[Any]) -> Iterable[list[Any]]:
    """Cut a list into parts that one query may list."""
    return (values[start : start + FEW] for start in range(0, len(values), FEW))


def insert_missing(connection: sa.Connection, table: sa.Table, rows: Rows) -> int:
    """Insert rows, but those whose key is there; return how many."""
    if not rows:
        return 0
    statement = _INSERT[connection.dialect.name](table).on_conflict_do_nothing()
    return len(connection.execute(statement.returning(*table.primary_key), rows).all())


def upsert(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    """Insert a row, in place of the one that has its key."""
    statement = _INSERT[connection.dialect.name](table)
    values = {name: statement.excluded[name] for name in row if name not in table.primary_key.columns}
    connection.execute(statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=values), row)
