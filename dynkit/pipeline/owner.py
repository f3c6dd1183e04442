"""The writing side of a run: claim it, beat, obey requests, commit events and triggers.

A run has one owner at a time, the process that executes its loop. A thread of the owner writes heartbeat and
progress twice a second and notes what others ask for (pause, cancel); the loop obeys between two batches, in
`check`. Readers never talk to the owner, only to the catalog.
"""

import dataclasses
import logging
import secrets
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from dynkit import catalog as tables
from dynkit.catalog import Catalog, insert_missing
from dynkit.data import Dataset
from dynkit.errors import Conflict, DynkitError
from dynkit.evaluation.matrix import Scored, rows_of
from dynkit.lineage.rebuilding import version_of
from dynkit.models import ModelStore
from dynkit.pipeline.process import identity
from dynkit.types import Event, Trained, Window

if TYPE_CHECKING:
    import torch

__all__ = ["Cancelled", "Owner", "insert_event", "new_id", "new_run", "trained_of"]

logger = logging.getLogger(__name__)

_BEAT_S = 0.5


class Cancelled(BaseException):
    """Ends the loop on request; no Exception, so that a user's ``except Exception`` cannot swallow it."""


def new_id() -> str:
    """Make an id for a run."""
    return secrets.token_hex(4)


def new_run(
    catalog: Catalog, run: str, *, name: str, digest: str, dataset: str, version: int, description: dict[str, Any]
) -> None:
    """Make the row of a new run owned by this process."""
    now_ns = time.time_ns()
    row = {
        "id": run,
        "name": name,
        "digest": digest,
        "dataset": dataset,
        "dataset_version": version,
        "pipeline": description,
        "created_ns": now_ns,
        "status": "running",
        "heartbeat_ns": now_ns,
        "progress": {"phase": "starting", "fraction": 0.0},
        **identity(),
    }
    with catalog.write() as connection:
        connection.execute(sa.insert(tables.runs), row)


def insert_event(connection: sa.Connection, run: str, kind: str, data: dict[str, Any]) -> Event:
    """Append an event to a run in an open transaction."""
    events = tables.events
    last = connection.scalar(sa.select(sa.func.max(events.c.seq)).where(events.c.run == run))
    event = Event(run, 0 if last is None else last + 1, time.time_ns(), kind, data)
    row = {"run": run, "seq": event.seq, "time_ns": event.time_ns, "kind": kind, "data": data}
    connection.execute(sa.insert(events), row)
    return event


def trained_of(connection: sa.Connection, run: str) -> list[Trained]:
    """Return the committed triggers of a run, oldest first."""
    triggers = tables.triggers
    rows = connection.execute(sa.select(triggers).where(triggers.c.run == run).order_by(triggers.c.index))
    names = [field.name for field in dataclasses.fields(Trained)]
    return [Trained(**{name: row._mapping[name] for name in names}) for row in rows]


