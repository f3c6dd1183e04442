"""Making datasets: of a declaration, or of their first samples."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from blake3 import blake3

from dynkit.catalog import Catalog, datasets, insert_missing
from dynkit.data import manifest, writing
from dynkit.data.dataset import Dataset, check_name
from dynkit.data.fields import parse_fields
from dynkit.data.prepare import RESERVED, Prepared, Roles, check_fields, prepare_all
from dynkit.data.shards import check_compression
from dynkit.data.sources import blocks, progress_bar, with_column
from dynkit.data.store import Folder, Remote, open_store, storage_errors
from dynkit.errors import Conflict, InvalidInput, did_you_mean

__all__ = ["create", "ingest"]


def create(
    catalog: Catalog,
    name: str,
    fields: Mapping[str, Any],
    *,
    label: Any = None,
    columns: Mapping[str, str] | None = None,
    compression: str = "auto",
) -> Dataset:
    """Make a dataset without samples; see `Workspace.create_dataset`."""
    store = _register(catalog, name)
    schema: dict[str, Any] = {
        "timestamp": "timestamp",
        "label": _declared_label(label),
        "features": [],
        "columns": _declared_columns(columns or {}, fields),
        "fields": {field: kind.to_json() for field, kind in check_fields(parse_fields(fields)).items()},
        "compression": _resolve(compression, store),
    }
    with storage_errors(f"cannot make dataset {name!r}"), store.writing():
        made = manifest.commit(store, "create", lambda old: None if old is not None else writing.empty_manifest(schema))
    dataset = Dataset(catalog, name)
    if not made and (_declared(dataset.schema) != schema or dataset.open().manifest["content"] is not None):
        raise Conflict(f"dataset {name!r} exists with other fields; ws.dataset({name!r}) opens it")
    return dataset


def ingest(
    catalog: Catalog,
    name: str,
    data: Any,
    *,
    timestamp: Any = None,
    label: Any = None,
    features: Sequence[str] | None = None,
    compression: str = "auto",
    progress: bool | None = None,
) -> Dataset:
    """Make a dataset of its first samples; see `Workspace.ingest`."""
    check_name(name, "dataset")
    source, total = blocks(data)
    if timestamp is None:
        timestamp = "timestamp"
    elif not isinstance(timestamp, str):
        source, timestamp = with_column(source, "timestamp", timestamp), "timestamp"
    named = isinstance(label, list | tuple) and all(isinstance(part, str) for part in label)
    if label is not None and not isinstance(label, str) and not named:
        source, label = with_column(source, "label", label), "label"
    roles = Roles(timestamp, label, features)
    store = open_store(catalog.root, catalog.storage, name)
    codec = _resolve(compression, store)
    prepared = prepare_all(source, roles, {"compression": codec})
    if not manifest.head(store):
        first = next(prepared)  # what is wrong with the data leaves nothing, not even a name
        store = _register(catalog, name)

        def again() -> Iterator[Prepared]:
            yield first
            yield from prepared

        with progress_bar(f"ingest {name}", total, progress) as done:
            number, _ = writing.append(store, again(), codec=codec, create=True, done=done)
        if number:
            return Dataset(catalog, name)
        prepared = prepare_all(blocks(data)[0], roles, {"compression": codec})
    hasher = blake3()
    for block in prepared:
        hasher.update(bytes.fromhex(block.content_hash()))
    dataset = Dataset(catalog, name)
    if dataset.open().manifest["content"] != hasher.hexdigest():
        raise Conflict(
            f"dataset {name!r} exists with other samples ({len(dataset)} in version {dataset.version}); "
            f"add to it with ws.dataset({name!r}).append(...), or choose another name"
        )
    return dataset


def _register(catalog: Catalog, name: str) -> Folder | Remote:
    check_name(name, "dataset")
    with catalog.write() as connection:
        row = {"name": name, "created_ns": time.time_ns()}
        insert_missing(connection, datasets, row)
    return open_store(catalog.root, catalog.storage, name)


def _resolve(compression: str, store: Folder | Remote) -> str:
    """Resolve ``"auto"``: on a local disk samples are read at memory speed; of a remote store, bytes take the time."""
    if check_compression(compression) != "auto":
        return compression
    return "zstd" if isinstance(store, Remote) else "none"


_COLUMNS = {"str": "String", "bool": "Boolean", "int64": "Int64", "float64": "Float64", "float32": "Float32"}


def _declared_columns(columns: Mapping[str, str], fields: Collection[str]) -> dict[str, str]:
    for name, kind in columns.items():
        if name in RESERVED or name in fields:
            raise InvalidInput(f"column {name!r} would be there twice; choose another name")
        if kind not in _COLUMNS:
            raise InvalidInput(f"column {name!r}: type {kind!r} is not known{did_you_mean(str(kind), _COLUMNS)}")
    return {name: _COLUMNS[kind] for name, kind in columns.items()}


def _declared(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without the classes that came with samples."""
    label = schema["label"]
    empty = label is not None and label["classes"] is not None
    return {**schema, "label": {**label, "classes": []}} if empty else schema


def _declared_label(label: Any) -> dict[str, Any] | None:
    if label is None:
        return None
    dtype, shape = label if isinstance(label, tuple | list) else (label, ())
    if dtype == "str":
        return {"name": "label", "dtype": "int64", "shape": [], "classes": []}
    field = parse_fields({"label": (dtype, shape)})["label"]
    if field.kind != "array" or field.dtype == "bfloat16" or field.dtype.startswith("complex"):
        raise InvalidInput(f"label={label!r} is no label; use 'int64', 'float32', 'str', or ('float32', (5,))")
    kept = field.dtype if field.dtype in ("float32", "float64") else "float32" if "float" in field.dtype else "int64"
    return {"name": "label", "dtype": kept, "shape": list(shape), "classes": None}
