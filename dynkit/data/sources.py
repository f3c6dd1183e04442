"""Sources: what a user has, cut into blocks of bounded size.

Every source becomes an iterator of frames or mappings that `prepare` understands; nothing is held but one block, so
that what is larger than memory can be read. Files are read by Polars, images by their bytes, Zarr and other arrays by
slices, torch datasets sample by sample, and an iterator of blocks is taken as it comes.
"""

import itertools
import os
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from dynkit.errors import InvalidInput

__all__ = ["IMAGE_SUFFIXES", "blocks", "progress_bar", "read_file"]

BLOCK_BYTES = 32 << 20
_BLOCK_ROWS = 250_000
_INFERRED = 100_000  # rows that say what type a column of texts is
_TRIED = 100  # rows that say whether texts are times
_IMAGES_PER_BLOCK = 1024
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")


def _ndjson(path: Path) -> pl.LazyFrame:
    """Scan lines of JSON; texts that are times become times, as in CSV files."""
    frame = pl.scan_ndjson(path, infer_schema_length=_INFERRED)
    first = frame.head(_TRIED).collect()
    times = []
    for series in first.select(pl.col(pl.String)):
        with suppress(pl.exceptions.PolarsError):
            if series.str.to_datetime().count():
                times.append(series.name)
    return frame.with_columns(pl.col(times).str.to_datetime())


_csv = partial(pl.scan_csv, try_parse_dates=True, infer_schema_length=_INFERRED)
_SCANS: dict[str, Callable[..., pl.LazyFrame]] = {
    ".parquet": pl.scan_parquet,
    ".csv": _csv,
    ".tsv": partial(_csv, separator="\t"),
    ".arrow": pl.scan_ipc,
    ".feather": pl.scan_ipc,
    ".ipc": pl.scan_ipc,
    ".ndjson": _ndjson,
    ".jsonl": _ndjson,
}


def blocks(data: Any) -> tuple[Iterator[Any], int | None]:
    """Cut a source into blocks; also return the number of its samples where that is known.

    Parameters
    ----------
    data : frame, mapping, path, dataset or iterable
        See `Workspace.ingest`.

    Raises
    ------
    InvalidInput
        When it is none of these, or a file cannot be read.
    """
    if isinstance(data, str | os.PathLike):
        return _path(Path(data))
    if isinstance(data, pl.LazyFrame):
        return _lazy(data, "the frame")
    if isinstance(data, pl.DataFrame):
        return _sliced(data, data.height, int(data.estimated_size()))
    if isinstance(data, torch.utils.data.Dataset) and not hasattr(data, "with_format"):
        return _torch(data)
    if hasattr(data, "with_format") and hasattr(data, "iter"):  # Hugging Face datasets
        arrow = data.with_format("arrow")
        return arrow.iter(batch_size=_IMAGES_PER_BLOCK), len(data) if hasattr(data, "__len__") else None
    if hasattr(data, "arrays") and hasattr(data, "attrs"):  # a Zarr group
        data = dict(data.arrays())
    if isinstance(data, Mapping):
        return _mapping(data)
    if isinstance(data, Iterator):
        return data, None
    if hasattr(data, "column_names") or hasattr(data, "columns"):  # Arrow, pandas
        return iter([data]), len(data) if hasattr(data, "__len__") else None
    if isinstance(data, list | tuple) and data and isinstance(data[0], Mapping | pl.DataFrame):
        return iter(data), None
    raise InvalidInput(
        f"cannot read samples from {type(data).__name__}; pass a frame, a dict of arrays, a file, a folder, a torch or "
        "Hugging Face dataset, or an iterator of such blocks"
    )


