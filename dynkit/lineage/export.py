"""The graph for other tools: networkx, GraphML, JSON (node-link) and Mermaid."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import sqlalchemy as sa

from dynkit.catalog import edges, models, names, notes
from dynkit.errors import InvalidInput, did_you_mean

__all__ = ["save", "to_mermaid", "to_networkx"]

_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_FORMATS = (".graphml", ".json", ".mmd")


def to_networkx(connection: sa.Connection) -> "nx.MultiDiGraph[str]":
    """All models as nodes with created_ns, and names and tags where they have any; edges keyed by kind, with `runs`."""
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    rows = connection.execute(sa.select(models.c.id, models.c.created_ns).order_by(models.c.created_ns))
    graph.add_nodes_from((row[0], {"created_ns": row[1]}) for row in rows)
    for name, model in connection.execute(sa.select(names.c.name, names.c.model)):
        graph.nodes[model].setdefault("names", []).append(name)
    for model, tag in connection.execute(sa.select(notes.c.model, notes.c.text).where(notes.c.kind == "tag")):
        graph.nodes[model].setdefault("tags", []).append(tag)
    found: dict[tuple[str, str, str], list[str]] = {}
    for parent, child, kind, run in connection.execute(sa.select(edges)):
        found.setdefault((parent, child, kind), []).append(run)
    graph.add_edges_from((parent, child, kind, {"runs": made}) for (parent, child, kind), made in found.items())
    return graph


def save(graph: "nx.MultiDiGraph[str]", path: Path) -> None:
    """Write a graph in the format that the name's ending says: .graphml, .json or .mmd."""
    if path.suffix == ".graphml":
        flat: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        flat.add_nodes_from((node, _flat(data)) for node, data in graph.nodes(data=True))
        flat.add_edges_from(
            (a, b, key, {"kind": key, **_flat(data)}) for a, b, key, data in graph.edges(keys=True, data=True)
        )
        nx.write_graphml(flat, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(nx.node_link_data(graph, edges="edges"), indent=1))
    elif path.suffix == ".mmd":
        path.write_text(to_mermaid(graph))
    else:
        raise InvalidInput(f"the format {path.suffix!r} is not known{did_you_mean(path.suffix, _FORMATS)}")


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """GraphML has no lists, and XML no control characters."""
    texts = {n: v if isinstance(v, str) else ", ".join(v) for n, v in data.items() if isinstance(v, Sequence)}
    return {**data, **{name: _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text) for name, text in texts.items()}}


def to_mermaid(graph: "nx.MultiDiGraph[str]") -> str:
    """Draw the graph as a Mermaid flowchart: solid arrows are `derived`, dotted ones `version`."""
    number = {node: f"m{i}" for i, node in enumerate(graph)}
    lines = ["flowchart TD"]
    for node, data in graph.nodes(data=True):
        label = ", ".join(data.get("names", ())) or node[:12]
        lines.append(f'  {number[node]}["{label.replace(chr(34), "#quot;")}"]')
    arrows = {"derived": "-->", "version": "-.->"}
    lines += [f"  {number[a]} {arrows[kind]} {number[b]}" for a, b, kind in graph.edges(keys=True)]
    return "\n".join(lines) + "\n"
