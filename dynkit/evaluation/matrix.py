"""The models x windows matrix: every window is read once and scored by all models, as a whole and slice by slice."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import nn

from dynkit.data import Batches, Version, as_keys, slice_batch
from dynkit.errors import TrainingError
from dynkit.evaluation.metrics import Scores
from dynkit.time import IntArray
from dynkit.training import predict
from dynkit.types import Metric, Window

__all__ = ["Scored", "evaluate", "rows_of"]

State = Mapping[str, torch.Tensor]


class Scored(NamedTuple):
    """How models did on some samples of a window."""

    samples: int
    scores: dict[str, dict[str, float | None]]
    """For each model its score by metric; without samples there are none."""


def evaluate(
    module: nn.Module,
    states: Mapping[str, State],
    windows: Iterable[Window],
    version: Version,
    table: pl.DataFrame,
    metrics: list[Metric],
    *,
    device: torch.device,
    batch_size: int,
    slices: Sequence[str] = (),
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[tuple[Window, dict[str, Scored]]]:
    """Score all models in each window.

    One module takes the weights of one model after the other while a piece of the window is in memory: memory is
    bounded by one model on the device, and samples are read once whatever the number of models.

    Parameters
    ----------
    module : nn.Module
        Any model of the run; its weights are overwritten.
    states : mapping
        Model identity to its tensors.
    windows : iterable of Window
    version : Version
    table : pl.DataFrame
        Key, timestamp and columns to slice by of the samples to judge on, in time order.
    metrics : list of Metric
    device : torch.device
    batch_size : int
    slices : sequence of str
        Columns whose values are also judged apart.
    on_batch : callable, optional
        As in `Batches`.

    Yields
    ------
    tuple
        The window, and what was scored in it: of all its samples under ``""``, of each slice that has samples there
        under ``"column=value"``.
    """
    module = module.to(device).eval()
    time_ns = table["timestamp"].to_physical()
    for window in windows:
        low, high = (int(time_ns.search_sorted(ns, side="left")) for ns in (window.start_ns, window.end_ns))
        rows = table.slice(low, max(high - low, 0))
        if not rows.height:
            yield window, {"": Scored(0, {})}
            continue
        parts = _parts(rows, slices)
        scores = {part: {model: Scores(metrics) for model in states} for part in parts}
        batches = Batches(version, as_keys(rows), batch_size=batch_size, device=device)
        done = 0
        with torch.inference_mode():
            for some in batches.super_batches():
                for model, state in states.items():
                    module.load_state_dict(state)
                    to = [(parts[part], scores[part][model]) for part in parts]
                    _score(module, some, to, done, batch_size, on_batch)
                done += len(some["label"])
        yield (
            window,
            {
                part: Scored(rows.height if at is None else len(at), {m: s.compute() for m, s in scores[part].items()})
                for part, at in parts.items()
            },
        )


def rows_of(run: str, window: Window, scored: Mapping[str, Scored]) -> list[dict[str, Any]]:
    """Rows of the catalog's `evaluations` for one window of a run."""
    return [
        {
            "run": run,
            "model": model,
            "window_start_ns": window.start_ns,
            "window_end_ns": window.end_ns,
            "window_anchor_ns": window.anchor,
            "metric": metric,
            "slice": slice,
            "metric_index": metric_index,
            "value": value,
            "samples": some.samples,
        }
        for slice, some in scored.items()
        for model, by_metric in some.scores.items()
        for metric_index, (metric, value) in enumerate(by_metric.items())
    ]


def _parts(rows: pl.DataFrame, slices: Sequence[str]) -> dict[str, IntArray | None]:
    """Rows of each slice, rising, by its name; of the whole, None."""
    parts: dict[str, IntArray | None] = {"": None}
    for column in slices:
        values = rows[column].cast(pl.String).fill_null("null").alias("value")
        by_value = values.to_frame().with_row_index().group_by("value").agg("index").sort("value")
        parts |= {f"{column}={value}": np.asarray(index, dtype=np.int64) for value, index in by_value.iter_rows()}
    return parts


def _score(
    module: nn.Module,
    some: dict[str, torch.Tensor],
    to: list[tuple[IntArray | None, Scores]],
    first: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None,
) -> None:
    """Score samples from row `first` of the window on, and add what falls into each part to its scores."""
    n = len(some["label"])
    for low in range(0, n, batch_size):
        batch = slice_batch(some, low, min(low + batch_size, n))
        labels = batch["label"]
        if on_batch is not None:
            on_batch(len(labels))
        outputs = predict(module, batch)
        if not torch.isfinite(outputs).all():
            raise TrainingError("the model's outputs are not finite in evaluation (NaN or infinity)")
        for at, scores in to:
            if at is None:
                scores.update(outputs, labels)
                continue
            begin, end = np.searchsorted(at, [first + low, first + low + len(labels)])
            if begin < end:
                inside = torch.from_numpy(at[begin:end] - (first + low)).to(outputs.device)
                scores.update(outputs[inside], labels[inside])
