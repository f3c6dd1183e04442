"""Erase samples from a dataset and from every model that learned from them.

A model is affected when one of its origins used the samples, held-out validation samples included, or when it comes
from an affected model. `erase` makes each affected model anew from its recorded recipe: the same samples without the
erased ones, the same seed, parents that were made anew; exactly what training from scratch without these samples
gives. Only then it replaces, in one transaction, the old models in runs, names and notes, and removes what nothing
uses. An erasure that was interrupted is completed by asking for it again: what was rebuilt is remembered, and the
stored selections, by which the affected models are found, are rewritten after the models are replaced.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa

from dynkit.catalog import Catalog, evaluations, models, runs
from dynkit.data import Dataset, as_keys
from dynkit.errors import Conflict
from dynkit.evaluation.matrix import rows_of
from dynkit.html import duration
from dynkit.lineage.display import Shown, short, watched
from dynkit.lineage.graph import reachable
from dynkit.lineage.origins import Origin, origins_of, parents_first
from dynkit.lineage.rebuilding import CannotBuildError, Workshop, version_of
from dynkit.lineage.replacing import Change, replace_models, successors
from dynkit.lineage.samples import forget_trainings, read_selection, rewrite_selections, uses
from dynkit.lineage.storing import free, unneeded
from dynkit.models import ModelStore
from dynkit.time import IntArray
from dynkit.types import Window

__all__ = ["Affected", "Erasure", "affected_by", "erase"]

_FRESH_NS = 60 * 10**9  # a run whose owner was heard of since is going


@dataclass(frozen=True, repr=False)
class Affected(Shown):
    """Models that learned from some samples; a collection of identities, in the order of time.

    Parameters
    ----------
    dataset : str
    keys : (N,) int64
    direct : dict
        Model to the number of these samples that one of its trainings used.
    through : tuple of str
        Models that come from those of `direct`.
    trainings : dict
        Trigger (run, index) to the number of these samples that it used.
    """

    dataset: str
    keys: IntArray
    direct: Mapping[str, int]
    through: tuple[str, ...]
    trainings: Mapping[tuple[str, int], int]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.direct, *self.through])

    def __len__(self) -> int:
        return len(self.direct) + len(self.through)

    def __contains__(self, model: object) -> bool:
        return model in self.direct or model in self.through

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        title = f"{len(self)} models learned from these {len(self.keys):,} samples of {self.dataset}"
        facts = [f"{len(self.direct)} directly, {len(self.through)} through ancestors"]
        rows = [
            *((short(model), "directly", n) for model, n in self.direct.items()),
            *((short(model), "through ancestors", None) for model in self.through),
        ]
        return title, facts, ("model", "how", "samples"), rows


def affected_by(catalog: Catalog, dataset: str, keys: IntArray) -> Affected:
    """Find the models that learned from samples."""
    with catalog.read() as connection:
        return _affected(connection, catalog, dataset, keys)


def _affected(connection: sa.Connection, catalog: Catalog, dataset: str, keys: IntArray) -> Affected:
    origins = origins_of(connection, dataset=dataset)
    trainings = {one.training for one in origins if one.training is not None}
    found = uses(catalog.root, trainings, keys)
    direct: dict[str, int] = {}
    for one in origins:
        if one.training in found:
            direct[one.model] = max(found[one.training], direct.get(one.model, 0))
    through = sorted(reachable(connection, direct, up=False) - direct.keys())
    return Affected(dataset, keys, direct, tuple(through), found)


@dataclass(frozen=True, repr=False)
class Erasure(Shown):
    """What an erasure does, or did, and what is left.

    Parameters
    ----------
    affected : Affected
    origins : tuple of Origin
        To be made anew, in this order.
    blocked : tuple of str
        Affected models without a recipe; they are removed.
    estimated_s : float
        From the recorded times of training, by the share of samples that stays.
    rebuilt : dict
        Old to new identity; None where no samples were left to train on. Empty in a dry run.
    removed : tuple of str
        Models that are no more.
    checks : dict
        What was looked at afterwards, with the number of traces that were found: all must be 0.
    seconds : float
    """

    affected: Affected
    origins: tuple[Origin, ...]
    blocked: tuple[str, ...]
    estimated_s: float
    rebuilt: Mapping[str, str | None] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    checks: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether it was carried out and nothing was found afterwards."""
        return bool(self.checks) and not any(self.checks.values())

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        what = f"{len(self.affected.keys):,} samples of {self.affected.dataset}, {len(self.affected)} models"
        if not self.checks:
            facts = [
                f"{len(self.origins)} trainings to do again, about {duration(self.estimated_s)}",
                *([f"without a recipe, to be removed: {', '.join(map(short, self.blocked))}"] if self.blocked else []),
                "dry run: nothing was changed; erase(keys, dry_run=False) does it",
            ]
            steps = [(short(one.model), str(one), duration(one.seconds)) for one in self.origins]
            return f"Plan to erase {what}", facts, ("model", "origin", "took"), steps
        facts = [f"done in {duration(self.seconds)}; {len(self.removed)} models removed"]
        facts += [f"left: {name}: {n}" for name, n in self.checks.items()]
        rows = [(short(old), short(new) or "no samples left") for old, new in self.rebuilt.items()]
        return f"Erased {what}" if self.done else f"Erased {what}, but traces are left", facts, ("old", "new"), rows


