"""Compare runs: what each cost and how good its composite model was, over windows that all can answer."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from dynkit import html
from dynkit.errors import InvalidInput
from dynkit.evaluation.composite import CompositeKind, mean_scores, shared
from dynkit.pipeline.run import Run

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; displays as a table and a chart.

    Parameters
    ----------
    frame : pl.DataFrame
        A row per run and metric: name, run, metric, mean, time_weighted, windows, trainings, samples_trained,
        train_s. Anything a Polars frame can do, a Comparison passes on to it.
    curves : dict
        Each run's composite curve by label, all windows.
    kind : "active" or "trained"
        Which composite.
    """

    frame: pl.DataFrame
    curves: dict[str, pl.DataFrame] = field(repr=False)
    kind: CompositeKind = "active"

    @property
    def chart(self) -> Any:
        """The composite curves as an Altair chart, of the first metric."""
        return self.plot().chart

    def plot(self, metric: str | None = None) -> Any:
        """Draw the composite curves; see `dynkit.plots.composite`."""
        from dynkit import plots

        return plots.composite(self.curves, metric)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.frame, name)

    def __getitem__(self, item: Any) -> Any:
        return self.frame[item]

    def __len__(self) -> int:
        return len(self.frame)

    def __str__(self) -> str:
        return str(self.frame)

    def rows_as_text(self) -> tuple[list[str], list[list[str]]]:
        """Return column names and cells as people read them."""
        columns = [
            "pipeline",
            "run",
            "metric",
            f"mean ({self.kind})",
            "time-weighted",
            "windows",
            "trainings",
        ]
        rows = [
            [
                row["name"],
                row["run"],
                row["metric"],
                _number(row["mean"]),
                _number(row["time_weighted"]),
                str(row["windows"]),
                str(row["trainings"]),
                f"{row['samples_trained']:,}",
                f"{row['train_s']:.1f}",
            ]
            for row in self.frame.iter_rows(named=True)
        ]
        return [*columns, "samples trained", "train s"], rows

    def _repr_html_(self) -> str:
        columns, rows = self.rows_as_text()
        table = html.table(columns, rows, numbers=columns[3:])
        drawable = any(curve.height for curve in self.curves.values())
        return table + (self.plot().to_html() if drawable else "")


def compare(runs: Run | Iterable[Run], *, kind: CompositeKind = "active") -> Comparison:
    """Compare runs by their composite models.

    Means are taken over the windows that every run can answer: from the latest first active model on, up to the end of
    the run that ends first.

    Parameters
    ----------
    runs : Run or iterable of Run
    kind : "active" or "trained"

    Returns
    -------
    Comparison

    Raises
    ------
    InvalidInput
        When there is no run.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    if not all(isinstance(run, Run) for run in runs):
        raise InvalidInput("runs must be runs, such as ws.run(id): dk.compare([run_a, run_b])")
    if not runs:
        raise InvalidInput("nothing to compare; pass runs: dk.compare([run_a, run_b])")
    names = [run.name for run in runs]
    labels = [name if names.count(name) == 1 else f"{name} ({run.id})" for name, run in zip(names, runs, strict=True)]
    curves = [run.composite(kind) for run in runs]
    frames = []
    metrics = pl.concat([curve["metric"] for curve in curves]).unique(maintain_order=True)
    for run, label, curve in zip(runs, labels, shared(curves), strict=True):
        models = run.models()
        scores = mean_scores(curve)
        if not scores.height:
            scores = pl.DataFrame({"metric": metrics}).with_columns(
                mean=pl.lit(None, pl.Float64),
                time_weighted=pl.lit(None, pl.Float64),
                windows=pl.lit(0, pl.UInt32),
            )
        frames.append(
            scores.select(
                pl.lit(label).alias("name"),
                pl.lit(run.id).alias("run"),
                pl.all(),
                pl.lit(models.height, pl.Int64).alias("trainings"),
                pl.lit(models["samples_passed"].sum(), pl.Int64).alias("samples_trained"),
                pl.lit(models["train_s"].sum(), pl.Float64).alias("train_s"),
            )
        )
    return Comparison(pl.concat(frames), dict(zip(labels, curves, strict=True)), kind)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
