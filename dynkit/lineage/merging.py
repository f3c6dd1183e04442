"""Merge two lines of work on one model, as version control merges two branches of a text.

Layers that only one side changed since the common ancestor are taken from that side. A layer that both changed is a
conflict. Where different layers were changed but the output of one reaches the other, it is a possible conflict:
each side was tuned to what the other had before, so the registered tests decide. Layers that do not see each other,
such as two heads of one body, merge without conflict.

The three classes are those of W. Hao et al., "MGit: a model versioning and management system", ICML 2024.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch

from dynkit.catalog import Catalog
from dynkit.errors import Conflict, InvalidInput
from dynkit.lineage import structure, testing
from dynkit.lineage.adding import commit
from dynkit.lineage.display import Shown, short
from dynkit.lineage.graph import common_ancestor
from dynkit.lineage.operators import Layers, Mean, Operator, merged, recipe_of, same
from dynkit.lineage.origins import Origin, origins_of
from dynkit.lineage.rebuilding import Workshop
from dynkit.lineage.structure import connected, layer_of
from dynkit.lineage.testing import TestReport
from dynkit.models import ModelStore
from dynkit.policies import digest

__all__ = ["Merge", "compare", "merge"]

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, repr=False)
class Merge(Shown):
    """How two models merge.

    Parameters
    ----------
    kind : str
        ``"no conflict"``, ``"possible conflict"`` or ``"conflict"``; ``"operator"``: weights were merged by one.
    base : str or None
        The common ancestor.
    models : tuple of str
    changed : tuple of tuple of str
        Layers that each of the models changed.
    both : tuple of str
        Layers that both changed, and not alike.
    connections : tuple of (str, str)
        Changed layers of different sides, the output of the first of which reaches the second.
    model : str or None
        The merged model; None: it was not stored, because there is a conflict or tests do not pass.
    report : TestReport or None
        Tests that decided about a possible conflict.
    """

    kind: str
    base: str | None
    models: tuple[str, ...]
    changed: tuple[tuple[str, ...], ...] = ()
    both: tuple[str, ...] = ()
    connections: tuple[tuple[str, str], ...] = ()
    model: str | None = None
    report: TestReport | None = None

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        facts = [f"common ancestor {short(self.base) or 'none'}", *self._advice()]
        rows = [
            *(("both", layer, "") for layer in self.both),
            *(("connected", a, b) for a, b in self.connections),
            *(
                (short(model), layer, "")
                for model, some in zip(self.models, self.changed, strict=False)
                for layer in some
            ),
        ]
        result = f"merged as {short(self.model)}" if self.model else "not merged"
        return f"{self.kind}: {result}", facts, ("changed by", "layer", "reaches"), rows

    def _advice(self) -> list[str]:
        if self.model is not None:
            return []
        if self.kind == "conflict":
            return ["both changed the same layers; merge their weights: merge(a, b, operator=Ties())"]
        if self.report is None or not len(self.report):
            return ["no test applies; register one to decide: ws.lineage.register(function)"]
        return ["tests do not pass on the merged model", *repr(self.report).splitlines()]


def merge(
    catalog: Catalog,
    store: ModelStore,
    workshop: Workshop,
    models: tuple[str, ...],
    operator: Operator | None,
    module: torch.nn.Module | None,
    name: str | None,
) -> Merge:
    """Merge models and store the result, if there is no conflict; see `Lineage.merge`."""
    base: str | None = models[0]
    with catalog.read() as connection:
        for other in models[1:]:
            base = None if base is None else common_ancestor(connection, base, other)
    if operator is None and len(models) > 2:
        raise InvalidInput(f"{len(models)} models merge with an operator only: operator=Ties()")
    if base is None and not isinstance(operator, Mean):
        raise Conflict("the models have no common ancestor; merge them with operator=Mean()")
    if operator is not None:
        return Merge("operator", base, models, model=_stored(store, operator, base, models, name))
    assert base is not None
    states = [store.load(one) for one in (base, *models)]
    kind, details = compare(states[0], states[1], states[2], _flow(catalog, workshop, base, states[0], module))
    merge = Merge(kind, base, models, **details)
    if kind == "conflict":
        return merge
    if kind == "possible conflict":
        report = _judged(catalog, Layers()(states[0], states[1:]), {base, *models})
        merge = replace(merge, report=report)
        if not len(report) or not all(one.passed for one in report):
            return merge
    return replace(merge, model=_stored(store, Layers(), base, models, name))


def _stored(store: ModelStore, operator: Operator, base: str | None, models: tuple[str, ...], name: str | None) -> str:
    """Store what an operator makes, with it as the recipe."""
    recipe = recipe_of(operator)
    parents = models if isinstance(operator, Mean) or base is None else (base, *models)
    started_s = time.perf_counter()
    state = merged(recipe, [store.load(parent) for parent in parents])
    seconds = time.perf_counter() - started_s
    origin = Origin("", "merged", parents, recipe=recipe, digest=digest(recipe), seconds=seconds)
    return commit(store, state, replace(origin, created_ns=time.time_ns()), name=name)


def _flow(
    catalog: Catalog, workshop: Workshop, base: str, state: State, module: torch.nn.Module | None
) -> "nx.DiGraph[str]":
    """Trace the module; that of the run which made the common ancestor where none is given; else a chain."""
    if module is None:
        with catalog.read() as connection:
            made = origins_of(connection, {base})
        run = next((one.run for one in made if one.run is not None), None)
        module = None if run is None else workshop.recipe(run).module()
    return structure.chain(state) if module is None else structure.flow(module)


def _judged(catalog: Catalog, state: State, relatives: set[str]) -> TestReport:
    """Run the tests that apply to any of the relatives on a state that is not stored."""
    with catalog.read() as connection:
        pairs = testing.covering(connection, sorted(relatives), testing.registered(connection))
    tests = {test.name: test for _, test in pairs}.values()
    return TestReport(tuple(testing.judged(catalog, test, "merged", state) for test in tests))


def compare(base: State, a: State, b: State, flow: "nx.DiGraph[str]") -> tuple[str, dict[str, Any]]:
    """Return the class of a merge, and the layers that decide it.

    Parameters
    ----------
    base, a, b : states
    flow : DiGraph
        Of layers; see `structure`.
    """
    names = dict.fromkeys([*base, *a, *b])
    sides = [{name for name in names if not same(base.get(name), side.get(name))} for side in (a, b)]
    apart = {layer_of(name) for name in names if name in sides[0] | sides[1] and not same(a.get(name), b.get(name))}
    changed = [list(dict.fromkeys(layer_of(name) for name in names if name in side)) for side in sides]
    both = [layer for layer in changed[0] if layer in changed[1] and layer in apart]
    links = connected(
        flow,
        *(  # what both changed alike is no question
            [layer for layer in side if layer in apart] for side in changed
        ),
    )
    kind = "conflict" if both else "possible conflict" if links else "no conflict"
    details = {"changed": tuple(map(tuple, changed)), "both": tuple(both), "connections": tuple(links)}
    return kind, details
