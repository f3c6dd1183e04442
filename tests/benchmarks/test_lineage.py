"""Questions about large graphs: 10 000 and 100 000 models.

``make bench`` prints the table. Each model has one parent among the hundred before it, or none, and is the next
version of one of them now and then; models are rows of the catalog without tensors of their own, except that each is
indexed for placement with a state of 20 tensors. Opening means: a new process's workspace answers its first question.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import sqlalchemy as sa
import torch

import dynkit as dk
from dynkit.catalog import edges, models
from dynkit.lineage import placing


def grown(path: Path, n: int) -> tuple[dk.Workspace, list[str]]:
    """A workspace with a graph of n models, grown in the order of time."""
    ws = dk.Workspace(path)
    ws.models.put({"w": torch.zeros(1)})
    rng = np.random.default_rng(0)
    ids = [rng.bytes(32).hex() for _ in range(n)]
    with ws.catalog.write() as connection:
        row = connection.execute(sa.select(models)).one()._asdict()
        rows = [{**row, "id": model, "created_ns": 1 + i} for i, model in enumerate(ids)]
        connection.execute(sa.insert(models), rows)
        links = []
        for i in range(1, n):
            back = int(rng.integers(1, 101))
            if back <= i and rng.random() > 0.001:
                links.append({"parent": ids[i - back], "child": ids[i], "kind": "derived", "run": ""})
            if rng.random() < 0.5:
                links.append({"parent": ids[i - 1], "child": ids[i], "kind": "version", "run": ""})
        connection.execute(sa.insert(edges), links)
    return ws, ids


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


@pytest.mark.parametrize("n", [10_000, 100_000])
def test_questions_about_a_large_graph(tmp_path: Path, n: int) -> None:
    ws, ids = grown(tmp_path / "ws", n)
    ws.catalog.close()
    seconds: dict[str, float] = {}
    opened = dk.Workspace(tmp_path / "ws")
    seconds["open and log of 50"], log = timed(lambda: opened.lineage.log(50))
    assert log.total == n + 1
    oracle = opened.lineage.to_networkx()
    derived = nx.DiGraph((a, b) for a, b, kind in oracle.edges(keys=True) if kind == "derived")
    seconds["ancestors of the newest"], ancestors = timed(lambda: opened.lineage.ancestors(ids[-1]))
    assert ancestors == nx.ancestors(derived, ids[-1])
    most = max(ids[:50], key=lambda model: len(nx.descendants(derived, model)) if model in derived else 0)
    seconds["descendants of an old one"], descendants = timed(lambda: opened.lineage.descendants(most))
    assert descendants == nx.descendants(derived, most)
    seconds["show"], _ = timed(lambda: opened.lineage.show(ids[-1]))
    seconds["common ancestor"], _ = timed(lambda: opened.lineage.common_ancestor(ids[-1], ids[-2]))
    seconds["search by text"], _ = timed(lambda: opened.lineage.search(ids[5][:10]))
    if n <= 10_000:
        seconds["log of all"], _ = timed(lambda: opened.lineage.log(None))
    assert max(seconds.values()) < (1.0 if n == 10_000 else 3.0)
    seconds["whole graph to networkx"], whole = timed(opened.lineage.to_networkx)
    assert whole.number_of_nodes() == n + 1
    print(f"\n{n} models, {whole.number_of_edges()} edges, {len(descendants)} descendants")
    for name, value in seconds.items():
        print(f"{name:28} {value * 1000:9.1f} ms")


def test_placement_among_ten_thousand_models(tmp_path: Path) -> None:
    """Families of 100, of which half share the tensors of a frozen body; all families have one architecture."""
    n, family = 10_000, 100
    ws, ids = grown(tmp_path / "ws", n)
    generator = torch.Generator().manual_seed(0)
    states: list[dict[str, torch.Tensor]] = []
    index_s = 0.0
    for i in range(n):
        if i % family == 0:
            base = {f"layer{j}.weight": torch.randn(16, 16, generator=generator) for j in range(20)}
            states.append(base)
            state = base
        else:
            changed = range(15 if i % 2 else 0, 20)
            new = {
                f"layer{j}.weight": base[f"layer{j}.weight"] + 0.1 * torch.randn(16, 16, generator=generator)
                for j in changed
            }
            state = {**base, **new}
        manifest = {name: placing.tensor_id(tensor) for name, tensor in state.items()}
        with ws.catalog.write() as connection:
            took, _ = timed(lambda: placing.index(connection, ids[i], state, manifest))  # noqa: B023
        index_s += took
    times, right = [], 0
    rng = np.random.default_rng(1)
    for which in rng.integers(len(states), size=30):
        child = {
            name: tensor + 0.05 * torch.randn(16, 16, generator=generator) for name, tensor in states[which].items()
        }
        with ws.catalog.read() as connection:
            took, placed = timed(lambda: placing.place(connection, child, 5, ""))  # noqa: B023
        times.append(took)
        right += placed[0].model == ids[which * family]
    print(f"\nplacement among {n}: median {np.median(times) * 1000:.1f} ms, slowest {max(times) * 1000:.1f} ms; ")
    print(f"parent first {right}/30; indexing {index_s / n * 1000:.2f} ms a model")
    assert max(times) < 1.0
    assert right >= 28
