"""The graph of models: questions about it, provenance, placement, names, notes and export."""

import json
import threading
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import sqlalchemy as sa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import make_model, make_pipeline, replayed
from torch import nn

import dynkit as dk
from dynkit.catalog import edges, insert_missing, models, names
from dynkit.errors import Conflict, InvalidInput, NotFound
from dynkit.lineage import graph
from dynkit.lineage.placing import sketch


def weights(seed: int, rows: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "body.weight": torch.randn(rows, 48, generator=generator),
        "body.bias": torch.zeros(rows),
        "head.weight": torch.randn(10, rows, generator=generator),
    }


def tuned(state: dict[str, torch.Tensor], seed: int, by: float = 0.05) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: t + by * torch.randn(t.shape, generator=generator) for name, t in state.items()}


def planted(ws: dk.Workspace, pairs: list[tuple[int, int]], n: int, kinds: list[str]) -> None:
    """Models m0..m<n> of one tensor, with these edges."""
    for i in range(n):
        ws.models.put({"w": torch.tensor([float(i)])})
    with ws.catalog.write() as connection:
        ids = list(connection.scalars(sa.select(models.c.id).order_by(models.c.created_ns)))
        for i, model in enumerate(ids):
            connection.execute(sa.insert(names), {"name": f"m{i}", "model": model, "changed_ns": 0})
        rows = [
            {"parent": ids[a], "child": ids[b], "kind": kind, "run": ""}
            for (a, b), kind in zip(pairs, kinds, strict=True)
        ]
        insert_missing(connection, edges, rows)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_ancestors_and_versions_are_those_of_networkx_cycles_included(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    ws = dk.Workspace(tmp_path_factory.mktemp("ws"))
    n = data.draw(st.integers(2, 8))
    node = st.integers(0, n - 1)
    pairs = data.draw(st.lists(st.tuples(node, node).filter(lambda pair: pair[0] != pair[1]), unique=True, max_size=14))
    kinds = [data.draw(st.sampled_from(["derived", "version"])) for _ in pairs]
    planted(ws, pairs, n, kinds)
    derived, version = nx.DiGraph(), nx.DiGraph()
    for kind, oracle in (("derived", derived), ("version", version)):
        oracle.add_nodes_from(range(n))
        oracle.add_edges_from(pair for pair, k in zip(pairs, kinds, strict=True) if k == kind)
    ids = [ws.models.resolve(f"m{i}") for i in range(n)]
    for i in range(n):
        assert ws.lineage.ancestors(f"m{i}") == {ids[j] for j in nx.ancestors(derived, i)}
        assert ws.lineage.descendants(ids[i]) == {ids[j] for j in nx.descendants(derived, i)}
        chain = ws.lineage.versions(ids[i])
        assert set(chain) == {ids[j] for j in nx.ancestors(version, i) | nx.descendants(version, i) | {i}}
    with ws.catalog.read() as connection:
        order = graph.in_order(connection, set(ids))
        some = graph.reachable(connection, ids, up=True)
        assert some == graph._walked(graph.all_edges(connection, ("derived",)), ids, up=True)
    both = nx.compose(derived, version)
    assert sorted(order) == sorted(ids)
    place = {model: i for i, model in enumerate(order)}
    for together in nx.strongly_connected_components(both):
        inner = both.subgraph(together)
        outer = [(a, b) for a, b in both.edges if (a, b) not in inner.edges and (a in together) != (b in together)]
        assert all(place[ids[a]] < place[ids[b]] for a, b in outer)


def test_the_common_ancestor_is_the_lowest_one(ws: dk.Workspace) -> None:
    planted(ws, [(0, 1), (1, 2), (1, 3), (2, 4), (5, 4)], 7, ["derived", "derived", "version", "derived", "derived"])
    ids = [ws.models.resolve(f"m{i}") for i in range(7)]
    assert ws.lineage.common_ancestor("m4", "m3") == ids[1]
    assert ws.lineage.common_ancestor("m0", "m4") == ids[0]
    assert ws.lineage.common_ancestor("m4", "m4") == ids[4]
    assert ws.lineage.common_ancestor("m3", "m5") is None


def test_a_model_is_found_by_name_identity_or_its_beginning(
    ws: dk.Workspace,
) -> None:
    model = ws.lineage.add(weights(0), name="base")
    other = ws.lineage.add(weights(1))
    assert ws.models.resolve("base") == ws.models.resolve(model[:10]) == model
    with pytest.raises(NotFound, match="none has this name"):
        ws.lineage.ancestors("bases")
    shared = next(i for i in range(64) if model[i] != other[i])
    if shared:
        with pytest.raises(NotFound, match="more than one model begins"):
            ws.models.resolve(model[:shared])
    with pytest.raises(InvalidInput, match="is no model"):
        ws.models.resolve("")


def test_a_run_leaves_its_whole_provenance(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset))
    first, second, *_ = run.trained
    card = ws.lineage.show(second.model)
    (origin,) = card.origins
    assert (origin.how, origin.run, origin.index, origin.parents) == ("trained", run.id, 1, (first.model,))
    assert (origin.dataset, origin.dataset_version, origin.samples, origin.seed) == ("stream", 1, second.samples, 3)
    assert origin.recipe["trigger"] == {"amount": {"n": 500}}
    assert origin.digest == make_pipeline(dataset).digest()
    assert card.environment["packages"]["torch"] == torch.__version__
    assert card.samples()["key"].to_list() == run.selection(1)["key"].to_list()
    assert (card.parents, len(card.children), card.ancestors, card.descendants) == ((first.model,), 1, 1, 4)
    assert card.versions == tuple(one.model for one in run.trained)
    means = {row["metric"]: row["mean"] for row in card.metrics.iter_rows(named=True)}
    matrix = run.matrix().filter(model=second.model, metric="accuracy")
    assert means["accuracy"] == pytest.approx(matrix["value"].mean())
    assert f"trained by run {run.id} at trigger 1" in repr(card)
    assert "accuracy" in card._repr_html_()


