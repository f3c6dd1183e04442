"""Models as content-addressed tensors: stored once, as differences where that is smaller, checked when read.

`ModelStore.put` hashes the tensors of a state dict, takes those that the store does not hold yet and codes them
(`encoding`), predicted from the parents' tensors (`prediction`). They go into a new pack file, flushed before the one
catalog transaction that publishes them; a crash leaves a file that nothing refers to. Writers do not wait for each
other: one that relied on a tensor that was removed meanwhile starts over.

Lossless: a model comes back with the bits that it was stored with. Only a `policy` gives up bits, and what it makes is
another model. Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from torch.nn.parameter import is_lazy

from dynkit.catalog import Catalog, edges, insert_missing, models, names, packs
from dynkit.errors import Conflict, InvalidInput, StorageError
from dynkit.models.encoding import Ref
from dynkit.models.guard import Guard
from dynkit.models.reading import Reader
from dynkit.models.records import Stored, resolved, stored
from dynkit.models.shelf import GoneError, Shelf
from dynkit.models.sizes import Stats, measured
from dynkit.models.tensors import dtype_name, tensor_id
from dynkit.models.upkeep import Damage, Freed, collect, inspect, rewrite
from dynkit.models.writing import Also, Draft, bases_of, commit

__all__ = ["ModelStore", "OpenModel"]

_ATTEMPTS = 10
_GRACE_S = 3600.0


class ModelStore:
    """The models of one workspace.

    Wherever a method takes a model, that is its identity, a beginning of it that fits only one model, or a name.

    Parameters
    ----------
    catalog : Catalog

    Examples
    --------
    >>> import dynkit as dk, tempfile, torch
    >>> store = dk.Workspace(tempfile.mkdtemp()).models
    >>> base = torch.nn.Linear(200, 100).state_dict()
    >>> first = store.put(base, name="base")
    >>> second = store.put({**base, "weight": base["weight"] * 1.001}, parents=[first])
    >>> store.load(second)["weight"].equal(base["weight"] * 1.001)
    True
    >>> store.load("base")["bias"].equal(base["bias"])
    True
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._shelf = Shelf(catalog)

    def put(
        self,
        state: Mapping[str, Any],
        parents: str | Sequence[str] = (),
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        policy: Guard | None = None,
        also: Also | None = None,
    ) -> str:
        """Store the tensors of a state dict and return the model's identity.

        Parameters
        ----------
        state : mapping of name to tensor
            Anything that is tensors: weights, buffers, optimizer states (flatten nested ones, such as
            ``{f"optimizer.{i}.{k}": tensor}``).
        parents : str or sequence of str
            Models that it was made from: its parents in the lineage, and what its tensors are predicted from.
        name : str, optional
            What to call it from now on. A name that is taken moves only from a parent to its child.
        metadata : mapping, optional
            JSON values, kept with the model. Those of a model that is there already are added to.
        policy : Guard, optional
            From `dynkit.guard`: store an approximation, if a test of yours says that it is as good.
        also : callable, optional
            Internal. Further writes for the same transaction, given the connection and the identity: all is committed
            or nothing. The lineage's edges are then left to it.

        Raises
        ------
        InvalidInput
            When something in the state is not a dense tensor, or the metadata is no JSON.
        NotFound
            When a parent is not in the store.
        Conflict
            When the name belongs to a model that is not a parent.
        StorageError
            When the disk refuses; nothing was committed.
        """
        tensors = dense_tensors(state)
        kept = _json(metadata or {})
        given = [parents] if isinstance(parents, str) else parents
        ancestors = tuple(dict.fromkeys(self.resolve(parent) for parent in given))
        step = 0.0
        if policy is not None:
            tensors, step, evidence = policy.applied(tensors, bases_of(self._shelf, tensors, ancestors))
            kept["guard"] = evidence
        ids = {key: bytes.fromhex(tensor_id(tensor)) for key, tensor in tensors.items()}
        draft = Draft(tensors, ids, ancestors, name, kept, step)
        for _ in range(_ATTEMPTS):
            try:
                commit(self._shelf, draft, also)
            except GoneError:
                continue
            return draft.identity
        raise StorageError(f"tensors in {self._shelf.folder} were removed {_ATTEMPTS} times while a model was written")

    def load(self, model: str) -> dict[str, torch.Tensor]:
        """Read a model's tensors, each checked against its identity.

        Returns
        -------
        dict
            Name to tensor on the CPU, in the order that they were put in.

        Raises
        ------
        NotFound
            When no model, or more than one, goes by this.
        StorageError
            When a tensor is missing or damaged.
        """
        return next(iter(self.load_many([model]).values()))

    def load_many(self, models: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        """Read several models; equal tensors are in memory once, so changing one in place changes it in all.

        Returns
        -------
        dict
            The models as they were given, each as from `load`.
        """
        found = self._stored(models)
        refs = list(dict.fromkeys(ref for one in found.values() for ref in one.refs.values()))
        with Reader(self._shelf) as reader:
            reader.prepare(pack for pack, _ in refs)
            loaded = {ref: reader.tensor(ref) for ref in refs if reader.remembers(ref)}
            others = [ref for ref in refs if ref not in loaded]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                loaded |= zip(others, pool.map(reader.tensor, others), strict=True)
        return {model: {name: loaded[ref] for name, ref in one.refs.items()} for model, one in found.items()}

    def open(self, model: str) -> "OpenModel":
        """Return a model whose tensors are read when they are asked for."""
        return OpenModel(self._shelf, self._stored([model])[model])

    def manifest(self, model: str) -> dict[str, str]:
        """Tensor name to tensor identity of a model."""
        one = self._stored([model])[model]
        with Reader(self._shelf) as reader:
            reader.prepare(pack for pack, _ in one.refs.values())
            return {name: reader.frame(ref).id.hex() for name, ref in one.refs.items()}

    def metadata(self, model: str) -> dict[str, Any]:
        """Return what was given with a model, and the evidence of its guard."""
        return self._stored([model])[model].metadata

    def resolve(self, model: str) -> str:
        """Return the whole identity of a model."""
        with self._catalog.read() as connection:
            return resolved(connection, model)

    def names(self) -> dict[str, str]:
        """Names, and the identity of the model that each is for."""
        with self._catalog.read() as connection:
            return {row.name: row.model for row in connection.execute(sa.select(names).order_by(names.c.name))}

    def __repr__(self) -> str:
        return f"ModelStore({str(self._shelf.folder)!r}, {len(self)} models)"

    def __len__(self) -> int:
        with self._catalog.read() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(models)) or 0)

    def __contains__(self, model: object) -> bool:
        with self._catalog.read() as connection:
            return connection.scalar(sa.select(models.c.id).where(models.c.id == model)) is not None

    def __iter__(self) -> Iterator[str]:
        """Identities, oldest first."""
        with self._catalog.read() as connection:
            query = sa.select(models.c.id).order_by(models.c.created_ns, models.c.id)
            return iter(connection.scalars(query).all())

    def remove(self, model: str) -> None:
        """Forget a model and its names; `gc` frees what no other model needs.

        What was made from it comes from its parents then, and its next version follows the one before it.

        Raises
        ------
        Conflict
            When it belongs to a run.
        """
        identity = self.resolve(model)
        try:
            with self._catalog.write() as connection:
                connection.execute(sa.delete(names).where(names.c.model == identity))
                _bridge(connection, identity)
                connection.execute(sa.delete(edges).where((edges.c.child == identity) | (edges.c.parent == identity)))
                connection.execute(sa.delete(models).where(models.c.id == identity))
        except Conflict:
            raise Conflict(f"the model {identity[:12]} belongs to a run, which needs it") from None

    def stats(self) -> Stats:
        """Measure what the models are and what they take on disk."""
        return measured(self._shelf)

    def verify(self, model: str) -> None:
        """Read a model from the disk and compare every tensor with its identity.

        Raises
        ------
        StorageError
            Names each tensor that is missing or damaged.
        """
        one = self._stored([model])[model]
        damage = inspect(self._shelf, [one], deep=True)
        if damage:
            raise StorageError(f"the model {one.id[:12]} is damaged: " + "; ".join(map(str, damage)))

    def fsck(self, deep: bool = False) -> list[Damage]:
        """Compare all that is stored with its checksums; `deep` decodes it and compares identities.

        Returns
        -------
        list of Damage
            Each damaged or missing tensor and the models that it makes unreadable; empty when all is well.
        """
        with self._catalog.read() as connection:
            everything = list(stored(connection).values())
        return inspect(self._shelf, everything, deep=deep)

    def tensors(self) -> set[str]:
        """Return identities of all tensors in the packs, whether a model has them or not."""
        with self._catalog.read() as connection:
            ids = list(connection.scalars(sa.select(packs.c.id)))
        with Reader(self._shelf) as reader:
            reader.prepare(ids)
            return {frame.id.hex() for id in ids for frame in reader.pack(id).frames if frame is not None}

    def gc(self, *, grace_s: float = _GRACE_S, garbage: float = 0.25) -> Freed:
        """Remove tensors that no model needs, directly or to predict others from.

        Parameters
        ----------
        grace_s : float
            Files that are in no catalog stay for so long: a writer may be about to commit them.
        garbage : float
            A pack is written anew when more than this share of it is not needed; 0 leaves none of it on the disk.
        """
        return collect(self._shelf, grace_s, garbage)

    def repack(self) -> Freed:
        """Look for smaller ways to store every tensor, now that the lineage is known, and join small files."""
        return rewrite(self._shelf)

    def import_safetensors(
        self,
        path: str | os.PathLike[str],
        parents: Sequence[str] = (),
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Store the tensors of a safetensors file; its own metadata is kept, too. Otherwise as `put`."""
        state, own = read_safetensors(path)
        return self.put(state, parents, name, {**own, **(metadata or {})})

    def export_safetensors(self, model: str, path: str | os.PathLike[str]) -> None:
        """Write a model as a safetensors file; tied tensors become separate ones."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        state = self.load(model)
        described = {key: value for key, value in self.metadata(model).items() if isinstance(value, str)}
        copies = {name: tensor.clone() for name, tensor in state.items()}
        target = Path(path)
        draft = target.with_name(f".{target.name}.draft")
        try:
            save_file(copies, draft, described)
            draft.replace(target)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise StorageError(f"cannot write {target}: {error}") from error
        finally:
            draft.unlink(missing_ok=True)

    def _stored(self, given: Sequence[str]) -> dict[str, Stored]:
        with self._catalog.read() as connection:
            found = stored(connection, set(given))  # most are given by their whole identities
            identities = {model: model if model in found else resolved(connection, model) for model in given}
            found |= stored(connection, set(identities.values()) - found.keys())
        return {model: found[identity] for model, identity in identities.items()}


class OpenModel(Mapping[str, torch.Tensor]):
    """A model whose tensors are read when they are asked for; from `ModelStore.open`."""

    def __init__(self, shelf: Shelf, model: Stored) -> None:
        self._shelf = shelf
        self._model = model

    @property
    def id(self) -> str:
        """Identity of the model."""
        return self._model.id

    def __getitem__(self, name: str) -> torch.Tensor:
        ref: Ref = self._model.refs[name]
        with Reader(self._shelf) as reader:
            return reader.tensor(ref)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.refs)

    def __len__(self) -> int:
        return len(self._model.refs)

    def __repr__(self) -> str:
        return f"OpenModel({self.id[:12]!r}, {len(self)} tensors, {self._model.raw_bytes:,} bytes)"


