"""Turn one block of what a user has (a frame, a dictionary of arrays) into what is stored, or say why not.

Nothing is dropped or guessed: rows are sorted by time, features are rounded to float32, and what cannot be stored is
refused with the column's name, the number of rows and the line to type. This module knows no files.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from blake3 import blake3

from dynkit.data.arrays import take_stored
from dynkit.data.fields import Array, Field, Spans, Stored, check_field_name, field_of, hash_stored
from dynkit.data.labels import column_types, fits, label_series, label_type, label_values, with_classes
from dynkit.errors import InvalidInput, did_you_mean

__all__ = ["RESERVED", "Prepared", "Roles", "prepare", "prepare_all", "roles_of"]

_TIMESTAMP = pl.Datetime("ns", "UTC")
RESERVED = {"key", "timestamp", "label", "weight"}
_X = Field("array", "float32")
_LAST_US = (2**63 - 1) // 1000

Schema = dict[str, Any]


@dataclass(frozen=True)
class Roles:
    """Which columns of the user's data are what.

    Parameters
    ----------
    timestamp : str
        Column of datetimes or dates; naive ones are UTC.
    label : str, sequence of str or None
        One column, or several of numbers that make a label of shape (K,).
    features : sequence of str or None
        Numeric and boolean columns that become the float32 field ``x`` of shape (F,), in this order. None means all
        columns but timestamp and label when there are no other arrays. Columns that are not features stay in the
        table, where policies see them.
    """

    timestamp: str
    label: str | Sequence[str] | None = None
    features: Sequence[str] | None = None


@dataclass(frozen=True)
class Prepared:
    """A block of samples ready to be written, in time order.

    Parameters
    ----------
    index : pl.DataFrame
        Columns timestamp (Datetime ns UTC), label (when there is one) and the scalar columns.
    fields : dict
        Field name to stored rows as in `index`; the label's numbers are among them.
    schema : dict
        Which source column became what, as JSON values; kept in the manifest so that `append` does the same.
    order : (N,) int64 or None
        Row of the user's data for each row here; None when it was in time order.
    """

    index: pl.DataFrame
    fields: dict[str, Stored]
    schema: Schema
    order: Array | None

    def content_hash(self) -> str:
        """BLAKE3 of all values and the schema: equal for equal input, whatever library version wrote it."""
        hasher = blake3(repr(self.schema).encode())
        for series in self.index.iter_columns():
            if series.name == "label":
                continue  # its numbers are among the fields, its classes in the schema
            hasher.update(f"{series.name}:{series.dtype};".encode())
            if series.dtype == pl.String:
                hasher.update("\x1e".join("\x1f" if value is None else value for value in series).encode())
            else:
                physical = series.to_physical()
                for array in (physical.is_null().to_numpy(), physical.fill_null(strategy="zero").to_numpy()):
                    hasher.update(array.tobytes())
        for name, stored in self.fields.items():
            hasher.update(hash_stored(name, stored))
        return hasher.hexdigest()


def prepare(data: Any, roles: Roles, schema: Schema | None = None) -> Prepared:
    """Check and convert samples.

    Parameters
    ----------
    data : frame or mapping
        A Polars frame, anything with the Arrow stream interface (pandas, pyarrow), or a mapping of name to array or
        tensor. What is more than one number or text per sample becomes a field of its own.
    roles : Roles
    schema : dict or None
        Of the dataset that the samples must fit; None when they make it. With it, whole numbers in the timestamp
        column are nanoseconds since 1970.

    Raises
    ------
    InvalidInput
        Missing or duplicate columns, nulls, text features, values that float32 cannot hold, unequal lengths, and
        what does not fit the schema.
    """
    declared = {} if schema is None else {n: Field.from_json(f) for n, f in schema["fields"].items()}
    features = roles.features if schema is None else schema["features"]
    if features:
        declared.pop("x", None)  # made here
    labels = [roles.label] if isinstance(roles.label, str) else list(roles.label or [])
    frame, arrays = _as_frame(data, declared, {"label", *labels})
    if schema is not None:
        frame = frame.with_columns(_typed_nulls(frame, schema))
    if features is not None and (isinstance(features, str) or len(set(features)) != len(features)):
        raise InvalidInput(f"features={features!r} must be a list of different column names")
    if schema is not None and labels and not any(name in frame.columns for name in labels):
        labels = []  # they come late
    used = [roles.timestamp, *labels, *(features or [])]
    for name in used:
        if name not in frame.columns:
            raise InvalidInput(f"no column {name!r} in the data{did_you_mean(name, frame.columns)}")
    if len(set(used)) != len(used):
        raise InvalidInput(f"timestamp, label and features must be different columns, not {used}")
    if frame.height == 0:
        raise InvalidInput("the data has no rows; nothing to store")
    if features is None:
        features = [] if arrays else [name for name in frame.columns if name not in used]
    columns = [name for name in frame.columns if name not in {*used, *features}]
    _check_names([*columns, *arrays])
    time = _timestamps(frame[roles.timestamp], integers_are_ns=schema is not None)
    index = pl.DataFrame([time, *(_scalar(frame[name]) for name in columns)])
    fields = {name: declared.get(name) or field_of(name, value) for name, value in arrays.items()}
    check_fields({**fields, **({"x": _X} if features and "x" not in fields else {})})
    found: Schema = {
        "timestamp": roles.timestamp,
        "label": None,
        "features": list(features),
        "columns": {name: str(index[name].dtype) for name in columns},
        "fields": {
            **({"x": Field("array", "float32", (len(features),)).to_json()} if features else {}),
            **{name: field.to_json() for name, field in fields.items()},
        },
    }
    if not found["fields"]:
        raise InvalidInput("the data has no features and no arrays; a sample needs something to train on")
    series, found["label"] = _labels(frame, labels)
    if schema is not None:
        series, found = _fit(series, found, schema, frame.height)
    stored: dict[str, Stored] = {**({"x": _features(frame, features)} if features else {})}
    stored |= {name: field.store(name, arrays[name]) for name, field in fields.items()}
    stored = {name: stored[name] for name in found["fields"]}  # in the dataset's order
    if series is not None:
        stored["label"] = label_values(series, found["label"])
        index = index.select("timestamp", series, pl.exclude("timestamp"))
    lengths = {"rows": index.height, **{name: len(rows) for name, rows in stored.items()}}
    if len(set(lengths.values())) > 1:
        raise InvalidInput(f"arrays of different lengths: {lengths}")
    index = index.select("timestamp", *(["label"] if series is not None else []), *found["columns"])
    order = None
    if not index["timestamp"].is_sorted():
        order = np.argsort(index["timestamp"].to_physical().to_numpy(), kind="stable")
        index = index[order]
        stored = {name: take_stored(name, rows, order) for name, rows in stored.items()}
    return Prepared(index, stored, found, order)


def check_fields(fields: Mapping[str, Field]) -> Mapping[str, Field]:
    """Return fields if a batch can have them all.

    Raises
    ------
    InvalidInput
        Names that are reserved, no names of arrays, or given twice: a record's names are fields of a batch.
    """
    names = [check_field_name(name) for name in fields]
    parts = [part for field in fields.values() if field.kind == "record" for part in field.record.names or ()]
    _check_names([*names, *parts])
    taken = [*(name for name, field in fields.items() if field.kind != "record"), *parts]
    for name in taken:
        if taken.count(name) > 1:
            raise InvalidInput(f"{name!r} is the name of two fields of a batch; rename one (a record's names count)")
    return fields


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name in RESERVED:
            raise InvalidInput(f"{name!r} is the name of a column that dynkit adds; rename yours")


def prepare_all(source: Iterable[Any], roles: Roles, base: Schema) -> Iterator[Prepared]:
    """Prepare blocks one after the other; each must fit those before.

    Parameters
    ----------
    source : iterable of blocks
    roles : Roles
    base : dict
        Schema of the dataset, or only its ``compression`` when the first block makes it.
    """
    schema = base if "fields" in base else None
    for block in source:
        prepared = prepare(block, roles, schema)
        schema = {**prepared.schema, "compression": base["compression"]}
        yield replace(prepared, schema=schema)
    if schema is None:
        raise InvalidInput("the data has no rows; nothing to store")


def roles_of(schema: Schema) -> Roles:
    """Return the roles that a dataset's first samples had."""
    label = schema["label"]
    return Roles(schema["timestamp"], None if label is None else label["name"], schema["features"])


