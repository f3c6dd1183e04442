"""The graph of models: `derived` edges (trained from) and `version` edges (next version of)."""

import networkx as nx
import sqlalchemy as sa

from dynkit.catalog import Catalog, edges, models
from dynkit.errors import NotFound

__all__ = ["Lineage"]


class Lineage:
    """The lineage of a workspace's models, read from the catalog when asked.

    Parameters
    ----------
    catalog : Catalog
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def graph(self) -> "nx.MultiDiGraph[str]":
        """All models as nodes; edges keyed by kind, with the `runs` that made them."""
        graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        with self._catalog.read() as connection:
            graph.add_nodes_from(connection.scalars(sa.select(models.c.id).order_by(models.c.created_ns)))
            for edge in connection.execute(sa.select(edges)):
                key = graph.add_edge(edge.parent, edge.child, key=edge.kind)
                graph.edges[edge.parent, edge.child, key].setdefault("runs", []).append(edge.run)
        return graph

    def ancestors(self, model: str) -> set[str]:
        """Models that `model` was trained from, directly or through others."""
        return set(nx.ancestors(self._derived(model), model))

    def descendants(self, model: str) -> set[str]:
        """Models trained from `model`, directly or through others."""
        return set(nx.descendants(self._derived(model), model))

    def _derived(self, model: str) -> "nx.DiGraph[str]":
        graph = self.graph()
        if model not in graph:
            raise NotFound(f"no model {model!r}; run.models() lists those of a run")
        derived: nx.DiGraph[str] = nx.DiGraph()
        derived.add_nodes_from(graph)
        derived.add_edges_from((a, b) for a, b, kind in graph.edges(keys=True) if kind == "derived")
        return derived
