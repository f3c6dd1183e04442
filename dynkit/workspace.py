"""A Workspace opens everything below it by name: datasets, runs, models, lineage."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dynkit import catalog as tables
from dynkit.catalog import Catalog
from dynkit.data import Dataset
from dynkit.lineage import Lineage
from dynkit.models import ModelStore
from dynkit.pipeline import Pipeline, Run, Runs

__all__ = ["Workspace"]


class Workspace:
    """A directory that holds datasets, models and runs.

    Parameters
    ----------
    path : path or None
        Made when missing; None means ``$DYNKIT_WORKSPACE``, else ``./dynkit-workspace``. It must be on a local disk.

    Raises
    ------
    StorageError
        When it cannot be made, written or read by this version.

    Examples
    --------
    >>> import tempfile, dynkit as dk
    >>> ws = dk.Workspace(tempfile.mkdtemp())
    >>> ws.datasets(), ws.runs()
    ([], [])
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.catalog = Catalog(path)
        self.models = ModelStore(self.catalog)
        self.lineage = Lineage(self.catalog)

    @property
    def path(self) -> Path:
        """The directory."""
        return self.catalog.root

    def __repr__(self) -> str:
        return f"Workspace({str(self.path)!r}, datasets={self.datasets()}, runs={len(self.runs())})"

    def ingest(
        self,
        name: str,
        data: Any,
        *,
        timestamp: str,
        label: str | None = None,
        features: Sequence[str] | None = None,
    ) -> Dataset:
        """Make a dataset of its first samples; a cell that does it again with the same samples gets it back.

        Parameters
        ----------
        name : str
        data : frame or mapping of name to array
            Polars, or anything with the Arrow stream interface; arrays of two and more dimensions become fields of
            their own, such as ``x`` of shape (N, 3, 32, 32).
        timestamp : str
            Column of datetimes (naive ones are UTC). Rows may come in any order.
        label : str or None
            Column of integers, booleans or floats.
        features : list of str or None
            Numeric and boolean columns that become the float32 field ``x`` of shape (F,). None means all others. The
            columns left over stay in the table, where policies see them.

        Raises
        ------
        InvalidInput
            When something cannot be stored as it is; nothing is dropped silently.
        Conflict
            When the name is taken by other samples.
        """
        return Dataset.create(self.catalog, name, data, timestamp=timestamp, label=label, features=features)

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
        runs = tables.runs
        query = sa.select(runs.c.id).where(runs.c.digest == pipeline.digest()).order_by(runs.c.created_ns.desc())
        with self.catalog.read() as connection:
            ids = connection.scalars(query).all()
        found = (Run(self.catalog, id) for id in ids)
        return next((run for run in found if run.status in ("running", "paused", "interrupted", "finished")), None)