def test_equal_models_are_one_node_with_two_origins(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    one, two = (replayed(make_pipeline(dataset)) for _ in range(2))
    card = ws.lineage.show(one.trained[0].model)
    assert [origin.run for origin in card.origins] == [one.id, two.id]


def test_what_people_bring_gets_its_place_name_tags_and_note(ws: dk.Workspace, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights(0), tmp_path / "base.safetensors")
    base = ws.lineage.add(tmp_path / "base.safetensors", name="base", tags=["text"], note="from the hub")
    assert base == ws.models.put(weights(0))
    child = ws.lineage.add(nn.Linear(2, 2), parents=["base"], version_of=base, how="distilled")
    assert ws.lineage.ancestors(child) == {base}
    assert ws.lineage.versions(base) == [base, child]
    card = ws.lineage.show("base")
    assert (card.names, card.tags, card.notes) == (("base",), ("text",), ("from the hub",))
    assert str(ws.lineage.show(child).origins[0]) == "added: distilled"
    ws.lineage.note(child, "better", tags=["text", "small"])
    assert [one.model for one in ws.lineage.search(tag="text")] == [child, base]
    assert [one.model for one in ws.lineage.search("hub")] == [base]
    assert [one.model for one in ws.lineage.search(base[:8], tag="text")] == [base]
    assert [(one.model, one.parents) for one in ws.lineage.log()] == [(child, (base,)), (base, ())]
    for wrong, message in ((3, "no model; pass an nn.Module"), ("x.pt", r"path of a \.safetensors file")):
        with pytest.raises(InvalidInput, match=message):
            ws.lineage.add(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"missing.safetensors cannot be read as safetensors"):
        ws.lineage.add("missing.safetensors")
    with pytest.raises(NotFound):
        ws.lineage.add(weights(3), parents=["nobody"])
    with pytest.raises(InvalidInput, match="tags='x' must be a list of text"):
        ws.lineage.note(child, tags="x")


def test_search_finds_what_a_cascade_trained_on_a_dataset(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, training=dk.Training(epochs=1, warm_start=True)))
    first = run.trained[0].model
    new = ws.lineage.add({n: t + 1 for n, t in ws.models.load(first).items()}, version_of=first)
    rebuilt = ws.lineage.cascade(first, new, dry_run=False).rebuilt
    found = {one.model for one in ws.lineage.search(dataset="stream")}
    assert found == {one.model for one in run.trained} | set(rebuilt.values())