def _fit(series: pl.Series | None, found: Schema, schema: Schema, rows: int) -> tuple[pl.Series | None, Schema]:
    """Compare with the dataset's schema; return the label in its type, and the schema with new classes added."""
    for part in ("columns", "fields"):
        for name in [*schema[part], *found[part]]:
            if schema[part].get(name) != found[part].get(name):
                raise InvalidInput(
                    f"{part[:-1]} {name!r}: the dataset has {schema[part].get(name, 'no such one')}, "
                    f"the new samples have {found[part].get(name, 'no such one')}"
                )
    label = schema["label"]
    if series is None:
        missing = None if label is None else pl.Series("label", [None] * rows, dtype=label_type(label))
        return missing, schema
    given = found["label"]
    if label is None:
        raise InvalidInput(f"label: the dataset has none, the new samples have {given['name']!r}")
    if not fits(given, label):
        raise InvalidInput(f"label: the dataset has {_named(label)}, the new samples {_named(given)}")
    if label["classes"] is not None:
        label = with_classes(label, given["classes"])
    return series.cast(label_type(label)), {**schema, "label": label}


def _typed_nulls(frame: pl.DataFrame, schema: Schema) -> list[pl.Expr]:
    """Give columns without any value the type that the dataset knows."""
    label = schema["label"]
    known = dict(column_types(schema["columns"]))
    if label is not None and isinstance(label["name"], str):
        known[label["name"]] = label_type(label)
    return [
        pl.col(name).cast(known[name]) for name, dtype in frame.schema.items() if dtype == pl.Null and name in known
    ]