def plan(catalog: Catalog, workshop: Workshop, affected: Affected) -> Erasure:
    """Say what has to be done."""
    saved: set[str] = set()
    again = []
    seconds = 0.0
    for one in _origins(catalog, affected):
        tainted = [parent for parent in one.parents if parent in affected]
        if not workshop.can_build(one) or not saved.issuperset(tainted):
            continue  # also one that was brought from elsewhere: who knows what it learned from?
        saved.add(one.model)
        used = affected.trainings.get(one.training, 0) if one.training else 0
        if used or tainted:
            again.append(one)
            seconds += one.seconds * (1 - used / max(one.samples, 1))
    return Erasure(affected, tuple(again), tuple(sorted(set(affected) - saved)), seconds)


def _origins(catalog: Catalog, affected: Affected) -> list[Origin]:
    with catalog.read() as connection:
        return parents_first(origins_of(connection, set(affected)))


def erase(
    catalog: Catalog, store: ModelStore, workshop: Workshop, dataset: Dataset, planned: Erasure, *, drop: bool
) -> Erasure:
    """Carry a plan out.

    Raises
    ------
    Conflict
        When a run on the dataset is going, models without a recipe would have to be removed and `drop` is False, or
        models that learned from the samples came while others were made anew.
    """
    started_s = time.perf_counter()
    affected, keys = planned.affected, planned.affected.keys
    with catalog.read() as connection:
        _refuse_running(connection, dataset.name)
    if planned.blocked and not drop:
        raise Conflict(
            f"{len(planned.blocked)} affected models have no recipe and cannot be made anew: "
            f"{', '.join(map(short, planned.blocked))}; erase(keys, dry_run=False, drop=True) removes them"
        )
    origins = _origins(catalog, affected)
    changes, blocked = _rebuild(workshop, planned, origins, drop=drop)
    judged = _judge(catalog, store, workshop, dataset, changes, keys)
    with catalog.write() as connection:
        _refuse_running(connection, dataset.name)
        now = _affected(connection, catalog, dataset.name, keys)
        if set(now) != set(affected) or parents_first(origins_of(connection, set(now))) != origins:
            raise Conflict(
                "other models that learned from these samples came meanwhile, and nothing was erased yet; ask again: "
                "what was rebuilt is remembered"
            )
        removed = replace_models(connection, changes, judged, set(affected), dataset.name)
        of_dataset = list(connection.scalars(sa.select(runs.c.id).where(runs.c.dataset == dataset.name)))
    rewrite_selections(catalog.root, of_dataset, keys)
    forget_trainings(catalog.root, of_dataset)
    left = np.intersect1d(keys, as_keys(dataset.keys()))
    if len(left):
        dataset.delete(left)
    dataset.compact(erase=True)
    free(store)
    catalog.scrub()
    return Erasure(
        affected,
        planned.origins,
        blocked,
        planned.estimated_s,
        rebuilt=successors(changes),
        removed=tuple(sorted(removed)),
        checks=_checks(catalog, store, dataset, keys, removed),
        seconds=time.perf_counter() - started_s,
    )


def _refuse_running(connection: sa.Connection, dataset: str) -> None:
    """Refuse while a run is going, which would bring the samples back."""
    going = runs.c.status.in_(["running", "paused"]), runs.c.heartbeat_ns > time.time_ns() - _FRESH_NS
    found = connection.scalars(sa.select(runs.c.id).where(runs.c.dataset == dataset, *going)).all()
    if found:
        raise Conflict(f"run {found[0]} on {dataset!r} is going; ws.run({found[0]!r}).cancel() it, or wait for it")


