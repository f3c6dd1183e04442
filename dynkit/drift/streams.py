"""Detectors of change in streams of numbers, many columns at once.

A detector gets the next values of each column, a block (T, D) at a time, and says after which of them it sees a change;
there that column's detector begins anew. What it keeps between blocks is small, is pickled with it, and does not depend
on how the stream is cut into blocks. The ones here watch any number; those of `error_streams` watch a model's errors.

Positions are those of the package river 0.26, where each value costs a Python call: here a block is a few array
operations. That works because nothing outlives a detection: a whole block is computed as if there were none, and what
follows the first one in a column is computed again from there.
"""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import scipy  # its parts load at first use

from dynkit.errors import InvalidInput, check_whole

__all__ = ["ADWIN", "KSWIN", "Detector", "PageHinkley", "Stream", "as_detector"]

Array = np.ndarray[Any, np.dtype[Any]]
Carry = dict[str, Array]  # what a detector keeps, by name: (..., D)

_ROWS = 1_024  # of a block at once: what is computed again after a detection
_CELLS = 1 << 17
_DRAWS = 4_096
_LEVELS = 40  # sizes of buckets: for more values than any stream has
_LONG = 1 << 42


class Detector(Protocol):
    """Sees the next values (T,) or (T, D) of one or several streams; says after which there was a change."""

    def update(self, values: Any, /) -> Array: ...


