"""Make sure that what was written is on the disk before something that refers to it is committed."""

import os
from pathlib import Path

__all__ = ["flush", "flush_tree"]


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
