"""Manifests: what a version consists of, and how a new one is committed.

``versions/00000007.json`` lists the schema, segments, tombstones (deleted keys), labels (that came late), splits and
watched files of version 7. Creating it, if nobody else did, is the commit: of two writers that reach the same number
one loses and makes its change to the new head instead.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from blake3 import blake3

from dynkit.data.segments import files_of
from dynkit.data.store import Folder, Remote
from dynkit.errors import Conflict, NotFound, StorageError

__all__ = ["LISTS", "Manifest", "commit", "files", "head", "load", "numbers", "path_of", "read"]

Manifest = dict[str, Any]

FORMAT = 2
LISTS = ("segments", "tombstones", "labels", "sources")
_PATIENCE = 1000  # times that somebody else may be faster


def numbers(store: Folder | Remote) -> list[int]:
    """Numbers of all versions, ascending."""
    names = store.names("versions")
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def head(store: Folder | Remote) -> int:
    """Return number of the newest version, 0 when there is none."""
    number, manifest = store.newest
    if number and store.exists(path_of(number)):  # versions follow each other: look for the next, not at all of them
        while store.exists(path_of(number + 1)):
            number, manifest = number + 1, None
    else:
        number, manifest = max(numbers(store), default=0), None
    store.newest = number, manifest
    return number


def path_of(number: int) -> str:
    """Where a version's manifest is."""
    return f"versions/{number:08d}.json"


def load(store: Folder | Remote, number: int) -> Manifest:
    """Read and check a manifest as `read` does, but only once the newest one that `head` has seen."""
    newest, manifest = store.newest
    if newest != number or manifest is None:
        manifest = read(store, number)
        if newest == number:
            store.newest = number, manifest
    elif not store.exists(path_of(number)):
        raise NotFound(f"no version {number}")
    found: Manifest = manifest
    return found


def read(store: Folder | Remote, number: int) -> Manifest:
    """Read and check a manifest.

    Raises
    ------
    NotFound
        When there is no such version.
    StorageError
        When it is damaged or of another format.
    """
    try:
        manifest: Manifest = json.loads(store.read(path_of(number)))
    except FileNotFoundError:
        raise NotFound(f"no version {number}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"manifest {path_of(number)} cannot be read: {error}") from error
    if manifest.get("format") != FORMAT:
        raise StorageError(
            f"manifest {path_of(number)} has format {manifest.get('format')}; this dynkit reads {FORMAT}"
        )
    if manifest.pop("hash", None) != _hash(manifest):
        raise StorageError(f"manifest {path_of(number)} is damaged: its hash does not fit")
    return manifest


def commit(store: Folder | Remote, operation: str, change: Callable[[Manifest | None], Manifest | None]) -> int:
    """Publish the next version.

    Parameters
    ----------
    store : Store
    operation : str
        What is done, for `Dataset.versions`.
    change : callable
        Makes the new manifest of the head's (None: there is no version yet), or None to give up; called again when
        another writer was faster. What it refers to must be durable when it returns.

    Returns
    -------
    int
        Number of the new version; 0 when `change` gave up.
    """
    for _ in range(_PATIENCE):
        parent = head(store)
        try:
            old = load(store, parent) if parent else None
        except NotFound:
            continue  # erased meanwhile, so there is a newer one
        changed = change(old)
        if changed is None:
            return 0
        manifest = {
            **changed,
            "format": FORMAT,
            "version": parent + 1,
            "parent": parent or None,
            "created_ns": time.time_ns(),
            "operation": operation,
        }
        text = json.dumps({**manifest, "hash": _hash(manifest)}, separators=(",", ":"))
        if store.create(path_of(parent + 1), text.encode()):
            return parent + 1
    raise Conflict(f"other writers were faster {_PATIENCE} times; try again")


def files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Every file that a version refers to, with its hash."""
    for entry in manifest["segments"]:
        yield from files_of(entry)
    for kind in LISTS[1:]:
        for entry in manifest[kind]:
            yield f"{kind}/{entry['id']}.arrow", entry["hash"]


def _hash(manifest: Manifest) -> str:
    return blake3(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