class Owner:
    """Ownership of a run by this process, for the length of a ``with`` block.

    The block's end is the run's: nothing more to say when `finish` was called, else the exception decides between
    cancelled, interrupted and failed. A cancellation is no error for the caller.

    Parameters
    ----------
    catalog : Catalog
    run : str
        Id of a run whose status is running.
    """

    def __init__(self, catalog: Catalog, run: str) -> None:
        self.catalog = catalog
        self.run = run
        self.folder = catalog.root / "runs" / run
        self.store = ModelStore(catalog)
        self.progress: dict[str, Any] = {"phase": "starting", "fraction": 0.0}
        self._started_s = time.monotonic()
        self._paused_s = 0.0
        self._first_fraction: float | None = None
        self._request: str | None = None
        self._ended = threading.Event()
        self._woken = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name=f"dynkit-{run}", daemon=True)

    def __enter__(self) -> "Owner":
        with self.catalog.write() as connection:
            row = connection.execute(sa.select(tables.runs).where(tables.runs.c.id == self.run)).one()
            if row.status != "running":
                raise Conflict(f"run {self.run} is {row.status}; run.resume() continues it")
            self._update(connection, **identity(), heartbeat_ns=time.time_ns())
            self.committed = trained_of(connection, self.run)
            triggers = tables.triggers
            starts = sa.select(triggers.c.block_start).where(triggers.c.run == self.run).order_by(triggers.c.index)
            self.block_starts = list(connection.scalars(starts))
            self.state: bytes | None = row.state
            self.decided = self._last_decision(connection)  # in an earlier life, as well as
            self.skipped = {int(data["position"]) for data in self._reported(connection, "skipped")}
            self._dataset = row.dataset, row.dataset_version
            self.live: bool = row.pipeline.get("live", False)
            self.reuse: bool = row.pipeline.get("reuse", False)
        self._pulse.start()
        return self

    def _last_decision(self, connection: sa.Connection) -> int:
        """Position of the last decision that was reported; -1 before any."""
        return max((int(data["position"]) for data in self._reported(connection, "decided")), default=-1)

    def _reported(self, connection: sa.Connection, kind: str) -> Iterable[dict[str, Any]]:
        """Return what the events of a kind tell."""
        events = tables.events
        return connection.scalars(sa.select(events.c.data).where(events.c.run == self.run, events.c.kind == kind))

    @property
    def dataset(self) -> Dataset:
        """The dataset at the run's version; of a live run at the one after it, where that was erased meanwhile."""
        name, number = self._dataset
        return version_of(Dataset(self.catalog, name), number) if self.live else Dataset(self.catalog, name, number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        finished = self._ended.is_set()
        self._ended.set()
        self._pulse.join()
        if error is None or finished:
            return False
        text = "".join(traceback.format_exception(kind, error, trace))
        if isinstance(error, Cancelled):
            self._end("cancelled", None, {})
            return True
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            self._end("interrupted", None, {})
        else:
            summary = str(error) if isinstance(error, DynkitError) else f"{type(error).__name__}: {error}"
            self._end("failed", text, {"error": summary})
        return False

    def _end(self, status: str, error: str | None, data: dict[str, Any]) -> Event:
        with self.catalog.write() as connection:
            self._update(
                connection,
                status=status,
                error=error,
                request=None,
                ended_ns=time.time_ns(),
                progress=self._timed(),
            )
            return insert_event(connection, self.run, status, data)

    def finish(self, **data: Any) -> Event:
        """Commit the end of a run that did all it had to."""
        self.progress = {"phase": "finished", "fraction": 1.0}
        self._ended.set()
        self._pulse.join()
        return self._end("finished", None, data)

    def decide(self, reports: list[dict[str, Any]]) -> list[Event]:
        """Commit decisions of the trigger, all or none."""
        with self.catalog.write() as connection:
            return [insert_event(connection, self.run, "decided", report) for report in reports]

    def event(self, kind: str, **data: Any) -> Event:
        """Commit one event."""
        with self.catalog.write() as connection:
            return insert_event(connection, self.run, kind, data)

    def skip(self, index: int, position: int, reason: str) -> Event:
        """Commit that a trigger leads to no training."""
        self.skipped.add(position)
        return self.event("skipped", index=index, position=position, reason=reason)

    def commit_trained(
        self,
        trained: Trained,
        state: "Mapping[str, torch.Tensor]",
        *,
        parent: str | None,
        columns: dict[str, Any],
        policies: bytes,
        event: dict[str, Any],
    ) -> tuple[Trained, Event]:
        """Commit a trigger: its model, its place in the lineage, the policies' state and the event, at once.

        Parameters
        ----------
        trained : Trained
            Its model is filled in here, by the store.
        state : mapping of name to tensor
        parent : str or None
            The model that training started from.
        columns : dict
            Further columns of the triggers table.
        policies : bytes
            Pickled state of the policies, to continue from.
        event : dict
            Data of the event.
        """
        previous = self.committed[-1].model if self.committed else None
        committed: list[tuple[Trained, Event]] = []

        def also(connection: sa.Connection, model: str) -> None:
            done = dataclasses.replace(trained, model=model)
            row = {"run": self.run, "parent": parent, **vars(done), **columns}
            connection.execute(sa.insert(tables.triggers), row)
            kinds = {"derived": parent, "version": previous}
            rows = [
                {"parent": source, "child": model, "kind": kind, "run": self.run}
                for kind, source in kinds.items()
                if source not in (None, model)
            ]
            insert_missing(connection, tables.edges, rows)
            self._update(connection, state=policies)
            committed.append((done, insert_event(connection, self.run, "trained", {**event, "model": model})))

        self.store.put(state, [parent] if parent else [], also=also)
        self.committed.append(committed[0][0])
        return committed[0]

    def trained_before(self, training: str) -> Any:
        """Return the row of a trigger, of any run, that did this very training; None when there is none."""
        table = tables.triggers
        with self.catalog.read() as connection:
            return connection.execute(sa.select(table).where(table.c.training == training).limit(1)).one_or_none()

    def evaluated_windows(self) -> set[tuple[int, int]]:
        """Windows (start, end) already in the matrix."""
        table = tables.evaluations
        with self.catalog.read() as connection:
            query = sa.select(table.c.window_start_ns, table.c.window_end_ns).where(table.c.run == self.run).distinct()
            return {(row.window_start_ns, row.window_end_ns) for row in connection.execute(query)}

    def commit_window(self, window: Window, scored: dict[str, Scored]) -> Event:
        """Commit one column of the models x windows matrix, of all samples and of each slice."""
        samples = scored[""].samples
        rows = rows_of(self.run, window, scored)
        data = {"start": window.start.isoformat(), "end": window.end.isoformat(), "samples": samples}
        with self.catalog.write() as connection:
            if rows:
                connection.execute(sa.insert(tables.evaluations), rows)
            return insert_event(connection, self.run, "evaluated", data)

    def check(self) -> None:
        """Obey a pending request: wait while paused, raise `Cancelled` to end. Called between two batches."""
        if self._request is None:
            return
        if self._asked("pause"):
            self._change("running", "paused")
            since_s = time.monotonic()
            while self._asked("pause"):
                self._woken.wait(_BEAT_S)
                self._woken.clear()
            self._paused_s += time.monotonic() - since_s
            if not self._asked("cancel"):
                self._change("paused", "running")
        if self._asked("cancel"):
            raise Cancelled

    @property
    def finishing(self) -> bool:
        """Whether somebody asked a live run to come to its end."""
        return self._asked("finish")

    def _asked(self, request: str) -> bool:
        return self._request == request

    def _change(self, before: str, after: str) -> None:
        with self.catalog.write() as connection:
            self._update(connection, status=after, progress=self._timed())
            insert_event(connection, self.run, {"paused": "paused", "running": "continued"}[after], {"was": before})

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            try:
                with self.catalog.write() as connection:
                    self._update(connection, heartbeat_ns=time.time_ns(), progress=self._timed())
                    query = sa.select(tables.runs.c.request).where(tables.runs.c.id == self.run)
                    self._request = connection.scalar(query)
                    self._woken.set()
            except Exception:  # a full disk must not end the training; the next beat may succeed
                logger.exception("heartbeat of run %s failed", self.run)

    def _timed(self) -> dict[str, Any]:
        """Progress with elapsed and remaining seconds."""
        elapsed_s = time.monotonic() - self._started_s - self._paused_s
        fraction = self.progress["fraction"]
        if self._first_fraction is None and fraction > 0:
            self._first_fraction = fraction  # a continued run begins in the middle
        done = fraction - (self._first_fraction or 0)
        eta_s = elapsed_s * (1 - fraction) / done if done > 0.01 else None
        return {**self.progress, "elapsed_s": elapsed_s, "eta_s": eta_s}

    def _update(self, connection: sa.Connection, **values: Any) -> None:
        connection.execute(sa.update(tables.runs).where(tables.runs.c.id == self.run).values(**values))