def test_search_finds_the_models_of_a_run_and_of_a_dataset(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset))
    ws.lineage.add(weights(0))
    expected = {one.model for one in run.trained}
    assert {one.model for one in ws.lineage.search(run=run.id)} == expected
    assert {one.model for one in ws.lineage.search(run="test", dataset="stream")} == expected
    assert len(ws.lineage.search(dataset="other")) == 0


def test_a_name_moves_only_from_the_model_that_one_has_seen(ws: dk.Workspace) -> None:
    a, b = (ws.lineage.add(weights(i)) for i in range(2))
    ws.lineage.name(a, "best")
    with pytest.raises(Conflict, match="names model"):
        ws.lineage.name(b, "best")
    ws.lineage.name(b, "best", instead_of=a)
    with pytest.raises(Conflict):
        ws.lineage.name(a, "best", instead_of=a)
    with pytest.raises(Conflict, match="is free"):
        ws.lineage.name(a, "new", instead_of=b)
    assert ws.models.resolve("best") == b
    with pytest.raises(Conflict):  # all or nothing
        ws.lineage.add(weights(7), name="best")
    assert len(ws.lineage.log()) == 2


def test_a_model_of_unknown_origin_is_placed_under_its_parent(ws: dk.Workspace) -> None:
    """Families of related models: the nearest relative of a child is its parent, with what it shares."""
    rng = np.random.default_rng(0)
    pool = {ws.lineage.add(weights(i)): weights(i) for i in range(20)}
    right = 0
    for i in range(60):
        parent = list(pool)[rng.integers(len(pool))]
        child = tuned(pool[parent], 1000 + i)
        placed = ws.lineage.place(child)
        right += placed[0].model == parent
        assert placed[0].near > 0.9
        assert placed[0].structure == 1.0
        pool[ws.lineage.add(child, parents=[parent])] = child
    assert right >= 55


def test_shared_tensors_count_more_than_near_ones(ws: dk.Workspace) -> None:
    base = weights(0)
    frozen = ws.lineage.add(base)
    near = ws.lineage.add(tuned(base, 1, by=0.01))
    head = {**base, "head.weight": weights(5)["head.weight"]}
    placed = ws.lineage.place(head)
    assert (placed[0].model, placed[1].model) == (frozen, near)
    assert placed[0].shared == pytest.approx(2 / 4)
    assert placed[0].confidence > placed[1].confidence
    again = ws.lineage.place(base)
    assert again.identity == frozen
    assert frozen not in {one.model for one in again.candidates}
    assert "stored already" in repr(again)
    assert "confidence" in again._repr_html_()


def test_unrelated_models_are_placed_by_structure_with_little_confidence(ws: dk.Workspace) -> None:
    same = ws.lineage.add(weights(0))
    ws.lineage.add(nn.Linear(3, 3))
    placed = ws.lineage.place(weights(1))
    assert placed[0].model == same
    assert placed[0].confidence < 0.5
    strange = ws.lineage.place({"other": torch.randn(4, 4)})
    assert all(one.confidence < 0.5 and one.shared == one.structure == 0.0 for one in strange.candidates)


def test_models_of_runs_are_placed_too(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset))
    state = tuned(ws.models.load(run.trained[2].model), 0, by=1e-4)
    assert ws.lineage.place(state)[0].model == run.trained[2].model
    assert ws.lineage.place(make_model())[0].structure == 1.0


