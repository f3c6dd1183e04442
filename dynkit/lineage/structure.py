"""How the layers of a model follow each other: which layer's output may reach which.

A layer is a module with tensors of its own, named as in the state dict. The flow of data is traced with torch.fx where
the module allows it, with the operations between layers left out; otherwise, and where there are only tensors, the
layers count as a chain in their order.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from dynkit.lineage.display import Shown

__all__ = ["StructureDiff", "chain", "connected", "diff_structure", "flow", "layer_of"]


def layer_of(tensor: str) -> str:
    """Layer of a tensor: its name up to the last dot.

    >>> layer_of("encoder.0.weight"), layer_of("scale")
    ('encoder.0', '')
    """
    return tensor.rpartition(".")[0]


def chain(tensors: Iterable[str]) -> "nx.DiGraph[str]":
    """Layers one after the other, in the order of their tensors."""
    layers = list(dict.fromkeys(map(layer_of, tensors)))
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(layers)
    nx.add_path(graph, layers)
    return graph


def flow(module: nn.Module) -> "nx.DiGraph[str]":
    """Layers with edges along the flow of data; each node's `kind` is the class and its settings.

    The graph's attribute `traced` says whether torch.fx could follow the module.
    """
    kinds = {name: f"{type(one).__name__}({one.extra_repr()})" for name, one in module.named_modules()}
    try:
        with torch.no_grad():
            graph = _traced(fx.symbolic_trace(module))
        graph.graph["traced"] = True
    except Exception:  # control flow that depends on data, or a module that no tracer can call
        leaves = [name for name, one in module.named_modules() if name and not list(one.children())]
        graph = chain(f"{name}." for name in leaves)
        graph.graph["traced"] = False
    for layer in graph:
        graph.nodes[layer]["kind"] = kinds.get(layer, "")
    return graph


def _traced(traced: fx.GraphModule) -> "nx.DiGraph[str]":
    """Contract the operations between layers."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    reach: dict[fx.Node, set[str]] = {}  # the last layers whose output is in a value
    weights: set[fx.Node] = set()  # values that are made of tensors of the module only
    for node in traced.graph.nodes:
        inputs = node.all_input_nodes
        before = set().union(*(reach[one] for one in inputs if one not in weights))
        after = set().union(*(reach[one] for one in inputs if one in weights))  # an operation that is part of a layer
        if node.op in ("call_module", "get_attr"):
            after = {str(node.target) if node.op == "call_module" else layer_of(str(node.target))}
        if node.op == "get_attr" or (node.op != "call_module" and inputs and weights.issuperset(inputs)):
            weights.add(node)
        graph.add_nodes_from(after)
        graph.add_edges_from((one, layer) for one in before for layer in after if one != layer)
        reach[node] = after or before
    return graph


def connected(graph: "nx.DiGraph[str]", some: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs (before, after) of a layer of each side of which one's output may reach the other.

    A layer that the graph does not have may be connected with any.
    """
    others = list(others)
    pairs = []
    for one in some:
        after = nx.descendants(graph, one) if one in graph else set(others)
        before = nx.ancestors(graph, one) if one in graph else set()
        for other in others:
            if other in after or other not in graph:
                pairs.append((one, other))
            elif other in before:
                pairs.append((other, one))
    return pairs


@dataclass(frozen=True, repr=False)
class StructureDiff(Shown):
    """Layers and connections that only one of two modules has.

    Parameters
    ----------
    lines : tuple of (str, str, str)
        ``"-"`` only in the first, ``"+"`` only in the second, ``" "`` in both; the layer's name and kind.
    connections : tuple of (str, str, str)
        Sign, from, to; between layers that both have.
    traced : bool
        Whether torch.fx could follow both.
    """

    lines: tuple[tuple[str, str, str], ...]
    connections: tuple[tuple[str, str, str], ...]
    traced: bool

    @property
    def divergence(self) -> float:
        """Share of layers and connections that only one has, in [0, 1]."""
        single = sum(sign != " " for sign, *_ in (*self.lines, *self.connections))
        both = sum(sign == " " for sign, *_ in (*self.lines, *self.connections))
        return single / max(single + 2 * both, 1)

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        facts = [] if self.traced else ["not traced: layers in the order of their definition"]
        rows = [*self.lines, *((sign, f"{a} -> {b}", "") for sign, a, b in self.connections if sign != " ")]
        return f"structure differs by {self.divergence:.0%}", facts, ("", "layer", "kind"), rows


def diff_structure(a: "nx.DiGraph[str]", b: "nx.DiGraph[str]") -> StructureDiff:
    """Compare two graphs from `flow`: longest common subsequences of kinds, then connections of matched layers."""
    orders = [list(nx.lexicographical_topological_sort(_cut(graph))) for graph in (a, b)]
    kinds = [[graph.nodes[layer]["kind"] for layer in order] for graph, order in zip((a, b), orders, strict=True)]
    lines: list[tuple[str, str, str]] = []
    match: dict[str, str] = {}
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, kinds[0], kinds[1], autojunk=False).get_opcodes():
        if tag == "equal":
            match.update(zip(orders[0][i1:i2], orders[1][j1:j2], strict=True))
            lines += [(" ", layer, kind) for layer, kind in zip(orders[1][j1:j2], kinds[1][j1:j2], strict=True)]
        else:
            lines += [("-", layer, kind) for layer, kind in zip(orders[0][i1:i2], kinds[0][i1:i2], strict=True)]
            lines += [("+", layer, kind) for layer, kind in zip(orders[1][j1:j2], kinds[1][j1:j2], strict=True)]
    first = {(match[x], match[y]) for x, y in a.edges if x in match and y in match}
    common = set(match.values())
    second = {(x, y) for x, y in b.edges if x in common and y in common}
    signs: Mapping[str, set[tuple[str, str]]] = {" ": first & second, "-": first - second, "+": second - first}
    connections = tuple((sign, x, y) for sign, pairs in signs.items() for x, y in sorted(pairs))
    return StructureDiff(tuple(lines), connections, bool(a.graph["traced"] and b.graph["traced"]))


def _cut(graph: "nx.DiGraph[str]") -> "nx.DiGraph[str]":
    """Leave out edges that go back to a layer that is used more than once."""
    place = {layer: i for i, layer in enumerate(graph)}
    cut: nx.DiGraph[str] = nx.DiGraph()
    cut.add_nodes_from(graph)
    acyclic = nx.is_directed_acyclic_graph(graph)
    cut.add_edges_from((x, y) for x, y in graph.edges if acyclic or place[x] < place[y])
    return cut
