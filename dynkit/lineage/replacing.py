"""Put models in the place of others, everywhere in the catalog, in one transaction."""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from dynkit.catalog import (
    edges,
    evaluations,
    events,
    insert_missing,
    models,
    names,
    notes,
    origins,
    runs,
    tests,
    triggers,
)
from dynkit.lineage.origins import Origin
from dynkit.lineage.rebuilding import Built, link

__all__ = ["Change", "follow", "replace_models", "successors"]


@dataclass(frozen=True)
class Change:
    """What becomes of one origin.

    Parameters
    ----------
    origin : Origin
        As it was.
    parents : tuple of str
        As they are now.
    built : Built or None
        The model in its place; None: there is none, because no samples or parents were left.
    clean : bool
        The origin stays as it is.
    """

    origin: Origin
    parents: tuple[str, ...]
    built: Built | None
    clean: bool = False

    @property
    def model(self) -> str | None:
        """The model now."""
        return self.origin.model if self.clean else None if self.built is None else self.built.model


def replace_models(
    connection: sa.Connection,
    changes: Iterable[Change],
    judged: Mapping[str, list[dict[str, Any]]],
    affected: set[str],
    dataset: str,
) -> set[str]:
    """Write what has changed; return the models that are no more.

    Parameters
    ----------
    connection : Connection
        In a write transaction.
    changes : iterable of Change
    judged : mapping
        New rows of `evaluations` by run.
    affected : set of str
        Models that must not stay but where an origin is clean.
    dataset : str
        What its runs keep of their policies may be made of the samples, so it goes.
    """
    changes = list(changes)
    now = successors(changes)
    changed_runs = {change.origin.run for change in changes if change.origin.run and not change.clean}
    for change in changes:
        if not change.clean:
            _replace_origin(connection, change)
    for run, rows in judged.items():
        connection.execute(sa.delete(evaluations).where(evaluations.c.run == run))
        if rows:
            connection.execute(sa.insert(evaluations), rows)
    connection.execute(sa.update(runs).where(runs.c.dataset == dataset).values(state=None))
    kept = _with_origin(connection, affected)
    gone = affected - kept
    _replace_edges(connection, now, gone, changed_runs)
    follow(connection, now, gone)
    for model in sorted(gone):
        _remove(connection, model, now.get(model))
    for run in changed_runs:
        _retell(connection, run, [change for change in changes if change.origin.run == run and not change.clean])
        count = sum(change.origin.run == run and not change.clean for change in changes)
        _tell(connection, run, {"models": count})
    return gone


def successors(changes: Iterable[Change]) -> dict[str, str | None]:
    """Old to new model; of several origins, one that can still be made counts."""
    now: dict[str, str | None] = {}
    for change in changes:
        if change.model is not None or change.origin.model not in now:
            now[change.origin.model] = change.model
    return now


def _replace_origin(connection: sa.Connection, change: Change) -> None:
    origin, built = change.origin, change.built
    if origin.number is None:
        row = sa.and_(triggers.c.run == origin.run, triggers.c["index"] == origin.index)
        if built is None:
            connection.execute(sa.delete(triggers).where(row))
            return
        values = {
            "model": built.model,
            "parent": change.parents[0] if change.parents else None,
            "samples": built.samples,
            "selection": built.selection,
            "training": None,  # it was not what a run does now
            "train_s": built.seconds,
            **built.details,
        }
        connection.execute(sa.update(triggers).where(row).values(**values))
    elif built is None:
        connection.execute(sa.delete(origins).where(origins.c.id == origin.number))
    else:
        values = {"model": built.model, "parents": list(change.parents), "seconds": built.seconds}
        connection.execute(sa.update(origins).where(origins.c.id == origin.number).values(**values))


def _with_origin(connection: sa.Connection, some: set[str]) -> set[str]:
    """Those that some origin still makes."""
    found = sa.union(sa.select(triggers.c.model), sa.select(origins.c.model))
    return some & set(connection.scalars(found))


def _replace_edges(
    connection: sa.Connection, now: Mapping[str, str | None], gone: set[str], changed_runs: set[str]
) -> None:
    """Edges of changed runs come from their triggers anew; those that people made follow the models."""
    followed = []
    for row in connection.execute(sa.select(edges).where(edges.c.run == "")):
        if row.parent in gone or row.child in gone:
            ends = [now.get(end) if end in gone else end for end in (row.parent, row.child)]
            followed.append((row, ends))
    for row, (parent, child) in followed:
        if parent is not None and child is not None:
            link(connection, row.kind, [parent], child)
    connection.execute(sa.delete(edges).where(edges.c.run.in_(changed_runs)))
    for run in changed_runs:
        of_run = sa.select(triggers.c.model, triggers.c.parent).where(triggers.c.run == run)
        before = None
        for model, parent in connection.execute(of_run.order_by(triggers.c["index"])):
            link(connection, "derived", [parent] if parent else [], model, run)
            link(connection, "version", [before] if before else [], model, run)
            before = model


def follow(connection: sa.Connection, now: Mapping[str, str | None], gone: Collection[str] = ()) -> None:
    """Let tests of models given one by one apply to those in their places, and not to those that are gone."""
    for test, scope in connection.execute(sa.select(tests.c.name, tests.c.scope)).all():
        listed = scope["models"] or ()
        new = [now[model] for model in listed if now.get(model)]
        models = list(dict.fromkeys([*(model for model in listed if model not in gone), *new]))
        if models != list(listed):
            changed = sa.update(tests).where(tests.c.name == test)
            connection.execute(changed.values(scope={**scope, "models": models}))


def _remove(connection: sa.Connection, model: str, instead: str | None) -> None:
    """Delete a model; names, tags and notes go to the one that is there instead, if any."""
    if instead is not None:
        connection.execute(sa.update(names).where(names.c.model == model).values(model=instead))
        rows = connection.execute(sa.select(notes).where(notes.c.model == model))
        insert_missing(connection, notes, [{**row._asdict(), "model": instead} for row in rows])
    connection.execute(sa.delete(edges).where(sa.or_(edges.c.parent == model, edges.c.child == model)))
    for table in (names, evaluations):
        connection.execute(sa.delete(table).where(table.c.model == model))
    connection.execute(sa.delete(models).where(models.c.id == model))


def _retell(connection: sa.Connection, run: str, changes: Iterable[Change]) -> None:
    """Rewrite the events that hold what was learned: of trainings, and what triggers saw."""
    connection.execute(sa.delete(events).where(events.c.run == run, events.c.kind == "decided"))
    built = {change.origin.index: change.built for change in changes if change.origin.number is None}
    trained = sa.select(events.c.seq, events.c.data).where(events.c.run == run, events.c.kind == "trained")
    for seq, data in connection.execute(trained).all():
        if data["index"] not in built:
            continue
        row = sa.and_(events.c.run == run, events.c.seq == seq)
        new = built[data["index"]]
        if new is None:
            connection.execute(sa.delete(events).where(row))
            continue
        again = {"index": data["index"], "samples": new.samples, "seconds": round(new.seconds, 4)}
        report = new.details.get("report") or [{}]
        connection.execute(sa.update(events).where(row).values(data={**again, **report[-1], "model": new.model}))


def _tell(connection: sa.Connection, run: str, data: dict[str, Any]) -> None:
    """Add the event ``erased`` to a run."""
    last = connection.scalar(sa.select(sa.func.max(events.c.seq)).where(events.c.run == run))
    row = {"run": run, "seq": (-1 if last is None else last) + 1, "time_ns": time.time_ns(), "kind": "erased"}
    connection.execute(sa.insert(events), {**row, "data": data})