def _bridge(connection: sa.Connection, model: str) -> None:
    """Join what leads to a model with what it leads to."""
    before, after = edges.alias(), edges.alias()
    over = sa.select(before.c.parent, after.c.child, before.c.kind).join(after, before.c.kind == after.c.kind)
    over = over.where(before.c.child == model, after.c.parent == model, before.c.parent != after.c.child).distinct()
    insert_missing(connection, edges, [{**row._asdict(), "run": ""} for row in connection.execute(over)])


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, and its metadata.

    Raises
    ------
    InvalidInput
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{os.fspath(path)} cannot be read as safetensors: {error}") from error


def dense_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Check that a state is dense tensors by name.

    Raises
    ------
    InvalidInput
    """
    if not isinstance(state, Mapping):
        raise InvalidInput(
            f"a state is a mapping of name to tensor, not {type(state).__name__}; give module.state_dict()"
        )
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise InvalidInput(
                f"state entry {name!r} is a {type(value).__name__}; a model's state must be tensors only (keep other "
                "settings in its constructor or in metadata=, and flatten nested states)"
            )
        if is_lazy(value):
            raise InvalidInput(f"state entry {name!r} has no values yet: call the module once")
        if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.device.type == "meta":
            raise InvalidInput(
                f"state entry {name!r} is a {dtype_name(value.dtype)} tensor of layout {value.layout} on "
                f"{value.device}; a stored tensor must be dense and have data: use .to_dense() or .dequantize()"
            )
        if not isinstance(name, str):
            raise InvalidInput(f"state entry {name!r} has no name; names must be str")
    return {name: value.resolve_conj().resolve_neg() for name, value in state.items()}


def _json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"metadata={metadata!r} must be JSON values: {error}") from None
    return kept
