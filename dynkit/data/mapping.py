"""Files side by side in one range of addresses, so that reading from many costs what reading from one does.

A reader of uncompressed arrays wants one table whose rows lie in many files. The range is reserved first, then each
file is mapped over its place in it: a row's address is ``base + row * row_bytes`` whatever file it is in. A file can
only begin at a page, so each begins at a row whose bytes begin a (huge) page; the rows between the end of a file and
the next one exist for nobody.
"""

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dynkit.data.fields import Array
from dynkit.errors import StorageError

__all__ = ["drop_pages", "map_file", "reserve", "slot_rows"]

_HUGE = 2 << 20  # a huge page: fewer of them to look up for a random read
_MOST_ADDRESSES = 1 << 45

_MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap has no such flag
_FAILED = ctypes.c_void_p(-1).value
_MADV_DONTNEED = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def slot_rows(row_bytes: Iterable[int], rows: Iterable[int]) -> int:
    """Return a number of which the first row of every file is a multiple, so that its first byte begins a page.

    Parameters
    ----------
    row_bytes : iterable of int
        Of the arrays that share row numbers.
    rows : iterable of int
        Of the files.
    """
    sizes, counts = [size for size in row_bytes if size] or [1], list(rows)
    slot = max(_HUGE // math.gcd(_HUGE, size) for size in sizes)
    if sum(-(-count // slot) for count in counts) * slot * max(sizes) > _MOST_ADDRESSES:
        slot = max(mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, size) for size in sizes)
    return slot


def reserve(rows: int, row_bytes: int) -> Array:
    """Reserve addresses for a table.

    Returns
    -------
    (rows, row_bytes) uint8
        Read-only; what was not mapped by `map_file` must not be read. All is unmapped when its last view is gone.
    """
    length = rows * row_bytes
    if not length:
        return np.empty((rows, row_bytes), np.uint8)
    size = length + _HUGE
    base = _libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == _FAILED:
        raise StorageError(f"cannot reserve {length} bytes of address space: {os.strerror(ctypes.get_errno())}")
    memory = (ctypes.c_uint8 * length).from_address(base + -base % _HUGE)
    weakref.finalize(memory, _libc.munmap, base, size).atexit = False  # at exit others may still read
    table: Array = np.ctypeslib.as_array(memory).reshape(rows, row_bytes)
    table.flags.writeable = False
    return table


def map_file(table: Array, path: Path, first_row: int, rows: int) -> None:
    """Map the first bytes of a file over rows of a reserved table; `first_row` is a multiple of its `slot_rows`.

    Raises
    ------
    StorageError
        When the file is missing or shorter than its rows.
    """
    address, size = table.ctypes.data + first_row * table.shape[1], rows * table.shape[1]
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"shard {path} cannot be read: {error.strerror}") from error
    try:
        if os.fstat(descriptor).st_size < size:
            raise StorageError(f"shard {path} is cut short: {os.fstat(descriptor).st_size} bytes, not {size}")
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        if _libc.mmap(address, size, mmap.PROT_READ, flags, descriptor, 0) != address:
            raise StorageError(f"shard {path} cannot be mapped: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def drop_pages(table: Array) -> None:
    """Take the table's pages out of this process's memory; the next read takes them from the page cache again."""
    if table.nbytes and sys.platform == "linux":
        _libc.madvise(table.ctypes.data, table.nbytes, _MADV_DONTNEED)
