"""Labels: numbers in a batch, whatever they are in the table.

The table keeps what the user gave, with null for a label that has not come yet. Stored next to the fields, where
batches take them from, are numbers: classes given as text become codes in the order in which they first came, and a
missing label becomes `MISSING` (NaN among floats).
"""

import ast
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl

from dynkit.data.fields import Array, Field
from dynkit.errors import InvalidInput

__all__ = [
    "MISSING",
    "column_types",
    "fits",
    "label_field",
    "label_series",
    "label_type",
    "label_values",
    "stored_fields",
    "with_classes",
]

MISSING = -100
"""A label that is not known yet, in a batch: the class that torch's losses ignore. Of a float label, NaN."""

Label = dict[str, Any]  # name, dtype, shape, classes (None: numbers)


def label_field(label: Label | None) -> Field | None:
    """How labels are stored."""
    return None if label is None else Field("array", label["dtype"], tuple(label["shape"]))


def stored_fields(schema: dict[str, Any]) -> dict[str, Field]:
    """Return the fields of a schema, and the label where there is one."""
    label = label_field(schema["label"])
    fields = {name: Field.from_json(value) for name, value in schema["fields"].items()}
    return fields if label is None else {**fields, "label": label}


def with_classes(label: Label, classes: Iterable[str]) -> Label:
    """Return a label of texts with classes that are new to it, after those that it has."""
    return {**label, "classes": list(dict.fromkeys([*label["classes"], *classes]))}


def fits(given: Label, label: Label) -> bool:
    """Whether labels that were given can be kept as `label` says: of its shape, texts or numbers, whole if it is."""
    alike = given["shape"] == label["shape"] and (given["classes"] is None) == (label["classes"] is None)
    return alike and given["dtype"].startswith("float") <= label["dtype"].startswith("float")


def label_type(label: Label) -> pl.DataType:
    """Type of the table's label column."""
    if label["classes"] is not None:
        return pl.String()
    inner: Any = {"int64": pl.Int64, "float32": pl.Float32, "float64": pl.Float64}[label["dtype"]]
    return pl.Array(inner, tuple(label["shape"])) if label["shape"] else inner()


def label_series(name: str, series: pl.Series) -> tuple[pl.Series, Label]:
    """Bring a label column of any type to one of those that are kept.

    Raises
    ------
    InvalidInput
        Types that are no label: nested ones of varying length, decimals, times; integers beyond 64 bits; `MISSING`.
    """
    dtype: Any = series.dtype
    shape: tuple[int, ...] = ()
    inner: Any = dtype
    if isinstance(dtype, pl.Array):
        shape, inner = dtype.shape, dtype.inner
        while isinstance(inner, pl.Array):
            inner = inner.inner
    if inner in (pl.String, pl.Categorical, pl.Enum) and not shape:
        text = series.cast(pl.String)
        classes = text.drop_nulls().unique(maintain_order=True).to_list()
        return text.alias("label"), {"name": name, "dtype": "int64", "shape": [], "classes": classes}
    if inner == pl.Null:
        raise InvalidInput(f"label column {name!r} has no values; leave it out, or give its type in create_dataset")
    if not (inner.is_numeric() or inner == pl.Boolean) or inner.is_decimal():
        raise InvalidInput(f"label column {name!r} is {dtype}; a label is a number, a text or an array of numbers")
    kept: Any = inner if inner in (pl.Float32, pl.Float64) else pl.Float32 if inner.is_float() else pl.Int64
    label: Label = {"name": name, "dtype": str(kept).lower(), "shape": list(shape), "classes": None}
    try:
        kept_series = series.cast(label_type(label)).alias("label")
    except pl.exceptions.PolarsError:
        raise InvalidInput(f"label column {name!r} has values beyond 64 bits; encode them first") from None
    if label["dtype"] == "int64" and not shape and (kept_series == MISSING).any():
        raise InvalidInput(
            f"label column {name!r} has the number {MISSING}, which in a batch means a label that is not known yet: "
            "give null for one, or floats for numbers to predict"
        )
    return kept_series, label


def label_values(series: pl.Series, label: Label) -> Array:
    """Numbers of a label column (N, ...) as batches have them.

    Raises
    ------
    InvalidInput
        When a text is none of the classes.
    """
    if label["classes"] is not None:
        codes = series.replace_strict(
            label["classes"], range(len(label["classes"])), default=-1, return_dtype=pl.Int64
        ).to_numpy(writable=True)
        codes[series.is_null().to_numpy()] = MISSING
        if (codes == -1).any():
            raise InvalidInput(f"label {series.filter(pl.Series(codes == -1))[0]!r} is none of the classes")
        return codes
    missing = series.is_null().to_numpy()
    fill = np.nan if label["dtype"].startswith("float") else MISSING
    values: Array = np.full((len(series), *label["shape"]), fill, dtype=label["dtype"])
    values[~missing] = series.drop_nulls().to_numpy()
    return values


def column_types(columns: dict[str, str]) -> dict[str, Any]:
    """Types of scalar columns as a schema names them."""
    return {name: _type(text) for name, text in columns.items()}


def _type(text: str) -> Any:
    """Read a type as Polars writes it: ``Int64``, ``Datetime(time_unit='us', time_zone=None)``."""
    name, _, options = text.rstrip(")").partition("(")
    pairs = (option.split("=") for option in options.split(", ") if option)
    return getattr(pl, name)(**{key: ast.literal_eval(value) for key, value in pairs})