def _named(label: dict[str, Any]) -> str:
    kind = "text" if label["classes"] is not None else label["dtype"]
    return f"{kind} {tuple(label['shape'])}" if label["shape"] else kind


def _as_frame(data: Any, declared: Mapping[str, Field], labels: Collection[str]) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Split the input into plain columns, labels of any shape among them, and values that are fields."""
    if isinstance(data, pl.DataFrame):
        return _split(data, declared, labels)
    if isinstance(data, Mapping):
        values = {str(name): value for name, value in data.items()}
        arrays = {
            name: value
            for name, value in values.items()
            if not isinstance(value, pl.Series) and (name in declared or (name not in labels and _is_field(value)))
        }
        if "x" in values and "x" not in arrays and _length("x", values["x"]):
            raise InvalidInput("'x' is the field made of the feature columns; give the array 'x' two dimensions (N, F)")
        plain = {name: _as_series(name, value) for name, value in values.items() if name not in arrays}
        lengths = {name: _length(name, value) for name, value in {**plain, **arrays}.items()}
        if len(set(lengths.values())) > 1:
            raise InvalidInput(f"arrays of different lengths: {lengths}")
        frame, more = _split(pl.DataFrame(plain), declared, labels)
        return frame, {**arrays, **more}
    names = [str(name) for name in getattr(data, "column_names", getattr(data, "columns", []))]  # Arrow, pandas
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InvalidInput(f"duplicate column names: {', '.join(doubled)}; rename or drop one of each")
    if not names:
        raise InvalidInput(
            f"cannot read samples from {type(data).__name__}; pass a frame, a dict of arrays, a file or a folder"
        )
    try:
        return _split(pl.DataFrame(data), declared, labels)
    except ImportError as error:
        package = f"pip install {error.name or 'pyarrow'}"
        raise InvalidInput(f"{type(data).__name__} needs a package to be read: {package}") from None
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise InvalidInput(f"cannot read samples from {type(data).__name__}: {error}") from None


def _split(
    frame: pl.DataFrame, declared: Mapping[str, Field], labels: Collection[str]
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Take columns of lists, arrays and bytes out of a frame: they are fields."""
    arrays: dict[str, Any] = {}
    for name, dtype in frame.schema.items():
        series = frame[name]
        if isinstance(dtype, pl.Struct) and {field.name for field in dtype.fields} == {"bytes", "path"}:
            series = series.struct.field("bytes")  # an image of Hugging Face datasets
        if series.dtype == pl.Binary:
            _refuse_nulls(series.alias(name), "field", "drop those rows")
            arrays[name] = series.to_list()
        elif isinstance(dtype, pl.List) and (dtype.inner.is_numeric() or dtype.inner == pl.Boolean):
            _refuse_nulls(series, "field", "an empty sequence is []")
            flat = series.explode(empty_as_null=False)
            _refuse_nulls(flat, "field", "a sequence has no gaps")
            arrays[name] = Spans(flat.to_numpy(), series.list.len().to_numpy().astype(np.int64))
        elif isinstance(dtype, pl.Array):
            if name not in declared and name in labels:
                continue
            _refuse_nulls(series, "field", "drop those rows")
            arrays[name] = series.to_numpy()
        elif name in declared:
            _refuse_nulls(series, "field", "drop those rows")
            arrays[name] = series.to_numpy()
    return frame.drop(arrays), arrays


