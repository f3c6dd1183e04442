"""Turn what a user has (a frame, a dictionary of arrays) into an index table and field arrays, or say why not.

Nothing is dropped or guessed: rows are sorted by time, features are rounded to float32, and what cannot be stored is
refused with the column's name, the number of rows and the line to type. This module knows no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from blake3 import blake3

from dynkit.errors import InvalidInput, did_you_mean

__all__ = ["Prepared", "prepare"]

_TIMESTAMP = pl.Datetime("ns", "UTC")
_RESERVED = {"key", "timestamp", "label", "weight"}
_LAST_US = (2**63 - 1) // 1000


@dataclass(frozen=True)
class Prepared:
    """Samples ready to be written, in time order.

    Parameters
    ----------
    index : pl.DataFrame
        Columns timestamp (Datetime ns UTC), label (when there is one) and the scalar columns.
    fields : dict
        Field name to array (N, ...), rows as in `index`.
    schema : dict
        Which source column became what, as JSON values; kept in the manifest so that `append` does the same.
    """

    index: pl.DataFrame
    fields: dict[str, np.ndarray[Any, Any]]
    schema: dict[str, Any]

    def content_hash(self) -> str:
        """BLAKE3 of all values and the schema: equal for equal input, whatever library version wrote it."""
        hasher = blake3(repr(self.schema).encode())
        for series in self.index.iter_columns():
            hasher.update(f"{series.name}:{series.dtype};".encode())
            if series.dtype == pl.String:
                hasher.update("\x1e".join("\x1f" if value is None else value for value in series).encode())
            else:
                physical = series.to_physical()
                for array in (physical.is_null().to_numpy(), physical.fill_null(strategy="zero").to_numpy()):
                    hasher.update(array.tobytes())
        for name, array in self.fields.items():
            hasher.update(f"{name}:{array.dtype};".encode())
            hasher.update(array.reshape(-1).view(np.uint8).data)  # no copy: fields are large
        return hasher.hexdigest()


def prepare(data: Any, timestamp: str, label: str | None, features: Sequence[str] | None) -> Prepared:
    """Check and convert samples.

    Parameters
    ----------
    data : frame or mapping
        A Polars (lazy) frame, anything with the Arrow stream interface (pandas, pyarrow), or a mapping of name to
        array or tensor; arrays of two and more dimensions become fields of their own.
    timestamp : str
        Column of datetimes or dates; naive ones are UTC.
    label : str or None
        Column of integers, booleans or floats.
    features : sequence of str or None
        Numeric and boolean columns that become the float32 field ``x`` of shape (F,), in this order. None means all
        columns but timestamp and label when there are no other arrays. Columns that are not features stay in the
        table, where policies see them.

    Raises
    ------
    InvalidInput
        Missing or duplicate columns, nulls, text features, values that float32 cannot hold, unequal lengths.
    """
    frame, arrays = _as_frame(data)
    if features is not None and (isinstance(features, str) or len(set(features)) != len(features)):
        raise InvalidInput(f"features={features!r} must be a list of different column names")
    roles = [timestamp, *([label] if label is not None else []), *(features or [])]
    for name in roles:
        if name not in frame.columns:
            raise InvalidInput(f"no column {name!r} in the data{did_you_mean(name, frame.columns)}")
    if len(set(roles)) != len(roles):
        raise InvalidInput(f"timestamp, label and features must be different columns, not {roles}")
    if frame.height == 0:
        raise InvalidInput("the data has no rows; nothing to store")
    if features is None:
        features = [] if arrays else [name for name in frame.columns if name not in roles]
    columns = [name for name in frame.columns if name not in {*roles, *features}]
    for name in [*columns, *arrays]:
        if name in _RESERVED:
            raise InvalidInput(f"{name!r} is the name of a column that dynkit adds; rename yours")

    index = frame.select(
        _timestamps(frame[timestamp]),
        *([_labels(frame[label])] if label is not None else []),
        *(_scalar(frame[name]) for name in columns),
    )
    fields = {**({"x": _features(frame, features)} if features else {}), **arrays}
    if not fields:
        raise InvalidInput("the data has no features and no arrays; a sample needs something to train on")
    if not index["timestamp"].is_sorted():
        order = np.argsort(index["timestamp"].to_physical().to_numpy(), kind="stable")
        index = index[order]
        fields = {name: array[order] for name, array in fields.items()}
    schema = {
        "timestamp": timestamp,
        "label": None if label is None else {"name": label, "dtype": str(index["label"].dtype)},
        "features": list(features),
        "columns": {name: str(index[name].dtype) for name in columns},
        "fields": {name: {"dtype": str(array.dtype), "shape": list(array.shape[1:])} for name, array in fields.items()},
    }
    return Prepared(index, {name: np.ascontiguousarray(array) for name, array in fields.items()}, schema)


def _as_frame(data: Any) -> tuple[pl.DataFrame, dict[str, np.ndarray[Any, Any]]]:
    """Split the input into one-dimensional columns and arrays of more dimensions."""
    if isinstance(data, pl.DataFrame):
        return data, {}
    if isinstance(data, pl.LazyFrame):
        return data.collect(), {}
    if isinstance(data, Mapping):
        values = {str(name): _as_array(str(name), value) for name, value in data.items()}
        lengths = {name: len(value) for name, value in values.items()}
        if len(set(lengths.values())) > 1:
            raise InvalidInput(f"arrays of different lengths: {lengths}")
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray) and value.ndim > 1}
        if "x" in values and "x" not in arrays:
            raise InvalidInput("'x' is the field made of the feature columns; give the array 'x' two dimensions (N, F)")
        return pl.DataFrame({name: value for name, value in values.items() if name not in arrays}), arrays
    names = [str(name) for name in getattr(data, "column_names", getattr(data, "columns", []))]  # Arrow, pandas
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InvalidInput(f"duplicate column names: {', '.join(doubled)}; rename or drop one of each")
    if not names:
        raise InvalidInput(f"cannot read samples from {type(data).__name__}; pass a Polars frame or a dict of arrays")
    try:
        return pl.DataFrame(data), {}
    except ImportError as error:
        raise InvalidInput(f"{type(data).__name__} needs a package to be read: pip install {error.name}") from None
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise InvalidInput(f"cannot read samples from {type(data).__name__}: {error}") from None


def _as_array(name: str, value: Any) -> np.ndarray[Any, Any] | pl.Series:
    if isinstance(value, pl.Series):
        return value
    if isinstance(value, list | tuple) and value and not hasattr(value[0], "__len__"):
        return pl.Series(name, value)  # of datetimes, say
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim == 0:
        raise InvalidInput(f"{name!r} is a single value, not one per sample")
    if array.ndim > 1 and array.dtype == object:
        raise InvalidInput(f"array {name!r} holds Python objects; every sample needs the same shape and a number type")
    if array.ndim > 1 and (array.dtype.kind not in "biuf" or array.dtype.itemsize > 8):
        raise InvalidInput(f"array {name!r} has dtype {array.dtype}; fields hold booleans, integers or floats")
    if array.dtype.kind == "M" and np.datetime_data(array.dtype)[0] not in ("D", "ms", "us", "ns"):
        array = array.astype("datetime64[us]")  # Polars has no hours or minutes
    return array if array.ndim > 1 else pl.Series(name, array)


def _timestamps(series: pl.Series) -> pl.Series:
    name = series.name
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


def _labels(series: pl.Series) -> pl.Series:
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean) or series.dtype.is_decimal():
        advice = f"pl.col({series.name!r}).cast(pl.Categorical).to_physical().cast(pl.Int64)"
        raise InvalidInput(f"label column {series.name!r} is {series.dtype}; encode it as numbers first: {advice}")
    _refuse_nulls(series, "label", "fill them or drop those rows")
    if series.dtype.is_float() and series.is_nan().any():
        n = int(series.is_nan().sum())
        raise InvalidInput(f"label column {series.name!r} has {n} NaN values; fill them or drop those rows")
    if series.dtype.is_integer():
        try:
            series = series.cast(pl.Int64)
        except pl.exceptions.InvalidOperationError:
            raise InvalidInput(f"label column {series.name!r} has values beyond 64 bits; encode them first") from None
    return series.alias("label")


def _scalar(series: pl.Series) -> pl.Series:
    if series.dtype.is_nested() or series.dtype.is_decimal() or series.dtype in (pl.Object, pl.Null, pl.Int128):
        raise InvalidInput(f"column {series.name!r} is {series.dtype}, which is not stored; convert or drop it")
    if series.dtype in (pl.Categorical, pl.Enum):
        return series.cast(pl.String)
    return series


def _features(frame: pl.DataFrame, features: Sequence[str]) -> np.ndarray[Any, Any]:
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
