"""The samples of a run in the order in which it sees them.

A replay walks one version in the order of (timestamp, key). A live run walks arrivals: keys are given in the order of
the commits, so arrival order is key order, and the stream grows with every version.

A place in the stream is told in two ways: as a row of the present table, and as a position that stays true when the
table grows or loses samples: in a replay the number of samples seen, in a live run the key after the last one seen.
"""

import time
from collections.abc import Callable

import numpy as np
import polars as pl

from dynkit.data import Dataset, Version, held_out
from dynkit.time import IntArray

__all__ = ["Stream"]


class Stream:
    """Samples to walk.

    Parameters
    ----------
    dataset : Dataset
        At the version to begin with.
    live : bool
        Whether more may come.
    """

    def __init__(self, dataset: Dataset, *, live: bool) -> None:
        self._dataset = dataset
        self.live = live
        self._show(dataset)

    def _show(self, dataset: Dataset) -> None:
        self.version: Version = dataset.open()
        self.number = dataset.version
        table = self.version.table
        self.table: pl.DataFrame = table.sort("key") if self.live else table
        self.time_ns: IntArray = self.table["timestamp"].to_physical().to_numpy()
        #: latest time of the samples up to each row; in a replay its own
        self.newest_ns: IntArray = np.maximum.accumulate(self.time_ns)
        self._keys: IntArray = self.table["key"].to_numpy().astype(np.int64)
        ordered = bool((self._keys[1:] > self._keys[:-1]).all())
        self._sorter: IntArray | None = None if ordered else np.argsort(self._keys)
        known = self.table["label"].is_not_null().to_numpy()
        #: rows that a training may get: their label is known, and no holdout has them
        self.trainable = known & ~held_out(self.table, self.version.manifest["splits"])

    def __len__(self) -> int:
        return self.table.height

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Wait for the next version of a live stream, and show it; False: `stop` said so."""
        growing = Dataset(self._dataset.catalog, self._dataset.name)
        for following in growing.follow(self.number, stop=stop):
            self._show(following)
            return True
        return False

    def row(self, position: int) -> int:
        """Return number of rows up to a position."""
        return int(np.searchsorted(self._keys, position)) if self.live else position

    def position(self, row: int) -> int:
        """Position after the first `row` rows."""
        return int(self._keys[row - 1]) + 1 if self.live and row else row

    def place(self, keys: IntArray) -> IntArray:
        """Row of each key; -1 for keys that are not there."""
        order = self._sorter
        rank = np.minimum(np.searchsorted(self._keys, keys, sorter=order), len(self._keys) - 1)
        rows: IntArray = rank if order is None else order[rank]
        return np.where(self._keys[rows] == keys, rows, -1)

    def waited_s(self) -> float:
        """Seconds since the present version was committed."""
        return time.time() - float(self.version.manifest["created_ns"]) / 1e9
