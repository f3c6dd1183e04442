"""Find where a model of unknown origin belongs: which stored models it may come from.

Every model is indexed once: the identities of its tensors, and a sketch of its weights of 128 numbers. To place a
model, an inverted index gives those that share tensors or a band of the sketch, so the cost follows the number of
relatives, not of models; they are ranked by shared tensors, then by how near the weights are, then by structure.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
import torch
from blake3 import blake3

from dynkit.catalog import Catalog, insert_missing, models, sketches, structures, tokens
from dynkit.data.hashing import mix
from dynkit.lineage.display import Shown, short, watched
from dynkit.models import ModelStore, tensor_id

__all__ = ["Candidate", "Placement", "catch_up", "index", "place", "slots_of"]

_DIMENSIONS = 128
_BANDS, _BAND_BITS = 16, 8
_PREFIX, _SPREAD = 256, 768  # values of a tensor that the sketch looks at: the first, and evenly spread ones
_PROBES = 64  # shared tensors to look for
_MOST = 200  # candidates to rank
_AT_ONCE = 400  # values in one query
_STRUCTURE_WEIGHT = 0.2  # equal structure alone says little: anyone may use an architecture
_PACKED = {torch.float4_e2m1fn_x2}  # several numbers a byte, which torch cannot take apart
_LARGEST = 1e30  # of a sum in a sketch, so that their squares stay finite
_STEP = np.uint64(0x9E3779B97F4A7C15)

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """A model that another may come from.

    Parameters
    ----------
    model : str
    confidence : float
        1 - (1 - shared) (1 - near) (1 - structure / 5), in [0, 1].
    shared : float
        Jaccard index of the sets of tensors: bit by bit equal ones.
    near : float
        Estimated cosine between the weights, 0 when it is negative; unrelated trainings are near 0.
    structure : float
        Jaccard index of names, types and shapes of tensors.
    """

    model: str
    confidence: float
    shared: float
    near: float
    structure: float


@dataclass(frozen=True, repr=False)
class Placement(Shown):
    """Candidates for the origin of a model, the most likely first; behaves like a sequence."""

    candidates: tuple[Candidate, ...]
    identity: str | None = None  # of the model itself, when it is already stored

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, i: int) -> Candidate:
        return self.candidates[i]

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        facts = [f"it is stored already, as {self.identity[:12]}"] if self.identity else []
        columns = ("model", "confidence", "shared tensors", "near", "structure")
        rows = [(short(c.model), c.confidence, c.shared, c.near, c.structure) for c in self.candidates]
        return f"{len(rows)} candidates", facts, columns, rows


def slots_of(state: State) -> list[list[Any]]:
    """Names, types and shapes of the tensors, sorted by name."""
    return sorted([name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items())


def sketch(state: State) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Project the weights to (128,) float32 so that distances are kept (CountSketch).

    Matrices and larger tensors count; vectors (norms, biases) only where there is nothing else, because many begin
    alike. Of each tensor about a thousand values are looked at, at places that stay the same when rows are added.

    References
    ----------
    M. Charikar, K. Chen, M. Farach-Colton, "Finding frequent items in data streams", ICALP 2002, section 3: each
    value is added, with a random sign, to one of the sums.
    """
    floating = {name: t for name, t in state.items() if t.is_floating_point() and t.numel() and t.dtype not in _PACKED}
    large = {name: t for name, t in floating.items() if t.ndim > 1}
    sums = np.zeros(_DIMENSIONS)
    for name, tensor in (large or floating).items():
        n = tensor.numel()
        stride = 1 << max(0, int(np.ceil(np.log2(n / _SPREAD))))
        places = np.union1d(np.arange(min(n, _PREFIX)), np.arange(0, n, stride))
        values = tensor.detach().reshape(-1)[torch.from_numpy(places).to(tensor.device)].double().cpu().numpy()
        seed = np.frombuffer(blake3(name.encode()).digest(8), np.uint64)
        bits = mix(seed + places.astype(np.uint64) * _STEP)
        signs = np.where(bits & np.uint64(_DIMENSIONS), 1.0, -1.0)
        weights = np.nan_to_num(values, posinf=0.0, neginf=0.0) * signs * np.sqrt(n / len(places))
        sums += np.bincount((bits % np.uint64(_DIMENSIONS)).astype(np.int64), weights, _DIMENSIONS)
    return np.clip(sums, -_LARGEST, _LARGEST).astype(np.float32)


def _bands(sketched: "np.ndarray[Any, Any]") -> list[int]:
    """Tokens of the sketch: signs of 8 numbers each (random hyperplanes, Charikar 2002), with the band's number."""
    bits = (sketched > 0).reshape(_BANDS, _BAND_BITS) @ (1 << np.arange(_BAND_BITS))
    return [int(token) for token in bits + (np.arange(_BANDS) << _BAND_BITS)]


def _tokens(manifest: Mapping[str, str]) -> list[int]:
    """First 64 bits of the identities of the tensors, each once, in a fixed order."""
    return sorted({int(identity[:16], 16) - 2**63 for identity in manifest.values()})


