"""A Run by its id: how it goes, what came out, and how to steer it.

A Run reads the catalog and nothing else, so it works from any process, while the run is going and after, and never
loads user code.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa

from dynkit import catalog as tables
from dynkit import html
from dynkit.catalog import Catalog
from dynkit.errors import Conflict, InvalidInput, NotFound, WaitTimeout, did_you_mean
from dynkit.evaluation.composite import CompositeKind, composite, mean_scores
from dynkit.evaluation.transfer import transfer
from dynkit.lineage.samples import files_of, read_selection
from dynkit.pipeline.owner import trained_of
from dynkit.pipeline.process import ACTIVE, identity, true_status
from dynkit.pipeline.scores import read_scores
from dynkit.pipeline.spawn import log_tail, spawn
from dynkit.time import to_datetime
from dynkit.types import Event, Trained

__all__ = ["Run", "Runs", "find"]

_POLL_S = 0.1
_REAPING_S = 1.0  # how long the process that started a worker may take to note its end
_ACKNOWLEDGE_S = 15.0  # how long pause and cancel wait for the run to obey
_COLUMNS = [column for column in tables.runs.c if column.name != "state"]  # that one may be large
_CURVE = ["window_start", "window_end", "model", "metric", "value"]


class Run:
    """Handle of one execution of a pipeline; made by `Pipeline.start`, found again by `Workspace.run`.

    Parameters
    ----------
    catalog : Catalog
    id : str
        The run's id, or a beginning of it that fits only one run.

    Raises
    ------
    NotFound
    """

    def __init__(self, catalog: Catalog, id: str) -> None:
        self._catalog = catalog
        if not isinstance(id, str) or not id:
            raise InvalidInput(f"{id!r} is no run; give the id of one, or its beginning")
        with catalog.read() as connection:
            query = sa.select(tables.runs.c.id).where(tables.runs.c.id.startswith(id, autoescape=True))
            found = connection.scalars(query.limit(2)).all()
        if len(found) != 1:
            problem = "more than one run begins" if found else "no run begins"
            raise NotFound(f"{problem} with {id!r} in {catalog.root}; ws.runs() lists them")
        self.id = found[0]
        self._reaper: threading.Thread | None = None

    # -- how it goes ---------------------------------------------------------------------------------------------

    def _row(self) -> Any:
        with self._catalog.read() as connection:
            return self._read_row(connection)

    def _read_row(self, connection: sa.Connection) -> Any:
        return connection.execute(sa.select(*_COLUMNS).where(tables.runs.c.id == self.id)).one()

    @property
    def name(self) -> str:
        """Name of the pipeline."""
        return str(self._row().name)

    @property
    def status(self) -> str:
        """``running``, ``paused``, ``finished``, ``failed``, ``cancelled`` or ``interrupted``.

        Interrupted means that its process is gone without having ended the run; `resume` continues it.
        """
        row = self._row()
        status = true_status(row)
        if status == "interrupted" and row.status in ACTIVE:  # whoever started it may be writing how it ended
            if self._reaper is not None:
                self._reaper.join(_REAPING_S)
            elif time.time_ns() - row.heartbeat_ns < _REAPING_S * 1e9:
                time.sleep(_REAPING_S)
            status = true_status(self._row())
        return status

    @property
    def pid(self) -> int:
        """Process that owns the run, or owned it last."""
        return int(self._row().pid)

    @property
    def error(self) -> str | None:
        """Traceback or reason of a run that failed or was interrupted, else None."""
        error: str | None = self._row().error
        return error

    @property
    def reason(self) -> str | None:
        """Why it failed or was interrupted, in one line; None otherwise."""
        if self.status not in ("failed", "interrupted"):
            return None
        ends = [event for event in self.events() if event.kind in ("failed", "interrupted")]
        told = [event.data["error"] for event in ends if event.data]
        return told[-1] if told else f"its process is gone; ws.run({self.id!r}).resume() continues it"

    @property
    def progress(self) -> dict[str, Any]:
        """What it is doing: phase, fraction (0 to 1), elapsed_s, eta_s (None while unknown) and details."""
        progress: dict[str, Any] = self._row().progress
        return progress

    @property
    def pipeline(self) -> dict[str, Any]:
        """The declaration, as JSON values."""
        description: dict[str, Any] = self._row().pipeline
        return description

    @property
    def created(self) -> Any:
        """When the run was made, as a UTC datetime."""
        return to_datetime(self._row().created_ns)

    @property
    def folder(self) -> Path:
        """Where its log and selections are."""
        folder: Path = self._catalog.root / "runs" / self.id
        return folder

    def events(self, since: int = 0) -> list[Event]:
        """Events from number `since` on, oldest first."""
        events = tables.events
        query = sa.select(events).where(events.c.run == self.id, events.c.seq >= since).order_by(events.c.seq)
        with self._catalog.read() as connection:
            return [Event(*row) for row in connection.execute(query)]

    # -- what came out -------------------------------------------------------------------------------------------

    @property
    def trained(self) -> list[Trained]:
        """Its committed triggers, oldest first."""
        with self._catalog.read() as connection:
            return trained_of(connection, self.id)

    def models(self) -> pl.DataFrame:
        """Return a row per trigger.

        Columns index, last_timestamp, position, samples (selected), samples_passed (all epochs), model, select_s,
        train_s, report (what the fit function reported, as JSON).
        """
        triggers = tables.triggers
        query = sa.select(triggers).where(triggers.c.run == self.id).order_by(triggers.c.index)
        with self._catalog.read() as connection:
            rows = connection.execute(query).all()
        names = ("index", "last_ns", "position", "samples", "samples_passed", "model", "select_s", "train_s")
        schema = {
            **dict.fromkeys(names, pl.Int64),
            "model": pl.String,
            "select_s": pl.Float64,
            "train_s": pl.Float64,
        }
        frame = pl.DataFrame({name: [row._mapping[name] for row in rows] for name in names}, schema=schema)
        reports = pl.Series("report", [json.dumps(row.report) for row in rows], dtype=pl.String)
        last = pl.from_epoch("last_ns", time_unit="ns").dt.replace_time_zone("UTC").alias("last_timestamp")
        return frame.select("index", last, pl.exclude("index", "last_ns")).with_columns(reports)

    def decisions(self) -> pl.DataFrame:
        """Return what triggers saw each time they looked, whether they fired or not.

        Returns
        -------
        pl.DataFrame
            Columns timestamp (of the last sample seen), position, trigger, score, threshold, fired, and what else a
            trigger reported; null where it did not. Triggers that only count report nothing.
        """
        found = [event.data for event in self.events() if event.kind == "decided"]
        first: dict[str, Any] = {"timestamp": pl.Datetime("ns", "UTC"), "position": pl.Int64, "trigger": pl.String}
        first |= {"score": pl.Float64, "threshold": pl.Float64, "fired": pl.Boolean}
        rows = [{**one, "timestamp": one["at_ns"]} for one in found]
        more = {name: None for one in found for name in one if name not in first and name != "at_ns"}
        columns = {name: [row.get(name) for row in rows] for name in (*first, *more)}
        return pl.DataFrame(
            [pl.Series(name, values, dtype=first.get(name), strict=False) for name, values in columns.items()]
        )

    def selection(self, index: int) -> pl.DataFrame:
        """Return the samples that trigger `index` trained on: key, and weight, epoch and score where there were any.

        Raises
        ------
        NotFound
        """
        indexes = [one.index for one in self.trained]
        if index not in indexes:
            raise NotFound(f"run {self.id} has no trigger {index}; it has {len(indexes)}")
        return read_selection(self._catalog.root, self.id, index)

    def matrix(self, slice: str = "") -> pl.DataFrame:
        """Scores of all models in all windows: window_start, window_end, model, metric, value.

        The value is null where a metric is undefined in a window (ROC-AUC of one class only).

        Parameters
        ----------
        slice : str
            Only of these samples, such as ``"carrier=UA"``; see `slices`. Windows without them are left out.

        Raises
        ------
        NotFound
        """
        return self._matrix(slice).select(_CURVE)

    def composite(self, kind: CompositeKind = "active", slice: str = "") -> pl.DataFrame:
        """One score per window and metric: of the model in use (``"active"``) or the one trained there (``"trained"``).

        Slice and columns as in `matrix`.
        """
        return composite(self._matrix(slice), self.trained, kind).select(_CURVE)

    def scores(self, kind: CompositeKind = "active") -> pl.DataFrame:
        """Aggregate the composite curve: metric, mean, time_weighted, windows."""
        return mean_scores(self.composite(kind))

    def slices(self, kind: CompositeKind = "active") -> pl.DataFrame:
        """Aggregate the composite curve of each slice that `Evaluation` asked for.

        Returns
        -------
        pl.DataFrame
            Columns slice (``"column=value"``), metric, mean, time_weighted, windows, and samples of those windows.
        """
        scored = read_scores(self._catalog, self.id, None).filter(pl.col("slice") != "", pl.col("value").is_not_null())
        curve = composite(scored, self.trained, kind)
        samples = curve.group_by("slice", "metric").agg(pl.col("samples").sum())
        means = mean_scores(curve, by=("slice", "metric"))
        return means.join(samples, on=["slice", "metric"], maintain_order="left").sort("slice", maintain_order=True)

    def transfer(self, *, baseline: Mapping[str, float] | None = None) -> pl.DataFrame:
        """Forgetting, backward and forward transfer after each model; see `dynkit.evaluation.transfer`."""
        return transfer(self._matrix(), self.trained, baseline=baseline)

    def _matrix(self, slice: str = "") -> pl.DataFrame:
        found = read_scores(self._catalog, self.id, slice)
        if slice and not found.height:
            names = read_scores(self._catalog, self.id, None)["slice"].unique().to_list()
            hint = did_you_mean(slice, filter(None, names)) or "; name its column in Evaluation(slices=[...])"
            raise NotFound(f"run {self.id} has no slice {slice!r}{hint}")
        return found

    # -- how to steer it -----------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> str:
        """Wait until the run has ended and return its status; interrupting the wait leaves the run going.

        Raises
        ------
        WaitTimeout
            When it has not ended after `timeout_s` seconds.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while (status := self.status) in ACTIVE:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise WaitTimeout(f"run {self.id} is still {status} after {timeout_s:g} s; it goes on")
            time.sleep(_POLL_S)
        return status

    def pause(self) -> "Run":
        """Let it stand still between two batches, keeping its device; `resume` lets it go on.

        Returns once it obeys, which takes as long as a batch, or after 15 seconds.
        """
        return self._ask("pause")

    def cancel(self) -> "Run":
        """End it after the present batch; what was committed stays. Returns as `pause` does."""
        return self._ask("cancel")

    def finish(self) -> "Run":
        """Let a live run see what is there, evaluate and end; `wait` for it."""
        return self._ask("finish")

    def _ask(self, request: str) -> "Run":
        runs = tables.runs
        with self._catalog.write() as connection:
            row = self._read_row(connection)
            status = true_status(row)
            if status not in ACTIVE:
                raise Conflict(f"run {self.id} is {status}; only a running one can be asked to {request}")
            connection.execute(sa.update(runs).where(runs.c.id == self.id).values(request=request))
        if request != "finish":
            self._until(lambda status: status not in ACTIVE or (request, status) == ("pause", "paused"))
        return self

    def resume(self) -> "Run":
        """Let a paused run go on; continue one that was interrupted, cancelled or failed in a new process.

        It goes on from its last committed trigger and ends in the same result as if nothing had happened.

        Raises
        ------
        Conflict
            When it has finished.
        StorageError
            When it was started in another directory of the workspace.
        """
        status = self.status
        runs = tables.runs
        if status in ACTIVE:
            with self._catalog.write() as connection:
                paused = runs.c.request == "pause"  # a cancellation stays
                connection.execute(sa.update(runs).where(runs.c.id == self.id, paused).values(request=None))
            self._until(lambda status: status != "paused")
            return self
        if status == "finished":
            raise Conflict(f"run {self.id} has finished; start the pipeline again for a new one")
        files_of(self._catalog.root, self.id)
        with self._catalog.write() as connection:  # one of several who try gets it
            row = self._read_row(connection)
            if true_status(row) in ACTIVE:
                return self
            values = {"status": "running", "request": None, "error": None, "ended_ns": None}
            connection.execute(sa.update(runs).where(runs.c.id == self.id).values(**values, **identity()))
        return self._spawn()

    def _until(self, reached: Any) -> None:
        deadline_s = time.monotonic() + _ACKNOWLEDGE_S
        while not reached(self.status) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S / 2)

    def _spawn(self) -> "Run":
        self._reaper = spawn(self._catalog, self.id)
        return self

    def log_tail(self) -> str:
        """Return the last lines of what the worker printed and logged."""
        return log_tail(self.folder)

    # -- how it looks --------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        row = self._row()
        progress = f", {row.progress['fraction']:.0%}" if row.status in ACTIVE else ""
        return f"Run({self.id!r}, {row.name!r}, {self.status}{progress})"

    def _repr_html_(self) -> str:
        return self.to_html(picture=True)

    def to_html(self, *, picture: bool) -> str:
        """Draw the run as static HTML; with a picture of its composite curve once there is one."""
        row, status, trained = self._row(), self.status, self.trained
        began = f"{to_datetime(row.created_ns):%Y-%m-%d %H:%M:%S} UTC"
        took = f", took {html.duration((row.ended_ns - row.created_ns) / 1e9)}" if row.ended_ns else ""
        facts = [
            f"run {self.id}, dataset {row.dataset} version {row.dataset_version}, started {began}{took}",
            f"{len(trained)} models, {sum(one.samples for one in trained):,} samples selected",
        ]
        curve = self.composite() if status not in ACTIVE else None
        if curve is not None and curve.height:
            scores = mean_scores(curve).iter_rows(named=True)
            facts.append("composite mean: " + ", ".join(f"{score['metric']} {score['mean']:.4f}" for score in scores))
        if status in ("failed", "interrupted") and (reason := self.reason):  # a view that moves asks twice a second
            facts.append(reason)
        if status == "interrupted":
            facts.append(f"continue it with ws.run({self.id!r}).resume()")
        if status in ACTIVE:  # so that a view that moves no more, of a kernel that was restarted, tells its age
            facts.append(
                f"heard of at {to_datetime(row.heartbeat_ns):%H:%M:%S} UTC; %dynkit show {self.id} looks again"
            )
        body = ""
        if picture and curve is not None and curve.height:
            from dynkit import plots

            body = plots.composite({row.name: curve}, height=140).to_html()
        return html.card(row.name, status, row.progress, facts, body)


class Runs(list[Run]):
    """A list of runs that displays as a table."""

    columns = ("run", "pipeline", "status", "progress", "models", "started (UTC)")

    def rows_as_text(self) -> list[list[str]]:
        """Return the cells of the table."""
        return [
            [
                run.id,
                run.name,
                run.status,
                f"{run.progress['fraction']:.0%}",
                str(len(run.trained)),
                f"{run.created:%Y-%m-%d %H:%M:%S}",
            ]
            for run in self
        ]

    def _repr_html_(self) -> str:
        return html.table(self.columns, self.rows_as_text(), numbers=("progress", "models"))


def find(
    catalog: Catalog, digest: str, statuses: Sequence[str] = ("running", "paused", "interrupted", "finished")
) -> Run | None:
    """Return the newest run of a pipeline's digest with such a status: one that is going, done or can go on, if any."""
    runs = tables.runs
    query = sa.select(runs.c.id).where(runs.c.digest == digest).order_by(runs.c.created_ns.desc())
    with catalog.read() as connection:
        ids = connection.scalars(query).all()
    found = (Run(catalog, id) for id in ids)
    return next((run for run in found if run.status in statuses), None)
