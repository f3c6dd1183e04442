"""Data that arrives: versions as they are committed, and files as they appear in a folder."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
from blake3 import blake3

from dynkit.data import manifest as manifests
from dynkit.data import writing
from dynkit.data.manifest import Manifest
from dynkit.data.prepare import prepare_all, roles_of
from dynkit.data.sources import matching, read_file
from dynkit.data.store import Folder, Remote
from dynkit.data.version import Version
from dynkit.errors import Conflict, InvalidInput

__all__ = ["new_versions", "watch"]

_LOG = logging.getLogger(__name__)
_POLL_S = {Folder: 0.01, Remote: 1.0}
_SOURCES = ("file", "size", "mtime_ns", "hash", "first_key", "end_key")

_Known = tuple[int, int, str, int, int]  # size, time of change, hash, first key and end of the keys


def new_versions(
    store: Folder | Remote, since: int, timeout_s: float | None = None, stop: Callable[[], bool] | None = None
) -> Iterator[int]:
    """Yield numbers of versions after `since`, in order, as they come; see `Dataset.follow`."""
    last_s = time.monotonic()
    while True:
        newer = [number for number in manifests.numbers(store) if number > since]
        for number in newer:
            yield number
            since, last_s = number, time.monotonic()
        if newer:
            continue
        if stop is not None and stop():
            return
        if timeout_s is not None and time.monotonic() - last_s > timeout_s:
            return
        time.sleep(_POLL_S[type(store)])


def watch(
    store: Folder | Remote,
    folder: Path,
    pattern: str,
    *,
    poll_s: float = 1.0,
    settle_s: float = 0.5,
    timeout_s: float | None = None,
) -> Iterator[int]:
    """Append new and changed files, each once; yield the number of every version; see `Dataset.watch`."""
    if not folder.is_dir():
        raise InvalidInput(f"no folder {folder} to watch")
    last_s = time.monotonic()
    waiting: dict[str, tuple[tuple[int, int], float]] = {}  # files to be read, and since when they are as they are
    refused: dict[str, tuple[int, int]] = {}  # files with nothing to read, until they change
    while True:
        known = _known(Version(store, manifests.load(store, manifests.head(store))))
        for file, status in matching(folder, pattern).items():
            seen = status.st_size, status.st_mtime_ns
            before = known.get(file)
            if (before is not None and before[:2] == seen) or refused.get(file) == seen:
                continue
            if file not in waiting or waiting[file][0] != seen:
                waiting[file] = seen, time.monotonic()
            since_s = time.monotonic() - waiting[file][1]
            if time.time_ns() - status.st_mtime_ns < settle_s * 1e9 and since_s < settle_s:
                last_s = time.monotonic()  # somebody is writing it
                continue
            try:
                number = _read(store, folder, file, seen, before)
            except _ReadByAnother:
                continue
            except InvalidInput as error:
                refused[file] = seen
                _LOG.warning("%s was not read, and will be when it changes: %s", folder / file, error)
                continue
            except (Conflict, OSError) as error:
                _LOG.warning("%s was not read, and will be tried again: %s", folder / file, error)
                continue
            del waiting[file]
            if number:
                last_s = time.monotonic()
                yield number
            else:
                refused[file] = seen  # only the time changed
        if timeout_s is not None and time.monotonic() - last_s > timeout_s:
            return
        time.sleep(poll_s)


class _ReadByAnother(Conflict):
    """Another watcher committed this file first."""


def _known(version: Version) -> dict[str, _Known]:
    """Files that were read, the last state of each."""
    known: dict[str, _Known] = {}
    for entry in version.manifest["sources"]:
        for file, *rest in version.side("sources", entry).select(_SOURCES).iter_rows():
            known[file] = (rest[0], rest[1], rest[2], rest[3], rest[4])
    return known


def _read(store: Folder | Remote, folder: Path, file: str, seen: tuple[int, int], before: _Known | None) -> int:
    """Append one file, and delete the samples of its earlier content in the same version; 0: nothing changed."""
    content = blake3().update_mmap(folder / file).hexdigest()
    if before is not None and before[2] == content:
        return 0
    schema = manifests.load(store, manifests.head(store))["schema"]

    def also(changed: Manifest, first_key: int, root: Path) -> Manifest:
        head = Version(store, {**changed, "version": 0})
        if _known(head).get(file) != before:
            raise _ReadByAnother(f"{file} was read by another watcher")
        row = (file, *seen, content, first_key, changed["next_key"])
        changed = writing.with_side(store, root, changed, "sources", pl.DataFrame([row], _SOURCES, orient="row"))
        if before is not None:
            keys = head.columns([])["key"]
            gone = keys.filter(keys.is_between(before[3], before[4], closed="left")).sort()
            if len(gone):
                changed = writing.with_side(store, root, changed, "tombstones", gone.to_frame())
        return changed

    prepared = prepare_all(read_file(folder, file), roles_of(schema), schema)
    return writing.append(store, prepared, codec=schema["compression"], also=also)[0]
