"""The tables of a workspace's catalog: together they are the format.

They mean the same on SQLite and on PostgreSQL: text is compared byte by byte, a number that is not one is null, and
JSON is kept as Python writes it (PostgreSQL's own refuses NaN, which a loss may be).
"""

import json
from typing import Any

import sqlalchemy as sa

__all__ = [
    "SCHEMA_VERSION",
    "datasets",
    "edges",
    "evaluations",
    "events",
    "info",
    "layouts",
    "metadata",
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


class _JsonText(sa.TypeDecorator[Any]):
    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


class _NoNan(sa.TypeDecorator[float]):
    impl = sa.Float
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: sa.Dialect) -> float | None:
        return None if value is None or value != value else value


class _NoNul(sa.TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else value.replace("\0", "\ufffd")


_String = sa.String().with_variant(sa.String(collation="C"), "postgresql")
_Json = sa.JSON().with_variant(_JsonText(), "postgresql")
_Float = sa.Float().with_variant(_NoNan(), "postgresql")
_Text = sa.Text().with_variant(_NoNul(), "postgresql")
metadata = sa.MetaData()

info = sa.Table(
    "info",
    metadata,
    sa.Column("key", _String, primary_key=True),
    sa.Column("value", _String, nullable=False),
)
datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("name", _String, primary_key=True),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
)
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", _String, primary_key=True),
    sa.Column("name", _String, nullable=False, index=True),
    sa.Column("digest", _String, nullable=False, index=True),  # identity of pipeline and dataset version
    sa.Column("dataset", _String, nullable=False),
    sa.Column("dataset_version", sa.Integer, nullable=False),
    sa.Column("pipeline", _Json, nullable=False),  # describe(pipeline)
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_ns", sa.BigInteger),
    sa.Column("status", _String, nullable=False),
    sa.Column("request", _String),  # "pause", "cancel" or nothing: what somebody asked of the owner
    sa.Column("error", _Text),
    # The process that owns the run; pid alone could have been used again by another process.
    sa.Column("host", _String, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process_started", _Float, nullable=False),
    sa.Column("heartbeat_ns", sa.BigInteger, nullable=False),
    sa.Column("progress", _Json, nullable=False),
    # State of stateful policies at the last committed trigger; read only to continue the run.
    sa.Column("state", sa.LargeBinary),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("run", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("time_ns", sa.BigInteger, nullable=False),
    sa.Column("kind", _String, nullable=False),
    sa.Column("data", _Json, nullable=False),
)
triggers = sa.Table(
    "triggers",
    metadata,
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
    sa.Column("selection", _String, nullable=False),  # BLAKE3 of the stored keys and weights
    sa.Column("training", _String, index=True),  # identity of samples, model, settings, parent and seed
    sa.Column("select_s", _Float, nullable=False),
    sa.Column("train_s", _Float, nullable=False),
    sa.Column("report", _Json, nullable=False),  # what the fit function reported: losses, epochs, ...
)
models = sa.Table(
    "models",
    metadata,
    sa.Column("id", _String, primary_key=True),  # BLAKE3 of the manifest
    sa.Column("layout", sa.ForeignKey("layouts.id"), nullable=False),
    sa.Column("tensors", sa.LargeBinary, nullable=False),  # (pack, slot) of each name of the layout
    sa.Column("raw_bytes", sa.BigInteger, nullable=False),
    sa.Column("metadata", _Json, nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
layouts = sa.Table(
    "layouts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),  # BLAKE3 of the list, 16 bytes
    sa.Column("names", sa.LargeBinary, nullable=False),  # JSON list, zstd
)
packs = sa.Table(
    "packs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("file", _String, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),  # of the pack's index; its frames end there
    sa.Column("size", sa.BigInteger, nullable=False),  # of the index
    sqlite_autoincrement=True,  # a reference to a pack that is gone must never find another one
)
tensors = sa.Table(
    "tensors",
    metadata,
    # The first 8 bytes of the identity. Of two tensors that share them one is not found again, and stored anew.
    sa.Column("key", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("pack", sa.Integer, nullable=False),
    sa.Column("slot", sa.Integer, nullable=False),
)
names = sa.Table(
    "names",
    metadata,
    sa.Column("name", _String, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("changed_ns", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
edges = sa.Table(
    "edges",
    metadata,
    sa.Column("parent", sa.ForeignKey("models.id"), primary_key=True),
    sa.Column("child", sa.ForeignKey("models.id"), primary_key=True),
    sa.Column("kind", _String, primary_key=True),  # "derived" or "version"
    sa.Column("run", _String, primary_key=True),  # which run made it; empty when a person did
)
evaluations = sa.Table(
    "evaluations",
    metadata,
    sa.Column("run", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id"), primary_key=True),
    sa.Column("window_start_ns", sa.BigInteger, primary_key=True),
    sa.Column("window_end_ns", sa.BigInteger, primary_key=True),
    sa.Column("metric", _String, primary_key=True),
    sa.Column("slice", _String, primary_key=True),  # "column=value"; empty for all samples of the window
    sa.Column("metric_index", sa.Integer, nullable=False),  # as declared; the first is the one drawn by default
    sa.Column("window_anchor_ns", sa.BigInteger, nullable=False),
    sa.Column("value", _Float),  # null where the metric is undefined in the window
    sa.Column("samples", sa.BigInteger, nullable=False),  # of the slice in the window
)

# -- lineage: what people add to the graph, and what makes it quick to search --
sa.Index("edges_child", edges.c.child)
notes = sa.Table(
    "notes",
    metadata,
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("kind", _String, primary_key=True),  # "tag" or "note"
    sa.Column("text", _String, primary_key=True),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
)
origins = sa.Table(  # how a model came to be that no trigger of a run made
    "origins",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("how", _String, nullable=False),  # "added", "made", "merged", "rebuilt"
    sa.Column("parents", _Json, nullable=False),  # models, in order
    sa.Column("recipe", _Json, nullable=False),
    sa.Column("code", sa.LargeBinary),  # a function of the parents' states, pickled; read only to build anew
    sa.Column("digest", _String, nullable=False),  # identity of recipe and code
    sa.Column("run", sa.ForeignKey("runs.id")),  # rebuilt: the trigger whose recipe and samples it has
    sa.Column("index", sa.Integer),
    sa.Column("environment", _Json, nullable=False),
    sa.Column("seconds", _Float, nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
)
recipes = sa.Table(  # what a recipe with these parents and samples gave, so that it is not done twice
    "recipes",
    metadata,
    sa.Column("id", _String, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("seconds", _Float, nullable=False),
    sa.Column("details", _Json, nullable=False),  # of a training: samples passed, reports
)
tests = sa.Table(
    "tests",
    metadata,
    sa.Column("name", _String, primary_key=True),
    sa.Column("function", sa.LargeBinary, nullable=False),  # pickled; read only to run it
    sa.Column("digest", _String, nullable=False),
    sa.Column("scope", _Json, nullable=False),  # models, name pattern, tag
    sa.Column("dataset", _String),
    sa.Column("at_least", _Float),
)
results = sa.Table(
    "results",
    metadata,
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("test", _String, primary_key=True),
    sa.Column("digest", _String, primary_key=True),  # of the test's function
    sa.Column("dataset_version", sa.Integer, primary_key=True),  # 0 without a dataset
    sa.Column("passed", sa.Boolean),  # null where it could not be tested
    sa.Column("value", _Float),
    sa.Column("error", _Text),
    sa.Column("seconds", _Float, nullable=False),
)
structures = sa.Table(  # names, types and shapes of tensors; many models share one
    "structures",
    metadata,
    sa.Column("id", _String, primary_key=True),
    sa.Column("slots", _Json, nullable=False),
)
sketches = sa.Table(
    "sketches",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.id", ondelete="CASCADE"), nullable=False, unique=True),
    sa.Column("structure", sa.ForeignKey("structures.id"), nullable=False),
    sa.Column("tensors", sa.Integer, nullable=False),  # different ones
    sa.Column("sketch", sa.LargeBinary, nullable=False),
)
tokens = sa.Table(  # inverted index: 64 bits of a tensor's identity, or of a band of the sketch
    "tokens",
    metadata,
    sa.Column("token", sa.BigInteger, primary_key=True),
    sa.Column("number", sa.ForeignKey("sketches.number", ondelete="CASCADE"), primary_key=True, index=True),
    sqlite_with_rowid=False,
)
remotes = sa.Table(
    "remotes",
    metadata,
    sa.Column("name", _String, primary_key=True),
    sa.Column("url", _String, nullable=False),
)
