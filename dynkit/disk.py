"""Files between processes: written for sure before something refers to them, and locks."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["flush", "flush_tree", "locked", "read_at"]

_POLL_S = 0.01


def flush(*paths: Path) -> None:
    """Flush files, or the entries of folders, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush a folder with all below it."""
    flush(folder, *folder.rglob("*"))


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock that one process at a time can have; it is free again when that process ends, however it does.

    Parameters
    ----------
    path : Path
        The lock's file.
    waiting : callable
        Called again and again while another process has it; may raise.
    shared : bool
        Several may have it that only want to share it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(_POLL_S)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for children that were forked meanwhile


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read bytes of a file, more than the system gives at once, too.

    Raises
    ------
    OSError
        When the file ends before.
    """
    parts: list[bytes] = []
    while size:
        part = os.pread(descriptor, size, offset)
        if not part:
            raise OSError("the file ends too early")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