def _is_field(value: Any) -> bool:
    """Whether a value of a mapping is more than one number or text per sample."""
    if isinstance(value, Spans) or getattr(value, "is_nested", False):
        return True
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        dtype = getattr(value, "dtype", None)
        return len(value.shape) > 1 or bool(getattr(dtype, "names", None))
    first = value[0] if isinstance(value, list | tuple) and value else None
    sequence = isinstance(first, list | tuple) and bool(first)
    return sequence or isinstance(first, bytes | os.PathLike) or getattr(first, "ndim", 0) > 0 or hasattr(first, "save")


def _length(name: str, value: Any) -> int:
    try:
        return int(value.shape[0]) if hasattr(value, "shape") else len(value)
    except (TypeError, IndexError):
        raise InvalidInput(f"{name!r} is a single value, not one per sample") from None


def _as_series(name: str, value: Any) -> pl.Series:
    if isinstance(value, pl.Series):
        return value.alias(name)
    if isinstance(value, list | tuple) and value and not hasattr(value[0], "__len__"):
        return pl.Series(name, value)  # of datetimes, say
    if isinstance(value, np.ma.MaskedArray):
        return _as_series(name, value.data).scatter(np.flatnonzero(np.ma.getmaskarray(value)), None)
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim == 0:
        raise InvalidInput(f"{name!r} is a single value, not one per sample")
    if array.dtype.kind == "M" and np.datetime_data(array.dtype)[0] not in ("D", "ms", "us", "ns"):
        array = array.astype("datetime64[us]")  # Polars has no hours or minutes
    return pl.Series(name, array)


def _labels(frame: pl.DataFrame, names: Sequence[str]) -> tuple[pl.Series | None, dict[str, Any] | None]:
    """Return the label column and what it is; NaN is a label that is not known."""
    if not names:
        return None, None
    if len(names) == 1:
        series = frame[names[0]]
        return label_series(names[0], series.fill_nan(None) if series.dtype.is_float() else series)
    parts = [label_series(name, frame[name])[1] for name in names]
    if any(part["classes"] is not None or part["shape"] for part in parts):
        raise InvalidInput(f"labels of several columns are numbers; encode {', '.join(names)} first")
    floats = any(part["dtype"].startswith("float") for part in parts)
    inner = pl.Float64 if floats else pl.Int64
    known = ~pl.any_horizontal(pl.col(list(names)).cast(inner).cast(pl.Float64).fill_nan(None).is_null())
    joined = pl.concat_arr([pl.col(name).cast(inner) for name in names])
    series, label = label_series("label", frame.select(label=pl.when(known).then(joined)).to_series())
    return series, {**label, "name": list(names)}


