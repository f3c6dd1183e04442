"""The recipe of a finished run, to train its models anew: with other parents, or without some samples.

Here the user's code of the run is loaded, as when a run is resumed: only when somebody asks to rebuild a model, never
to list or show one.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa
import torch

from dynkit import catalog as tables
from dynkit.catalog import Catalog
from dynkit.data import Dataset, Version, in_split
from dynkit.evaluation import evaluate
from dynkit.evaluation.matrix import Scored
from dynkit.lineage.samples import files_of
from dynkit.pipeline.declaration import Pipeline
from dynkit.pipeline.payload import load
from dynkit.pipeline.train import Outcome, train
from dynkit.time import IntArray
from dynkit.training import resolve_device, seeded
from dynkit.types import Window

__all__ = ["Recipe"]

State = dict[str, torch.Tensor]


class Recipe:
    """How a run trained and judged its models.

    Parameters
    ----------
    catalog : Catalog
    run : str
        Its id.
    """

    def __init__(self, catalog: Catalog, run: str) -> None:
        self._catalog = catalog
        self.run = run
        self._home: tuple[Path, int]

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline as declared; its dataset is of no concern here."""
        runs = tables.runs
        with self._catalog.read() as connection:
            dataset = connection.scalar(sa.select(runs.c.dataset).where(runs.c.id == self.run))
        parts = load(files_of(self._catalog.root, self.run))
        self._home = Path.cwd(), torch.get_num_threads()
        return Pipeline(dataset=Dataset(self._catalog, str(dataset)), **parts)

    @contextmanager
    def _at_home(self) -> Iterator[Pipeline]:
        """Be where the run was, with its number of threads, and come back after."""
        folder, threads = Path.cwd(), torch.get_num_threads()
        try:
            pipeline = self.pipeline
            os.chdir(self._home[0])
            torch.set_num_threads(self._home[1])
            yield pipeline
        finally:
            os.chdir(folder)
            torch.set_num_threads(threads)

    def module(self) -> torch.nn.Module:
        """Return a fresh model."""
        with self._at_home() as pipeline, seeded(pipeline.seed):
            return pipeline.model()

    @property
    def carries(self) -> bool:
        """Whether a training goes on with the optimizer of the one before."""
        with self._at_home() as pipeline:
            return pipeline.training.carry_optimizer

    def train(self, index: int, version: Version, chosen: pl.DataFrame, parent: State | None, carried: Any) -> Outcome:
        """Train as the run did at this trigger, on these samples, from this parent and this state of the optimizer."""
        with self._at_home() as pipeline:
            device = resolve_device(pipeline.training.device)
            return train(pipeline, index, version, chosen, parent=parent, device=device, carried=carried)

    def judge(
        self, states: dict[str, State], windows: Iterable[Window], version: Version, without: IntArray
    ) -> Iterator[tuple[Window, dict[str, Scored]]]:
        """Score models in windows as the run did, leaving out some samples; yields as `evaluate` does."""
        with self._at_home() as pipeline:
            evaluation = pipeline.evaluation
            table = version.table.filter(pl.col("label").is_not_null(), ~pl.col("key").is_in(without.tolist()))
            if evaluation.split is not None:
                table = table.filter(in_split(table, version.manifest["splits"], evaluation.split))
            with seeded(pipeline.seed):
                module = pipeline.model()
            yield from evaluate(
                module,
                states,
                windows,
                version,
                table.sort("timestamp", "key"),
                evaluation.resolved(),
                slices=evaluation.slices,
                device=resolve_device(pipeline.training.device),
                batch_size=evaluation.batch_size,
            )
