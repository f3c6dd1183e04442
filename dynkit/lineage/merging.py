"""Merge two lines of work on one model, as version control merges two branches of a text.

Layers that only one side changed since the common ancestor are taken from that side. A layer that both changed is a
conflict. Where different layers were changed but the output of one reaches the other, it is a possible conflict:
each side was tuned to what the other had before, so the registered tests decide. Layers that do not see each other,
such as two heads of one body, merge without conflict.

The three classes are those of W. Hao et al., "MGit: a model versioning and management system", ICML 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch

from dynkit.lineage.display import Shown, short
from dynkit.lineage.operators import same
from dynkit.lineage.structure import connected, layer_of
from dynkit.lineage.testing import TestReport

__all__ = ["Merge", "compare"]

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
