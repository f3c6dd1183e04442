"""How triggers and selections change score and cost on streams: writes the tables of docs/policy-study.md.

``make study`` runs it. Every policy runs with three seeds, several at a time; the runs are kept in build/study, so
that a second call makes only what is missing.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch

import dynkit as dk
from dynkit.drift import DynamicQuantile, PValue
from dynkit.pipeline.sweep import Sweep
from dynkit.streams.stream import clocked
from dynkit.triggers import Amount, AvoidableMisclassifications, Drift, Performance

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "policy-study.md"
SEEDS = [0, 1, 2]
JOBS = 2
LOOKS = 20  # of a stream, of triggers
TRAININGS = 5  # of a stream, of selections


def streams(axis: str) -> list[dk.streams.Stream]:
    images = dk.streams.fashion_mnist().frame.head(10_000)
    fashion = clocked("fashion-10k", images["x"].to_numpy(), images["label"].to_numpy())
    year = [] if axis == "selection" else [dk.streams.flights()]  # all selections on it would take an hour
    return [
        *year,
        dk.streams.class_incremental(fashion, stages=5),
        dk.streams.prior_shift(fashion, priors=[[1] * 10, [6] * 5 + [1] * 5, [1] * 5 + [6] * 5]),
        dk.streams.corruption(fashion, "noise", severities=(0, 0.6, 0)),
        dk.streams.sea(12_000),
    ]


class Once:
    """Train after so many samples, and never again."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, new: pl.DataFrame, run: Any) -> list[int]:
        at = self.n - run.past.height - 1
        return [at] if 0 <= at < new.height else []


def triggers_of(rows: int) -> dict[str, Any]:
    """Each looks as often as the fixed interval trains."""
    every = rows // LOOKS
    looks = {"every": every, "current": min(every, 1000), "reference": min(every, 1000)}
    return {
        "once": Once(every),
        "fixed interval": Amount(every),
        "half as often": Amount(2 * every),
        "drift of embeddings, p < 0.01": Drift(**looks, criterion=PValue(0.01)),
        "drift of samples, p < 0.01": Drift(**looks, on="fields", criterion=PValue(0.01)),
        "drift of embeddings, highest of 10": Drift(**looks, criterion=DynamicQuantile(0.0)),
        "accuracy, lowest of 10": Performance(every=every, criterion=DynamicQuantile(0.0)),
        "avoidable errors, 5 % of a look": Performance(
            every=every, criterion=AvoidableMisclassifications(max(1, every // 20))
        ),
    }


IN_WINDOWS = ("once", "fixed interval", "half as often", "drift of embeddings, p < 0.01", "drift of samples, p < 0.01")


def fixed_of(axis: str, stream: dk.streams.Stream) -> dict[str, Any]:
    """What all policies of a table have in common."""
    every = len(stream) // LOOKS
    if axis == "trigger":  # new samples and as many old ones as one interval has, from the weights before
        return {"selection": dk.selection.Replay(new=dk.selection.New(), old=dk.selection.Random(n=every))}
    if axis == "window":  # the newest samples, until a fresh model has learned them
        return {
            "selection": dk.selection.Recent(n=every),
            "training": replace(stream.training, warm_start=False, epochs=3 * stream.training.epochs),
        }
    return {"trigger": Amount(len(stream) // TRAININGS)}


SELECTIONS: dict[str, Any] = {
    "all": dk.selection.All(),
    "uniform": dk.selection.Random(fraction=0.5),
    "recent": dk.selection.Recent(fraction=0.5),
    "class-balanced": dk.selection.ClassBalanced(fraction=0.5),
    "RS2": dk.selection.RS2(fraction=0.5),
    "loss": dk.selection.Loss(fraction=0.5),
    "gradient norm (DLIS)": dk.selection.GradNorm(fraction=0.5),
    "margin": dk.selection.Margin(fraction=0.5),
    "entropy": dk.selection.Entropy(fraction=0.5),
    "RHO-LOSS": dk.selection.RhoLoss(fraction=0.5),
}


def table_of(stream: dk.streams.Stream, sweep: Sweep, axis: str) -> pl.DataFrame:
    """Mean and spread over seeds of the composite score, and what it cost."""
    metric = stream.metrics[0]
    # a selection is judged by the model that learned from a window's past, a trigger by the one that was in use
    frame = sweep.frame("trained" if axis == "selection" else "active").filter(metric=metric)
    grouped = frame.group_by(axis, maintain_order=True).agg(
        pl.col("mean").mean().alias("score"),
        (pl.col("mean").max() - pl.col("mean").min()).alias("spread"),
        pl.col("trainings").mean(),
        pl.col("samples_trained").mean().alias("samples"),
    )
    return grouped.select(pl.lit(stream.name).alias("stream"), pl.lit(metric).alias("metric"), pl.all())


def markdown(frame: pl.DataFrame, axis: str) -> str:
    lines = [f"| stream | {axis} | score | spread | trainings | samples trained |", "|---|---|---|---|---|---|"]
    for row in frame.iter_rows(named=True):
        name = f"{row['stream']} ({row['metric']})"
        numbers = f"{row['score']:.4f} | {row['spread']:.4f} | {row['trainings']:.1f} | {row['samples']:,.0f}"
        lines.append(f"| {name} | {row[axis]} | {numbers} |")
    return "\n".join(lines)


def studied(axis: str, ws: dk.Workspace) -> str:
    tables, varied = [], "selection" if axis == "selection" else "trigger"
    for stream in streams(axis):
        values = SELECTIONS if axis == "selection" else triggers_of(len(stream))
        if axis == "window":
            values = {name: values[name] for name in IN_WINDOWS}
        pipeline = stream.pipeline(ws, name=f"{axis}-{stream.name}", **fixed_of(axis, stream))
        sweep = dk.sweep(pipeline, jobs=JOBS, **{varied: values}, seed=SEEDS).wait()
        for run in sweep.runs:
            if run.status != "finished":
                sys.exit(f"{stream.name}: run {run.id} {run.status}: {run.reason}")
        tables.append(table_of(stream, sweep, varied))
        print(markdown(tables[-1], varied), flush=True)
    return markdown(pl.concat(tables), varied)


def main() -> None:
    torch.set_num_threads(1)  # of each run; several go at a time
    ws = dk.Workspace(ROOT / "build" / "study")
    page = PAGE.read_text()
    for axis in sys.argv[1:] or ("trigger", "window", "selection"):
        table = f"<!-- {axis}s -->\n{studied(axis, ws)}\n<!-- end -->"
        page = re.sub(rf"<!-- {axis}s -->.*?<!-- end -->", lambda _, text=table: text, page, flags=re.DOTALL)
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
