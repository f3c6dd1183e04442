"""Questions about the graph of models, answered by the catalog.

Edges are of two kinds: `derived` (trained or made from) and `version` (next version of). The catalog walks them with
recursive queries over the index of `edges`, so that a question costs what its answer is long. Equal models are one
node, and training may come back to a model that was there before: the graph may have cycles, and `in_order` says how
they are cut.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import networkx as nx
import sqlalchemy as sa

from dynkit.catalog import FEW, edges, models

__all__ = ["KINDS", "above", "acyclic", "ages", "all_edges", "common_ancestor", "in_order", "reachable", "versions"]

KINDS = ("derived", "version")


def reachable(
    connection: sa.Connection, start: Iterable[str], *, up: bool, kinds: Collection[str] = ("derived",)
) -> set[str]:
    """Models that lead to those of `start` (`up`), or that they lead to; a start only when a cycle comes back to it."""
    start = list(start)
    if len(start) > FEW:
        return _walked(all_edges(connection, kinds), start, up=up)
    near, far = (edges.c.child, edges.c.parent) if up else (edges.c.parent, edges.c.child)
    of_kind = edges.c.kind.in_(kinds)
    found = sa.select(far.label("id")).where(near.in_(start), of_kind).cte("found", recursive=True)
    found = found.union(sa.select(far).where(near == found.c.id, of_kind))
    return set(connection.scalars(sa.select(found.c.id)))


def _walked(pairs: Iterable[tuple[str, str]], start: Iterable[str], *, up: bool) -> set[str]:
    near: dict[str, list[str]] = {}
    for parent, child in pairs:
        key, value = (child, parent) if up else (parent, child)
        near.setdefault(key, []).append(value)
    seen: set[str] = set()
    left = [following for model in start for following in near.get(model, ())]
    while left:
        model = left.pop()
        if model not in seen:
            seen.add(model)
            left += near.get(model, ())
    return seen


def all_edges(
    connection: sa.Connection, kinds: Collection[str] = KINDS, within: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """Pairs (parent, child), each once; only those with both ends `within` these models, if given."""
    query = sa.select(edges.c.parent, edges.c.child).where(edges.c.kind.in_(kinds)).distinct()
    if within is not None and len(within) <= FEW:
        query = query.where(edges.c.child.in_(within))
    rows = connection.execute(query)
    return [(row[0], row[1]) for row in rows if within is None or (row[0] in within and row[1] in within)]


def versions(connection: sa.Connection, model: str) -> list[str]:
    """Versions of a model, before and after it and itself, oldest first."""
    chain = {model}
    for up in (True, False):
        chain |= reachable(connection, [model], up=up, kinds=("version",))
    return in_order(connection, chain, kinds=("version",))


def common_ancestor(connection: sa.Connection, a: str, b: str) -> str | None:
    """Return the newest model that both come from and that no other such model comes from; itself counts."""
    graph = above(connection, {a, b})
    common = set.intersection(*({model, *nx.ancestors(graph, model)} for model in (a, b)))
    last = {model for model in common if common.isdisjoint(graph.successors(model))}
    return in_order(connection, last)[-1] if last else None


def in_order(connection: sa.Connection, some: Collection[str], kinds: Collection[str] = KINDS) -> list[str]:
    """Sort models so that parents come before children, older ones first where the edges do not say."""
    age = ages(connection, some)
    graph = acyclic(all_edges(connection, kinds, within=set(some)), age)
    graph.add_nodes_from(some)
    return list(nx.lexicographical_topological_sort(graph, key=age.__getitem__))


def ages(connection: sa.Connection, some: Collection[str]) -> dict[str, tuple[int, str]]:
    """When each model was first stored, with its identity to tell equal times apart."""
    query = sa.select(models.c.id, models.c.created_ns)
    if len(some) <= FEW:
        query = query.where(models.c.id.in_(some))
    return {row.id: (row.created_ns, row.id) for row in connection.execute(query) if row.id in some}


Node = TypeVar("Node", bound=Hashable)


def acyclic(pairs: Iterable[tuple[Node, Node]], age: Mapping[Node, Any]) -> "nx.DiGraph[Node]":
    """Graph of these edges; inside a cycle, those that lead from a younger model to an older one are left out."""
    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_edges_from((parent, child) for parent, child in pairs if parent != child)
    for together in list(nx.strongly_connected_components(graph)):
        if len(together) > 1:
            inner = list(graph.subgraph(together).edges)
            graph.remove_edges_from((parent, child) for parent, child in inner if age[parent] > age[child])
    return graph


def above(connection: sa.Connection, some: set[str]) -> "nx.DiGraph[str]":
    """Models and all they come from, by edges of both kinds, without cycles."""
    found = some | reachable(connection, some, up=True, kinds=KINDS)
    graph = acyclic(all_edges(connection, within=found), ages(connection, found))
    graph.add_nodes_from(found)
    return graph
