"""Find the first bad model between good ones and a bad one, with few tests.

A fault is assumed to stay in all that comes from the model that brought it. Then testing one model rules out all it
comes from (it passes) or all but those (it fails); the model that halves the suspects best is tested next, as git
does. That takes log2(n) tests for n suspects on a chain, and about log(n) / log(3/2) at the worst where a model has at
most two parents (J. Courtiel, P. Dorbec, R. Lecoq, "Theoretical analysis of git bisect", LATIN 2022).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from dynkit.errors import InvalidInput
from dynkit.lineage.display import Shown, short

__all__ = ["Bisection", "bisect"]

Verdict = Callable[[str], bool | None]


@dataclass(frozen=True, repr=False)
class Bisection(Shown):
    """Which model brought a failure.

    Parameters
    ----------
    first : str or None
        The first bad model; None when those that could tell cannot be tested.
    suspects : tuple of str
        What it can be: the first bad model alone, if it was found.
    tested : tuple of (str, bool or None)
        Models in the order of testing, with whether they passed.
    errors : tuple of str
        What the test raised where it broke.
    """

    first: str | None
    suspects: tuple[str, ...]
    tested: tuple[tuple[str, bool | None], ...]
    errors: tuple[str, ...] = ()

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        found = f"the first bad model is {short(self.first)}"
        title = found if self.first else f"the first bad model is one of {len(self.suspects)} that cannot be told apart"
        facts = [] if self.first else [", ".join(map(short, self.suspects[:20]))]
        facts += [f"the test broke {len(self.errors)} times: {self.errors[0]}"] if self.errors else []
        said = {True: "good", False: "bad", None: "cannot tell"}
        rows = [(i, short(model), said[passed]) for i, (model, passed) in enumerate(self.tested, 1)]
        return title, facts, ("test", "model", "verdict"), rows


def bisect(graph: "nx.DiGraph[str]", good: Iterable[str], bad: str, passes: Verdict) -> Bisection:
    """Search a graph without cycles, edges from parent to child.

    Parameters
    ----------
    graph : DiGraph
    good : iterable of str
        Known to pass.
    bad : str
        Known to fail.
    passes : callable
        Whether a model passes; None: it cannot be told.

    Raises
    ------
    InvalidInput
        When a good model comes from the bad one.
    """
    above: dict[str, set[str]] = {}

    def lineage(model: str) -> set[str]:
        if model not in above:
            above[model] = {model, *(nx.ancestors(graph, model) if model in graph else ())}
        return above[model]

    cleared = set().union(*map(lineage, good))
    if bad in cleared:
        raise InvalidInput(f"model {bad[:12]} is bad, but a good model comes from it; swap good and bad, or look again")
    suspects = lineage(bad) - cleared
    tested: list[tuple[str, bool | None]] = []
    unclear: set[str] = set()
    while len(suspects) > 1:
        best = _halving(graph, suspects, unclear | {bad})
        if best is None:
            break
        passed = passes(best)
        tested.append((best, passed))
        if passed is None:
            unclear.add(best)
        elif passed:
            suspects -= lineage(best)
        else:
            suspects &= lineage(best)
            bad = best
    order = tuple(sorted(suspects))
    return Bisection(order[0] if len(order) == 1 else None, order, tuple(tested))


def _halving(graph: "nx.DiGraph[str]", suspects: set[str], without: set[str]) -> str | None:
    """Return the suspect that comes from nearest to half of the suspects; the first such in the order of the graph."""
    part = graph.subgraph(suspects)
    bit = {model: 1 << i for i, model in enumerate(part)}
    reach: dict[str, int] = {}
    best, best_score = None, -1
    for model in nx.lexicographical_topological_sort(part):
        reach[model] = bit[model]
        for parent in part.predecessors(model):
            reach[model] |= reach[parent]
        weight = reach[model].bit_count()
        score = min(weight, len(suspects) - weight)
        if score > best_score and model not in without:
            best, best_score = model, score
    return best
