"""Changes to a dataset: append, delete, label, compact; and what keeps it whole: verify and collect garbage.

Every change writes new files, makes them durable, and commits a manifest that refers to them; a crash before the
commit leaves files that nothing refers to, which `collect_garbage` removes.

Small appends are merged as digits of a number are: when the last `_FANOUT` segments are of one level, the append that
completed them merges them into one of the next level. So a dataset of n appends has about ``log(n)`` segments, every
sample was rewritten as often, and no append waits for a rewrite of everything.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from blake3 import blake3

from dynkit.data.arrays import Memory
from dynkit.data.fields import Array
from dynkit.data.labels import label_type, stored_fields, with_classes
from dynkit.data.manifest import LISTS, Manifest, commit, files, load, numbers, path_of, read
from dynkit.data.manifest import head as head_of
from dynkit.data.prepare import Prepared
from dynkit.data.segments import SEGMENT_BYTES, SegmentWriter, files_of, new_id, read_index, write_index, write_table
from dynkit.data.shards import threads
from dynkit.data.store import Folder, Remote, storage_errors
from dynkit.data.version import Version
from dynkit.errors import Conflict, InvalidInput, StorageError
from dynkit.time import IntArray

__all__ = [
    "ClassesChanged",
    "append",
    "collect_garbage",
    "compact",
    "delete",
    "empty_manifest",
    "relabel",
    "set_split",
    "verify",
    "with_side",
]

_FANOUT = 32
_BLOCK_BYTES = 32 << 20  # of a merge

Store = Folder | Remote
Entry = dict[str, Any]


def empty_manifest(schema: dict[str, Any]) -> Manifest:
    """Return what a dataset without samples refers to."""
    lists: Manifest = {name: [] for name in LISTS}
    return {"schema": schema, "splits": {}, "next_key": 0, "content": None, **lists}


def append(
    store: Store,
    prepared: Iterable[Prepared],
    *,
    codec: str,
    create: bool = False,
    also: Callable[[Manifest, int, Path], Manifest] | None = None,
    done: Callable[[int], None] | None = None,
) -> tuple[int, Callable[[], IntArray]]:
    """Write blocks of samples and commit them as one version.

    Parameters
    ----------
    store : Store
    prepared : iterable of Prepared
        Taken one at a time.
    codec : str
    create : bool
        Make the dataset; gives up when somebody else did.
    also : callable, optional
        A further change of the same commit: gets the manifest, the first of the new keys and the folder to write in.
    done : callable, optional
        Called with the number of samples of each block that was written.

    Returns
    -------
    tuple
        Number of the version (0: gave up), and what gives the samples' keys in the order in which they were given.
    """
    with storage_errors("cannot write the samples"), store.writing() as root:
        draft = _Draft(root, codec, _next_key(store))
        try:
            for block in prepared:
                draft.add(block)
                if done is not None:
                    done(block.index.height)
            draft.close()

            def change(old: Manifest | None) -> Manifest | None:
                draft.offered = False  # what was, is not there: another writer was faster
                if create and old is not None:
                    return None
                manifest = old or {**empty_manifest(draft.schema), "content": draft.content.hexdigest()}
                draft.move_keys(manifest["next_key"])
                store.keep(root, draft.files())
                changed = {
                    **manifest,
                    "schema": {
                        **manifest["schema"],
                        "label": _joined(manifest["schema"]["label"], draft.schema["label"]),
                    },
                    "segments": [*manifest["segments"], *draft.entries],
                    "next_key": draft.entries[-1]["end_key"],
                }
                if also is not None:
                    changed = also(changed, draft.entries[0]["first_key"], root)
                merged = _merge_tail(store, root, changed, codec)
                draft.offered = True
                return merged

            number = commit(store, "create" if create else "append", change)
        except BaseException:
            if not draft.offered:  # else it may be committed; if it is not, gc removes it
                draft.discard()
            raise
        if not number:
            draft.discard()
        return number, draft.keys


class _Draft:
    """Segments that are being written."""

    def __init__(self, root: Path, codec: str, first_key: int) -> None:
        self._root, self._codec, self._first_key = root, codec, first_key
        self._writer: SegmentWriter | None = None
        self._started: list[str] = []
        self._orders: list[tuple[int, Array | None]] = []  # rows of each block, and how they were sorted
        self.entries: list[Entry] = []
        self.schema: dict[str, Any] = {}
        self.content = blake3()
        self.offered = False  # to be committed

    def add(self, block: Prepared) -> None:
        """Write a block to the segment at hand; when it is full, complete it."""
        self.schema = block.schema
        self.content.update(bytes.fromhex(block.content_hash()))
        self._orders.append((block.index.height, block.order))
        if self._writer is None:
            self._writer = SegmentWriter(self._root, stored_fields(block.schema), self._codec)
            self._started.append(self._writer.id)
        self._writer.write(block.index, block.fields)
        if self._writer.size_bytes >= SEGMENT_BYTES:
            self._complete()

    def close(self) -> None:
        """Complete the last segment."""
        self._complete()
        if not self.entries:
            raise InvalidInput("the data has no rows; nothing to store")

    def _complete(self) -> None:
        if self._writer is not None:
            first_key = self.entries[-1]["end_key"] if self.entries else self._first_key
            level = 0 if self._writer.size_bytes < SEGMENT_BYTES // 4 else None
            self.entries.append(self._writer.close(first_key, level=level))
            self._writer = None

    def move_keys(self, first_key: int) -> None:
        """Give other keys when another writer took these."""
        move = first_key - self.entries[0]["first_key"]
        if move:
            for entry in self.entries:
                path = self._root / "segments" / f"{entry['id']}.arrow"
                index = read_index(path)
                index = index.with_columns(key=(pl.col("key").cast(pl.Int64) + move).cast(pl.UInt64)).rechunk()
                path.unlink()  # what is mapped stays as it was
                entry["index_hash"] = write_index(self._root, entry["id"], index)
                entry["first_key"] += move
                entry["end_key"] += move

    def keys(self) -> IntArray:
        """Keys of the samples in the order in which they were given."""
        first, end = self.entries[0]["first_key"], self.entries[-1]["end_key"]
        keys: IntArray = np.arange(first, end)
        start = 0
        for rows, order in self._orders:
            if order is not None:
                keys[start + order] = np.arange(first + start, first + start + rows)
            start += rows
        return keys

    def files(self) -> list[str]:
        """All files written, relative to the dataset."""
        return [path for entry in self.entries for path, _ in files_of(entry)]

    def discard(self) -> None:
        """Delete what was written."""
        if self._writer is not None:
            self._writer.abandon()
        for segment in self._started:
            _discard(self._root, segment)


def _discard(root: Path, segment: str) -> None:
    shutil.rmtree(root / "segments" / f"{segment}.zarr", ignore_errors=True)
    (root / "segments" / f"{segment}.arrow").unlink(missing_ok=True)


def _next_key(store: Store) -> int:
    number = head_of(store)
    return int(load(store, number)["next_key"]) if number else 0


class ClassesChanged(Conflict):
    """Another writer gave the codes of this one's new label classes to its own."""


