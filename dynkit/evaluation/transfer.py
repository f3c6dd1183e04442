"""Forgetting and transfer over the models x windows matrix: what a training did to windows before and after it.

Papers number tasks and train one model after each. Here models come at triggers and windows are intervals of time, so
a window counts as *learned* by the first model whose training data reaches into it, the one that the *trained*
composite takes for a window anchored at its start; windows that no model reached are left out. With A(k, w) the score
of the model of trigger k in window w, and l(w) the model that learned w, a run that ends with model k has

- *backward* transfer: mean of ``A(k, w) - A(l(w), w)`` over windows with ``l(w) < k``. Below 0: later trainings hurt.
- *forgetting*: mean of ``max over j < k of A(j, w) - A(k, w)`` over the same windows. Above 0: some model was better.
- *forward* transfer: mean of ``A(l(w) - 1, w) - b(w)`` over windows with ``1 <= l(w) <= k``: what the model before
  knew of a window whose samples it had never seen, beyond what b(w) knows.

Of errors (where less is better) the signs are turned, so that backward and forward always say gain.

References
----------
Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017, equations 3 and 4 (backward and
forward transfer). Chaudhry et al., "Riemannian walk for incremental learning", ECCV 2018, section 3 (forgetting).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from dynkit.errors import InvalidInput, did_you_mean
from dynkit.evaluation.metrics import NAMES, higher_is_better
from dynkit.types import Trained

__all__ = ["transfer"]

_ERRORS = tuple(name for name, metric in NAMES.items() if not higher_is_better(metric()))
_SCHEMA = {
    "index": pl.Int64,
    "model": pl.String,
    "metric": pl.String,
    "backward": pl.Float64,
    "forgetting": pl.Float64,
    "forward": pl.Float64,
}

Array = np.ndarray[Any, np.dtype[Any]]


def transfer(
    matrix: pl.DataFrame,
    trained: Sequence[Trained],
    *,
    baseline: Mapping[str, float] | None = None,
    errors: Sequence[str] = _ERRORS,
) -> pl.DataFrame:
    """Measure forgetting and transfer, as if the run ended with each of its models in turn.

    Parameters
    ----------
    matrix : pl.DataFrame
        Columns window_start, window_end, model, metric, value; null where a metric is undefined.
    trained : sequence of Trained
        The run's triggers, oldest first.
    baseline : mapping of metric to float or None
        Score of a model that knows nothing, such as ``{"accuracy": 0.1}`` for ten classes: the paper's b(w). None:
        forward transfer is over the run's first model, in windows that come after the next one.
    errors : sequence of str
        Metrics of which less is better.

    Returns
    -------
    pl.DataFrame
        A row per metric and trigger: index, model, metric, backward, forgetting, forward; null where there is no
        window to take a mean over. The last row of a metric is the run's.

    Raises
    ------
    InvalidInput
        When `baseline` names a metric that is not in the matrix.

    Examples
    --------
    Two models, each trained when a day is over; what the second learned cost it what the first knew.

    >>> import datetime as dt
    >>> from dynkit.time import to_ns
    >>> days = [dt.datetime(2020, 1, day, tzinfo=dt.UTC) for day in (1, 2, 3)]
    >>> matrix = pl.DataFrame({
    ...     "window_start": days[:2] * 2, "window_end": days[1:] * 2, "model": ["a", "a", "b", "b"],
    ...     "metric": "accuracy", "value": [0.75, 0.25, 0.5, 0.875],
    ... })
    >>> trained = [Trained(i, 0, to_ns(days[i + 1]) - 1, name, 1, 0.0) for i, name in enumerate("ab")]
    >>> transfer(matrix, trained, baseline={"accuracy": 0.125}).row(-1)
    (1, 'b', 'accuracy', -0.25, 0.25, 0.125)
    """
    metrics = matrix["metric"].unique(maintain_order=True).to_list()
    for name in baseline or ():
        if name not in metrics:
            raise InvalidInput(f"baseline has a metric {name!r} that is not in the matrix{did_you_mean(name, metrics)}")
    last_ns = np.array([one.last_ns for one in trained], dtype=np.int64)
    frames = [pl.DataFrame(schema=_SCHEMA)]
    for metric in metrics if trained else ():
        scores_MW, starts_W = _dense(matrix.filter(pl.col("metric") == metric), trained)
        sign = -1 if metric in errors else 1
        learned_W = np.searchsorted(last_ns, starts_W, side="left")
        known = learned_W < len(trained)
        known_b = None if baseline is None or metric not in baseline else sign * baseline[metric]
        columns = _by_model(sign * scores_MW[:, known], learned_W[known], known_b)
        frames.append(
            pl.DataFrame(
                {
                    "index": [one.index for one in trained],
                    "model": [one.model for one in trained],
                    "metric": [metric] * len(trained),
                    **columns,
                },
                schema=_SCHEMA,
            ).with_columns(pl.col("backward", "forgetting", "forward").fill_nan(None))
        )
    return pl.concat(frames)


def _dense(rows: pl.DataFrame, trained: Sequence[Trained]) -> tuple[Array, Array]:
    """Scores (M, W) of one metric, NaN where there is none, and the windows' starts (W,) in nanoseconds."""
    windows = rows.select("window_start", "window_end").unique().sort("window_start", "window_end").with_row_index("w")
    models = {model: i for i, model in enumerate(dict.fromkeys(one.model for one in trained))}
    placed = rows.join(windows, on=["window_start", "window_end"]).filter(pl.col("model").is_in(list(models)))
    scores = np.full((len(models), windows.height), np.nan)
    at = placed["model"].replace_strict(models, return_dtype=pl.Int64).to_numpy(), placed["w"].to_numpy()
    scores[at] = placed["value"].fill_null(np.nan).to_numpy()
    return scores[[models[one.model] for one in trained]], windows["window_start"].dt.epoch("ns").to_numpy()


def _by_model(scores_MW: Array, learned_W: Array, baseline: float | None) -> dict[str, Array]:
    """Means for each last model (M,); more is better, and every window was learned."""
    n_models, n_windows = scores_MW.shape
    at = np.arange(n_windows)
    before_MW = learned_W < np.arange(n_models)[:, None]
    best_MW = np.full_like(scores_MW, np.nan)  # of the models before; fmax passes over what is undefined
    best_MW[1:] = np.fmax.accumulate(scores_MW, axis=0)[:-1]
    ahead_W = scores_MW[learned_W - 1, at] - (scores_MW[0] if baseline is None else baseline)
    first = 1 if baseline is not None else 2  # the first model is no better than itself
    reached_MW = (learned_W >= first) & (learned_W <= np.arange(n_models)[:, None])
    return {
        "backward": _mean(scores_MW - scores_MW[learned_W, at], before_MW),
        "forgetting": _mean(best_MW - scores_MW, before_MW),
        "forward": _mean(np.broadcast_to(ahead_W, scores_MW.shape), reached_MW),
    }


def _mean(values_MW: Array, counted_MW: Array) -> Array:
    """Mean (M,) over the windows that count and have a value; NaN where there is none."""
    counted = counted_MW & ~np.isnan(values_MW)
    n = counted.sum(1)
    total = np.where(counted, values_MW, 0).sum(1)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)
