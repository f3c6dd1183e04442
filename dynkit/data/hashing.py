"""Content hashes of samples, for finding equal ones: vectorised, so that millions take seconds.

Every 8 bytes of a sample are mixed with their place and added up modulo 2^64; equal samples have equal hashes on any
machine, different ones the same with a probability of about 2^-64. It is not meant to resist an attacker.
"""

from typing import Any

import numpy as np

from dynkit.data.arrays import Memory
from dynkit.data.fields import Array, Spans, Stored
from dynkit.data.version import Version
from dynkit.time import IntArray

__all__ = ["hash_rows", "mix"]

_BLOCK_BYTES = 16 << 20
_M1, _M2, _STEP = (np.uint64(n) for n in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))

U64 = np.ndarray[Any, np.dtype[np.uint64]]


def hash_rows(version: Version, keys: IntArray) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """Hash the content, fields and label, of samples (N,)."""
    memory = Memory()
    hashes = np.zeros(len(keys), dtype=np.uint64)
    step = max(1, _BLOCK_BYTES // version.row_bytes)
    for low in range(0, len(keys), step):
        some = keys[low : low + step]
        rows = version.rows_of(some)
        part = hashes[low : low + step]
        for stored in version.gather_stored(rows, memory=memory).values():
            part[:] = mix(part * _M1 + _hash(stored))
    return hashes


def mix(x: U64) -> U64:
    """Mix the bits of each number: the finalizer of SplitMix64 (Steele et al. 2014, figure 16)."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def _hash(stored: Stored) -> U64:
    if isinstance(stored, Spans):
        if not len(stored.values):
            return mix(stored.lengths.astype(np.uint64))
        words = _words(stored.values.reshape(len(stored.values), -1))
        numbers = words[:, 0] if words.shape[1] == 1 else mix(words[:, 0]) + words[:, 1]  # complex128 has two
        place = np.arange(len(numbers), dtype=np.uint64) - np.repeat(stored.starts.astype(np.uint64), stored.lengths)
        until = np.cumsum(
            np.concatenate([[np.uint64(0)], mix(numbers + (place + np.uint64(1)) * _STEP)]), dtype=np.uint64
        )
        return mix(until[stored.starts + stored.lengths] - until[stored.starts] + stored.lengths.astype(np.uint64))
    words = _words(stored.reshape(len(stored), -1))
    places = (np.arange(words.shape[1], dtype=np.uint64) + np.uint64(1)) * _STEP
    sums: U64 = mix(words + places).sum(axis=1, dtype=np.uint64)
    return sums


def _words(rows: Array) -> U64:
    """Rows (N, ...) as whole 8-byte words (N, W), filled up with zeros."""
    data = np.ascontiguousarray(rows).view(np.uint8)
    missing = -data.shape[1] % 8
    if missing:
        data = np.pad(data, ((0, 0), (0, missing)))
    words: U64 = data.view("<u8")
    return words
