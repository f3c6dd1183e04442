"""What differs between two models: tensor by tensor, in their structure, and in their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import sqlalchemy as sa
import torch

from dynkit.catalog import evaluations, results
from dynkit.lineage.display import Shown, short
from dynkit.lineage.operators import same
from dynkit.lineage.structure import StructureDiff, layer_of

__all__ = ["ModelDiff", "diff_tensors", "scores_of"]

_LARGEST_RANK = 2048  # smaller side of a matrix whose singular values are computed
_SCHEMA = {
    "name": pl.String,
    "change": pl.String,
    "dtype": pl.String,
    "shape": pl.String,
    "norm_a": pl.Float64,
    "norm_b": pl.Float64,
    "delta": pl.Float64,
    "relative": pl.Float64,
    "cosine": pl.Float64,
    "unchanged": pl.Float64,
    "rank": pl.Int64,
}

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, repr=False)
class ModelDiff(Shown):
    """Differences from model `a` to model `b`.

    Parameters
    ----------
    a, b : str
    tensors : pl.DataFrame
        name; change: ``same``, ``changed``, ``reshaped``, ``retyped``, ``added``, ``removed``, ``renamed``; dtype and
        shape, where they differ as ``a -> b``; Euclidean norms of both and of the difference, the latter also relative
        to `a`; cosine; share of elements that are unchanged; numerical rank of the difference, as a matrix.
    scores : pl.DataFrame
        kind (metric or test), name, a, b, difference: means over windows that both have, and values of tests.
    structure : StructureDiff or None
        When modules were given.
    """

    a: str
    b: str
    tensors: pl.DataFrame
    scores: pl.DataFrame
    structure: StructureDiff | None = None

    @property
    def layers(self) -> list[str]:
        """Layers in which something differs."""
        changed = self.tensors.filter(pl.col("change") != "same")["name"]
        return list(dict.fromkeys(layer_of(name) for name in changed))

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        counts = self.tensors["change"].value_counts().sort("change").iter_rows()
        facts = [", ".join(f"{n} {change}" for change, n in counts)]
        facts += [
            f"{row['name']}: {row['a']:.4g} -> {row['b']:.4g} ({row['difference']:+.4g})"
            for row in self.scores.iter_rows(named=True)
        ]
        if self.structure is not None:
            facts += repr(self.structure).splitlines()
        rows = self.tensors.filter(pl.col("change") != "same").rows()
        return f"diff {short(self.a)} -> {short(self.b)}", facts, tuple(_SCHEMA), rows


def diff_tensors(a: State, b: State) -> pl.DataFrame:
    """Compare two states; columns as in `ModelDiff.tensors`."""
    removed, added = [n for n in a if n not in b], [n for n in b if n not in a]
    rows = []
    for name in removed:
        other = next((n for n in added if same(a[name], b[n])), None)
        if other is None:
            rows.append({"name": name, "change": "removed", **_facts(a[name])})
        else:
            added.remove(other)
            rows.append({"name": f"{name} -> {other}", "change": "renamed", **_facts(a[name])})
    rows += [{"name": name, "change": "added", **_facts(b[name])} for name in added]
    rows += [{"name": name, **_compared(a[name], b[name])} for name in a if name in b]
    return pl.DataFrame(rows, schema=_SCHEMA)


def _facts(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": _dtype(tensor), "shape": _shape(tensor), "norm_a": _norm(tensor)}


def _compared(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dtype": " -> ".join(dict.fromkeys(map(_dtype, (a, b)))),
        "shape": " -> ".join(dict.fromkeys(map(_shape, (a, b)))),
        "norm_a": _norm(a),
        "norm_b": _norm(b),
    }
    if a.shape != b.shape:
        return {"change": "reshaped", **row}
    if same(a, b):
        return {"change": "same", **row, "delta": 0.0, "relative": 0.0, "cosine": 1.0, "unchanged": 1.0, "rank": 0}
    wide_a, wide_b = _wide(a), _wide(b)
    delta = wide_b - wide_a
    length = _norm(delta)
    cosine = (
        float((wide_a.conj() * wide_b).sum().real) / (row["norm_a"] * row["norm_b"])
        if row["norm_a"] and row["norm_b"]
        else None
    )
    return {
        "change": "changed" if a.dtype == b.dtype else "retyped",
        **row,
        "delta": length,
        "relative": length / row["norm_a"] if row["norm_a"] else None,
        "cosine": cosine,
        "unchanged": float((wide_a == wide_b).double().mean()),
        "rank": _rank(delta, a.dtype),
    }


def _rank(delta: torch.Tensor, dtype: torch.dtype) -> int | None:
    """Numerical rank as a matrix (first axis against the others), by the tolerance of numpy's `matrix_rank`."""
    if not delta.numel():
        return 0
    if delta.ndim < 2 or min(delta.shape[0], delta[0].numel()) > _LARGEST_RANK or not torch.isfinite(delta).all():
        return None
    matrix = delta.reshape(len(delta), -1)
    values = torch.linalg.svdvals(matrix)
    # Rounding to the tensors' own type leaves a residue of full rank, which is no part of the difference.
    rounded = dtype.is_floating_point or dtype.is_complex
    precision = torch.finfo(dtype if rounded else torch.float64).eps
    return int((values > values.max() * max(matrix.shape) * precision).sum())


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(tensor)))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def scores_of(connection: sa.Connection, a: str, b: str) -> pl.DataFrame:
    """Compare what is known of both: means of metrics over the same windows of a run, values of tests on equal data."""
    left, right = evaluations.alias(), evaluations.alias()
    same_window = [
        left.c[name] == right.c[name] for name in ("run", "window_start_ns", "window_end_ns", "metric", "slice")
    ]
    means = [sa.func.avg(side.c.value) for side in (left, right)]
    metrics = (
        sa.select(left.c.metric, *means)
        .join(right, sa.and_(*same_window))
        .where(
            left.c.slice == "",
            left.c.model == a,
            right.c.model == b,
            left.c.value.is_not(None),
            right.c.value.is_not(None),
        )
        .group_by(left.c.metric)
    )
    one, two = results.alias(), results.alias()
    same_test = [one.c[name] == two.c[name] for name in ("test", "digest", "dataset_version")]
    tests = (
        sa.select(one.c.test, one.c.value, two.c.value)
        .join(two, sa.and_(*same_test))
        .where(one.c.model == a, two.c.model == b, one.c.value.is_not(None), two.c.value.is_not(None))
    )
    rows = [("metric", *row) for row in connection.execute(metrics)]
    rows += [("test", *row) for row in connection.execute(tests)]
    schema = {"kind": pl.String, "name": pl.String, "a": pl.Float64, "b": pl.Float64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(difference=pl.col("b") - pl.col("a"))
