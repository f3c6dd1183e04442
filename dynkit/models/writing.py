"""Put a model into packs and the catalog.

New tensors are coded by a pool of threads, with tensors of the parents, and of their parents, as what they may be
predicted from. Tensors are matched by name; where a model calls them otherwise, by the end of the name.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import torch

from dynkit.catalog import FEW, batched, edges, insert_missing, packs, tensors
from dynkit.errors import NotFound
from dynkit.models.encoding import Frame, Ref, encode
from dynkit.models.packs import Written
from dynkit.models.reading import Reader
from dynkit.models.records import Stored, insert_model, move_name, stored
from dynkit.models.shelf import GoneError, Shelf
from dynkit.models.tensors import manifest_id

__all__ = ["Also", "Draft", "bases_of", "coded_tensor", "commit", "lineage_of", "related"]

Also = Callable[[sa.Connection, str], None]
Coded = tuple[Frame, bytes, torch.Tensor]  # from `encode`

_GENERATIONS = 8  # of ancestors that are looked at
_ANCESTORS = 12  # after which no further generation is
_LOSSY = 0.12  # the same of a rounded one
_USUAL = 0.6  # share of a tensor that is left of it, about
_ROOM = 4.0  # bits per element that a tensor gives to leave all of its bounds to its children
_BRANCHES = 3  # earlier tensors that are tried as well
_STEP = 0.1  # of the bounds that count as more room


@dataclass(frozen=True)
class Draft:
    """A model that is to be stored.

    Parameters
    ----------
    state : dict of name to Tensor
    ids : dict of name to bytes
        Identities of the tensors.
    parents : tuple of str
        Whole identities.
    name : str or None
    metadata : dict
    step : float
        Not 0: the state was quantised by this step.
    """

    state: dict[str, torch.Tensor]
    ids: dict[str, bytes]
    parents: tuple[str, ...]
    name: str | None
    metadata: dict[str, Any]
    step: float = 0.0

    @property
    def identity(self) -> str:
        """Identity of the model."""
        return manifest_id({name: id.hex() for name, id in self.ids.items()})

    @property
    def tensors(self) -> dict[bytes, tuple[str, torch.Tensor]]:
        """A name and the tensor of each identity; tied ones once."""
        return {id: (name, self.state[name]) for name, id in reversed(self.ids.items())}


def commit(shelf: Shelf, draft: Draft, also: Also | None) -> None:
    """Write a pack with what is new and publish the model.

    Raises
    ------
    GoneError
        Nothing was committed; to be tried again.
    """
    with Reader(shelf) as reader:
        known = _known(reader, draft.ids.values())
        new = {id: named for id, named in draft.tensors.items() if id not in known}
        coded = _coded(reader, draft, new)
    relied = {*known.values(), *(base for frame, *_ in coded for base in frame.bases)}
    if not coded:
        with shelf.catalog.write() as connection:
            _still_there(shelf, connection, relied)
            _publish(connection, draft, known, also)
        return
    with shelf.writing() as file:
        written = file.add((frame, data) for frame, data, _ in coded)
        shelf.publish(file)
        with shelf.catalog.write() as connection:
            shelf.check(file)
            _still_there(shelf, connection, relied)
            pack = _insert_pack(connection, file.name, written)
            refs = {frame.id: (pack, slot) for slot, (frame, *_) in enumerate(coded)}
            rows = [{"key": key_of(id), "pack": pack, "slot": slot} for id, (_, slot) in refs.items()]
            insert_missing(connection, tensors, rows)
            _publish(connection, draft, known | refs, also)
    for frame, _, tensor in coded:
        shelf.recent.put(frame.id, tensor)


def _known(reader: Reader, ids: Iterable[bytes]) -> dict[bytes, Ref]:
    """Find tensors that the store holds."""
    by_key = {key_of(id): id for id in ids}
    places: dict[bytes, Ref] = {}
    with reader.catalog.read() as connection:
        for part in batched(list(by_key)):
            for row in connection.execute(sa.select(tensors).where(tensors.c.key.in_(part))):
                places[by_key[row.key]] = (row.pack, row.slot)
    reader.prepare(pack for pack, _ in places.values())
    return {id: ref for id, ref in places.items() if (frame := reader.find(ref)) is not None and frame.id == id}


def key_of(id: bytes) -> int:
    """Key of a tensor in the catalog's index: the first 8 bytes of its identity."""
    return int.from_bytes(id[:8], "big", signed=True)


def _coded(reader: Reader, draft: Draft, new: Mapping[bytes, tuple[str, torch.Tensor]]) -> list[Coded]:
    if not new:
        return []
    with reader.catalog.read() as connection:
        parents, earlier = lineage_of(connection, draft.parents)
    reader.prepare({pack for model in (*parents, *earlier) for pack, _ in model.refs.values()})

    def code(item: tuple[bytes, tuple[str, torch.Tensor]]) -> Coded:
        id, (name, tensor) = item
        return coded_tensor(reader, id, tensor, *related(name, parents, earlier), step=draft.step)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(code, new.items()))


