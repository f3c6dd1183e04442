"""Batches: exactly the selected samples, gathered from storage as tensors on the device.

There are two ways. *Mapped*: samples that lie uncompressed on a local disk are copied out of the page cache in any
order, a super-batch of several batches at a time; a shuffle is a uniform permutation. *Windowed*: samples that must be
decoded or fetched, or that do not fit in `cache_bytes`, are read in pieces. Chunks of neighbouring samples are put in
random order and cut into windows of a quarter of `cache_bytes`; each chunk is decoded once, a window ahead of its use,
and the samples of a window are permuted. So any two samples of a window are equally likely in either order, and a
selection no larger than a window is shuffled uniformly.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from dynkit.data.arrays import Memory, take_stored
from dynkit.data.fields import Stored
from dynkit.data.store import Folder
from dynkit.data.version import CACHE_BYTES, Version
from dynkit.errors import InvalidInput, check_whole
from dynkit.time import IntArray

__all__ = ["Batch", "Batches", "length_of", "slice_batch", "take_batch"]

Batch = dict[str, torch.Tensor]

_SUPER_BATCH_BYTES = 16 << 20  # so that two threads copy for longer than one takes to wake up
_MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
_WORTH_HIDING = 10  # a load that takes more than this part of the time between two of them
_LAST = ("keep", "drop", "join")


class _Plan(NamedTuple):
    """How samples are read."""

    windowed: bool
    rows: int  # of one super-batch or window, whole batches
    reason: str


class _Piece(NamedTuple):
    """Samples to read at once: whole batches, or this process's shares of them."""

    rows: IntArray
    weights: torch.Tensor | None
    sizes: IntArray  # of its batches


