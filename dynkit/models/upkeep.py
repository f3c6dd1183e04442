"""Look after packs: find damage, free what no model needs, store better what is there.

References never change, so a new file takes over from an old one in one transaction, while others read and write:
readers who miss the old file look up the new one, writers who relied on a freed tensor start over. `gc` and `repack`
exclude each other by a lock that ends with its process.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from xxhash import xxh3_64_intdigest

from dynkit import html
from dynkit.catalog import batched, edges, layouts, models, packs, tensors
from dynkit.errors import StorageError
from dynkit.models.encoding import Frame, Ref
from dynkit.models.packs import packs_at
from dynkit.models.reading import Reader
from dynkit.models.records import Stored, stored
from dynkit.models.shelf import Shelf
from dynkit.models.writing import coded_tensor, key_of, lineage_of, related

__all__ = ["Damage", "Freed", "collect", "inspect", "rewrite"]

_FILE_BYTES = 64 << 20  # of a file that repack makes of several
_SIBLINGS = 2
_WORTH = 0.99  # of its size that a frame must become, to be changed
_ATTEMPTS = 5


@dataclass(frozen=True)
class Damage:
    """A tensor that cannot be read.

    Parameters
    ----------
    tensor : str
        Its identity, or its place where the index of its pack is damaged.
    problem : str
    models : tuple of str
        Identities of the models that need it.
    """

    tensor: str
    problem: str
    models: tuple[str, ...]

    def __str__(self) -> str:
        return f"tensor {self.tensor[:12]}: {self.problem}"


@dataclass(frozen=True)
class Freed:
    """What an upkeep gave back.

    Parameters
    ----------
    tensors : int
        Removed, or stored in a smaller way.
    files : int
        Removed.
    size_bytes : int
        By which the pack files became smaller.
    """

    tensors: int
    files: int
    size_bytes: int

    def _repr_html_(self) -> str:
        rows = [(name, f"{value:,}") for name, value in vars(self).items()]
        return html.table(["freed", ""], rows, numbers=[""])


def inspect(shelf: Shelf, checked: Sequence[Stored], *, deep: bool) -> list[Damage]:
    """Check all tensors that some models need."""
    problems: dict[Ref, tuple[str, str]] = {}
    needs: dict[Ref, set[Ref]] = {}
    with shelf.anew() as fresh, Reader(fresh) as reader:

        def check(ref: Ref) -> set[Ref]:
            """Return the damaged tensors among this one and what it needs."""
            if ref not in needs:
                needs[ref] = set()
                try:
                    frame = reader.frame(ref)
                    for base in frame.bases:
                        needs[ref] |= check(base)
                    if xxh3_64_intdigest(reader.data(ref)[1]) != frame.checksum:
                        raise StorageError(f"its bytes in {reader.pack(ref[0]).file} do not fit their checksum")
                    if deep and not needs[ref]:
                        reader.base(ref)
                except StorageError as error:
                    problems[ref] = _name(reader, ref), str(error)
                    needs[ref].add(ref)
            return needs[ref]

        hit: dict[Ref, list[str]] = {}
        for model in checked:
            for ref in set().union(*(check(ref) for ref in model.refs.values())):
                hit.setdefault(ref, []).append(model.id)
    return [Damage(*problems[ref], tuple(hit[ref])) for ref in sorted(hit)]


def _name(reader: Reader, ref: Ref) -> str:
    try:
        return reader.frame(ref).id.hex()
    except StorageError:
        return f"{ref[0]}:{ref[1]}"


def collect(shelf: Shelf, grace_s: float, garbage: float) -> Freed:
    """Remove what no model needs; see `ModelStore.gc`."""
    with shelf.catalog.alone(shelf.folder):
        before, files = shelf.size_bytes(), len(shelf.sizes())
        for _ in range(_ATTEMPTS):
            removed = _collect_once(shelf, garbage)
            if removed is not None:
                break
        with shelf.catalog.write():  # so that no writer commits one in between
            shelf.discard(shelf.orphans(grace_s))
        after, left = shelf.size_bytes(), len(shelf.sizes())
    return Freed(removed or 0, files - left, before - after)


def _collect_once(shelf: Shelf, garbage: float) -> int | None:
    """Free once; None when a writer came between and needs one of the tensors."""
    with shelf.catalog.read() as connection:
        known, listed = stored(connection), packs_at(connection)
    with Reader(shelf) as reader:
        reader.prepare(listed)
        rows = {id: row for id, row in listed.items() if reader.known(id) is not None}
        needed = reader.closure(ref for model in known.values() for ref in model.refs.values())
        live = {ref for ref, frame in needed.items() if frame is not None}
        lost = listed.keys() - rows.keys() - {id for id, _ in needed}  # somebody removed their files; nobody needs them
        dead = {
            (id, slot)
            for id in rows
            for slot, frame in enumerate(reader.pack(id).frames)
            if frame is not None and (id, slot) not in live
        }
        victims = _wasteful(shelf, reader, rows, live, garbage)
        dropped = {ref for ref in dead if rows[ref[0]].file in victims}
        if not dropped and not victims and not lost:
            return 0
        ids = {ref: reader.frame(ref).id for ref in dead}  # a later put must not find what may lose its base
        kept = sorted({pack for pack, _ in live if rows[pack].file in victims})

        def also(connection: sa.Connection) -> None:
            if _needed_by_new(shelf, connection, known, listed) & dropped:
                raise _OvertakenError
            for part in batched(sorted(lost)):
                connection.execute(sa.delete(tensors).where(tensors.c.pack.in_(part)))
            empty = [id for id in rows if rows[id].file in victims and id not in kept]
            for part in batched([*empty, *lost]):
                connection.execute(sa.delete(packs).where(packs.c.id.in_(part)))
            if ids:
                named = [column == sa.bindparam(f"of_{column.name}") for column in tensors.c]
                rows_of = [{"of_key": key_of(id), "of_pack": ref[0], "of_slot": ref[1]} for ref, id in ids.items()]
                connection.execute(sa.delete(tensors).where(*named), rows_of)
            connection.execute(sa.delete(layouts).where(layouts.c.id.not_in(sa.select(models.c.layout))))

        try:
            _replace(shelf, {id: partial(_live_part, reader, id, live) for id in kept}, also)
        except _OvertakenError:
            return None
    shelf.discard(victims)
    return len(dropped)


def _live_part(reader: Reader, id: int, live: set[Ref]) -> Iterator[tuple[Frame | None, bytes]]:
    for slot in range(len(reader.pack(id).frames)):
        yield reader.data((id, slot)) if (id, slot) in live else (None, b"")


def _wasteful(shelf: Shelf, reader: Reader, rows: "dict[int, sa.Row[Any]]", live: set[Ref], garbage: float) -> set[str]:
    """Files of which more than this share is not needed."""
    useful = dict.fromkeys((row.file for row in rows.values()), 0)
    for id, slot in live:
        size = reader.frame((id, slot)).size
        useful[rows[id].file] += size
    alive = {id for id, _ in live}
    for id, row in rows.items():
        useful[row.file] += row.size if id in alive else 0
    sizes = shelf.sizes()
    dead_slots = {
        row.file
        for id, row in rows.items()
        if any(frame is not None and (id, slot) not in live for slot, frame in enumerate(reader.pack(id).frames))
    }
    return {
        file
        for file, used in useful.items()
        if not used or (file in dead_slots and sizes[file] - used >= garbage * sizes[file])
    }


def _needed_by_new(
    shelf: Shelf, connection: sa.Connection, known: "dict[str, Stored]", rows: "dict[int, sa.Row[Any]]"
) -> set[Ref]:
    """Tensors that models and packs rely on which were committed after `known` and `rows` were read."""
    fresh = set(connection.scalars(sa.select(models.c.id))) - known.keys()
    refs = {ref for model in stored(connection, fresh).values() for ref in model.refs.values()}
    added = set(connection.scalars(sa.select(packs.c.id))) - rows.keys()
    with Reader(shelf, connection) as reader:
        reader.prepare(added)
        frames = (frame for id in added for frame in reader.pack(id).frames if frame is not None)
        return set(reader.closure(refs | {base for frame in frames for base in frame.bases}))


def _replace(
    shelf: Shelf,
    content: Mapping[int, Callable[[], Iterable[tuple[Frame | None, Any]]]],
    also: Callable[[sa.Connection], None] = lambda connection: None,
) -> None:
    """Write packs into a new file and let the catalog point there; nothing happens when `also` raises."""
    if not content:
        with shelf.catalog.write() as connection:
            also(connection)
        return
    with shelf.writing() as file:
        placed = {id: file.add(frames()) for id, frames in content.items()}
        shelf.publish(file)
        with shelf.catalog.write() as connection:
            for id, written in placed.items():
                values = {"file": file.name, **vars(written)}
                connection.execute(sa.update(packs).where(packs.c.id == id).values(**values))
            also(connection)


class _OvertakenError(Exception):
    """A writer needs what was to be removed."""


def rewrite(shelf: Shelf) -> Freed:
    """Store every tensor in the smallest way that is found now; see `ModelStore.repack`."""
    improved = 0
    with shelf.catalog.alone(shelf.folder):
        before, files = shelf.size_bytes(), len(shelf.sizes())
        plan = _Plan(shelf)
        with shelf.catalog.read() as connection:
            rows = packs_at(connection)
        with Reader(shelf) as reader:
            reader.prepare(rows)
            for group in _groups(reader, rows):
                coded = {id: list(_recoded(reader, id, plan)) for id in group}
                better = sum(new for slots in coded.values() for _, _, new in slots)
                if better or len({rows[id].file for id in group}) > 1:
                    _replace(shelf, {id: partial(_without_note, slots) for id, slots in coded.items()})
                improved += better
        shelf.discard({row.file for row in rows.values()} - shelf.sizes().keys())
        after, left = shelf.size_bytes(), len(shelf.sizes())
    return Freed(improved, files - left, before - after)


class _Plan:
    """What a tensor may be predicted from: its namesakes in its model's ancestors and older siblings."""

    def __init__(self, shelf: Shelf) -> None:
        self._catalog = shelf.catalog
        with self._catalog.read() as connection:
            self._models = stored(connection)
        self._first: dict[Ref, tuple[str, str]] = {}  # the oldest model that has it, and its name there
        for model in self._models.values():
            for name, ref in model.refs.items():
                self._first.setdefault(ref, (model.id, name))
        self._families: dict[str, tuple[list[Stored], list[Stored]]] = {}

    def related(self, ref: Ref) -> tuple[list[Ref], list[Ref]] | None:
        """Tensors stored before this one; None when no model has it."""
        if ref not in self._first:
            return None
        model, name = self._first[ref]
        if model not in self._families:
            self._families[model] = self._family(model)
        direct, before = related(name, *self._families[model])
        return [other for other in direct if other < ref], [other for other in before if other < ref]

    def _family(self, model: str) -> tuple[list[Stored], list[Stored]]:
        made_from = sa.select(edges.c.parent).where(edges.c.child == model).order_by(edges.c.kind, edges.c.parent)
        with self._catalog.read() as connection:
            parents = list(dict.fromkeys(connection.scalars(made_from)))
            beside = sa.select(edges.c.child).where(edges.c.parent.in_(parents), edges.c.child != model).distinct()
            siblings = [self._models[id] for id in connection.scalars(beside) if id in self._models]
            direct, earlier = lineage_of(connection, parents)
        older = [other for other in siblings if other.created_ns < self._models[model].created_ns]
        older.sort(key=lambda other: -other.created_ns)
        return direct, [*older[:_SIBLINGS], *earlier]