def index(connection: sa.Connection, model: str, state: State, manifest: Mapping[str, str]) -> None:
    """Make a stored model findable by `place`."""
    slots = slots_of(state)
    structure = blake3(repr(slots).encode()).hexdigest()
    insert_missing(connection, structures, {"id": structure, "slots": slots})
    sketched, shared = sketch(state), _tokens(manifest)
    row = {"model": model, "structure": structure, "tensors": len(shared), "sketch": sketched.tobytes()}
    if insert_missing(connection, sketches, row):
        number = connection.scalar(sa.select(sketches.c.number).where(sketches.c.model == model))
        found = {*shared, *_bands(sketched)}
        connection.execute(sa.insert(tokens), [{"token": token, "number": number} for token in found])


def catch_up(catalog: Catalog, store: ModelStore) -> int:
    """Index the models that are not indexed yet, such as those of new runs; return how many."""
    with catalog.read() as connection:
        query = sa.select(models.c.id).where(models.c.id.not_in(sa.select(sketches.c.model)))
        left = list(connection.scalars(query))
    for model in watched(left, "index models"):
        state, manifest = store.load(model), store.manifest(model)
        with catalog.write() as connection:
            index(connection, model, state, manifest)
    return len(left)


def place(connection: sa.Connection, state: State, limit: int, identity: str) -> Placement:
    """Rank the models that `state` may come from; those that are not indexed are not seen.

    Parameters
    ----------
    connection : Connection
    state : mapping of name to tensor
    limit : int
        Most candidates to return.
    identity : str
        Of the model; it is no candidate for itself.
    """
    sketched = sketch(state).astype(np.float64)
    mine = _tokens({name: tensor_id(tensor) for name, tensor in state.items()})
    numbers = _relatives(connection, mine, _bands(sketched))
    slots = {str(slot) for slot in slots_of(state)}
    alike = _structures(connection, slots)
    if len(numbers) < limit:  # then by structure alone: the newest of each
        for structure in sorted(alike, key=lambda one: -alike[one])[:limit]:
            newest = sa.select(sketches.c.number).where(sketches.c.structure == structure)
            numbers += connection.scalars(newest.order_by(sketches.c.number.desc()).limit(limit))
    numbers = list(dict.fromkeys(numbers))
    common = _common(connection, numbers, mine)
    found = []
    for some in _in_parts(numbers):
        for row in connection.execute(sa.select(sketches).where(sketches.c.number.in_(some))):
            shared = common[row.number] / max(row.tensors + len(mine) - common[row.number], 1)
            near = _cosine(sketched, np.frombuffer(row.sketch, np.float32).astype(np.float64))
            fit = alike.get(row.structure, 0.0)
            confidence = 1 - (1 - shared) * (1 - near) * (1 - _STRUCTURE_WEIGHT * fit)
            found.append(Candidate(row.model, confidence, shared, near, fit))
    found.sort(key=lambda c: (c.confidence, c.shared, c.near, c.structure), reverse=True)
    others = tuple(one for one in found if one.model != identity)
    return Placement(others[:limit], identity if len(others) < len(found) else None)


def _relatives(connection: sa.Connection, mine: list[int], bands: list[int]) -> list[int]:
    """Return numbers of the models with most tensors and bands in common."""
    step = max(1, len(mine) // _PROBES)
    probes = [*mine[::step][:_PROBES], *bands]
    count = sa.func.count().label("n")
    query = sa.select(tokens.c.number).where(tokens.c.token.in_(probes)).group_by(tokens.c.number)
    return list(connection.scalars(query.order_by(count.desc(), tokens.c.number.desc()).limit(_MOST)))


def _structures(connection: sa.Connection, slots: set[str]) -> dict[str, float]:
    """Jaccard index of every known structure with this one, where there is something in common."""
    known = {row.id: {str(slot) for slot in row.slots} for row in connection.execute(sa.select(structures))}
    alike = {key: len(slots & theirs) / max(len(slots | theirs), 1) for key, theirs in known.items()}
    return {key: value for key, value in alike.items() if value > 0}


def _common(connection: sa.Connection, numbers: list[int], mine: list[int]) -> Counter[int]:
    """How many tensors each of these models has in common with this one."""
    found: Counter[int] = Counter()
    wanted = set(mine)
    for some in _in_parts(numbers):
        query = sa.select(tokens.c.number, tokens.c.token).where(tokens.c.number.in_(some))
        found.update(number for number, token in connection.execute(query) if token in wanted)
    return found


def _in_parts(numbers: list[int]) -> list[list[int]]:
    return [numbers[low : low + _AT_ONCE] for low in range(0, len(numbers), _AT_ONCE)]


def _cosine(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> float:
    """Cosine by the distance, which stays exact for vectors that nearly agree: 1 - |a/|a| - b/|b||^2 / 2."""
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(lengths):
        return 0.0
    return max(0.0, 1.0 - float(np.sum((a / lengths[0] - b / lengths[1]) ** 2)) / 2)
