"""Selections that need no model: by age, by chance, or by group.

Where a selection must remember something (which samples it has used), it does so in an attribute of its own, which the
run commits with every trigger.
"""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from dynkit.data.hashing import mix
from dynkit.errors import InvalidInput, check_whole
from dynkit.selection.budget import Budget, group_of, water_filled
from dynkit.time import IntArray
from dynkit.types import RunView

__all__ = [
    "All",
    "ClassBalanced",
    "Freshness",
    "Random",
    "RandomWithoutReuse",
    "Recent",
    "Reservoir",
    "TriggerBalanced",
]


@dataclass(frozen=True)
class All:
    """Every sample so far."""

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the whole pool."""
        return pool["key"]


@dataclass(frozen=True)
class Random(Budget):
    """A uniform sample, without replacement, of everything so far.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        return pool["key"][_drawn(np.arange(pool.height), self._of(pool.height), rng)]


@dataclass(frozen=True)
class RandomWithoutReuse(Budget):
    """A uniform sample in which no sample comes again before all have been used.

    When fewer samples than the budget are left unused, they are all taken and the next round begins with the rest.
    Samples that arrive during a round join it.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    _used: list[IntArray] = field(default_factory=list, init=False, repr=False, compare=False)  # keys of this round

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        keys, n = pool["key"].to_numpy(), self._of(pool.height)
        used = _among(keys, self._used)
        unused = np.flatnonzero(~used)
        if len(unused) >= n:
            rows = _drawn(unused, n, rng)
            self._used.append(keys[rows])
        else:
            again = _drawn(np.flatnonzero(used), n - len(unused), rng)
            rows = np.sort(np.concatenate([unused, again]))
            self._used[:] = [keys[again]]
        return pool["key"][rows]


@dataclass(frozen=True)
class Recent(Budget):
    """The newest samples.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the last samples of the pool."""
        return pool["key"].tail(self._of(pool.height))


@dataclass(frozen=True)
class Freshness:
    """A sample with a fixed share of samples that were never used before.

    Both groups, never used and used, are sampled uniformly, and as many samples are taken as the shares allow. While
    one group is empty, as at the first trigger, the other is taken.

    Parameters
    ----------
    fresh : float
        Share of never used samples, in (0, 1).
    n : int or None
        Most samples; None sets no limit.
    """

    fresh: float = 0.5
    n: int | None = None
    _used: list[IntArray] = field(default_factory=list, init=False, repr=False, compare=False)  # keys

    def __post_init__(self) -> None:
        if not (isinstance(self.fresh, int | float) and 0 < self.fresh < 1):
            raise InvalidInput(f"fresh={self.fresh!r} must be a share in (0, 1)")
        if self.n is not None:
            check_whole("n", self.n, 1)

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        keys = pool["key"].to_numpy()
        is_used = _among(keys, self._used)
        used, unused = np.flatnonzero(is_used), np.flatnonzero(~is_used)
        limit = len(keys) if self.n is None else min(self.n, len(keys))
        n_unused, n_used = min(limit, len(unused)), min(limit, len(used))
        if len(used) and len(unused):
            total = int(min(limit, len(unused) / self.fresh, len(used) / (1 - self.fresh)))
            n_unused = max(1, round(total * self.fresh))
            n_used = total - n_unused
        fresh = _drawn(unused, n_unused, rng)
        self._used.append(keys[fresh])
        return pool["key"][np.sort(np.concatenate([fresh, _drawn(used, n_used, rng)]))]


@dataclass(frozen=True)
class Reservoir(Budget):
    """A uniform sample of the whole stream that changes only where a new sample takes the place of an old one.

    A sample's rank is a hash of its key and the lowest ranks stay: the same random sets, one after the other, as those
    of Vitter's algorithm R (1985), but late, deleted or relabelled samples leave them uniform (bottom-k sampling, Cohen
    and Kaplan 2007, section 2).

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    _salt: list[int] = field(default_factory=list, init=False, repr=False, compare=False)  # drawn once

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the samples in the reservoir, in replay order."""
        if not self._salt:
            self._salt.append(int(rng.integers(2**63)))
        salted = pool["key"].to_numpy().astype(np.uint64) ^ mix(np.array(self._salt, np.uint64))
        n = self._of(pool.height)
        rank = mix(mix(salted))
        rows = np.argpartition(rank, n - 1)[:n] if 0 < n < len(rank) else np.arange(n)
        return pool["key"][np.sort(rows)]


@dataclass(frozen=True)
class ClassBalanced(Budget):
    """A sample in which every class has the same number of samples, as far as it has that many.

    The budget is shared by water filling: a class smaller than its share gives all it has, and the others share what it
    leaves. Within a class the sample is uniform, without replacement. Samples without a label are left out.

    Parameters
    ----------
    fraction : float or None
        Share of the labelled samples of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; all labelled ones while there are fewer. Exactly one of the two is given.
    """

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        groups = group_of(pool, "ClassBalanced")
        labelled = np.flatnonzero(groups)
        rows = water_filled(groups[labelled], self._of(len(labelled)), rng)
        return pool["key"][labelled[rows]]


@dataclass(frozen=True)
class TriggerBalanced(Budget):
    """A sample with as many samples of every trigger, as far as it has that many: old data weighs as much as new.

    A sample belongs to the trigger after whose predecessor it arrived. The budget is shared by water filling, as in
    `ClassBalanced`.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; the whole pool while it has fewer. Exactly one of the two is given.
    """

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.Series:
        """Keys of the drawn samples, in replay order."""
        return pool["key"][water_filled(run.arrived(pool["key"]), self._of(pool.height), rng)]


def _drawn(rows: IntArray, n: int, rng: np.random.Generator) -> IntArray:
    """Draw n of some rows uniformly, in order."""
    return np.sort(rng.choice(rows, size=n, replace=False, shuffle=False))


def _among(keys: IntArray, others: list[IntArray]) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Which keys are among others (N,) bool."""
    return np.isin(keys, np.concatenate([keys[:0], *others]))
