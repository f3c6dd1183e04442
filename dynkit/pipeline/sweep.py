"""Train a grid of policies over one dataset, several at a time, and nothing twice."""

import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import polars as pl

from dynkit import html
from dynkit.errors import Conflict, InvalidInput, WaitTimeout, check_whole, did_you_mean
from dynkit.evaluation.composite import CompositeKind
from dynkit.pipeline.compare import compare
from dynkit.pipeline.declaration import Pipeline
from dynkit.pipeline.process import ACTIVE
from dynkit.pipeline.run import Run, find

__all__ = ["Sweep", "sweep"]

_FIELDS = ("model", "trigger", "selection", "training", "evaluation", "seed")
_POLL_S = 0.2


def sweep(pipeline: Pipeline, *, jobs: int = 1, **grid: Any) -> "Sweep":
    """Run a pipeline once per combination of what is given, each in a process of its own.

    Trainings that several of them share (same samples, model, settings, parent and seed) are done once. A combination
    that has finished before is found again instead of run.

    Parameters
    ----------
    pipeline : Pipeline
        What they have in common.
    jobs : int
        How many run at a time.
    **grid
        Fields of the pipeline, each with a list of values or a mapping of label to value: ``trigger={"daily":
        Time("1d"), "monthly": Time("1mo")}, seed=[0, 1, 2]``.

    Returns
    -------
    Sweep
        At once; the runs go on in the background. Those that have begun survive the kernel, as any run does; the others
        begin when the same cell runs again.

    Raises
    ------
    InvalidInput
        When something in the grid is no pipeline field, or cannot be one.

    Examples
    --------
    >>> import dynkit as dk
    >>> dk.sweep(pipeline, trigger=[dk.triggers.Time("1d"), dk.triggers.Time("1mo")], seed=[0, 1])  # doctest: +SKIP
    """
    check_whole("jobs", jobs, 1)
    axes: dict[str, dict[str, Any]] = {}
    for name, values in grid.items():
        if name not in _FIELDS:
            raise InvalidInput(f"{name!r} cannot vary in a sweep{did_you_mean(name, _FIELDS)}")
        values = values.tolist() if isinstance(values, np.ndarray) else values
        if isinstance(values, Mapping):
            labelled = {str(label): value for label, value in values.items()}
        else:
            labelled = {_label(value): value for value in values} if isinstance(values, list | tuple) else {}
        if not labelled or len(labelled) < len(values):
            raise InvalidInput(f"{name}={values!r} must be a list of different values, or a mapping of labels to them")
        axes[name] = labelled
    combinations = [dict(zip(axes, labels, strict=True)) for labels in itertools.product(*axes.values())]
    pipelines = [
        dataclasses.replace(pipeline, **{name: axes[name][label] for name, label in combination.items()})
        for combination in combinations
    ]
    return Sweep(pipelines, combinations, jobs)


def _label(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


class Sweep:
    """Handle of the runs of a grid; displays as a table of what is done.

    Parameters
    ----------
    pipelines : sequence of Pipeline
    labels : sequence of dict
        What is special about each.
    jobs : int
    """

    def __init__(self, pipelines: Sequence[Pipeline], labels: Sequence[dict[str, str]], jobs: int) -> None:
        self._labels = labels
        self._runs: list[Run | None] = [None] * len(pipelines)
        self._waiting = list(enumerate(pipelines))
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._cancelled = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(jobs, len(pipelines)))]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        """Start one run after the other, as long as there are any."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                at, pipeline = self._waiting.pop(0)
            reuse = not pipeline.training.carry_optimizer  # which another run's training does not leave
            try:
                known = find(pipeline.dataset.catalog, pipeline.digest(), ("finished",))
                run = self._runs[at] = known or pipeline.start(reuse=reuse)
                if self._cancelled:  # while it was being started
                    _end(run)
                run.wait()
            except BaseException as error:  # told by `wait`: nobody looks at a thread
                self._error = error
                return

    @property
    def runs(self) -> list[Run]:
        """Those that were started, in the order of the grid."""
        return [run for run in self._runs if run is not None]

    def wait(self, timeout_s: float | None = None) -> "Sweep":
        """Wait until all runs have ended; interrupting the wait leaves them going.

        Raises
        ------
        WaitTimeout
            When they have not after `timeout_s` seconds.
        """
        waited_s = 0.0
        while any(thread.is_alive() for thread in self._threads):
            if timeout_s is not None and waited_s >= timeout_s:
                raise WaitTimeout(f"the sweep is still running after {timeout_s:g} s; it goes on")
            next(thread for thread in self._threads if thread.is_alive()).join(_POLL_S)
            waited_s += _POLL_S
        if self._error is not None:
            raise self._error
        return self

    def cancel(self) -> "Sweep":
        """Start no more runs, and end those that are going; what was committed stays."""
        self._cancelled = True
        with self._lock:
            self._waiting.clear()
        for run in self.runs:
            _end(run)
        return self

    def frame(self, kind: CompositeKind = "active") -> pl.DataFrame:
        """Return a row per finished run and metric: what is special about it, and all that `compare` tells."""
        done = [(label, run) for label, run in zip(self._labels, self._runs, strict=True) if run is not None]
        done = [(label, run) for label, run in done if run.status == "finished"]
        if not done:
            return pl.DataFrame()
        labels = pl.DataFrame([{**label, "run": run.id} for label, run in done])
        return labels.join(compare([run for _, run in done], kind=kind).frame, on="run", maintain_order="left")

    def __repr__(self) -> str:
        return "\n".join(" ".join(row) for row in self._rows())

    def _repr_html_(self) -> str:
        columns = [*(self._labels[0] if self._labels else ()), "run", "status", "trainings", "reused"]
        return html.table(columns, self._rows(), numbers=("trainings", "reused"))

    def _rows(self) -> list[list[str]]:
        rows = []
        for label, run in zip(self._labels, self._runs, strict=True):
            if run is None:
                rows.append([*label.values(), "", "waiting", "", ""])
                continue
            trained = [event.data for event in run.events() if event.kind == "trained"]
            reused = sum("reused" in data for data in trained)
            rows.append([*label.values(), run.id, run.status, str(len(trained)), str(reused)])
        return rows


def _end(run: Run) -> None:
    """Cancel a run, if it is going."""
    with suppress(Conflict):  # it has ended by itself meanwhile
        if run.status in ACTIVE:
            run.cancel()
