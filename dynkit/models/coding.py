"""Whole numbers to bytes and back: the last step of storing a tensor.

What is coded is a residual, the difference to a prediction, or the tensor itself where nothing predicts it. Coders:

- ``zero``: all are zero; nothing is stored;
- ``grouped``: pcodec, one histogram for each exponent of the prediction, because the spread of a difference in units of
  the last place follows the exponent;
- ``plain``: pcodec with one histogram for every 2^18 numbers;
- ``auto``: pcodec that looks for structure itself (multiples, steps): for numbers that nothing predicts;
- ``planes``: byte planes, zstd: best where long runs are equal;
- ``bytes``: zstd of the bytes as they are;
- ``raw``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, standalone

from dynkit.models.tensors import Bits

__all__ = ["Grouping", "compress", "decompress", "pack_numbers", "unpack_numbers", "unzigzag", "zigzag"]

_LEVEL = 7  # of pcodec; 8 saves 0.1 to 0.2 % for an eighth more time
_ZSTD_LEVEL = 3
_GROUP = 1536  # numbers that a histogram must be worth
_PAGE = 1 << 18
_BLOCK = 1 << 15  # numbers whose temporaries stay in the processor's cache; at most 2^16


def zigzag(signed: Bits) -> Bits:
    """Map signed numbers to small unsigned ones for small ones of either sign: 0, -1, 1, -2 to 0, 1, 2, 3."""
    mapped: Bits = signed >> (signed.itemsize * 8 - 1)
    mapped ^= signed << signed.dtype.type(1)
    return mapped.view(f"<u{signed.itemsize}")


def unzigzag(mapped: Bits) -> Bits:
    """Inverse of `zigzag`."""
    one = mapped.dtype.type(1)
    numbers: Bits = mapped & one
    np.negative(numbers, out=numbers)  # all ones for odd numbers
    numbers ^= mapped >> one
    return numbers.view(f"<i{mapped.itemsize}")


@dataclass(frozen=True)
class Grouping:
    """An order of numbers (N,) by group; within a group as they came.

    It is kept, and done, block by block: what fits in the processor's cache takes a third of the time.

    Parameters
    ----------
    order : (N,) uint16
        Order of each block, one after the other.
    runs : list of list of (int, int, int)
        For each block: where its part of a group goes, and where that begins and ends in the ordered block.
    sizes : list of int
        Stretches of the result that get a histogram each: rare groups join their neighbours.
    """

    order: Bits
    runs: list[list[tuple[int, int, int]]]
    sizes: list[int]

    @classmethod
    def by(cls, groups: Bits) -> "Grouping":
        """Group by small numbers (N,)."""
        values = np.arange(int(groups.max()) + 1, dtype=groups.dtype)
        order = np.empty(len(groups), np.uint16)
        ends = []
        for start in range(0, len(groups), _BLOCK):
            block = groups[start : start + _BLOCK]
            order_in_block = np.argsort(block, kind="stable")  # a radix sort
            order[start : start + _BLOCK] = order_in_block
            ends.append(np.searchsorted(block, values, side="right", sorter=order_in_block))
        ends_BG = np.array(ends)
        counts_BG = np.diff(ends_BG, axis=1, prepend=0)
        sizes_G = counts_BG.sum(axis=0)
        targets_BG = np.cumsum(counts_BG, axis=0) - counts_BG + (np.cumsum(sizes_G) - sizes_G)
        runs = []
        for target_G, end_G, count_G in zip(targets_BG, ends_BG, counts_BG, strict=True):
            some = np.flatnonzero(count_G)
            begins, lasts = (end_G - count_G)[some].tolist(), end_G[some].tolist()
            runs.append(list(zip(target_G[some].tolist(), begins, lasts, strict=True)))
        return cls(order, runs, _stretches(sizes_G.tolist()))

    def done(self, numbers: Bits) -> Bits:
        """Numbers (N,) by group."""
        grouped = np.empty_like(numbers)
        ordered = np.empty(_BLOCK, numbers.dtype)
        for start, runs in zip(range(0, len(numbers), _BLOCK), self.runs, strict=True):
            block = numbers[start : start + _BLOCK]
            np.take(block, self.order[start : start + _BLOCK], out=ordered[: len(block)], mode="clip")  # no checks
            for target, begin, end in runs:
                grouped[target : target + end - begin] = ordered[begin:end]
        return grouped

    def undone(self, grouped: Bits) -> Bits:
        """Inverse of `done`."""
        numbers = np.empty_like(grouped)
        ordered = np.empty(_BLOCK, grouped.dtype)
        for start, runs in zip(range(0, len(numbers), _BLOCK), self.runs, strict=True):
            for target, begin, end in runs:
                ordered[begin:end] = grouped[target : target + end - begin]
            order = self.order[start : start + _BLOCK].astype(np.intp)
            numbers[start : start + _BLOCK][order] = ordered[: len(order)]
        return numbers


def _stretches(sizes: Sequence[int]) -> list[int]:
    """Join groups of these sizes until they are worth a histogram; cut large ones into pages."""
    stretches: list[int] = []
    waiting = 0
    for size in sizes:
        waiting += size
        if waiting >= _GROUP:
            stretches += [_PAGE] * (waiting // _PAGE) + ([waiting % _PAGE] if waiting % _PAGE else [])
            waiting = 0
    if waiting:
        stretches = [*stretches[:-1], stretches[-1] + waiting] if stretches else [waiting]
    return stretches


def compress(numbers: Bits, coder: str, grouping: Grouping | None = None) -> bytes:
    """Code numbers (N,); ``grouped`` needs the grouping."""
    if coder == "zero":
        return b""
    if coder == "grouped":
        assert grouping is not None
        return _pcodec(grouping.done(numbers), paging_spec=PagingSpec.exact_page_sizes(grouping.sizes))
    if coder == "plain":
        return _pcodec(numbers)
    if coder == "auto":
        return _pcodec(numbers, mode_spec=ModeSpec.auto(), delta_spec=DeltaSpec.auto())
    if coder == "planes":
        numbers = zigzag(numbers) if numbers.dtype.kind == "i" else numbers
        return _zstd(np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, numbers.itemsize).T))
    return _zstd(numbers) if coder == "bytes" else numbers.tobytes()


def decompress(data: Any, coder: str, count: int, dtype: np.dtype[Any], grouping: Grouping | None = None) -> Bits:
    """Inverse of `compress`: `count` numbers of this dtype, in memory of their own."""
    if coder == "zero":
        return np.zeros(count, dtype)
    if coder == "grouped":
        assert grouping is not None
        return grouping.undone(np.asarray(standalone.simple_decompress(bytes(data))))
    if coder in ("plain", "auto"):
        return np.asarray(standalone.simple_decompress(bytes(data))).view(dtype)
    if coder == "planes":
        planes = np.frombuffer(Zstd().decode(data), np.uint8).reshape(dtype.itemsize, -1)
        numbers = planes.T.copy().reshape(-1).view(f"<u{dtype.itemsize}")
        return unzigzag(numbers) if dtype.kind == "i" else numbers.view(dtype)
    return np.frombuffer(bytearray(Zstd().decode(data) if coder == "bytes" else data), dtype)


def _pcodec(numbers: Bits, **options: Any) -> bytes:
    plain = {"mode_spec": ModeSpec.classic(), "delta_spec": DeltaSpec.no_op()}
    config = ChunkConfig(compression_level=_LEVEL, enable_8_bit=True, **(plain | options))
    return bytes(standalone.simple_compress(numbers, config))


def _zstd(data: Bits) -> bytes:
    return bytes(Zstd(_ZSTD_LEVEL).encode(data))


def pack_numbers(numbers: Sequence[int] | Bits) -> bytes:
    """Code a list of numbers that grow slowly, such as places: as differences, by zstd."""
    if not len(numbers):
        return b""
    return compress(np.diff(np.asarray(numbers, np.int64), prepend=np.int64(0)), "planes")


def unpack_numbers(data: Any) -> list[int]:
    """Inverse of `pack_numbers`."""
    if not data:
        return []
    places: list[int] = np.cumsum(decompress(data, "planes", 0, np.dtype(np.int64))).tolist()
    return places