@dataclass
class _Kept:
    """Values seen since the last detection (D,), and a detector's own arrays."""

    seen: Array | None = None
    carry: Carry = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """The walk through blocks that all detectors here have in common; their fields are parameters only."""

    @functools.cached_property
    def _kept(self) -> _Kept:
        return _Kept()

    def update(self, values: Any) -> Array:
        """Take the next values; return where changes were seen.

        Parameters
        ----------
        values : (T,) or (T, D)
            Next numbers of one stream, or of as many as before.

        Returns
        -------
        bool array of the same shape
            True at the value after which a change was seen.

        Raises
        ------
        InvalidInput
            When a value is not a number the detector takes, or the number of streams has changed.
        """
        block = as_block(values)
        x = block[:, None] if block.ndim == 1 else block
        self._check(x)
        kept = self._kept
        if kept.seen is None:
            kept.seen, kept.carry = np.zeros(x.shape[1], np.int64), self._begin(x.shape[1])
        if len(kept.seen) != x.shape[1]:
            raise InvalidInput(f"values of {x.shape[1]} streams came after those of {len(kept.seen)}; pass the same")
        drift = np.zeros(x.shape, bool)
        step = max(32, min(_ROWS, _CELLS // max(1, x.shape[1])))
        for low in range(0, len(x), step):
            drift[low : low + step] = self._walk(x[low : low + step])
        return drift.reshape(block.shape)

    def _walk(self, x: Array) -> Array:
        """Find the changes in a block; keep what is after its last row."""
        kept, rows = self._kept, np.arange(len(x))[:, None]
        assert kept.seen is not None
        seen = kept.seen + rows + 1
        drift, carry = self._run(x, seen, kept.carry)
        kept.carry = {name: array.copy() for name, array in carry.items()}
        todo = np.flatnonzero(drift.any(0))
        last = drift[:, todo].argmax(0)
        while len(todo):
            seen[:, todo] = since = rows - last
            after = since > 0
            found, carry = self._run(np.where(after, x[:, todo], 0), since, self._begin(len(todo)))
            found &= after
            drift[:, todo] = np.where(after, found, drift[:, todo])
            for name, array in carry.items():
                kept.carry[name][..., todo] = array
            again = found.any(0)
            todo, last = todo[again], found[:, again].argmax(0)
        kept.seen = seen[-1].copy()
        return drift

    def _check(self, x: Array) -> None:
        """Refuse values that the detector does not take."""

    def _begin(self, columns: int) -> Carry:
        """Return what is kept before the first value."""
        raise NotImplementedError

    def _run(self, x: Array, seen: Array, carry: Carry) -> tuple[Array, Carry]:
        """Find changes in x (T, D), as if there were none before; where `seen` (T, D) is below 1, x is 0 and not seen.

        Returns where a change is seen, right up to the first of each column, and what to keep after the last row.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class PageHinkley(Stream):
    """Page-Hinkley test: cumulated deviations from the mean leave their lowest or highest value (Page 1954).

    Parameters
    ----------
    min_instances : int
        Values before the first detection.
    delta : float
        Deviation that is tolerated.
    threshold : float
        Of the cumulated deviation.
    alpha : float
        Factor by which cumulated deviations fade with each value.
    mode : str
        ``"up"``, ``"down"`` or ``"both"``: which changes of the mean count.
    """

    min_instances: int = 30
    delta: float = 0.005
    threshold: float = 50.0
    alpha: float = 1 - 0.0001
    mode: str = "both"

    def __post_init__(self) -> None:
        check_whole("min_instances", self.min_instances, 1)
        if self.mode not in ("up", "down", "both"):
            raise InvalidInput(f"mode={self.mode!r} must be 'up', 'down' or 'both'")

    def _begin(self, columns: int) -> Carry:
        zero = np.zeros(columns)
        highest = np.full(columns, -1.0)  # not minus infinity: river's choice
        return {"total": zero, "up": zero, "down": zero, "lowest": np.full(columns, np.inf), "highest": highest}

    def _run(self, x: Array, seen: Array, carry: Carry) -> tuple[Array, Carry]:
        there = seen > 0
        total = cumulated(np.add, carry["total"], x)
        deviation = x - total / np.maximum(seen, 1)
        up = faded(np.where(there, deviation - self.delta, 0), self.alpha, carry["up"])
        down = faded(np.where(there, deviation + self.delta, 0), self.alpha, carry["down"])
        lowest = cumulated(np.minimum, carry["lowest"], np.where(there, up, np.inf))
        highest = cumulated(np.maximum, carry["highest"], np.where(there, down, -np.inf))
        rises, falls = up - lowest > self.threshold, highest - down > self.threshold
        change = rises if self.mode == "up" else falls if self.mode == "down" else rises | falls
        kept = {"total": total, "up": up, "down": down, "lowest": lowest, "highest": highest}
        return change & (seen >= self.min_instances), {name: array[-1] for name, array in kept.items()}


@dataclass(frozen=True)
class ADWIN(Stream):
    """Adaptive windowing: two parts of the values since the last change differ in their mean (Bifet and Gavalda 2007).

    Cut points are the edges of buckets, exponentially larger into the past; the bound on the difference is that of
    section 4.1, with the variance of the window. After a change the window is empty, as in river, where the paper
    would keep its newer part.

    Parameters
    ----------
    delta : float
        Accepted probability of a false alarm at a check.
    clock : int
        Values between two checks.
    max_buckets : int
        Most buckets of a size.
    min_window_length : int
        Fewest values on each side of a cut.
    grace_period : int
        Values before the first check.
    """

    delta: float = 0.002
    clock: int = 32
    max_buckets: int = 5
    min_window_length: int = 5
    grace_period: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise InvalidInput(f"delta={self.delta!r} must be between 0 and 1, such as 0.002")
        for name in ("clock", "max_buckets", "min_window_length"):
            check_whole(name, getattr(self, name), 1)
        check_whole("grace_period", self.grace_period, 0)

    def _begin(self, columns: int) -> Carry:
        edges = np.zeros((_LEVELS * self.max_buckets, columns), np.int64)
        sums = np.zeros(edges.shape)
        return {"edges": edges - _LONG, "sums": sums, "total": np.zeros(columns), "squares": np.zeros(columns)}

    def _run(self, x: Array, seen: Array, carry: Carry) -> tuple[Array, Carry]:
        there = seen > 0
        total = cumulated(np.add, carry["total"], x)
        before = np.concatenate([carry["total"][None], total[:-1]])
        gap = x - before / np.maximum(seen - 1, 1)
        squares = cumulated(
            np.add, carry["squares"], np.where(there & (seen > 1), (seen - 1) * gap * gap / np.maximum(seen, 1), 0)
        )
        edges, sums = np.concatenate([carry["edges"], seen]), np.concatenate([carry["sums"], total])
        checked = np.nonzero(there & (seen % self.clock == 0) & (seen > self.grace_period))
        change = np.zeros(x.shape, bool)
        if len(checked[0]):
            n, column = seen[checked], checked[1]
            cut = self._edges(n, int(n.max()).bit_length())
            change[checked] = self._cuts(n, total[checked], squares[checked], cut, _found(edges, sums, cut, column))
        kept = self._edges(np.maximum(seen[-1], 0), _LEVELS)
        after = {"edges": kept.T, "sums": _found(edges, sums, kept, np.arange(x.shape[1])).T}
        return change, after | {"total": total[-1], "squares": squares[-1]}

    def _cuts(self, n: Array, total: Array, squares: Array, cut: Array, before: Array) -> Array:
        """Whether any cut (C, K) of windows of n values (C,) parts different means."""
        width, n0 = n[:, None].astype(np.float64), cut.astype(np.float64)
        n1 = width - n0
        allowed = (n0 >= self.min_window_length) & (n1 >= self.min_window_length)
        n0, n1 = np.where(allowed, n0, width), np.where(allowed, n1, width)
        apart = np.abs(before / n0 - (total[:, None] - before) / n1)
        confidence = np.log(2 * np.log(width) / self.delta)
        least = self.min_window_length - 1
        harmonic = 1 / (n0 - least) + 1 / (n1 - least)
        bound = np.sqrt(2 * harmonic * (squares[:, None] / width) * confidence) + 2 / 3 * confidence * harmonic
        return np.asarray((allowed & (apart > bound)).any(1))

    def _edges(self, n: Array, levels: int) -> Array:
        """Positions (C, K) of the newer edge of each bucket of windows of n values (C,), oldest first; 0 is no edge.

        A bucket of each size waits until there are more than `max_buckets` of it; then the two oldest become one of
        the next size. So how many there are depends on how many values came, and on nothing else.
        """
        counts, newest, edges = n, n, []
        newer = np.arange(self.max_buckets)
        for level in range(levels):
            merged = np.maximum(0, (counts - self.max_buckets + 1) // 2)
            there = counts - 2 * merged
            edges.append(np.where(newer < there[:, None], newest[:, None] - (newer << level), 0))
            counts, newest = merged, newest - (there << level)
        return np.sort(np.concatenate(edges, 1), 1)


@dataclass(frozen=True)
class KSWIN(Stream):
    """Kolmogorov-Smirnov windowing: the newest values against as many drawn from those before (Raab et al. 2020).

    A change needs a p-value of at most `alpha` and a distance above 0.1. The draws are 4 096 random ones, used in turn
    since the last change.

    Parameters
    ----------
    alpha : float
        Level of each test; there is one at each value.
    window_size : int
        Values that are looked at.
    stat_size : int
        The newest of them, and how many are drawn from the others.
    seed : int
        Of the draws.
    """

    alpha: float = 0.005
    window_size: int = 100
    stat_size: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InvalidInput(f"alpha={self.alpha!r} must be between 0 and 1, such as 0.005")
        check_whole("stat_size", self.stat_size, 1)
        check_whole("window_size", self.window_size, 2 * self.stat_size)
        check_whole("seed", self.seed, 0)

    def _begin(self, columns: int) -> Carry:
        return {"values": np.zeros((self.window_size - 1, columns))}

    def _run(self, x: Array, seen: Array, carry: Carry) -> tuple[Array, Carry]:
        values = np.concatenate([carry["values"], x])
        tests = np.maximum(seen - self.window_size, 0)
        change = np.zeros(x.shape, bool)
        row, column = np.nonzero(seen >= self.window_size)
        if len(row):
            older = self.window_size - self.stat_size
            drawn = _draws(older, self.stat_size, self.seed)[tests[row, column] % _DRAWS]
            ranks = np.unique(values, return_inverse=True)[1].reshape(values.shape).astype(np.int32)
            old = ranks[row[:, None] + drawn, column[:, None]]
            new = ranks[row[:, None] + np.arange(older, self.window_size), column[:, None]]
            change[row, column] = _distances(old, new) >= _least_distance(self.stat_size, self.alpha)
        return change, {"values": values[len(x) :]}


def as_detector(value: Any) -> Detector:
    """Return a detector of river as a `Detector` of blocks, one copy for each column; one of ours as it is.

    Parameters
    ----------
    value : Detector, or an object with ``update(x)`` and ``drift_detected``

    Raises
    ------
    InvalidInput
        When it is neither.
    """
    if isinstance(value, type) or not callable(getattr(value, "update", None)):
        raise InvalidInput(f"{value!r} is no detector; expected one of dynkit.drift or river, such as KSWIN()")
    return _River(value) if hasattr(value, "drift_detected") else value


@dataclass
class _River:
    """A detector that takes one value at a time."""

    detector: Any

    @functools.cached_property
    def _each(self) -> list[Any]:
        return []

    def update(self, values: Any) -> Array:
        block = as_block(values)
        x = block[:, None] if block.ndim == 1 else block
        if not self._each:
            self._each.extend(copy.deepcopy(self.detector) for _ in range(x.shape[1]))
        if len(self._each) != x.shape[1]:
            raise InvalidInput(f"values of {x.shape[1]} streams came after those of {len(self._each)}; pass the same")
        drift = np.zeros(x.shape, bool)
        for column, detector in enumerate(self._each):
            for row, value in enumerate(x[:, column].tolist()):
                detector.update(value)
                drift[row, column] = detector.drift_detected
        return drift.reshape(block.shape)


def as_block(values: Any) -> Array:
    """Return values as float64 (T,) or (T, D)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        block = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"values cannot be read as numbers: {error}") from None
    if block.ndim not in (1, 2):
        raise InvalidInput(f"values have shape {block.shape}; expected (T,) or (T, D): one column a stream")
    if not np.isfinite(block).all():
        raise InvalidInput("values have NaN or infinite numbers; fill or drop them first")
    return block


def cumulated(operation: np.ufunc, first: Array, x: Array) -> Array:
    """Cumulate x (T, D) after what came before it (D,); one value after the other, so blocks make no difference."""
    return np.asarray(operation.accumulate(np.concatenate([first[None], x]), axis=0)[1:])


def faded(x: Array, factor: float, last: Array) -> Array:
    """Filter x (T, D): each value is added to `factor` times the result before it, `last` (D,) for the first one."""
    return np.asarray(scipy.signal.lfilter([1.0], [1.0, -factor], x, axis=0, zi=factor * last[None])[0])


def _found(edges: Array, sums: Array, wanted: Array, column: Array) -> Array:
    """Look up sums (C, K) to wanted positions (C, K) of columns (C,) among those at edges (E, D), which increase."""
    columns = np.arange(edges.shape[1]) * 2 * _LONG
    at = np.searchsorted((edges + columns).T.ravel(), (wanted + columns[column][:, None]).ravel())
    return np.asarray(sums.T.ravel()[np.minimum(at, sums.size - 1)].reshape(wanted.shape))


@functools.cache
def _draws(older: int, size: int, seed: int) -> Array:
    """Draw positions (draws, size) without replacement."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.random((_DRAWS, older)).argpartition(size - 1, axis=1)[:, :size])


@functools.cache
def _least_distance(size: int, alpha: float) -> int:
    """Least difference of ranks of two samples whose exact p-value is at most alpha."""
    x, least = np.arange(size), size
    while least / size > 0.1 and scipy.stats.ks_2samp(x, x + least - 0.5).pvalue <= alpha:
        least -= 1
    return least + 1


def _distances(x: Array, y: Array) -> Array:
    """Kolmogorov-Smirnov distances (C,) of ranks (C, S), (C, S), in values."""
    order = np.sort(np.concatenate([2 * x, 2 * y + 1], axis=1), axis=1)
    small = np.int8 if x.shape[1] < 128 else np.int32
    step = np.cumsum(1 - 2 * (order & 1).astype(small), axis=1, dtype=small)
    last = order[:, 1:] >> 1 != order[:, :-1] >> 1  # the functions differ only after all equal values
    return np.asarray((np.abs(step[:, :-1]) * last).max(1))
