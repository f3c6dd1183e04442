"""The models x windows matrix of a run, as the catalog has it."""

import polars as pl
import sqlalchemy as sa

from dynkit.catalog import Catalog, evaluations, triggers

__all__ = ["read_scores"]

_TIMES = ("window_start", "window_end", "window_anchor")
_SCHEMA = {
    **dict.fromkeys(_TIMES, pl.Int64),
    "model": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "slice": pl.String,
    "samples": pl.Int64,
}


def read_scores(catalog: Catalog, run: str, slice: str | None = "") -> pl.DataFrame:
    """Read scores: window_start, window_end, window_anchor, model, metric, value, slice, samples.

    Models are in the order of their first trigger, windows in that of time, metrics as declared.

    Parameters
    ----------
    catalog : Catalog
    run : str
    slice : str or None
        ``""``: of all samples of a window; ``"column=value"``: of those; None: of all samples and of every slice.
    """
    order = (
        sa.select(triggers.c.model, sa.func.min(triggers.c.index).label("first"))
        .where(triggers.c.run == run)
        .group_by(triggers.c.model)
        .subquery()
    )
    table = evaluations
    query = (
        sa.select(
            table.c.window_start_ns,
            table.c.window_end_ns,
            table.c.window_anchor_ns,
            table.c.model,
            table.c.metric,
            table.c.value,
            table.c.slice,
            table.c.samples,
        )
        .join(order, order.c.model == table.c.model)
        .where(table.c.run == run)
        .order_by(order.c.first, table.c.window_start_ns, table.c.window_end_ns, table.c.metric_index)
    )
    if slice is not None:
        query = query.where(table.c.slice == slice)
    with catalog.read() as connection:
        rows = connection.execute(query).all()
    frame = pl.DataFrame([tuple(row) for row in rows], schema=_SCHEMA, orient="row")
    return frame.with_columns(pl.from_epoch(pl.col(_TIMES), time_unit="ns").dt.replace_time_zone("UTC"))
