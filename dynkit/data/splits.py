"""Named parts of a dataset, declared once and true for samples to come.

A split is a rule, not a list: a share drawn by a hash of the key, or an expression over the table. A holdout is a
split that no training sees.
"""

import io
from typing import Any

import numpy as np
import polars as pl

from dynkit.data.hashing import mix
from dynkit.errors import InvalidInput, NotFound, did_you_mean

__all__ = ["held_out", "in_split", "select_rows", "split_rule"]

_GOLDEN = 0x9E3779B97F4A7C15


def split_rule(fraction: float | None, where: pl.Expr | None, seed: int, *, holdout: bool) -> dict[str, Any]:
    """Describe a split as JSON values.

    Raises
    ------
    InvalidInput
    """
    if (fraction is None) == (where is None):
        raise InvalidInput("give either fraction or where: fraction=0.1, or where=pl.col('place') == 'EWR'")
    if where is not None:
        if not isinstance(where, pl.Expr):
            raise InvalidInput(f"where={where!r} must be a Polars expression, such as pl.col('place') == 'EWR'")
        return {"where": where.meta.serialize(format="json"), "text": str(where), "holdout": holdout}
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise InvalidInput(f"fraction={fraction!r} must be in (0, 1)")
    return {"fraction": fraction, "seed": seed, "holdout": holdout}


def in_split(table: pl.DataFrame, splits: dict[str, Any], name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows of a table belong to a split (N,) bool.

    Raises
    ------
    NotFound
    """
    if name not in splits:
        raise NotFound(f"no split {name!r}{did_you_mean(name, splits)}")
    rule = splits[name]
    if "where" in rule:
        expression = pl.Expr.deserialize(io.StringIO(rule["where"]), format="json")
        return select_rows(table, expression)
    inside: np.ndarray[Any, np.dtype[np.bool_]] = _hash(table["key"].to_numpy(), rule["seed"]) < rule["fraction"]
    return inside


def held_out(table: pl.DataFrame, splits: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows belong to any holdout (N,) bool."""
    out = np.zeros(table.height, dtype=np.bool_)
    for name, rule in splits.items():
        if rule["holdout"]:
            out |= in_split(table, splits, name)
    return out


def select_rows(table: pl.DataFrame, where: pl.Expr) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows an expression is true for; null counts as not.

    Raises
    ------
    InvalidInput
        When it names unknown columns or is no condition.
    """
    try:
        mask = table.select(where.alias("mask")).to_series()
    except pl.exceptions.PolarsError as error:
        raise InvalidInput(f"{where} cannot be evaluated: {str(error).splitlines()[0]}") from None
    if mask.dtype != pl.Boolean:
        raise InvalidInput(f"{where} is {mask.dtype}, not a condition")
    if len(mask) != table.height:
        if len(mask) != 1:
            raise InvalidInput(f"{where} gives {len(mask)} values for {table.height} samples; one for each is needed")
        mask = mask.new_from_index(0, table.height)
    chosen: np.ndarray[Any, np.dtype[np.bool_]] = mask.fill_null(False).to_numpy()
    return chosen


def _hash(keys: "np.ndarray[Any, np.dtype[np.uint64]]", seed: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Map keys to uniform numbers in [0, 1)."""
    return mix(keys.astype(np.uint64) + np.uint64((seed + 1) * _GOLDEN % 2**64)).astype(np.float64) / 2.0**64
