"""A Dataset by name: append, look at its table, read samples, go back to an earlier version.

Committing a version is creating ``versions/<n>.json`` exclusively. Until then a segment is invisible, so a crash
leaves only files that nothing refers to; of two writers that reach the same number one loses and commits the same
segment on the new head instead. Nothing is ever changed in place.
"""

import dataclasses
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import sqlalchemy as sa

from dynkit.catalog import Catalog, datasets
from dynkit.data.ingest import Prepared, prepare
from dynkit.data.segments import write_fields
from dynkit.data.version import Version
from dynkit.disk import flush, flush_tree
from dynkit.errors import Conflict, InvalidInput, NotFound, StorageError, did_you_mean
from dynkit.time import Instant, IntArray, to_ns

if TYPE_CHECKING:
    import torch

__all__ = ["Dataset", "check_name"]

_FORMAT = 1
_EMPTY: dict[str, Any] = {"segments": [], "next_key": 0}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, what: str) -> str:
    """Return `name` if it can be a folder name everywhere."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{what} name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name


class Dataset:
    """A growing, versioned collection of samples; opened by `Workspace.dataset` or made by `Workspace.ingest`.

    Parameters
    ----------
    catalog : Catalog
    name : str
    version : int or None
        None follows the newest version; a number stays there and is read-only.

    Examples
    --------
    >>> import polars as pl, dynkit as dk, tempfile, datetime as dt
    >>> ws = dk.Workspace(tempfile.mkdtemp())
    >>> day = pl.datetime_range(dt.datetime(2013, 1, 1), dt.datetime(2013, 1, 3), "1d", eager=True)
    >>> ds = ws.ingest("tiny", pl.DataFrame({"t": day, "f": [1, 2, 3], "y": [0, 1, 0]}), timestamp="t", label="y")
    >>> len(ds), ds.version, ds.read([2, 0])["x"].tolist()
    (3, 1, [[3.0], [1.0]])
    """

    def __init__(self, catalog: Catalog, name: str, version: int | None = None) -> None:
        self.catalog = catalog
        self.name = check_name(name, "dataset")
        self._folder = catalog.root / "datasets" / name
        self._pinned = version
        self._opened: Version | None = None
        self.open()

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.catalog, self.name, self._pinned)

    def __dynkit_digest__(self) -> tuple[str, int]:
        return self.name, self.version

    def __repr__(self) -> str:
        opened = self.open()
        return (
            f"Dataset({self.name!r}, version={opened.number}, samples={opened.rows}, fields={opened.schema['fields']})"
        )

    def __len__(self) -> int:
        return self.open().rows

    @classmethod
    def names(cls, catalog: Catalog) -> list[str]:
        """Names of all datasets of a workspace, sorted."""
        with catalog.read() as connection:
            names = connection.scalars(sa.select(datasets.c.name).order_by(datasets.c.name)).all()
        return [name for name in names if _head(catalog.root / "datasets" / name)]

    @classmethod
    def create(
        cls,
        catalog: Catalog,
        name: str,
        data: Any,
        *,
        timestamp: str,
        label: str | None,
        features: Sequence[str] | None,
    ) -> "Dataset":
        """Make a dataset of its first samples; with the very same samples again, open it instead."""
        folder = catalog.root / "datasets" / check_name(name, "dataset")
        prepared = prepare(data, timestamp, label, features)
        content = prepared.content_hash()
        if not _head(folder):
            with catalog.write() as connection:
                row = {"name": name, "created_ns": time.time_ns()}
                connection.execute(sa.insert(datasets).prefix_with("OR IGNORE"), row)
            _commit(folder, prepared, content, create=True)
        dataset = cls(catalog, name)
        if dataset.at(1).open().manifest["segments"][0]["content"] != content:
            raise Conflict(
                f"dataset {name!r} exists with other samples ({len(dataset)} in version {dataset.version}); "
                f"add to it with ws.dataset({name!r}).append(...), or choose another name"
            )
        return dataset

    @property
    def version(self) -> int:
        """Number of the version that reads see."""
        return _head(self._folder) if self._pinned is None else self._pinned

    @property
    def schema(self) -> dict[str, Any]:
        """Source columns and fields: timestamp, label, features, columns, fields."""
        return self.open().schema

    def at(self, version: int) -> "Dataset":
        """Return the dataset as it was in `version`, read-only.

        Raises
        ------
        NotFound
        """
        return Dataset(self.catalog, self.name, version)

    def append(self, data: Any) -> int:
        """Add samples and commit a new version; columns are used as in the first ingest.

        Parameters
        ----------
        data : frame or mapping of arrays
            The same columns as before, in any order; rows in any order of time.

        Returns
        -------
        int
            The new version.

        Raises
        ------
        InvalidInput
            When the columns, dtypes or shapes differ from the dataset's.
        Conflict
            When this is an earlier version.
        """
        if self._pinned is not None:
            raise Conflict(f"version {self._pinned} of {self.name!r} is fixed; append to ws.dataset({self.name!r})")
        schema = self.schema
        label = schema["label"]["name"] if schema["label"] else None
        prepared = prepare(data, schema["timestamp"], label, schema["features"] or None)
        _check_schema(self.name, schema, prepared)
        order = ["timestamp", *(["label"] if label is not None else []), *schema["columns"]]
        prepared = dataclasses.replace(prepared, index=prepared.index.select(order), schema=schema)
        return _commit(self._folder, prepared, prepared.content_hash(), create=False)

    def table(self, start: Instant | None = None, end: Instant | None = None) -> pl.DataFrame:
        """Return the samples of ``[start, end)`` in replay order: key, timestamp, label and scalar columns.

        Parameters
        ----------
        start, end : datetime, date or str, optional
            Naive ones mean UTC.
        """
        table = self.open().table
        low = 0 if start is None else _position(table, to_ns(start))
        high = table.height if end is None else _position(table, to_ns(end))
        return table.slice(low, max(high - low, 0))

    def read(self, keys: Any) -> "dict[str, torch.Tensor]":
        """Read fields and labels of samples by key, in the order given.

        Parameters
        ----------
        keys : sequence, array, Series or tensor of int (N,)

        Returns
        -------
        dict
            Each field as a tensor (N, ...), and ``label`` (N,).

        Raises
        ------
        NotFound
            When a key is not in this version.
        """
        return self.open().gather(as_keys(keys))

    def open(self) -> Version:
        """Open the version that reads see now, to read it many times."""
        number = self.version
        if self._opened is None or self._opened.number != number:
            self._opened = _load(self._folder, self.name, number)
        return self._opened


def as_keys(keys: Any) -> IntArray:
    """Convert keys of any integer container to an int64 array (N,)."""
    if isinstance(keys, pl.DataFrame):
        keys = keys["key"]
    array = np.asarray(keys.to_numpy() if isinstance(keys, pl.Series) else keys)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidInput(f"keys must be one-dimensional integers, not {array.dtype} of shape {array.shape}")
    return cast(IntArray, array.astype(np.int64, copy=False))


def _position(table: pl.DataFrame, ns: int) -> int:
    return int(table["timestamp"].to_physical().search_sorted(ns, side="left"))


def _head(folder: Path) -> int:
    """Newest committed version, 0 when there is none."""
    try:
        return max((int(path.stem) for path in (folder / "versions").iterdir() if path.suffix == ".json"), default=0)
    except FileNotFoundError:
        return 0


def _load(folder: Path, name: str, number: int) -> Version:
    path = _manifest_path(folder, number)
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        head = _head(folder)
        if not head:
            others = sorted(entry.name for entry in folder.parent.glob("*") if _head(entry))
            raise NotFound(f"no dataset {name!r} in {folder.parent.parent}{did_you_mean(name, others)}") from None
        raise NotFound(f"dataset {name!r} has no version {number}; it has 1 to {head}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"manifest {path} cannot be read: {error}") from error
    if manifest.get("format") != _FORMAT:
        raise StorageError(f"manifest {path} has format {manifest.get('format')}; this dynkit reads {_FORMAT}")
    return Version(folder, manifest)


def _check_schema(name: str, schema: dict[str, Any], prepared: Prepared) -> None:
    for part in ("columns", "fields"):
        expected, found = schema[part], prepared.schema[part]
        for column in [*expected, *found]:
            if expected.get(column) != found.get(column):
                raise InvalidInput(
                    f"{part[:-1]} {column!r}: dataset {name!r} has {expected.get(column, 'no such one')}, "
                    f"the new samples have {found.get(column, 'no such one')}"
                )
    if schema["label"] != prepared.schema["label"]:
        raise InvalidInput(f"label: dataset {name!r} has {schema['label']}, the new samples {prepared.schema['label']}")


def _commit(folder: Path, prepared: Prepared, content: str, *, create: bool) -> int:
    """Write a segment and publish it as the next version; return its number."""
    for sub in ("versions", "segments"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    segment = secrets.token_hex(8)
    try:
        write_fields(folder / "segments" / f"{segment}.zarr", prepared.fields)
        while True:
            parent = _head(folder)
            if create and parent:
                return parent  # somebody else was first; the caller compares contents
            manifest = json.loads(_manifest_path(folder, parent).read_text()) if parent else _EMPTY
            first_key, rows = manifest["next_key"], prepared.index.height
            keys = pl.Series("key", np.arange(first_key, first_key + rows, dtype=np.int64))
            index = folder / "segments" / f"{segment}.arrow"
            prepared.index.select(keys, pl.all()).write_ipc(index, compression="uncompressed")
            entry = {"id": segment, "rows": rows, "first_key": first_key, "content": content}
            flush_tree(folder / "segments" / f"{segment}.zarr")
            flush(index, index.parent)
            if _publish(
                _manifest_path(folder, parent + 1),
                {
                    "format": _FORMAT,
                    "version": parent + 1,
                    "parent": parent or None,
                    "created_ns": time.time_ns(),
                    "schema": prepared.schema,
                    "segments": [*manifest["segments"], entry],
                    "tombstones": [],
                    "next_key": first_key + rows,
                },
            ):
                return parent + 1
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror or error}; nothing was committed") from error


def _manifest_path(folder: Path, number: int) -> Path:
    return folder / "versions" / f"{number:08d}.json"


def _publish(path: Path, manifest: dict[str, Any]) -> bool:
    """Create the manifest if no other writer did; a reader sees all of it or nothing."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.write_text(json.dumps(manifest, indent=1))
    flush(draft)
    try:
        os.link(draft, path)  # fails when the path exists, in one step
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    flush(path.parent)
    return True
