"""Models as content-addressed tensors: stored once, checked when read, never unpickled.

A tensor's identity is BLAKE3 over dtype, shape and little-endian bytes; a model's is BLAKE3 over its manifest, the
sorted list of name and tensor identity. So equal models are one model, tied weights and unchanged layers cost
nothing, and every read is verified. New tensors go into a new pack file, flushed before the one catalog transaction
that publishes them; a crash leaves a pack that nothing refers to.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from blake3 import blake3

from dynkit.catalog import Catalog, models, tensors
from dynkit.disk import flush
from dynkit.errors import InvalidInput, NotFound, StorageError

__all__ = ["ModelStore", "manifest_id", "tensor_id"]

_ALIGNMENT = 64


def tensor_id(tensor: torch.Tensor) -> str:
    """Identity of a tensor: BLAKE3 of dtype, shape and bytes."""
    return _tensor_id(_dtype_name(tensor), list(tensor.shape), _raw(tensor))


def manifest_id(manifest: Mapping[str, str]) -> str:
    """Identity of a model: BLAKE3 of its sorted names and tensor identities."""
    return blake3(json.dumps(sorted(manifest.items()), separators=(",", ":")).encode()).hexdigest()


def _tensor_id(dtype: str, shape: list[int], raw: memoryview) -> str:
    return blake3(f"{dtype}:{','.join(map(str, shape))}:".encode()).update(raw).hexdigest()


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class ModelStore:
    """The models of one workspace.

    Parameters
    ----------
    catalog : Catalog

    Examples
    --------
    >>> import dynkit as dk, tempfile, torch
    >>> store = dk.Workspace(tempfile.mkdtemp()).models
    >>> model = store.add(torch.nn.Linear(2, 1).state_dict())
    >>> sorted(store.load(model))
    ['bias', 'weight']
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._packs = catalog.root / "models" / "packs"

    def add(self, state: Mapping[str, Any], also: Callable[[sa.Connection, str], None] | None = None) -> str:
        """Store the tensors of a state dict and return the model's identity.

        Parameters
        ----------
        state : mapping of name to tensor
        also : callable, optional
            Further writes for the same transaction, given the connection and the identity: either all is
            committed or nothing.

        Raises
        ------
        InvalidInput
            When something in the state is not a tensor.
        StorageError
            When the disk refuses; nothing was committed.
        """
        by_id: dict[str, torch.Tensor] = {}
        manifest: dict[str, str] = {}
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise InvalidInput(
                    f"state entry {name!r} is a {type(value).__name__}; a model's state must be tensors only "
                    "(keep other settings in its constructor)"
                )
            manifest[name] = tensor_id(value)
            by_id.setdefault(manifest[name], value)
        identity = manifest_id(manifest)
        new = self._unknown(by_id)
        with self._written_pack(new) as rows, self._catalog.write() as connection:
            if rows:
                connection.execute(sa.insert(tensors).prefix_with("OR IGNORE"), rows)
            row = {"id": identity, "manifest": manifest, "created_ns": time.time_ns()}
            connection.execute(sa.insert(models).prefix_with("OR IGNORE"), row)
            if also is not None:
                also(connection, identity)
        return identity

    def _unknown(self, by_id: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those that the store does not hold yet."""
        with self._catalog.read() as connection:
            known = set(connection.scalars(sa.select(tensors.c.id).where(tensors.c.id.in_(by_id))))
        return {key: tensor for key, tensor in by_id.items() if key not in known}

    @contextmanager
    def _written_pack(self, new: dict[str, torch.Tensor]) -> Iterator[list[dict[str, Any]]]:
        """Write a pack, yield its catalog rows; remove it again when they could not be committed."""
        if not new:
            yield []
            return
        name = f"{secrets.token_hex(8)}.pack"
        path = self._packs / name
        rows = []
        try:
            self._packs.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                for key, tensor in new.items():
                    stream.write(bytes(-stream.tell() % _ALIGNMENT))
                    raw = _raw(tensor)
                    where = {"pack": name, "offset": stream.tell(), "size_bytes": raw.nbytes, "codec": "raw"}
                    rows.append({"id": key, "dtype": _dtype_name(tensor), "shape": list(tensor.shape), **where})
                    stream.write(raw)
                stream.flush()
                os.fsync(stream.fileno())
            flush(self._packs)
            yield rows
        except Exception as error:  # an interrupt may come after the commit: then the pack stays
            with suppress(OSError):
                path.unlink()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise StorageError(f"cannot write model tensors to {path}: {error.strerror or error}") from error
            raise

    def load(self, model: str) -> dict[str, torch.Tensor]:
        """Read a model's tensors, each checked against its identity.

        Parameters
        ----------
        model : str
            Identity, or a beginning of it that fits only one model.

        Returns
        -------
        dict
            Name to tensor on the CPU.

        Raises
        ------
        NotFound
            When no model, or more than one, has this identity.
        StorageError
            When a tensor is missing or damaged.
        """
        manifest = self.manifest(model)
        with self._catalog.read() as connection:
            rows = connection.execute(sa.select(tensors).where(tensors.c.id.in_(set(manifest.values())))).all()
        loaded = {row.id: self._read(row) for row in rows}
        return {name: loaded[key] for name, key in manifest.items()}

    def _read(self, row: sa.Row[Any]) -> torch.Tensor:
        path = self._packs / row.pack
        try:
            with path.open("rb") as stream:
                stream.seek(row.offset)
                raw = bytearray(stream.read(row.size_bytes))
        except OSError as error:
            raise StorageError(f"model tensors {path} cannot be read: {error.strerror or error}") from error
        if _tensor_id(row.dtype, row.shape, memoryview(raw)) != row.id:
            raise StorageError(f"a tensor in {path} is damaged: its content does not hash to {row.id[:12]}")
        dtype = getattr(torch, row.dtype)
        if not raw:
            return torch.empty(row.shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=dtype).reshape(row.shape)

    def manifest(self, model: str) -> dict[str, str]:
        """Tensor name to tensor identity of a model; arguments and errors as `load`."""
        with self._catalog.read() as connection:
            query = sa.select(models.c.id, models.c.manifest).where(models.c.id.startswith(model, autoescape=True))
            found = connection.execute(query.limit(2)).all()
        if len(found) != 1:
            problem = "more than one model begins" if found else "no model begins"
            raise NotFound(f"{problem} with {model!r} in {self._catalog.root}; run.models() lists those of a run")
        manifest: dict[str, str] = found[0].manifest
        return manifest

    def size_bytes(self) -> int:
        """Bytes of all pack files."""
        return sum(path.stat().st_size for path in Path(self._packs).glob("*.pack"))