class Batches:
    """The batches of one training or evaluation; each iteration is one epoch in a new order.

    Parameters
    ----------
    version : Version
        Where the samples are.
    keys : (N,) int64
        Which ones.
    weights : (N,) float32 or None
        Added to each batch as ``weight``.
    epochs : (N,) int64 or None
        In which epoch, from 0, each sample is used, as many in every one; None: in all of them.
    batch_size : int
    shuffle : bool
        The order of epoch e depends on the seed and e only.
    seed : int
    device : torch.device or str
    transform : callable, optional
        Batch to batch, applied on the device.
    fields : sequence of str or None
        Only these (``"label"`` is one); None means all.
    cache_bytes : int or None
        Most memory for samples; None means 512 MB where they are decoded, and where they are mapped leaves it to the
        system's page cache. Where they are decoded, about half of it stays with the dataset, for the next epoch.
    last : str
        What becomes of samples that do not fill a batch: ``"keep"`` makes a smaller one, ``"drop"`` leaves them out,
        ``"join"`` keeps them but adds a single one to the batch before, because layers that normalise over a batch
        cannot train on one.
    on_batch : callable, optional
        Called with the number of samples before each batch is handed out.
    part : (int, int)
        Rank and number of processes that share every batch. This one gets its share, in order; a batch with fewer than
        two samples for each process goes to all of them whole. Sizes that are told are those of whole batches.

    Notes
    -----
    A batch is a dict: the dataset's fields, ``label`` when it has labels, ``weight`` when there are weights.
    """

    def __init__(
        self,
        version: Version,
        keys: IntArray,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        weights: "np.ndarray[tuple[int], np.dtype[np.float32]] | None" = None,
        epochs: IntArray | None = None,
        transform: Callable[[Batch], Batch] | None = None,
        fields: "list[str] | tuple[str, ...] | None" = None,
        cache_bytes: int | None = None,
        last: str = "keep",
        on_batch: Callable[[int], None] | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        check_whole("batch_size", batch_size, 1)
        if fields is not None and not fields:
            raise InvalidInput("fields=[] leaves nothing to read; None means all")
        if last not in _LAST:
            raise InvalidInput(f"last={last!r} must be one of {', '.join(_LAST)}")
        if cache_bytes is not None and cache_bytes < 1 << 20:
            raise InvalidInput(f"cache_bytes={cache_bytes!r} must be at least {1 << 20}")
        self._rows = version.rows_of(keys)  # an unknown key is an error now, not in the middle of an epoch
        self._version = version
        self._keys = keys
        self._weights = None if weights is None else torch.from_numpy(weights)
        self._by_epoch = (
            None if epochs is None else np.argsort(epochs, kind="stable").reshape(int(epochs.max()) + 1, -1)
        )
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._device = torch.device(device)
        self._transform = transform
        self._fields = fields
        self._cache_bytes = cache_bytes
        self._last = last
        self._on_batch = on_batch
        self._part = part
        self._epoch = 0
        self._start = 0  # batch that the next iteration begins at
        self.passed = 0  # samples handed out so far, all epochs together

    def __len__(self) -> int:
        return len(self._edges) - 1

    @property
    def samples(self) -> int:
        """Number of samples of one epoch."""
        return len(self._keys) if self._by_epoch is None else int(self._by_epoch.shape[1])

    def seek(self, epoch: int, batch: int) -> None:
        """Make the next iteration be what is left of an epoch from a batch on, as if those before were handed out."""
        self._epoch, self._start = epoch, batch
        passed = int(epoch * self._edges[-1] + self._edges[batch])
        if self._on_batch is not None:
            self._on_batch(passed - self.passed)
        self.passed = passed

    @cached_property
    def _edges(self) -> IntArray:
        """Where batches begin in the order of an epoch, and where the last one ends."""
        n, size = self.samples, self._batch_size
        edges = np.minimum(np.arange(0, n + size, size, dtype=np.int64), n)
        if self._last == "join" and len(edges) > 2 and size > 1 and edges[-1] - edges[-2] == 1:
            edges = np.delete(edges, -2)
        if self._last == "drop" and len(edges) > 1 and edges[-1] - edges[-2] < size:
            edges = edges[:-1]
        return edges

    @cached_property
    def _shares(self) -> tuple[IntArray, IntArray]:
        """Where the share of this process begins in each batch, and how large it is."""
        rank, ranks = self._part
        low, size = self._edges[:-1], np.diff(self._edges)
        if ranks == 1:
            return low, size
        begin, end = size * rank // ranks, size * (rank + 1) // ranks
        shared = size >= 2 * ranks
        return low + np.where(shared, begin, 0), np.where(shared, end - begin, size)

    def explain(self) -> str:
        """Say how samples are read, and why."""
        plan = self._plan
        way = f"windows of {plan.rows} samples" if plan.windowed else f"mapped, {plan.rows} samples at a time"
        return f"{way}: {plan.reason}"

    @cached_property
    def _plan(self) -> _Plan:
        version = self._version
        total = version.row_bytes * len(self._keys)
        window_bytes = (self._cache_bytes or CACHE_BYTES) // 4
        if version.compressed:
            return self._planned(window_bytes, windowed=True, reason="chunks are compressed and decoded once per epoch")
        if not isinstance(version.store, Folder):
            return self._planned(window_bytes, windowed=True, reason="samples are fetched from remote storage")
        limit = _MEMORY_BYTES // 2 if self._cache_bytes is None else self._cache_bytes
        stored = sum(entry["bytes"] for entry in version.segments)
        if stored > limit:
            reason = f"{stored} bytes of samples do not fit in {limit}"
            return self._planned(window_bytes, windowed=True, reason=reason)
        reason = f"{total} bytes of samples lie uncompressed on a local disk"
        return self._planned(_SUPER_BATCH_BYTES, windowed=False, reason=reason)

    def _planned(self, size_bytes: int, *, windowed: bool, reason: str) -> _Plan:
        row_bytes = self._version.row_bytes
        for field in self._version.fields.values():
            if field.kind == "image" and field.shape:
                row_bytes += int(np.prod(field.shape))  # decoded
        return _Plan(windowed, self._batch_size * max(1, size_bytes // (row_bytes * self._batch_size)), reason)

    def __iter__(self) -> Iterator[Batch]:
        start, (_, sizes) = self._start, self._shares
        ends, whole = np.cumsum(sizes), np.diff(self._edges)
        for super_batch in self.super_batches():
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + length_of(super_batch))) + 1
            parts = _cut(super_batch, sizes[start:stop].tolist())
            for samples, batch in zip(whole[start:stop].tolist(), parts, strict=True):
                if self._on_batch is not None:
                    self._on_batch(samples)
                self.passed += samples
                yield batch if self._transform is None else self._transform(batch)
            start = stop

    def super_batches(self) -> Iterator[Batch]:
        """One epoch in pieces of several batches, each gathered at once, and one ahead where that pays."""
        images = any(field.kind == "image" for field in self._version.fields.values())
        if self._plan.windowed:
            batches = _ahead(partial(self._send, *piece) for piece in self._windows())
        elif images or self._device.type == "cuda":
            batches = _ahead(partial(self._load, piece) for piece in self._pieces(self._plan.rows))
        else:
            batches = _in_time(partial(self._load, piece) for piece in self._pieces(self._plan.rows))
        for batch in batches:
            if self._device.type == "cuda":  # tell the allocator who uses what the copying stream allocated
                for part in (part for tensor in batch.values() for part in _parts(tensor)):
                    part.record_stream(torch.cuda.current_stream(self._device))
            yield batch

    def _load(self, piece: _Piece) -> Batch:
        return self._send(self._stored(piece.rows, self._version.memory), piece.weights)

    def _pieces(self, rows: int) -> Iterator[_Piece]:
        """Give the samples in the order of this epoch, about so many at a time."""
        begins, sizes = (values[self._start :] for values in self._shares)
        order = self._order(self._epoch)
        self._epoch, self._start = self._epoch + 1, 0
        for low, high in self._groups(len(sizes), rows):
            places = self._places(begins[low:high], sizes[low:high])
            some = places if order is None else order[places]
            chosen = self._rows[some] if isinstance(some, slice) else self._rows.take(some)
            weights = None if self._weights is None else self._weights[some].clone()
            yield _Piece(chosen, weights, sizes[low:high])

    def _groups(self, batches: int, rows: int) -> list[tuple[int, int]]:
        """Cut ``range(batches)`` into groups of about so many samples."""
        step = max(1, rows // self._batch_size)
        return [(low, min(low + step, batches)) for low in range(0, batches, step)]

    def _places(self, begins: IntArray, sizes: IntArray) -> slice | IntArray:
        """Places in the order of the epoch of some batches that follow each other."""
        if self._part[1] == 1:
            return slice(int(begins[0]), int(begins[-1] + sizes[-1]))
        before = np.cumsum(sizes) - sizes
        places: IntArray = np.repeat(begins - before, sizes) + np.arange(sizes.sum())
        return places

    def _stored(self, rows: IntArray, memory: Memory) -> dict[str, Stored]:
        """Gather samples as they are stored."""
        stored = self._version.gather_stored(rows, self._fields, memory)
        if self._plan.windowed and not self._version.compressed:
            self._version.drop_pages()
        return stored

    def _windows(self) -> Iterator[tuple[dict[str, Stored], torch.Tensor | None]]:
        """Super-batches out of windows; a window is read while the one before is used."""
        memory = self._version.windows

        def load(piece: _Piece) -> tuple[dict[str, Stored], IntArray, _Piece]:
            rows, places = piece.rows, np.arange(len(piece.rows))
            if self._shuffle:
                by_place = np.argsort(rows)  # neighbours are decoded together
                rows, places[by_place] = rows[by_place], np.arange(len(rows))
            return self._stored(rows, memory), places, piece

        for stored, places, piece in _ahead(partial(load, piece) for piece in self._pieces(self._plan.rows)):
            ends = np.cumsum(piece.sizes).tolist()
            for first, stop in self._groups(len(ends), _SUPER_BATCH_BYTES // self._version.row_bytes):
                low, high = ends[first] - int(piece.sizes[first]), ends[stop - 1]
                some = places[low:high]
                part = {name: take_stored(name, values, some, self._version.memory) for name, values in stored.items()}
                yield part, None if piece.weights is None else piece.weights[low:high]

    def _send(self, stored: dict[str, Stored], weights: torch.Tensor | None) -> Batch:
        """Make a batch of stored samples, on the device."""
        batch = self._version.tensors(stored)
        if weights is not None:
            batch["weight"] = weights
        if self._device.type == "cpu":
            return batch
        if self._device.type != "cuda":
            return {name: tensor.to(self._device) for name, tensor in batch.items()}
        with torch.cuda.stream(self._copies):  # beside the stream that computes
            batch = {name: _sent(tensor, self._device) for name, tensor in batch.items()}
        self._copies.synchronize()  # in this thread; then the pinned buffers are free again
        return batch

    @cached_property
    def _copies(self) -> Any:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch has no types here

    def _order(self, epoch: int) -> IntArray | None:
        """Places in the selection in the order of an epoch; None: as they are."""
        some = None if self._by_epoch is None else self._by_epoch[epoch % len(self._by_epoch)]
        if not self._shuffle:
            return some
        generator = torch.Generator().manual_seed((self._seed + epoch) % 2**63)
        n = self.samples
        small = n < 2**31  # then half the memory, and the same order
        order: IntArray = torch.randperm(n, generator=generator, dtype=torch.int32 if small else torch.int64).numpy()
        if self._plan.windowed and n > self._plan.rows:
            chunk = self._version.chunk_of(self._rows if some is None else self._rows[some])
            rank = torch.randperm(int(chunk.max()) + 1, generator=generator).numpy()
            by_chunk = np.argsort(rank[chunk], kind="stable")
            window = np.arange(n) // self._plan.rows
            order = by_chunk[np.lexsort((order, window))]
        return order if some is None else some[order]

    def keys(self) -> IntArray:
        """Keys in the order of the next epoch (N,)."""
        order = self._order(self._epoch)
        return self._keys if order is None else self._keys[order]


def length_of(batch: Batch) -> int:
    """Return the number of samples of a batch."""
    return int(next(iter(batch.values())).size(0))


T = TypeVar("T")


def _ahead(tasks: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Do each task in a thread while the result of the one before is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="dynkit-ahead") as thread:
        coming = [thread.submit(task) for task in islice(tasks, 1)]
        while coming:
            done = coming.pop().result()
            coming = [thread.submit(task) for task in islice(tasks, 1)]
            yield done


def _in_time(tasks: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Do tasks when asked, or ahead once that hides a good part of the time: a thread takes its time from others."""
    for task in tasks:
        begin = time.perf_counter()
        done = task()
        ended = time.perf_counter()
        yield done
        took, used = ended - begin, time.perf_counter() - ended
        if took < used < _WORTH_HIDING * took:
            yield from _ahead(tasks)


def _cut(batch: Batch, sizes: list[int]) -> Iterator[Batch]:
    """Cut a batch into parts that follow each other."""
    if len(sizes) == 1:
        yield batch
    elif any(tensor.is_nested for tensor in batch.values()):
        ends = np.cumsum(sizes).tolist()
        yield from (slice_batch(batch, end - size, end) for size, end in zip(sizes, ends, strict=True))
    else:
        parts = [tensor.split_with_sizes(sizes) for tensor in batch.values()]
        yield from (dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True))


def slice_batch(batch: Batch, low: int, high: int) -> Batch:
    """Return samples `low` to `high` of a batch, without a copy."""
    return {name: _slice(tensor, low, high) for name, tensor in batch.items()}


def take_batch(batch: Batch, rows: torch.Tensor) -> Batch:
    """Return some samples of a batch, in the order of `rows`."""
    return {name: _taken(tensor, rows) for name, tensor in batch.items()}


def _taken(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return some samples of a tensor, jagged or not."""
    if not tensor.is_nested:
        return tensor[rows]
    offsets = tensor.offsets()  # type: ignore[attr-defined]  # of a jagged tensor
    lengths = offsets.diff()[rows]
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    places = torch.repeat_interleave(offsets[rows] - ends[:-1], lengths)
    values = tensor.values()[places + torch.arange(len(places), device=places.device)]
    return torch.nested.nested_tensor_from_jagged(values, ends)


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors that a jagged tensor is made of, or the tensor."""
    return (tensor.values(), tensor.offsets()) if tensor.is_nested else (tensor,)  # type: ignore[attr-defined]


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start the copy of a tensor to a device, from pinned memory."""
    parts = [part.pin_memory().to(device, non_blocking=True) for part in _parts(tensor)]
    return torch.nested.nested_tensor_from_jagged(parts[0], parts[1]) if tensor.is_nested else parts[0]


def _slice(tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Return samples `low` to `high` of a tensor, jagged or not."""
    if not tensor.is_nested:
        return tensor[low:high]
    offsets = tensor.offsets()  # type: ignore[attr-defined]  # of a jagged tensor
    values = tensor.values()[int(offsets[low]) : int(offsets[high])]
    return torch.nested.nested_tensor_from_jagged(values, offsets[low : high + 1] - offsets[low])
