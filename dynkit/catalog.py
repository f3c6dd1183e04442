"""Where a workspace lives, and its tables.

The catalog is the one place where processes meet: the notebook's kernel, the worker that trains, a terminal. It is
SQLite in write-ahead mode: readers never wait, one writer at a time waits its turn up to `_BUSY_TIMEOUT_S`. A write
transaction takes its lock at the start (``BEGIN IMMEDIATE``), so that two writers queue instead of failing.

Modules above keep their own queries next to their own logic and run them through `read` and `write`; here are only
the tables, because together they are the format. The write-ahead log needs a local disk.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dynkit.errors import Conflict, NotFound, StorageError

__all__ = [
    "Catalog",
    "datasets",
    "edges",
    "evaluations",
    "events",
    "layouts",
    "models",
    "names",
    "notes",
    "origins",
    "packs",
    "recipes",
    "remotes",
    "results",
    "runs",
    "sketches",
    "structures",
    "tensors",
    "tests",
    "tokens",
    "triggers",
]

SCHEMA_VERSION = 2
_BUSY_TIMEOUT_S = 60.0
_FILE = "catalog.sqlite"
_metadata = sa.MetaData()

_info = sa.Table(
    "info",
    _metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
datasets = sa.Table(
    "datasets",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
)
runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, index=True),
    sa.Column("digest", sa.String, nullable=False, index=True),  # identity of pipeline and dataset version
    sa.Column("dataset", sa.String, nullable=False),
    sa.Column("dataset_version", sa.Integer, nullable=False),
    sa.Column("pipeline", sa.JSON, nullable=False),  # describe(pipeline)
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_ns", sa.BigInteger),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("request", sa.String),  # "pause", "cancel" or nothing: what somebody asked of the owner
    sa.Column("error", sa.Text),
    # The process that owns the run; pid alone could have been used again by another process.
    sa.Column("host", sa.String, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process_started", sa.Float, nullable=False),
    sa.Column("heartbeat_ns", sa.BigInteger, nullable=False),
    sa.Column("progress", sa.JSON, nullable=False),
    # State of stateful policies at the last committed trigger; read only to continue the run.
    sa.Column("state", sa.LargeBinary),
)
events = sa.Table(
    "events",
    _metadata,
    sa.Column("run", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("time_ns", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)
triggers = sa.Table(
    "triggers",
    _metadata,
    sa.Column("run", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("index", sa.Integer, primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False),  # samples in replay order up to and with the last seen
    sa.Column("block_start", sa.BigInteger, nullable=False),  # position at which the policy state was taken
    sa.Column("last_ns", sa.BigInteger, nullable=False),
    sa.Column("model", sa.ForeignKey("models.id"), nullable=False, index=True),
    sa.Column("parent", sa.ForeignKey("models.id")),  # whose weights the training began with
    sa.Column("dataset_version", sa.Integer, nullable=False),  # a live run goes through several
    sa.Column("samples", sa.BigInteger, nullable=False),  # selected
    sa.Column("samples_passed", sa.BigInteger, nullable=False),  # handed to the fit function, all epochs together
    sa.Column("selection", sa.String, nullable=False),  # BLAKE3 of the stored keys and weights
    sa.Column("training", sa.String, index=True),  # identity of samples, model, settings, parent and seed
    sa.Column("select_s", sa.Float, nullable=False),
    sa.Column("train_s", sa.Float, nullable=False),
    sa.Column("report", sa.JSON, nullable=False),  # what the fit function reported: losses, epochs, ...
)
models = sa.Table(
    "models",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),  # BLAKE3 of the manifest
    sa.Column("layout", sa.ForeignKey("layouts.id"), nullable=False),
    sa.Column("tensors", sa.LargeBinary, nullable=False),  # (pack, slot) of each name of the layout
    sa.Column("raw_bytes", sa.BigInteger, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
layouts = sa.Table(
    "layouts",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),  # BLAKE3 of the list, 16 bytes
    sa.Column("names", sa.LargeBinary, nullable=False),  # JSON list, zstd
)
packs = sa.Table(
    "packs",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("file", sa.String, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),  # of the pack's index; its frames end there
    sa.Column("size", sa.BigInteger, nullable=False),  # of the index
    sqlite_autoincrement=True,  # a reference to a pack that is gone must never find another one
)
tensors = sa.Table(
    "tensors",
    _metadata,
    # The first 8 bytes of the identity. Of two tensors that share them one is not found again, and stored anew.
    sa.Column("key", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("pack", sa.Integer, nullable=False),
    sa.Column("slot", sa.Integer, nullable=False),
)
names = sa.Table(
    "names",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("changed_ns", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
edges = sa.Table(
    "edges",
    _metadata,
    sa.Column("parent", sa.ForeignKey("models.id"), primary_key=True),
    sa.Column("child", sa.ForeignKey("models.id"), primary_key=True),
    sa.Column("kind", sa.String, primary_key=True),  # "derived" or "version"
    sa.Column("run", sa.String, primary_key=True),  # which run made it; empty when a person did
)
evaluations = sa.Table(
    "evaluations",
    _metadata,
    sa.Column("run", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id"), primary_key=True),
    sa.Column("window_start_ns", sa.BigInteger, primary_key=True),
    sa.Column("window_end_ns", sa.BigInteger, primary_key=True),
    sa.Column("metric", sa.String, primary_key=True),
    sa.Column("slice", sa.String, primary_key=True),  # "column=value"; empty for all samples of the window
    sa.Column("metric_index", sa.Integer, nullable=False),  # as declared; the first is the one drawn by default
    sa.Column("window_anchor_ns", sa.BigInteger, nullable=False),
    sa.Column("value", sa.Float),  # null where the metric is undefined in the window
    sa.Column("samples", sa.BigInteger, nullable=False),  # of the slice in the window
)

# -- lineage: what people add to the graph, and what makes it quick to search --
sa.Index("edges_child", edges.c.child)
notes = sa.Table(
    "notes",
    _metadata,
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("kind", sa.String, primary_key=True),  # "tag" or "note"
    sa.Column("text", sa.String, primary_key=True),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
)
origins = sa.Table(  # how a model came to be that no trigger of a run made
    "origins",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("how", sa.String, nullable=False),  # "added", "made", "merged", "rebuilt"
    sa.Column("parents", sa.JSON, nullable=False),  # models, in order
    sa.Column("recipe", sa.JSON, nullable=False),
    sa.Column("code", sa.LargeBinary),  # a function of the parents' states, pickled; read only to build anew
    sa.Column("digest", sa.String, nullable=False),  # identity of recipe and code
    sa.Column("run", sa.ForeignKey("runs.id")),  # rebuilt: the trigger whose recipe and samples it has
    sa.Column("index", sa.Integer),
    sa.Column("environment", sa.JSON, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
)
recipes = sa.Table(  # what a recipe with these parents and samples gave, so that it is not done twice
    "recipes",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),  # of a training: samples passed, reports
)
tests = sa.Table(
    "tests",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("function", sa.LargeBinary, nullable=False),  # pickled; read only to run it
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("scope", sa.JSON, nullable=False),  # models, name pattern, tag
    sa.Column("dataset", sa.String),
    sa.Column("at_least", sa.Float),
)
results = sa.Table(
    "results",
    _metadata,
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("test", sa.String, primary_key=True),
    sa.Column("digest", sa.String, primary_key=True),  # of the test's function
    sa.Column("dataset_version", sa.Integer, primary_key=True),  # 0 without a dataset
    sa.Column("passed", sa.Boolean),  # null where it could not be tested
    sa.Column("value", sa.Float),
    sa.Column("error", sa.Text),
    sa.Column("seconds", sa.Float, nullable=False),
)
structures = sa.Table(  # names, types and shapes of tensors; many models share one
    "structures",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("slots", sa.JSON, nullable=False),
)
sketches = sa.Table(
    "sketches",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), nullable=False, unique=True),
    sa.Column("structure", sa.ForeignKey("structures.id"), nullable=False),
    sa.Column("tensors", sa.Integer, nullable=False),  # different ones
    sa.Column("sketch", sa.LargeBinary, nullable=False),
)
tokens = sa.Table(  # inverted index: 64 bits of a tensor's identity, or of a band of the sketch
    "tokens",
    _metadata,
    sa.Column("token", sa.BigInteger, primary_key=True),
    sa.Column("number", sa.ForeignKey("sketches.number", ondelete="CASCADE"), primary_key=True, index=True),
    sqlite_with_rowid=False,
)
remotes = sa.Table(
    "remotes",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("url", sa.String, nullable=False),
)


class Catalog:
    """The tables of one workspace.

    Parameters
    ----------
    root : path or None
        The workspace directory, made when missing. None means ``$DYNKIT_WORKSPACE``, else ``./dynkit-workspace``.

    storage : str or None
        URL such as ``s3://bucket/prefix`` where the datasets are; None means where the workspace was made with, at
        first the directory itself.

    Raises
    ------
    StorageError
        When the directory cannot be made or written, the catalog is damaged or of another schema version.
    Conflict
        When the workspace keeps its datasets elsewhere.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, storage: str | None = None) -> None:
        self.root = self.locate(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the workspace {self.root}: {error.strerror or error}") from error
        self._engine = sa.create_engine(f"sqlite:///{self.root / _FILE}")
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)
        self._prepare(storage)

    @staticmethod
    def locate(root: str | os.PathLike[str] | None = None) -> Path:
        """Return where a workspace is or would be made; makes nothing."""
        return Path(root or os.environ.get("DYNKIT_WORKSPACE") or "dynkit-workspace").expanduser().resolve()

    @classmethod
    def existing(cls, root: str | os.PathLike[str] | None = None) -> "Catalog":
        """Open a workspace that is there.

        Raises
        ------
        NotFound
        """
        path = cls.locate(root)
        if not (path / _FILE).exists():
            raise NotFound(f"no workspace at {path}; dk.Workspace({str(path)!r}) makes one")
        return cls(path)

    def __reduce__(self) -> tuple[type["Catalog"], tuple[str]]:
        return Catalog, (str(self.root),)

    def _prepare(self, storage: str | None) -> None:
        with self.read() as connection:
            found = sa.inspect(connection).has_table("info")
        if not found:
            with self.write() as connection:
                _metadata.create_all(connection)  # checks each table first: two first openers are fine
                connection.execute(
                    sa.insert(_info).prefix_with("OR IGNORE"),
                    [{"key": "schema", "value": str(SCHEMA_VERSION)}, {"key": "storage", "value": storage or ""}],
                )
        with self.read() as connection:
            info = {row.key: row.value for row in connection.execute(sa.select(_info))}
        version = info.get("schema")
        if version != str(SCHEMA_VERSION):
            raise StorageError(
                f"the workspace {self.root} has catalog schema {version}; this dynkit reads {SCHEMA_VERSION}: "
                "install the dynkit release that wrote it, or use another workspace"
            )
        self.storage: str | None = info.get("storage") or None
        if storage is not None and storage != self.storage:
            raise Conflict(
                f"the workspace {self.root} keeps its datasets in {self.storage or 'its own folder'}, not in "
                f"{storage}; use another folder"
            )

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
        except sa.exc.DatabaseError as error:
            if isinstance(error, sa.exc.IntegrityError):
                raise
            raise StorageError(f"the catalog {self.root / _FILE} cannot be used: {error.orig}") from error

    def scrub(self) -> None:
        """Write the file anew, so that the bytes of deleted rows are nowhere in it; waits for readers and writers."""
        raw = self._engine.raw_connection()
        try:
            cursor = raw.cursor()
            cursor.execute("VACUUM")
            busy, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            cursor.close()
        except sqlite3.Error as error:
            raise StorageError(f"the catalog {self.root / _FILE} cannot be written anew: {error}") from error
        finally:
            raw.close()
        if busy:
            raise StorageError(f"somebody is reading the catalog {self.root / _FILE}, so its log keeps deleted rows")

    def copy(self, path: Path) -> None:
        """Write all that is committed into a file of its own, without what was deleted."""
        raw = self._engine.raw_connection()
        try:
            raw.cursor().execute("VACUUM INTO ?", (str(path),)).close()
        except sqlite3.Error as error:
            raise StorageError(f"the catalog {self.root / _FILE} cannot be copied to {path}: {error}") from error
        finally:
            raw.close()

    def close(self) -> None:
        """Close all connections; the catalog opens new ones when used again."""
        self._engine.dispose()


def _configure(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions begin in _begin, not when sqlite3 guesses
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_TIMEOUT_S * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a committed trigger survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("dynkit_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
