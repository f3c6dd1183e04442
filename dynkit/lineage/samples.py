"""The samples that trainings used: keys and what goes with them at each trigger, kept beside its run.

    runs/<id>/selections/<index>.arrow       key, and weight, epoch and score where the selection gave them

Held-out validation samples are among them: they decide when training stops.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
from blake3 import blake3

from dynkit.data import as_keys
from dynkit.disk import flush
from dynkit.errors import StorageError
from dynkit.time import IntArray

__all__ = [
    "content",
    "files_of",
    "forget_trainings",
    "read_selection",
    "rewrite_selections",
    "uses",
    "without",
    "write_selection",
]


def files_of(root: Path, run: str) -> Path:
    """Return the folder of a run's files: code, log, selections.

    Raises
    ------
    StorageError
        When they are in another directory of the same workspace.
    """
    folder = root / "runs" / run
    if not folder.exists():
        raise StorageError(
            f"the code and selections of run {run} are not in {root}; do this in the directory where it was started"
        )
    return folder


def write_selection(root: Path, run: str, index: int, chosen: pl.DataFrame) -> None:
    """Write what a trigger selected, in place of what is there; the old or the new is seen, never a part."""
    path = _path(root, run, index)
    path.parent.mkdir(exist_ok=True)
    written = path.with_suffix(".new")
    chosen.write_ipc(written, compression="zstd")
    flush(written)
    written.replace(path)
    flush(path.parent)


def read_selection(root: Path, run: str, index: int) -> pl.DataFrame:
    """Read what a trigger selected.

    Raises
    ------
    StorageError
    """
    path = _path(root, run, index)
    try:
        return pl.read_ipc(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StorageError(f"the selection {path} cannot be read: {error}") from error


def _path(root: Path, run: str, index: int) -> Path:
    return files_of(root, run) / "selections" / f"{index:06d}.arrow"


def without(frame: pl.DataFrame, keys: IntArray) -> pl.DataFrame:
    """Leave out these samples."""
    return frame.filter(~np.isin(as_keys(frame), keys))


def content(chosen: pl.DataFrame) -> str:
    """Identity of a selection: BLAKE3 of keys, weights and epochs."""
    hasher = blake3()
    for name in ("key", "weight", "epoch"):
        if name in chosen.columns:
            hasher.update(name.encode()).update(chosen[name].to_numpy().tobytes())
    return hasher.hexdigest()


def uses(root: Path, trainings: Iterable[tuple[str, int]], keys: IntArray) -> dict[tuple[str, int], int]:
    """How many of these samples each of the trainings used; only those that used one."""
    found = {}
    for run, index in trainings:
        hits = int(np.isin(as_keys(read_selection(root, run, index)), keys).sum())
        if hits:
            found[run, index] = hits
    return found


def rewrite_selections(root: Path, runs: Iterable[str], keys: IntArray) -> None:
    """Take samples out of the selections of runs, also out of those that an interrupted training left."""
    for run in runs:
        for path in sorted((root / "runs" / run / "selections").glob("*.arrow")):
            index = int(path.stem)
            frame = read_selection(root, run, index)
            left = without(frame, keys)
            if not left.height:
                path.unlink()
            elif left.height < frame.height:
                write_selection(root, run, index, left)


def forget_trainings(root: Path, runs: Iterable[str]) -> None:
    """Delete what trainings keep on their way: states of optimizers, and of trainings that were interrupted."""
    for run in runs:
        shutil.rmtree(root / "runs" / run / "training", ignore_errors=True)