def _mapping(data: Mapping[str, Any]) -> tuple[Iterator[Any], int | None]:
    data = {name: value.unbind() if getattr(value, "is_nested", False) else value for name, value in data.items()}
    lengths = {_length(value) for value in data.values()}
    n = lengths.pop() if len(lengths) == 1 else None
    if n is None:
        return iter([data]), None  # `prepare` says what is wrong
    size = sum(int(getattr(value, "nbytes", 0)) or 100 * n for value in data.values())
    rows = max(1, n * BLOCK_BYTES // max(size, 1))
    if rows >= n and not any(hasattr(value, "store") for value in data.values()):
        return iter([data]), n

    def cut() -> Iterator[dict[str, Any]]:
        for low in range(0, n, rows):
            yield {name: value[low : low + rows] for name, value in data.items()}

    return cut(), n


def _length(value: Any) -> int | None:
    if hasattr(value, "shape"):
        return int(value.shape[0]) if len(value.shape) else None
    return len(value) if hasattr(value, "__len__") else None  # None: a single value


def _sliced(frame: pl.DataFrame, rows: int, size_bytes: int) -> tuple[Iterator[Any], int | None]:
    if size_bytes <= 4 * BLOCK_BYTES:
        return iter([frame]), rows
    return frame.iter_slices(max(1, rows * BLOCK_BYTES // size_bytes)), rows


def _lazy(frame: pl.LazyFrame, name: str) -> tuple[Iterator[Any], int | None]:

    def collect() -> Iterator[pl.DataFrame]:
        with _reading(name):
            yield from (one for one in frame.collect_batches(chunk_size=_BLOCK_ROWS, maintain_order=True) if one.height)

    return collect(), None


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say of what cannot be read what it is."""
    try:
        yield
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, pl.exceptions.PolarsError) as error:
        raise InvalidInput(f"{name} cannot be read: {str(error).splitlines()[0]}") from error


def _path(path: Path) -> tuple[Iterator[Any], int | None]:
    if not path.exists():
        raise InvalidInput(f"no file or folder {path}")
    if path.is_dir():
        if (path / "zarr.json").exists() or (path / ".zgroup").exists():
            import zarr

            return blocks(dict(zarr.open_group(path, mode="r").arrays()))
        files = sorted(file for file in path.rglob("*") if file.is_file())
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if images:
            return _images(path, images), len(images)
        tables = [file for file in files if file.suffix.lower() in _SCANS]
        if not tables:
            raise InvalidInput(f"folder {path} has no images and no tables ({', '.join(_SCANS)})")
        return itertools.chain.from_iterable(_path(file)[0] for file in tables), None
    if path.suffix.lower() == ".npz":
        with _reading(str(path)), np.load(path, allow_pickle=False) as arrays:
            return _mapping(dict(arrays))
    scan = _SCANS.get(path.suffix.lower())
    if scan is None:
        raise InvalidInput(f"{path} is no table that can be read; known are {', '.join([*_SCANS, '.npz'])}")
    with _reading(str(path)):
        return _lazy(scan(path), str(path))


def read_file(folder: Path, file: str) -> Iterator[Any]:
    """Blocks of one file of a watched folder: a table, or one image."""
    path = folder / file
    return _images(folder, [path]) if path.suffix.lower() in IMAGE_SUFFIXES else blocks(path)[0]


def _images(root: Path, files: list[Path]) -> Iterator[dict[str, Any]]:
    """Return the encoded files, the time they were last changed, and the names of their folders, if there are any."""
    labelled = any(file.parent != root for file in files)
    for start in range(0, len(files), _IMAGES_PER_BLOCK):
        some = files[start : start + _IMAGES_PER_BLOCK]
        yield {
            "image": [file.read_bytes() for file in some],
            "timestamp": pl.Series([file.stat().st_mtime_ns for file in some]).cast(pl.Datetime("ns")),
            **({"label": [file.parent.name if file.parent != root else None for file in some]} if labelled else {}),
            "file": [str(file.relative_to(root)) for file in some],
        }


def _torch(data: Any) -> tuple[Iterator[Any], int | None]:
    """Return samples of a torch dataset: dictionaries by name, tuples as x and label."""
    n = len(data) if hasattr(data, "__len__") else None
    if isinstance(data, torch.utils.data.TensorDataset):
        return _mapping(_named(data.tensors))
    samples = iter(data) if isinstance(data, torch.utils.data.IterableDataset) else (data[i] for i in range(n or 0))

    def batched() -> Iterator[dict[str, Any]]:
        for some in _batched(samples):
            yield _collate([sample if isinstance(sample, Mapping) else _named(sample) for sample in some])

    return batched(), n


def _batched(samples: Iterator[Any]) -> Iterator[list[Any]]:
    while some := list(itertools.islice(samples, _IMAGES_PER_BLOCK)):
        yield some


def _named(sample: Any) -> dict[str, Any]:
    values = sample if isinstance(sample, tuple | list) else (sample,)
    names = ["x", "label", "timestamp"]
    if len(values) > len(names):
        raise InvalidInput(f"a sample of {len(values)} parts needs names; return a dictionary of name to value")
    return dict(zip(names, values, strict=False))


def _collate(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: _stack(values) for name, values in columns.items()}


def _stack(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(values) if len({value.shape for value in values}) == 1 else values
    if isinstance(first, np.ndarray):
        return np.stack(values) if len({value.shape for value in values}) == 1 else values
    return values


def matching(folder: Path, pattern: str) -> dict[str, os.stat_result]:
    """Files below a folder whose name fits, with their status; hidden and half-written ones are left out."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if fnmatch(file.name, pattern) and not file.name.startswith("."):
            with suppress(FileNotFoundError):  # renamed meanwhile
                status = file.stat()
                if stat.S_ISREG(status.st_mode):
                    found[file.relative_to(folder).as_posix()] = status
    return found


@contextmanager
def progress_bar(what: str, total: int | None, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Return a bar with the time left, in a terminal or notebook; None shows it where somebody looks.

    Yields
    ------
    callable
        To be called with the number of samples that are done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if show is None:
        show = console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not show, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda rows: bar.advance(task, rows)


def with_column(source: Iterable[Any], name: str, values: Any) -> Iterator[Any]:
    """Add a column that the user gave as an array of its own to every block."""
    position = 0
    for one in source:
        block = one if isinstance(one, pl.DataFrame | Mapping) else pl.DataFrame(one)
        n = block.height if isinstance(block, pl.DataFrame) else _length(next(iter(block.values()))) or 0
        part = values[position : position + n]
        position += n
        if isinstance(block, pl.DataFrame):
            yield block.with_columns(pl.Series(name, part))
        else:
            yield {**block, name: part}
    if position != len(values):
        raise InvalidInput(f"{name} has {len(values)} values for {position} samples")
