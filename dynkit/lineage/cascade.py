"""Carry a new version of a model to all that was made from the old one.

Every descendant is made anew from its recorded recipe, parents first: same samples, same seeds, new parents where
there are any. Each result is a version beside the old one, with its own origin; nothing is replaced. A cascade that was
interrupted goes on where it stopped when it is asked for again.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import sqlalchemy as sa

from dynkit.catalog import Catalog, insert_missing, names, notes, origins
from dynkit.errors import InvalidInput
from dynkit.html import duration
from dynkit.lineage import testing
from dynkit.lineage.display import Shown, short, watched
from dynkit.lineage.graph import acyclic, ages, all_edges, reachable
from dynkit.lineage.origins import Origin, insert_origin, origins_of
from dynkit.lineage.rebuilding import Built, Workshop, link
from dynkit.lineage.replacing import follow
from dynkit.lineage.testing import TestReport
from dynkit.models import ModelStore

__all__ = ["Cascade", "Step", "carry_out", "plan"]


@dataclass(frozen=True)
class Step:
    """What becomes of one descendant.

    Parameters
    ----------
    model : str
    action : str
        ``"rebuild"``; ``"skip"``: asked to; ``"keep"``: nothing that it comes from is new; ``"blocked"``: it has no
        recipe; ``"stop"``: it comes from a new version that fails its tests.
    origin : Origin or None
        The recipe.
    """

    model: str
    action: str
    origin: Origin | None = None


@dataclass(frozen=True, repr=False)
class Cascade(Shown):
    """The update of all that comes from a model.

    Parameters
    ----------
    old, new : str
    steps : tuple of Step
        Descendants of the old version, parents first.
    rebuilt : dict
        Old to new version; empty in a dry run.
    reports : dict
        Results of the tests on each new version.
    seconds : float
    """

    old: str
    new: str
    steps: tuple[Step, ...]
    rebuilt: Mapping[str, str] = field(default_factory=dict)
    reports: Mapping[str, TestReport] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def estimated_s(self) -> float:
        """What the rebuilds took when they were first done."""
        return sum(one.origin.seconds for one in self.steps if one.action == "rebuild" and one.origin is not None)

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        n = sum(one.action == "rebuild" for one in self.steps)
        what = f"{n} of {len(self.steps)} models that come from {short(self.old)}"
        if self.seconds is None:
            facts = [f"about {duration(self.estimated_s)}; cascade(old, new, dry_run=False) does it"]
            planned = [(short(one.model), one.action, str(one.origin or "")) for one in self.steps]
            return f"Plan to rebuild {what}", facts, ("model", "action", "origin"), planned
        facts = [f"done in {duration(self.seconds)}"]
        rows = [
            (short(one.model), one.action, short(self.rebuilt.get(one.model)), self._verdict(one.model))
            for one in self.steps
        ]
        return f"Rebuilt {what}", facts, ("model", "action", "new version", "tests"), rows

    def _verdict(self, model: str) -> str:
        report = self.reports.get(model)
        return "" if report is None or not len(report) else "passed" if report.passed else "failed"


def plan(
    connection: sa.Connection, workshop: Workshop, old: str, new: str, skip: Collection[str] | Callable[[str], bool]
) -> Cascade:
    """Say what a cascade does, if all tests pass."""
    if old == new:
        raise InvalidInput(f"old and new are the same model {old[:12]}; give the new version")
    below = reachable(connection, [old], up=False) - {old}
    graph = acyclic(all_edges(connection, ("derived",), within={old, *below}), ages(connection, {old, *below}))
    graph.remove_nodes_from([new])
    affected = nx.descendants(graph, old) if old in graph else set()
    made = origins_of(connection, affected)
    now, steps = {old}, []
    for model in nx.lexicographical_topological_sort(graph.subgraph(affected)):
        own = [one for one in made if one.model == model and now.intersection(one.parents)]
        recipe = next((one for one in reversed(own) if workshop.can_build(one)), None)
        if skip(model) if callable(skip) else model in skip:
            action = "skip"
        elif not own and now.isdisjoint(graph.predecessors(model)):
            action = "keep"
        else:
            action = "rebuild" if recipe is not None else "blocked"
        if action == "rebuild":
            now.add(model)
        steps.append(Step(model, action, recipe))
    return Cascade(old, new, tuple(steps))


def carry_out(
    catalog: Catalog, store: ModelStore, workshop: Workshop, planned: Cascade, *, stop_on_failure: bool
) -> Cascade:
    """Rebuild, test, and give names to what passes."""
    started_s = time.perf_counter()
    now = {planned.old: planned.new}
    failed: set[str] = set()
    steps, reports = [], {}
    for step in watched(planned.steps, "rebuild"):
        origin = step.origin
        if step.action != "rebuild" or origin is None:
            steps.append(step)
            continue
        if failed.intersection(origin.parents):
            failed.add(step.model)
            steps.append(dataclasses.replace(step, action="stop"))
            continue
        parents = tuple(now.get(parent, parent) for parent in origin.parents)
        built = workshop.build(origin, parents)
        assert built is not None, "no samples were left out"
        now[step.model] = built.model
        with catalog.write() as connection:
            _record(connection, step.model, origin, parents, built)
            tests = testing.covering(connection, [step.model], testing.registered(connection))
        results = (testing.run(catalog, store, test, built.model) for _, test in tests)
        report = reports[step.model] = TestReport(tuple(results))
        if report.passed:
            with catalog.write() as connection:
                moved = sa.update(names).where(names.c.model == step.model)
                connection.execute(moved.values(model=built.model, changed_ns=time.time_ns()))
        elif stop_on_failure:
            failed.add(step.model)
        steps.append(step)
    del now[planned.old]
    return Cascade(planned.old, planned.new, tuple(steps), now, reports, time.perf_counter() - started_s)


def _record(connection: sa.Connection, old: str, origin: Origin, parents: tuple[str, ...], built: Built) -> None:
    """Give a new version its origin, edges and tags, unless an earlier try did."""
    link(connection, "derived", parents, built.model)
    link(connection, "version", [old], built.model)
    query = sa.select(notes).where(notes.c.model == old, notes.c.kind == "tag")
    tags = [{**row._asdict(), "model": built.model} for row in connection.execute(query)]
    insert_missing(connection, notes, tags)
    follow(connection, {old: built.model})
    how = "rebuilt" if origin.training is not None else origin.how
    known = [(one.how, one.parents, one.training) for one in origins_of(connection, {built.model})]
    if (how, parents, origin.training) in known:
        return
    code = None
    if origin.number is not None:
        code = connection.scalar(sa.select(origins.c.code).where(origins.c.id == origin.number))
    new = dataclasses.replace(
        origin, model=built.model, how=how, parents=parents, seconds=built.seconds, created_ns=time.time_ns()
    )
    insert_origin(connection, new, code)
