"""A small stream that a model can learn, and a pipeline over it; imported by tests, workers and kernels."""

import datetime as dt

import numpy as np
import polars as pl
from torch import nn

import dynkit as dk

START = dt.datetime(2013, 1, 1)


def make_frame(rows: int = 3000, seed: int = 0, start: dt.datetime = START, minutes: int = 10) -> pl.DataFrame:
    """A stream of `rows` samples, one every `minutes`; the label is learnable from two of three features."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3))
    label = (x[:, 0] - x[:, 1] + 0.3 * rng.normal(size=rows) > 0).astype(np.int64)
    times = [start + dt.timedelta(minutes=minutes * i) for i in range(rows)]
    return pl.DataFrame({"when": times, "a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "late": label})


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def make_pipeline(dataset: dk.Dataset, **changes: object) -> dk.Pipeline:
    """A pipeline that trains six models in a second."""
    options: dict[str, object] = {
        "name": "test",
        "dataset": dataset,
        "model": make_model,
        "trigger": dk.triggers.Amount(500),
        "selection": dk.selection.Random(fraction=0.8),
        "training": dk.Training(epochs=1, batch_size=64, lr=1e-2, warm_start=True),
        "evaluation": dk.Evaluation(windows=dk.windows.Tumbling("3d"), metrics=["accuracy", "roc_auc"]),
        "seed": 3,
    }
    return dk.Pipeline(**{**options, **changes})  # type: ignore[arg-type]


def replayed(pipeline: dk.Pipeline) -> dk.Run:
    """Run a pipeline here to its end."""
    *_, last = pipeline.replay()
    return dk.Workspace(pipeline.dataset.catalog.root).run(last.run)