def _timestamps(series: pl.Series, *, integers_are_ns: bool) -> pl.Series:
    name = series.name
    if integers_are_ns and series.dtype.is_integer():
        _refuse_nulls(series, "timestamp", "give every sample a time or drop those rows")
        if int(series.max() or 0) >= 2**63:  # type: ignore[arg-type]
            raise InvalidInput(f"timestamp column {name!r} has times outside the years 1677 to 2262")
        return series.cast(pl.Int64).cast(_TIMESTAMP).alias("timestamp")
    if isinstance(series.dtype, pl.Date):
        series = series.cast(pl.Datetime("us"))
    if not isinstance(series.dtype, pl.Datetime):
        hint = {
            pl.String: f"pl.col({name!r}).str.to_datetime()",
            pl.Int64: f"pl.from_epoch({name!r}, time_unit='s')",
        }.get(type(series.dtype), "a datetime column")
        raise InvalidInput(f"timestamp column {name!r} is {series.dtype}, not a datetime; convert it first: {hint}")
    _refuse_nulls(series, "timestamp", "give every sample a time or drop those rows")
    if series.dtype.time_unit != "ns":
        in_us = series.dt.epoch("us")
        if max(abs(int(in_us.min() or 0)), abs(int(in_us.max() or 0))) > _LAST_US:  # type: ignore[arg-type]
            raise InvalidInput(f"timestamp column {name!r} has times outside the years 1677 to 2262")
    if series.dtype.time_zone is None:
        return series.cast(pl.Datetime("ns")).dt.replace_time_zone("UTC").alias("timestamp")
    return series.dt.convert_time_zone("UTC").cast(_TIMESTAMP).alias("timestamp")


def _scalar(series: pl.Series) -> pl.Series:
    if series.dtype.is_nested() or series.dtype.is_decimal() or series.dtype in (pl.Object, pl.Null, pl.Int128):
        raise InvalidInput(f"column {series.name!r} is {series.dtype}, which is not stored; convert or drop it")
    if series.dtype in (pl.Categorical, pl.Enum):
        return series.cast(pl.String)
    return series


def _features(frame: pl.DataFrame, features: Sequence[str]) -> Array:
    """Stack columns into x_NF, float32 (N, F)."""
    text = [name for name in features if not (frame.schema[name].is_numeric() or frame.schema[name] == pl.Boolean)]
    if text:
        raise InvalidInput(
            f"feature column {text[0]!r} is {frame.schema[text[0]]}, not a number; encode it "
            f"(frame.to_dummies({text[0]!r}) "
            "or a number per value), or leave it out of features= to keep it as a plain column"
        )
    x_NF = np.empty((frame.height, len(features)), dtype=np.float32)
    for i, name in enumerate(features):
        series = frame[name]
        _refuse_nulls(series, "feature", f"fill them first: pl.col({name!r}).fill_null(0)")
        with np.errstate(over="ignore"):
            x_NF[:, i] = series.cast(pl.Float64).to_numpy().astype(np.float32)
        bad = frame.height - int(np.isfinite(x_NF[:, i]).sum())
        if bad:
            raise InvalidInput(
                f"feature column {name!r} has {bad} values that are NaN, infinite or too large for float32"
            )
    return x_NF


def _refuse_nulls(series: pl.Series, role: str, advice: str) -> None:
    nulls = series.null_count()
    if nulls:
        raise InvalidInput(f"{role} column {series.name!r} has {nulls} null values; {advice}")