def _joined(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the label of the head with the classes that a draft adds."""
    if old is None or new is None or old["classes"] is None:
        return old
    shared = min(len(old["classes"]), len(new["classes"]))
    if old["classes"][:shared] != new["classes"][:shared]:
        raise ClassesChanged("another writer added label classes at the same time; append again")
    return max(old, new, key=lambda label: len(label["classes"]))


def _merge_tail(store: Store, root: Path, manifest: Manifest, codec: str) -> Manifest:
    """Merge the last segments when a level is full."""
    while True:
        tail = manifest["segments"][-_FANOUT:]
        levels = {entry["level"] for entry in tail}
        too_large = sum(entry["bytes"] for entry in tail) > SEGMENT_BYTES
        if len(tail) < _FANOUT or len(levels) > 1 or levels == {None} or too_large:
            return manifest
        merged = _rewrite(store, root, manifest, tail, codec, level=levels.pop() + 1, fold=False)
        assert merged is not None, "nothing is dropped"
        manifest = {**manifest, "segments": [*manifest["segments"][:-_FANOUT], merged]}


def _rewrite(
    store: Store, root: Path, manifest: Manifest, entries: list[Entry], codec: str, *, level: int | None, fold: bool
) -> Entry | None:
    """Copy adjacent segments into one.

    Parameters
    ----------
    fold : bool
        Leave deleted samples out and put late labels in; else copy all as it is.

    Returns
    -------
    dict or None
        The new entry; None when no sample is left.
    """
    for path, known in (file for entry in entries for file in files_of(entry)):
        if store.checksum(path) != known:  # else damage would get a fresh hash
            raise StorageError(f"{path} is damaged: its hash does not fit; nothing was rewritten")
    lists = {name: manifest[name] if fold else [] for name in ("tombstones", "labels")}
    source = Version(store, {**manifest, **lists, "version": 0, "segments": entries})
    table = source.columns().sort("key")
    if not table.height:
        return None
    writer, memory = SegmentWriter(root, source.stored_fields, codec), Memory()
    try:
        block_rows = max(1, _BLOCK_BYTES // source.row_bytes)
        for index in table.iter_slices(block_rows):
            keys = index["key"].to_numpy().astype(np.int64)
            writer.write(index, source.gather_stored(source.rows_of(keys), memory=memory))
        entry = writer.close(0, level=level)
    except BaseException:
        writer.abandon()
        _discard(root, writer.id)
        raise
    store.keep(root, [path for path, _ in files_of(entry)])
    return entry


def delete(store: Store, keys: Callable[[Version], IntArray]) -> int:
    """Commit a version without these samples; `keys` finds them in the head. Returns its number."""
    with storage_errors("cannot delete"), store.writing() as root:

        def change(old: Manifest | None) -> Manifest | None:
            assert old is not None
            head = Version(store, old)
            chosen = np.unique(keys(head))
            if not len(chosen):
                return None
            head.rows_of(chosen)  # all there?
            return with_side(store, root, old, "tombstones", pl.DataFrame({"key": chosen.astype(np.uint64)}))

        return commit(store, "delete", change) or head_of(store)


def relabel(store: Store, keys: IntArray, labels: pl.Series) -> int:
    """Commit a version in which these samples have these labels; return its number."""
    with storage_errors("cannot label"), store.writing() as root:

        def change(old: Manifest | None) -> Manifest | None:
            assert old is not None
            if not len(keys):
                return None
            label = old["schema"]["label"]
            Version(store, old).rows_of(keys)  # all there?
            if label["classes"] is not None:
                label = with_classes(label, labels.drop_nulls().unique(maintain_order=True))
            frame = pl.DataFrame({"key": keys.astype(np.uint64), "label": labels.cast(label_type(label))})
            changed = {**old, "schema": {**old["schema"], "label": label}}
            return with_side(store, root, changed, "labels", frame)

        return commit(store, "label", change) or head_of(store)


def with_side(store: Store, root: Path, manifest: Manifest, kind: str, frame: pl.DataFrame) -> Manifest:
    """Add a small table to a manifest: tombstones, labels or watched files. Many are joined into one."""
    entries = manifest[kind]
    if len(entries) >= _FANOUT:
        frame = pl.concat([*(read_index(store.local(f"{kind}/{entry['id']}.arrow")) for entry in entries), frame])
        entries = []
        if kind != "tombstones":  # the last word counts
            frame = frame.unique(frame.columns[0], keep="last", maintain_order=True)
    name = new_id()
    path = f"{kind}/{name}.arrow"
    write_table(root / path, frame)
    store.keep(root, [path])
    entry = {"id": name, "rows": frame.height, "hash": blake3().update_mmap(root / path).hexdigest()}
    return {**manifest, kind: [*entries, entry]}


def set_split(store: Store, name: str, rule: dict[str, Any]) -> int:
    """Commit a version with a named split; return its number."""

    def change(old: Manifest | None) -> Manifest | None:
        assert old is not None
        if old["splits"].get(name, rule) != rule:
            raise Conflict(f"split {name!r} exists with another rule: {old['splits'][name]}; choose another name")
        return {**old, "splits": {**old["splits"], name: rule}} if name not in old["splits"] else None

    with storage_errors("cannot write the split"), store.writing():
        return commit(store, "split", change)


def compact(store: Store, codec: str, *, erase: bool) -> int:
    """Rewrite small segments and those with deleted or relabelled samples; return the new version's number.

    To `erase`, delete every earlier version and every file that the new one does not need.
    """
    with storage_errors("cannot compact"), store.writing(alone=erase) as root:
        written: dict[str, Entry | None] = {}

        def change(old: Manifest | None) -> Manifest | None:
            assert old is not None
            segments: list[Entry] = []
            for group in _groups(Version(store, old)):
                if len(group) == 1 and not group[0][1]:
                    segments.append(group[0][0])
                    continue
                entries = [entry for entry, _ in group]
                name = "+".join(entry["id"] for entry in entries)
                if name not in written or any(affected for _, affected in group):
                    written[name] = _rewrite(store, root, old, entries, codec, level=None, fold=True)
                made = written[name]
                segments += [] if made is None else [made]
            changed = {**old, "segments": segments, "tombstones": [], "labels": []}
            return _without_unused_classes(store, changed) if erase else changed

        number = commit(store, "erase" if erase else "compact", change)
        if erase:
            manifest = load(store, number)
            store.remove(path_of(n) for n in numbers(store) if n < number)
            known = {path_of(number), *(path for path, _ in files(manifest))}
            store.remove(store.orphans(known, erase=True))
        return number


def _without_unused_classes(store: Store, manifest: Manifest) -> Manifest:
    """Forget the names of classes that no sample has any more; the codes of the others stay."""
    label = manifest["schema"]["label"]
    if label is None or not label["classes"]:
        return manifest
    used = set(Version(store, {**manifest, "version": 0}).columns(["label"])["label"])
    classes = [name if name in used else f"erased {code}" for code, name in enumerate(label["classes"])]
    return {**manifest, "schema": {**manifest["schema"], "label": {**label, "classes": classes}}}


def _groups(version: Version) -> list[list[tuple[Entry, bool]]]:
    """Adjacent segments that make one of full size together, each with whether it has samples to change."""
    late = version.late_labels
    touched = np.sort(
        np.concatenate([version.deleted, *([late["key"].to_numpy().astype(np.int64)] if late is not None else [])])
    )
    groups: list[list[tuple[Entry, bool]]] = []
    size = 0
    for entry in version.segments:
        low, high = np.searchsorted(touched, [entry["first_key"], entry["end_key"]])
        if not groups or size + entry["bytes"] > SEGMENT_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((entry, bool(low < high)))
        size += entry["bytes"]
    return groups


def collect_garbage(store: Store) -> list[str]:
    """Delete files that no version refers to: what an interrupted writer left. Returns their paths."""
    with storage_errors("cannot collect garbage"), store.writing(alone=True):
        known = set()
        for number in numbers(store):
            known |= {path_of(number), *(path for path, _ in files(load(store, number)))}
        orphans = store.orphans(known)
        store.remove(orphans)
        return orphans


def verify(store: Store) -> None:
    """Compare every file of every version with its hash.

    Raises
    ------
    StorageError
        Names each file that is missing or damaged.
    """
    hashes: dict[str, str] = {}
    problems = []
    for number in numbers(store):
        try:
            hashes.update(files(read(store, number)))
        except StorageError as error:
            problems.append(str(error))

    def check(item: tuple[str, str]) -> str | None:
        path, expected = item
        try:
            found = store.checksum(path)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return None if found == expected else f"{path} is damaged"

    with storage_errors("cannot verify"):
        problems += filter(None, threads().map(check, sorted(hashes.items())))
    if problems:
        raise StorageError(f"{len(problems)} of {len(hashes)} files: {'; '.join(problems)}")
