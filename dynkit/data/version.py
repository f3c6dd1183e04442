"""One immutable state of a dataset: its manifest, its table in replay order, its samples by key."""

from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from dynkit.data.segments import open_field
from dynkit.errors import NotFound, StorageError
from dynkit.time import IntArray

__all__ = ["Version"]


class Version:
    """One immutable state of a dataset.

    Parameters
    ----------
    folder : Path
        The dataset's folder.
    manifest : dict
        Content of ``versions/<number>.json``.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._segments_folder = folder / "segments"
        self.manifest = manifest
        self.number: int = manifest["version"]
        self.rows: int = sum(segment["rows"] for segment in manifest["segments"])

    @property
    def schema(self) -> dict[str, Any]:
        """Which source columns became timestamp, label, features, columns and fields."""
        schema: dict[str, Any] = self.manifest["schema"]
        return schema

    @cached_property
    def _frames(self) -> list[pl.DataFrame]:
        """Index of every segment, in key order."""
        frames = []
        for segment in self.manifest["segments"]:
            path = self._segments_folder / f"{segment['id']}.arrow"
            try:
                frames.append(pl.read_ipc(path))
            except (OSError, pl.exceptions.PolarsError) as error:
                raise StorageError(f"segment index {path} cannot be read: {error}") from error
        return frames

    @cached_property
    def table(self) -> pl.DataFrame:
        """All samples in replay order (timestamp, key): key, timestamp, label, scalar columns."""
        if len(self._frames) == 1:
            return self._frames[0]  # sorted when it was written
        return pl.concat(self._frames).sort("timestamp", "key")

    @cached_property
    def _first_keys(self) -> IntArray:
        """Lowest key of each segment; keys are dense inside one."""
        return np.array([segment["first_key"] for segment in self.manifest["segments"]], dtype=np.int64)

    @cached_property
    def _pieces(self) -> dict[str, tuple[IntArray, list[torch.Tensor]]]:
        """For each field and the label: tensors in key order, and the first key of each."""
        pieces: dict[str, tuple[IntArray, list[torch.Tensor]]] = {}
        segments = self.manifest["segments"]
        for name in self.schema["fields"]:
            starts: list[int] = []
            tensors: list[torch.Tensor] = []
            for segment in segments:
                shards = open_field(self._segments_folder / f"{segment['id']}.zarr", name)
                if sum(map(len, shards)) != segment["rows"]:
                    raise StorageError(
                        f"field {name!r} of segment {segment['id']} does not have {segment['rows']} rows"
                    )
                starts += list(accumulate(map(len, shards[:-1]), initial=segment["first_key"]))
                tensors += shards
            pieces[name] = np.array(starts, dtype=np.int64), tensors
        if self.schema["label"] is not None:
            labels = [torch.from_numpy(frame["label"].to_numpy(writable=True)) for frame in self._frames]
            pieces["label"] = self._first_keys, labels
        return pieces

    def gather(self, keys: IntArray) -> dict[str, torch.Tensor]:
        """Copy the fields and labels of these samples, in this order.

        Parameters
        ----------
        keys : (N,) int64

        Returns
        -------
        dict
            Field name to tensor (N, ...), and ``label`` (N,) when the dataset has labels.

        Raises
        ------
        NotFound
            When a key is not in this version.
        """
        self._check(keys)
        return {name: _gather(starts, tensors, keys) for name, (starts, tensors) in self._pieces.items()}

    def _check(self, keys: IntArray) -> None:
        if not len(keys):
            return
        ends = self._first_keys + np.array([segment["rows"] for segment in self.manifest["segments"]])
        if int(keys.min()) >= self._first_keys[0] and int(keys.max()) < ends[-1]:
            if ends[-1] - self._first_keys[0] == self.rows:  # no gaps between segments
                return
            segment = np.searchsorted(self._first_keys, keys, side="right") - 1
            known = keys < ends[segment]
        else:
            segment = np.maximum(np.searchsorted(self._first_keys, keys, side="right") - 1, 0)
            known = (keys >= self._first_keys[0]) & (keys < ends[segment])
        if not known.all():
            missing = keys[~known]
            raise NotFound(f"{len(missing)} keys are not in version {self.number}: {missing[:3].tolist()}...")


def _gather(starts: IntArray, tensors: list[torch.Tensor], keys: IntArray) -> torch.Tensor:
    if len(tensors) == 1:
        return _take(tensors[0], keys - starts[0])
    piece = np.searchsorted(starts, keys, side="right") - 1
    out = torch.empty((len(keys), *tensors[0].shape[1:]), dtype=tensors[0].dtype)
    for i in np.unique(piece):
        where = np.flatnonzero(piece == i)
        out[torch.from_numpy(where)] = _take(tensors[i], keys[where] - starts[i])
    return out


def _take(tensor: torch.Tensor, rows: IntArray) -> torch.Tensor:
    """Copy rows; a run of neighbours is one memcpy."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return tensor[rows[0] : rows[-1] + 1].clone()
    return torch.index_select(tensor, 0, torch.from_numpy(rows))
