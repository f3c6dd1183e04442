"""A Dataset by name: append, delete, label, read, go back to an earlier version.

Committing a version is creating ``versions/<n>.json`` exclusively. Until then new files are invisible, so a crash
leaves only files that nothing refers to. Nothing is ever changed in place.
"""

import datetime as dt
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import polars as pl
import sqlalchemy as sa

from dynkit.catalog import Catalog, datasets
from dynkit.data import live, manifest, writing
from dynkit.data.batches import Batches
from dynkit.data.hashing import hash_rows
from dynkit.data.iterable import IterableSamples
from dynkit.data.labels import fits, label_series
from dynkit.data.prepare import prepare_all, roles_of
from dynkit.data.sources import blocks, progress_bar
from dynkit.data.splits import in_split, select_rows, split_rule
from dynkit.data.store import open_store
from dynkit.data.version import Version
from dynkit.errors import Conflict, InvalidInput, NotFound, did_you_mean
from dynkit.time import Instant, IntArray, to_datetime, to_ns

if TYPE_CHECKING:
    import torch

__all__ = ["Dataset", "Diff", "VersionInfo", "as_keys", "check_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Keys = np.ndarray[tuple[int], np.dtype[np.uint64]]


class VersionInfo(NamedTuple):
    """One version in the list of `Dataset.versions`; `Dataset.at` takes it."""

    number: int
    created: dt.datetime
    operation: str
    samples: int


class Versions(tuple[VersionInfo, ...]):
    """Versions, oldest first; a table in a notebook."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(pl.DataFrame(list(self), schema=VersionInfo._fields, orient="row"))

    def _repr_html_(self) -> str:
        return pl.DataFrame(list(self), schema=VersionInfo._fields, orient="row")._repr_html_()


class Diff(NamedTuple):
    """What a later version has that an earlier has not: keys, each (N,) uint64, sorted."""

    added: Keys
    removed: Keys
    relabeled: Keys


def check_name(name: str, what: str) -> str:
    """Return `name` if it can be a folder name everywhere."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{what} name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name


class Dataset:
    """A growing, versioned collection of samples; opened by `Workspace.dataset`, made by `ingest` or `create_dataset`.

    Parameters
    ----------
    catalog : Catalog
    name : str
    version : int or None
        None follows the newest version; a number stays there and is read-only.

    Examples
    --------
    >>> import numpy as np, dynkit as dk, tempfile
    >>> ws = dk.Workspace(tempfile.mkdtemp())
    >>> ds = ws.create_dataset("tiny", fields={"x": ("uint8", (2,))}, label="int64")
    >>> keys = ds.append(x=np.array([[1, 2], [3, 4]], np.uint8), timestamp=np.array([10, 20]), label=np.array([0, 1]))
    >>> keys.tolist(), len(ds), ds.read(keys[::-1])["x"].tolist()
    ([0, 1], 2, [[3, 4], [1, 2]])
    """

    def __init__(self, catalog: Catalog, name: str, version: int | None = None) -> None:
        self.catalog = catalog
        self.name = check_name(name, "dataset")
        self._store = open_store(catalog.root, catalog.storage, name)
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
        return [name for name in names if manifest.head(open_store(catalog.root, catalog.storage, name))]

    # ---- changing it ----

    def append(self, data: Any = None, /, *, progress: bool | None = None, **columns: Any) -> Keys:
        """Add samples and commit a new version.

        Parameters
        ----------
        data : frame, mapping, path, dataset or iterator of blocks
            As in `Workspace.ingest`; the same columns as before, rows in any order of time.
        progress : bool or None
        **columns
            Instead of `data`: arrays by name. ``timestamp`` are datetimes or int64 nanoseconds since 1970 UTC;
            ``label`` may be left out and come later.

        Returns
        -------
        (N,) uint64
            The new keys, in the order of the samples as given.

        Raises
        ------
        InvalidInput
            When the columns, dtypes or shapes differ from the dataset's.
        Conflict
            When this is an earlier version.
        """
        self._writable("append")
        if (data is None) == (not columns):
            raise InvalidInput("give either one block of data or columns by name: append(x=..., timestamp=...)")
        source, total = blocks(columns if data is None else data)
        while True:
            schema = self.schema
            prepared = prepare_all(source, roles_of(schema), schema)
            with progress_bar(f"append to {self.name}", total, progress) as done:
                try:
                    _, keys = writing.append(self._store, prepared, codec=schema["compression"], done=done)
                    return keys().astype(np.uint64)
                except writing.ClassesChanged:
                    if isinstance(data, Iterator):
                        raise
            source, total = blocks(columns if data is None else data)

    def delete(self, which: Any) -> int:
        """Commit a version without these samples; earlier versions keep them until `compact` erases them.

        Parameters
        ----------
        which : keys or pl.Expr
            A condition on the table's columns, or keys.

        Returns
        -------
        int
            The new version.

        Raises
        ------
        NotFound
            When a key is not there (any more).
        """
        self._writable("delete")
        if isinstance(which, pl.Expr):

            def find(head: Version) -> IntArray:
                return as_keys(head.table.filter(select_rows(head.table, which)))

            return writing.delete(self._store, find)
        keys = as_keys(which)
        return writing.delete(self._store, lambda head: keys)

    def label(self, keys: Any, labels: Any) -> int:
        """Commit a version in which these samples have these labels, whether they had one or not.

        Parameters
        ----------
        keys : (N,) int
        labels : (N, ...) array or sequence
            Of the dataset's label type.

        Returns
        -------
        int
            The new version.
        """
        self._writable("label")
        known = self.schema["label"]
        if known is None:
            raise InvalidInput(f"dataset {self.name!r} has no label; make it with label=...")
        keys = as_keys(keys)
        if not hasattr(labels, "__len__"):
            raise InvalidInput(f"labels={labels!r} is a single value; give one for each key")
        values = pl.Series("label", labels.detach().cpu().numpy() if hasattr(labels, "detach") else labels)
        if len(values) != len(keys):
            raise InvalidInput(f"{len(keys)} keys and {len(values)} labels")
        if not len(values):
            return self.version
        series, given = label_series("label", values.fill_nan(None) if values.dtype.is_float() else values)
        if series.null_count():
            raise InvalidInput(f"{series.null_count()} of the labels are null; give only those that are known")
        if not fits(given, known):
            raise InvalidInput(
                f"labels are {series.dtype}; dataset {self.name!r} has {known['dtype']} {known['shape']}"
            )
        return writing.relabel(self._store, keys, series)

    def compact(self, *, erase: bool = False) -> int:
        """Rewrite small segments and those with deleted samples; return the new version.

        Parameters
        ----------
        erase : bool
            Also delete all earlier versions, so that the bytes of deleted samples and replaced labels are nowhere
            under the dataset any more.
        """
        self._writable("compact")
        return writing.compact(self._store, self.schema["compression"], erase=erase)

    def gc(self) -> list[str]:
        """Delete files that no version refers to, which an interrupted writer left; return their paths."""
        return writing.collect_garbage(self._store)

    def verify(self) -> None:
        """Compare every file of every version with its hash.

        Raises
        ------
        StorageError
            Names each file that is missing or damaged.
        """
        writing.verify(self._store)

    def split(
        self,
        name: str,
        *,
        fraction: float | None = None,
        where: pl.Expr | None = None,
        seed: int = 0,
        holdout: bool = False,
    ) -> int:
        """Declare a named part, also of samples to come; commit it as a version.

        Parameters
        ----------
        name : str
        fraction : float or None
            This share, drawn by a hash of the key.
        where : pl.Expr or None
            A condition on the table's columns instead.
        seed : int
            Of the hash.
        holdout : bool
            No training of a pipeline gets these samples; evaluate on them with ``Evaluation(split=name)``.

        Returns
        -------
        int
            The version from which on it is known.
        """
        self._writable("split")
        check_name(name, "split")
        rule = split_rule(fraction, where, seed, holdout=holdout)
        if where is not None:
            select_rows(self.open().table.head(1), where)
        return writing.set_split(self._store, name, rule) or self.version

    def _writable(self, what: str) -> None:
        if self._pinned is not None:
            raise Conflict(f"version {self._pinned} of {self.name!r} is fixed; {what} with ws.dataset({self.name!r})")

    # ---- versions ----

    @property
    def version(self) -> int:
        """Number of the version that reads see."""
        return manifest.head(self._store) if self._pinned is None else self._pinned

    @property
    def schema(self) -> dict[str, Any]:
        """Source columns and fields: timestamp, label, features, columns, fields, compression."""
        return self.open().schema

    @property
    def splits(self) -> dict[str, Any]:
        """Rules of the named splits."""
        return dict(self.open().manifest["splits"])

    def versions(self) -> Versions:
        """Return all versions, oldest first: number, created, operation, samples."""
        found = []
        for number in manifest.numbers(self._store):
            with suppress(NotFound):  # erased meanwhile
                version = Version(self._store, manifest.load(self._store, number))
                created = to_datetime(version.manifest["created_ns"])
                found.append(VersionInfo(number, created, version.manifest["operation"], version.rows))
        return Versions(found)

    def at(self, version: int | VersionInfo | Instant) -> "Dataset":
        """Return the dataset as it was, read-only.

        Parameters
        ----------
        version : int, VersionInfo, datetime, date or str
            A number, or an instant: the newest version that was there then.

        Raises
        ------
        NotFound
        """
        if isinstance(version, VersionInfo):
            return Dataset(self.catalog, self.name, version.number)
        if isinstance(version, int | np.integer):
            return Dataset(self.catalog, self.name, int(version))
        instant_ns = to_ns(version)
        for number in reversed(manifest.numbers(self._store)):
            if manifest.load(self._store, number)["created_ns"] <= instant_ns:
                return Dataset(self.catalog, self.name, number)
        raise NotFound(f"dataset {self.name!r} had no version at {version}")

    def diff(self, before: Any, after: Any) -> Diff:
        """Say which samples were added, removed and relabelled between two versions, each as `at` takes it."""
        old, new = self.at(before).open(), self.at(after).open()
        old_keys, new_keys = np.sort(old.keys()), np.sort(new.keys())
        both = np.intersect1d(old_keys, new_keys, assume_unique=True)
        relabeled = both[:0]
        if new.label is not None:
            x, y = (version.gather(both.astype(np.int64), ["label"])["label"].numpy() for version in (old, new))
            equal = (x == y) | (x != x) & (y != y)
            relabeled = both[~equal.all(tuple(range(1, equal.ndim)))]
        return Diff(
            np.setdiff1d(new_keys, old_keys, assume_unique=True),
            np.setdiff1d(old_keys, new_keys, assume_unique=True),
            relabeled,
        )

    # ---- reading ----

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

    def keys(self, *, split: str | None = None) -> Keys:
        """Keys in time order (N,) uint64, of all samples or of one split."""
        opened = self.open()
        keys: Keys = opened.keys()
        return keys if split is None else keys[in_split(opened.table, opened.manifest["splits"], split)]

    def read(self, keys: Any, fields: Sequence[str] | None = None) -> "dict[str, torch.Tensor]":
        """Read fields and labels of samples by key, in the order given.

        Parameters
        ----------
        keys : sequence, array, Series or tensor of int (N,)
        fields : sequence of str or None
            Only these, and ``"label"`` only if it is among them.

        Returns
        -------
        dict
            Each field as a tensor (N, ...), and ``label`` (N,).

        Raises
        ------
        NotFound
            When a key is not in this version.
        """
        return self.open().gather(as_keys(keys), fields)

    def batches(self, selection: Any = None, batch_size: int = 512, **options: Any) -> Batches:
        """Iterate over samples in batches; every iteration is one epoch.

        Parameters
        ----------
        selection : keys, frame with columns key and weight, name of a split, or None
            None means all samples.
        batch_size : int
        **options
            See `Batches`: shuffle (here True by default), seed, device, transform, fields, cache_bytes, last.

        Returns
        -------
        Batches
            Yields dicts of tensors.
        """
        keys, weights = self._selected(selection)
        return Batches(self.open(), keys, weights=weights, batch_size=batch_size, **{"shuffle": True, **options})

    def torch(self, selection: Any = None, **options: Any) -> IterableSamples:
        """Return a torch IterableDataset for a loop of your own; see `IterableSamples`."""
        keys, weights = self._selected(selection)
        if weights is not None:
            raise InvalidInput("a torch dataset has no weights; read them next to it, or use batches(selection)")
        return IterableSamples(self.at(self.version), keys, **options)

    def _selected(self, selection: Any) -> "tuple[IntArray, Any]":
        if selection is None:
            return as_keys(self.keys()), None
        if isinstance(selection, str):
            return as_keys(self.keys(split=selection)), None
        weights = None
        if isinstance(selection, pl.DataFrame) and "weight" in selection.columns:
            weights = selection["weight"].cast(pl.Float32).to_numpy(writable=True)
        return as_keys(selection), weights

    def check_given(self, keys: IntArray) -> None:
        """Refuse keys that no sample of this dataset ever had.

        Raises
        ------
        NotFound
        """
        end = int(self.open().manifest["next_key"])
        never = keys[(keys < 0) | (keys >= end)]
        if len(never):
            raise NotFound(f"{len(never)} keys were never given to a sample of {self.name!r}: {never[:3].tolist()}...")

    def hashes(self, keys: Any = None) -> Keys:
        """Hash the content of samples, fields and label: equal samples have equal hashes (N,) uint64."""
        return hash_rows(self.open(), as_keys(self.keys() if keys is None else keys))

    def duplicates(self) -> pl.DataFrame:
        """Return samples with the same content as an earlier one: key, first (the key of the earliest), hash."""
        frame = pl.DataFrame({"key": self.keys(), "hash": self.hashes()})
        frame = frame.with_columns(first=pl.col("key").first().over("hash"))
        return frame.filter(pl.col("key") != pl.col("first")).select("key", "first", "hash")

    # ---- live ----

    def follow(
        self, since: int | None = None, *, timeout_s: float | None = None, stop: Callable[[], bool] | None = None
    ) -> "Iterator[Dataset]":
        """Yield every new version as it is committed, by whatever process; each pinned.

        Parameters
        ----------
        since : int or None
            Number of the last version that is already known; None means the present one.
        timeout_s : float or None
            End after this long without a new one.
        stop : callable, optional
            End when it returns True; asked many times a second while there is no new version.
        """
        for number in live.new_versions(self._store, self.version if since is None else since, timeout_s, stop):
            with suppress(NotFound):  # erased meanwhile; a newer one comes
                yield self.at(number)

    def watch(self, folder: str | Path, pattern: str = "*", **options: Any) -> "Iterator[Dataset]":
        """Append files that appear in a folder, each exactly once, also across restarts; yield each new version.

        Parameters
        ----------
        folder : path
        pattern : str
            Of file names, such as ``"*.parquet"``.
        **options
            ``poll_s``: seconds between two looks; ``settle_s``: a file is read when it did not change for so long;
            ``timeout_s``: end after so long without a new file; None never does.

        Notes
        -----
        Which files were read is committed together with their samples. A file whose content changed is read again:
        its samples are deleted and those of the new content appended, in one version.
        """
        self._writable("watch")
        for number in live.watch(self._store, Path(folder), pattern, **options):
            yield self.at(number)

    def open(self) -> Version:
        """Open the version that reads see now, to read it many times."""
        number = self.version
        if self._opened is None or self._opened.number != number:
            self._opened = self._load(number)
        return self._opened

    def _load(self, number: int) -> Version:
        try:
            return Version(self._store, manifest.load(self._store, number))
        except NotFound:
            known = manifest.numbers(self._store)
            if self._pinned is None and known and known[-1] > number:
                return self._load(known[-1])  # erased meanwhile
        if not known:
            raise NotFound(
                f"no dataset {self.name!r} in {self.catalog.root}{did_you_mean(self.name, Dataset.names(self.catalog))}"
            )
        raise NotFound(f"dataset {self.name!r} has no version {number}; it has {known[0]} to {known[-1]}")


def as_keys(keys: Any) -> IntArray:
    """Convert keys of any integer container to an int64 array (N,)."""
    if isinstance(keys, pl.DataFrame):
        keys = keys["key"]
    array = np.asarray(keys.to_numpy() if isinstance(keys, pl.Series) else keys)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidInput(f"keys must be one-dimensional integers, not {array.dtype} of shape {array.shape}")
    return cast(IntArray, array.view(np.int64) if array.dtype == np.uint64 else array.astype(np.int64, copy=False))


def _position(table: pl.DataFrame, ns: int) -> int:
    return int(table["timestamp"].to_physical().search_sorted(ns, side="left"))