def _recoded(reader: Reader, id: int, plan: _Plan) -> Iterator[tuple[Frame | None, bytes, bool]]:
    """Yield the frames of a pack, each as small as it can be, and whether it is new."""
    for slot, frame in enumerate(reader.pack(id).frames):
        ref = id, slot
        if frame is None:
            yield None, b"", False
            continue
        known = plan.related(ref)
        if known is not None:
            again, data, _ = coded_tensor(reader, frame.id, reader.base(ref), *known)
            bounded = reader.admits(frame.raw_bytes)(frame.bases, frame.size)
            stranded = any(plan.related(base) is None for base in frame.bases)  # it alone keeps what no model has
            if again.size < _WORTH * frame.size or not bounded or stranded:
                reader.plan(ref, again)
                yield again, data, True
                continue
        yield *reader.data(ref), False


def _without_note(slots: Iterable[tuple[Frame | None, bytes, bool]]) -> Iterator[tuple[Frame | None, bytes]]:
    return ((frame, data) for frame, data, _ in slots)


def _groups(reader: Reader, rows: "dict[int, sa.Row[Any]]") -> Iterator[list[int]]:
    """Packs that go into one file, in order."""
    group: list[int] = []
    size = 0
    for id in sorted(rows):
        group.append(id)
        size += sum(frame.size for frame in reader.pack(id).frames if frame is not None)
        if size >= _FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
