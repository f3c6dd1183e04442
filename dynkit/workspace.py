"""A Workspace opens everything below it by name: datasets, runs, models, lineage."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dynkit import catalog as tables
from dynkit.catalog import Catalog
from dynkit.data import Dataset, create, ingest
from dynkit.lineage import Lineage
from dynkit.lineage.remotes import check_clone
from dynkit.models import ModelStore
from dynkit.pipeline import Pipeline, Run, Runs
from dynkit.pipeline.recipe import Recipe
from dynkit.pipeline.run import find

__all__ = ["Workspace"]


class Workspace:
    """A directory that holds datasets, models and runs.

    Parameters
    ----------
    path : path or None
        Made when missing; None means ``$DYNKIT_WORKSPACE``, else ``./dynkit-workspace``. It must be on a local disk.
    storage : str or None
        URL of an S3-protocol bucket, such as ``s3://bucket/prefix``, to keep samples and models in (``pip install
        'dynkit[s3]'``; keys, region and endpoint from the usual ``AWS_*`` variables); the catalog and a read cache
        stay in the directory. Given once: the workspace remembers it.
    catalog : str or None
        URL of a PostgreSQL database, ``postgresql://user@host/database``, to keep the catalog in (``pip install
        'dynkit[postgres]'``); the password is libpq's business: ``~/.pgpass`` or ``$PGPASSWORD``. With `storage` too,
        directories on several machines are one workspace. None: a file in the directory. Given once, as well.

    Raises
    ------
    StorageError
        When it cannot be made, written or read by this version.
    Conflict
        When it keeps its samples or catalog elsewhere, or the database belongs to another directory.

    Examples
    --------
    >>> import tempfile, dynkit as dk
    >>> ws = dk.Workspace(tempfile.mkdtemp())
    >>> ws.datasets(), ws.runs()
    ([], [])
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, storage: str | None = None, catalog: str | None = None
    ) -> None:
        self.catalog = Catalog(path, storage, catalog)
        self.models = ModelStore(self.catalog)
        self.lineage = Lineage(self.catalog, self.models, partial(Recipe, self.catalog))

    @classmethod
    def clone(cls, source: str | os.PathLike[str], path: str | os.PathLike[str], **where: str | None) -> "Workspace":
        """Make a workspace with all models of another, which becomes its remote ``"origin"``; no datasets, no runs.

        Parameters
        ----------
        source : path or str
            Directory of a workspace, or the URL of one in a bucket, such as ``"s3://bucket/prefix"``.
        path : path
            Of the new one.
        **where : str or None
            Its `storage` and `catalog`, as of `Workspace`.
        """
        check_clone(source, path)
        new = cls(path, **where)
        new.lineage.add_remote("origin", source)
        new.lineage.pull("origin")
        return new

    @property
    def path(self) -> Path:
        """The directory."""
        return self.catalog.root

    def __repr__(self) -> str:
        return f"Workspace({str(self.path)!r}, datasets={self.datasets()}, runs={len(self.runs())})"

    def create_dataset(
        self,
        name: str,
        fields: Mapping[str, Any],
        *,
        label: Any = None,
        columns: Mapping[str, str] | None = None,
        compression: str = "auto",
    ) -> Dataset:
        """Make a dataset without samples; `Dataset.append` adds them. One that is there and equal is opened.

        Parameters
        ----------
        name : str
        fields : mapping of name to kind
            ``("uint8", (3, 32, 32))`` is an array per sample, ``("int32", (None,))`` a sequence of any length,
            ``"bytes"`` anything, ``("image", (3, 224, 224))`` an encoded image that is resized when read, and a NumPy
            structured dtype a record whose names become fields of a batch.
        label : str, tuple or None
            ``"int64"``, ``"float32"``, ``"str"`` (classes), or a dtype and shape: ``("float32", (5,))``.
        columns : mapping of name to type
            Scalar columns that policies see: ``"str"``, ``"bool"``, ``"int64"``, ``"float32"``, ``"float64"``.
        compression : str
            ``"none"``: read at memory speed. ``"zstd"``, ``"lz4"``, ``"gzip"``: smaller. ``"auto"``: none on a local
            disk, zstd on remote storage. Values of varying length stay as they are.

        Raises
        ------
        InvalidInput, Conflict
        """
        return create(self.catalog, name, fields, label=label, columns=columns, compression=compression)

    def ingest(
        self,
        name: str,
        data: Any,
        *,
        timestamp: Any = None,
        label: Any = None,
        features: Sequence[str] | None = None,
        compression: str = "auto",
        progress: bool | None = None,
    ) -> Dataset:
        """Make a dataset of its first samples; a cell that does it again with the same samples gets it back.

        What is larger than memory is read in pieces; all of it becomes one version, or nothing.

        Parameters
        ----------
        name : str
        data : frame, mapping, path, dataset or iterable
            A Polars (lazy) frame or anything with the Arrow stream interface (pandas, pyarrow); a mapping of name to
            array (NumPy, torch, Zarr); a file (Parquet, CSV, Arrow, NDJSON, npz), a folder of them, of images or a
            Zarr group; a torch or Hugging Face dataset; an iterator of frames or mappings. What is more than one
            number or text per sample becomes a field of its own: arrays, lists, bytes, images.
        timestamp : str, array or None
            Column of datetimes (naive ones are UTC), or the times themselves; None means the column ``timestamp``
            (of images in a folder, when the file was last changed). Rows may come in any order.
        label : str, list of str, array or None
            Column of numbers, booleans or text; several columns of numbers; or the labels themselves. Null (and NaN)
            is a label that is not known yet.
        features : list of str or None
            Numeric and boolean columns that become the float32 field ``x`` of shape (F,). None means all others when
            there are no fields otherwise. The columns left over stay in the table, where policies see them.
        compression : str
            As in `create_dataset`.
        progress : bool or None
            Show a bar with the time left; None: in a terminal.

        Raises
        ------
        InvalidInput
            When something cannot be stored as it is; nothing is dropped silently.
        Conflict
            When the name is taken by other samples.
        """
        return ingest(
            self.catalog,
            name,
            data,
            timestamp=timestamp,
            label=label,
            features=features,
            compression=compression,
            progress=progress,
        )

    def dataset(self, name: str) -> Dataset:
        """Open a dataset.

        Raises
        ------
        NotFound
        """
        return Dataset(self.catalog, name)

    def datasets(self) -> list[str]:
        """Names of the datasets, sorted."""
        return Dataset.names(self.catalog)

    def run(self, id: str) -> Run:
        """Find a run by its id or a beginning of it, whether it is going or not.

        Raises
        ------
        NotFound
        """
        return Run(self.catalog, id)

    def runs(self, name: str | None = None) -> Runs:
        """Return the runs, newest first; only those of one pipeline when `name` is given."""
        runs = tables.runs
        query = sa.select(runs.c.id).order_by(runs.c.created_ns.desc())
        if name is not None:
            query = query.where(runs.c.name == name)
        with self.catalog.read() as connection:
            return Runs(Run(self.catalog, id) for id in connection.scalars(query).all())

    def find(self, pipeline: Pipeline) -> Run | None:
        """Return the newest run of an equal pipeline on the same samples that is going, done or can go on, if any."""
        return find(self.catalog, pipeline.digest())
