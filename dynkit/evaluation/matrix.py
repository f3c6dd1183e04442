"""The models x windows matrix: every window is read once and scored by all models."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import polars as pl
import torch
from torch import nn

from dynkit.data import Batches, Version, as_keys, slice_batch
from dynkit.errors import TrainingError
from dynkit.evaluation.metrics import Scores
from dynkit.training import predict
from dynkit.types import Metric, Window

__all__ = ["evaluate"]

State = Mapping[str, torch.Tensor]


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
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[tuple[Window, int, dict[str, dict[str, float | None]]]]:
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
        Key and timestamp of the samples to judge on, in time order.
    metrics : list of Metric
    device : torch.device
    batch_size : int
    on_batch : callable, optional
        As in `Batches`.

    Yields
    ------
    tuple
        The window, its number of samples, and for each model its score by metric. A window without samples has
        no scores.
    """
    module = module.to(device).eval()
    time_ns = table["timestamp"].to_physical()
    for window in windows:
        low, high = (int(time_ns.search_sorted(ns, side="left")) for ns in (window.start_ns, window.end_ns))
        if low >= high:
            yield window, 0, {}
            continue
        batches = Batches(version, as_keys(table.slice(low, high - low)), batch_size=batch_size, device=device)
        scores = {model: Scores(metrics) for model in states}
        with torch.inference_mode():
            for some in batches.super_batches():
                for model, state in states.items():
                    module.load_state_dict(state)
                    _score(module, some, scores[model], batch_size, on_batch)
        yield window, high - low, {model: score.compute() for model, score in scores.items()}


def _score(
    module: nn.Module,
    some: dict[str, torch.Tensor],
    scores: Scores,
    batch_size: int,
    on_batch: Callable[[int], None] | None,
) -> None:
    n = len(some["label"])
    for low in range(0, n, batch_size):
        batch = slice_batch(some, low, min(low + batch_size, n))
        if on_batch is not None:
            on_batch(len(batch["label"]))
        outputs = predict(module, batch)
        if not torch.isfinite(outputs).all():
            raise TrainingError("the model's outputs are not finite in evaluation (NaN or infinity)")
        scores.update(outputs, batch["label"])