def lineage_of(connection: sa.Connection, parents: Iterable[str]) -> tuple[list[Stored], list[Stored]]:
    """Return the parents, and models before them: nearest first, a generation at a time."""
    direct = list(dict.fromkeys(parents))
    seen, generation = dict.fromkeys(direct), direct
    for _ in range(_GENERATIONS):
        if len(seen) - len(direct) >= _ANCESTORS:
            break
        query = (
            sa.select(edges.c.parent).where(edges.c.child.in_(generation[:FEW])).order_by(edges.c.kind, edges.c.parent)
        )
        generation = [model for model in dict.fromkeys(connection.scalars(query)) if model not in seen]
        seen |= dict.fromkeys(generation)
    found = stored(connection, seen)
    present = [model for model in seen if model in found]  # one may have been removed meanwhile
    return [found[model] for model in present if model in direct], [
        found[model] for model in present if model not in direct
    ]


def related(name: str, parents: Iterable[Stored], earlier: Iterable[Stored]) -> tuple[list[Ref], list[Ref]]:
    """Return tensors that go by this name: those of the parents, and earlier ones."""
    direct = [ref for model in parents if (ref := _matched(name, model.refs)) is not None]
    before = [ref for model in earlier if (ref := _matched(name, model.refs)) is not None]
    return list(dict.fromkeys(direct)), [ref for ref in dict.fromkeys(before) if ref not in direct]


def _matched(name: str, refs: Mapping[str, Ref]) -> Ref | None:
    """Tensor of this name, or the one whose name ends as this one does after a prefix was added or removed."""
    if name in refs:
        return refs[name]
    longer = [other for other in refs if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return refs[longer[0]] if len(longer) == 1 else None


def coded_tensor(
    reader: Reader, id: bytes, tensor: torch.Tensor, parents: list[Ref], earlier: list[Ref], *, step: float = 0.0
) -> Coded:
    """Code one tensor with those related ones that its decoding may depend on."""
    admits = reader.admits(tensor.nbytes)
    direct = _usable(reader, tensor, parents, _LOSSY if step else 0)
    before = _usable(reader, tensor, earlier, _LOSSY if step else _USUAL)
    nearest = _usable(reader, tensor, earlier[:1], 0)
    bases = [(ref, reader.base(ref)) for ref in dict.fromkeys([*direct, *nearest, *_branches(reader, tensor, before)])]
    ends = not _usable(reader, tensor, direct, _USUAL)

    def burden(refs: Sequence[Ref]) -> float:
        """Where the chain must end, a new branch is to have room for children."""
        return _ROOM * reader.used(refs, tensor.nbytes) if ends and not step else 0.0

    return encode(id, tensor, bases, parents=len(direct), admits=admits, burden=burden, step=step)


def _branches(reader: Reader, tensor: torch.Tensor, refs: Sequence[Ref]) -> list[Ref]:
    """Return the nearest tensor to depend on, and some others, each the nearest that leaves more room than the last."""
    found: list[Ref] = []
    limit = 1.0
    for ref in refs:
        if len(found) == _BRANCHES:
            break
        used = reader.used([ref], tensor.nbytes)
        if used <= limit:
            found.append(ref)
            limit = used - _STEP
    return found


def _usable(reader: Reader, tensor: torch.Tensor, refs: Iterable[Ref], share: float) -> list[Ref]:
    """Tensors that are there, and that one may depend on which takes this share of its bytes itself."""
    admits = reader.admits(tensor.nbytes)
    return [ref for ref in refs if reader.find(ref) is not None and admits([ref], int(share * tensor.nbytes))]


def bases_of(shelf: Shelf, state: Mapping[str, torch.Tensor], parents: Iterable[str]) -> dict[str, list[torch.Tensor]]:
    """Return the tensors of parents that each tensor can be predicted from; those of the nearest ancestor instead."""
    with Reader(shelf) as reader:
        with shelf.catalog.read() as connection:
            models, earlier = lineage_of(connection, parents)
        found = {}
        for name, tensor in state.items():
            direct, before = related(name, models, earlier)
            near = _usable(reader, tensor, direct, _LOSSY) or _usable(reader, tensor, before, _LOSSY)[:1]
            found[name] = [reader.base(ref) for ref in near]
        return found


def _still_there(shelf: Shelf, connection: sa.Connection, refs: Collection[Ref]) -> None:
    """Make sure, inside the transaction, that nobody removed these tensors, or their bases, since they were found."""
    with Reader(shelf, connection) as reader:
        reader.prepare(pack for pack, _ in refs)
        if None in reader.closure(refs).values():
            raise GoneError


def _insert_pack(connection: sa.Connection, file: str, written: Written) -> int:
    row = {"file": file, "offset": written.offset, "size": written.size}
    return int(connection.execute(sa.insert(packs).returning(packs.c.id), row).scalar_one())


def _publish(connection: sa.Connection, draft: Draft, refs: Mapping[bytes, Ref], also: Also | None) -> None:
    """Insert the model, its name and its place in the lineage."""
    identity = draft.identity
    gone = set(draft.parents) - stored(connection, draft.parents).keys()
    if gone:
        raise NotFound(f"the parent {sorted(gone)[0][:12]} was removed while its child was written")
    raw_bytes = sum(tensor.nbytes for tensor in draft.state.values())
    by_name = {name: refs[id] for name, id in draft.ids.items()}
    insert_model(connection, identity, by_name, raw_bytes, draft.metadata)
    if draft.name is not None:
        move_name(connection, draft.name, identity, draft.parents)
    if also is not None:
        also(connection, identity)
        return
    rows = [{"parent": parent, "child": identity, "kind": "derived", "run": ""} for parent in draft.parents]
    rows = [row for row in rows if row["parent"] != identity]
    insert_missing(connection, edges, rows)