@given(st.integers(0, 2**31), st.sampled_from([0.01, 0.1, 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_sketch_keeps_distances(seed: int, by: float) -> None:
    state = weights(seed)
    other = tuned(state, seed + 1, by)
    a, b = (sketch(one).astype(float) for one in (state, other))
    true = sum(float(((state[n] - other[n]) ** 2).sum()) for n in state if state[n].ndim > 1)
    assert 0.5 < np.sum((a - b) ** 2) / true < 1.7  # chi-squared of 128 degrees: 4 sigma


def test_the_sketch_sees_rows_that_were_added(ws: dk.Workspace) -> None:
    base = weights(0)
    ws.lineage.add(base)
    resized = {**base, "head.weight": torch.cat([base["head.weight"], torch.randn(2, 64)])}
    assert ws.lineage.place(tuned(resized, 1, by=0.01))[0].near > 0.8


def test_the_graph_is_exported(ws: dk.Workspace, tmp_path: Path) -> None:
    base = ws.lineage.add(weights(0), name='the "base"', tags=["a", "b"])
    child = ws.lineage.add(weights(1), parents=[base], version_of=base)
    ws.lineage.save(tmp_path / "graph.graphml")
    ws.lineage.save(tmp_path / "graph.json")
    ws.lineage.save(tmp_path / "graph.mmd")
    read = nx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    assert {(a, b, data["kind"]) for a, b, data in read.edges(data=True)} == {
        (base, child, "derived"),
        (base, child, "version"),
    }
    assert read.nodes[base]["tags"] == "a, b"
    again = nx.node_link_graph(json.loads((tmp_path / "graph.json").read_text()), edges="edges")
    assert set(again.edges(keys=True)) == set(ws.lineage.to_networkx().edges(keys=True))
    chart = (tmp_path / "graph.mmd").read_text()
    assert 'm0["the #quot;base#quot;"]' in chart
    assert "m0 --> m1" in chart and "m0 -.-> m1" in chart
    with pytest.raises(InvalidInput, match=r"'\.dot' is not known"):
        ws.lineage.save(tmp_path / "graph.dot")


def test_what_is_given_wrongly_is_told(ws: dk.Workspace, tmp_path: Path) -> None:
    base = ws.lineage.add(weights(0), name="base", tags=["odd \x01 tag"])
    ws.lineage.save(tmp_path / "graph.graphml")
    assert nx.read_graphml(tmp_path / "graph.graphml").nodes[base]["tags"] == "odd \N{REPLACEMENT CHARACTER} tag"
    lock = threading.Lock()
    for wrong, message in [
        (lambda: ws.lineage.place({"model": weights(0), "epoch": 3}), "'model' is a dict"),
        (lambda: ws.lineage.place({"w": torch.eye(3).to_sparse()}), "must be dense"),
        (lambda: ws.lineage.add(lambda: {"w": lock}), "cannot be kept"),
        (lambda: ws.lineage.add_group(lambda: {"w": lock}), "cannot be kept"),
        (lambda: ws.lineage.add(weights(1), how=3), "must be text for people"),  # type: ignore[arg-type]
        (lambda: ws.lineage.note(base, tags=[None]), "must be a list of text"),  # type: ignore[list-item]
        (lambda: ws.lineage.name(base, "\ud800"), "must be a text"),
        (lambda: ws.lineage.log(-1), "limit=-1 must be"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            wrong()
    assert ws.lineage.ancestors(ws.lineage.add(weights(2), parents="base")) == {base}


def test_tensors_that_torch_cannot_take_apart_are_placed(ws: dk.Workspace) -> None:
    packed = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    model = ws.lineage.add({"w": packed, "huge": torch.full((4, 4), 1e300, dtype=torch.float64)})
    assert ws.lineage.place({"w": packed, "x": torch.ones(2)})[0].model == model


def test_a_model_removed_meanwhile_is_a_conflict(ws: dk.Workspace) -> None:
    ws.lineage.add(weights(0), name="base")
    path = ws.path
    ws.lineage.register(lambda state: dk.Workspace(path).models.remove("base"), name="removes it")
    with pytest.raises(Conflict, match="another process removed or added what this needs"):
        ws.lineage.test()


def test_looking_at_the_lineage_runs_no_user_code(ws: dk.Workspace, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return marker.touch, ()

    trap = Trap()
    base = ws.lineage.add(weights(0))
    child = ws.lineage.add(lambda state, trap=trap: state, parents=[base])
    marker.unlink(missing_ok=True)
    ws.lineage.show(child)
    ws.lineage.log()
    ws.lineage.place(weights(0))
    ws.lineage.to_networkx()
    assert not marker.exists()
