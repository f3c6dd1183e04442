"""Composite models: one honest curve per pipeline out of the models x windows matrix.

For a window with anchor a (its start), and models in the order of their triggers, model j trained on data up to
last(j):

- *active*: the newest model with ``last(j) < a``, the one that was in use then. A window before the first has none.
- *trained*: the model after the active one, whose training data reaches into the window; the first model where none
  is active yet, and the last one where no later one exists.

Training takes no time on the dataset's clock. Two aggregates are in use: the plain mean over windows that all
compared pipelines can answer, and the mean weighted by the windows' length, which suits `BetweenTriggers`.

References
----------
Böther et al., "Modyn: Data-Centric Machine Learning Pipeline Orchestration", SIGMOD 2025, section on pipeline
evaluation.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl

from dynkit.errors import InvalidInput
from dynkit.types import Trained

__all__ = ["CompositeKind", "composite", "mean_scores", "shared"]

CompositeKind = Literal["active", "trained"]


def composite(matrix: pl.DataFrame, trained: Sequence[Trained], kind: CompositeKind = "active") -> pl.DataFrame:
    """Pick one model per window.

    Parameters
    ----------
    matrix : pl.DataFrame
        Columns window_start, window_end, window_anchor, model, metric, value.
    trained : sequence of Trained
        The run's triggers, oldest first.
    kind : "active" or "trained"

    Returns
    -------
    pl.DataFrame
        The rows of `matrix` of the chosen models, in order of windows; windows without an active model are left out.
    """
    if kind not in ("active", "trained"):
        raise InvalidInput(f"composite {kind!r} is not known; expected 'active' or 'trained'")
    last_ns = np.array([one.last_ns for one in trained], dtype=np.int64)
    anchors = matrix["window_anchor"].unique().sort()
    active = np.searchsorted(last_ns, anchors.to_physical().to_numpy(), side="left") - 1
    chosen = active if kind == "active" else np.minimum(active + 1, len(trained) - 1)
    names = [trained[i].model if i >= 0 else None for i in chosen.tolist()]
    picked = pl.DataFrame([anchors, pl.Series("model", names, dtype=pl.String)])
    rows = matrix.join(picked, on=["window_anchor", "model"], how="semi")
    return rows.sort("window_start", "window_end", maintain_order=True)


def shared(curves: Sequence[pl.DataFrame]) -> list[pl.DataFrame]:
    """Cut curves to the time that every one of them answers for.

    A window counts when its centre is between the latest first and the earliest last centre of any curve: pipelines
    differ in when their first model exists, datasets grow, and windows may differ. A curve without any stays empty.
    """
    centre = (pl.col("window_start").dt.epoch("ns") + pl.col("window_end").dt.epoch("ns")) // 2
    known = [curve.filter(pl.col("value").is_not_null()) for curve in curves]
    begins, ends = (
        [curve.select(edge).item() for curve in known if curve.height] for edge in (centre.min(), centre.max())
    )
    return [curve.filter(centre.is_between(max(begins), min(ends))) if curve.height else curve for curve in known]


def mean_scores(curve: pl.DataFrame, by: Sequence[str] = ("metric",)) -> pl.DataFrame:
    """Aggregate a curve: the columns of `by`, mean, time_weighted, windows."""
    seconds = (pl.col("window_end") - pl.col("window_start")).dt.total_seconds(fractional=True)
    return (
        curve.filter(pl.col("value").is_not_null())
        .group_by(by, maintain_order=True)
        .agg(
            pl.col("value").mean().alias("mean"),
            ((pl.col("value") * seconds).sum() / seconds.sum()).alias("time_weighted"),
            pl.len().alias("windows"),
        )
    )