def _rebuild(
    workshop: Workshop, planned: Erasure, origins: Sequence[Origin], *, drop: bool
) -> tuple[list[Change], tuple[str, ...]]:
    """Make every affected model anew, parents first; with `drop`, those whose recipes fail now are blocked, too."""
    affected, blocked = planned.affected, set(planned.blocked)
    now: dict[tuple[str | None, str], str | None] = dict.fromkeys(((None, model) for model in blocked), None)
    changes = []
    for origin in watched(origins, "rebuild"):
        at_last = [now.get((origin.run, p), now.get((None, p), p)) for p in origin.parents]
        parents = tuple(parent for parent in at_last if parent is not None)
        if blocked.intersection(origin.parents) or not workshop.can_build(origin):
            change = Change(origin, parents, None)
        elif parents == origin.parents and origin.training not in affected.trainings:
            change = Change(origin, parents, None, clean=True)
        elif origin.training is None and len(parents) < len(at_last):
            change = Change(origin, parents, None)  # made from what is no more
        else:
            try:
                change = Change(origin, parents, workshop.build(origin, parents, affected.keys))
            except CannotBuildError as error:
                if not drop:
                    raise Conflict(f"{error}; erase(keys, dry_run=False, drop=True) removes it") from error
                change = Change(origin, parents, None)
                blocked.add(origin.model)
        if change.model is not None:
            blocked.discard(origin.model)
        after = change.model
        if after is None and origin.training is not None and parents and origin.model not in blocked:
            after = parents[0]  # without samples it would have stayed as it was
        for place in (origin.run, None):
            if after is not None or (place, origin.model) not in now:  # one that can be made again is enough
                now[place, origin.model] = after
        changes.append(change)
    return changes, tuple(sorted(blocked))


def _judge(
    catalog: Catalog, store: ModelStore, workshop: Workshop, dataset: Dataset, changes: list[Change], keys: IntArray
) -> dict[str, list[dict[str, Any]]]:
    """Score the models of the affected runs anew, without the samples; rows of `evaluations` by run."""
    by_run: dict[str, dict[str, str | None]] = {}
    for change in changes:
        if change.origin.run is not None and change.origin.number is None:
            by_run.setdefault(change.origin.run, {})[change.origin.model] = change.model
    judged = {}
    for run, replaced in by_run.items():
        with catalog.read() as connection:
            of_run = evaluations.c.run == run
            bounds = [evaluations.c[f"window_{name}_ns"] for name in ("start", "end", "anchor")]
            windows = [Window(*row) for row in connection.execute(sa.select(*bounds).where(of_run).distinct())]
            before = connection.scalars(sa.select(evaluations.c.model).where(of_run).distinct()).all()
            known = connection.execute(sa.select(runs).where(runs.c.id == run)).one()
        models = {replaced.get(model, model) for model in before} - {None}
        if not windows or not models:
            continue
        states = {model: store.load(model) for model in models if model is not None}
        version = dataset if known.pipeline.get("live") else version_of(dataset, known.dataset_version)
        scored = workshop.recipe(run).judge(states, windows, version.open(), keys)
        judged[run] = [row for window, some in scored for row in rows_of(run, window, some)]
    return judged


def _checks(catalog: Catalog, store: ModelStore, dataset: Dataset, keys: IntArray, removed: set[str]) -> dict[str, int]:
    """Look for what should be gone, in what is there now."""
    with catalog.read() as connection:
        there = set(connection.scalars(sa.select(models.c.id)))
        trainings = [one.training for one in origins_of(connection, dataset=dataset.name) if one.training]
    listed = sum(int(np.isin(as_keys(read_selection(catalog.root, *one)), keys).sum()) for one in set(trainings))
    return {
        "samples in the dataset": len(np.intersect1d(keys, as_keys(dataset.keys()))),
        "earlier versions of the dataset": len(dataset.versions()) - 1,
        "samples listed in selections": listed,
        "models trained on them or on what comes from them": len(affected_by(catalog, dataset.name, keys)),
        "removed models in the store": len(removed & there),
        "tensors of removed models in the store": len(unneeded(store)),
    }
