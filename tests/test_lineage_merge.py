"""Differences between models, three-way merges and merge operators."""

from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import make_model, make_pipeline, replayed
from torch import nn

import dynkit as dk
from dynkit.errors import Conflict, InvalidInput
from dynkit.lineage import Layers, Mean, TaskArithmetic, Ties
from dynkit.lineage.diff import diff_tensors
from dynkit.lineage.structure import connected, diff_structure, flow

State = dict[str, torch.Tensor]


class TwoHeads(nn.Module):
    """A body and two heads that do not see each other."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(3, width)
        self.left = nn.Linear(width, 2)
        self.right = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.body(x)) + 1
        return self.left(x), self.right(x)


def changed(state: State, *layers: str, by: float = 1.0) -> State:
    return {name: t + by if name.rpartition(".")[0] in layers else t for name, t in state.items()}


@pytest.fixture
def base(ws: dk.Workspace) -> str:
    torch.manual_seed(0)
    return ws.lineage.add(TwoHeads(), name="base")


def sides(ws: dk.Workspace, base: str, left: State, right: State) -> tuple[str, str]:
    return ws.lineage.add(left, parents=[base]), ws.lineage.add(right, parents=[base])


# -- merging --


def test_layers_that_do_not_see_each_other_merge_by_themselves(ws: dk.Workspace, base: str) -> None:
    state = ws.models.load(base)
    a, b = sides(ws, base, changed(state, "left"), changed(state, "right"))
    merge = ws.lineage.merge(a, b, module=TwoHeads(), name="both")
    assert (merge.kind, merge.base, merge.changed) == ("no conflict", base, (("left",), ("right",)))
    expected = changed(changed(state, "left"), "right")
    assert merge.model == ws.models.resolve("both")
    assert all(ws.models.load(merge.model)[name].equal(value) for name, value in expected.items())
    assert set(ws.lineage.show("both").parents) == {base, a, b}
    assert "no conflict: merged as" in repr(merge) and "left" in merge._repr_html_()


def test_layers_of_which_one_reaches_the_other_merge_when_the_tests_pass(ws: dk.Workspace, base: str) -> None:
    state = ws.models.load(base)
    a, b = sides(ws, base, changed(state, "body"), changed(state, "right"))
    merge = ws.lineage.merge(b, a, module=TwoHeads())
    assert (merge.kind, merge.connections, merge.model) == ("possible conflict", (("body", "right"),), None)
    assert "register one to decide" in repr(merge)
    ws.lineage.register(lambda state: bool(state["body.weight"].max() < 0), name="never", models=["base"])
    failed = ws.lineage.merge(a, b, module=TwoHeads())
    assert failed.model is None and failed.report is not None and not failed.report.passed
    assert "tests do not pass" in repr(failed)
    count = len(ws.lineage.log())
    ws.lineage.register(lambda state: True, name="never", models=["base"])
    passed = ws.lineage.merge(a, b, module=TwoHeads())
    assert passed.model is not None
    assert len(ws.lineage.log()) == count + 1
    merged = ws.models.load(passed.model)
    assert merged["body.weight"].equal(state["body.weight"] + 1) and merged["right.weight"].equal(
        state["right.weight"] + 1
    )


def test_a_layer_that_both_changed_is_a_conflict_unless_they_changed_it_alike(ws: dk.Workspace, base: str) -> None:
    state = ws.models.load(base)
    a, b = sides(ws, base, changed(state, "left"), changed(state, "left", by=2.0))
    merge = ws.lineage.merge(a, b, module=TwoHeads())
    assert (merge.kind, merge.both, merge.model) == ("conflict", ("left",), None)
    assert "operator=Ties()" in repr(merge)
    c, d = sides(ws, base, changed(state, "left"), changed(changed(state, "left"), "right"))
    alike = ws.lineage.merge(c, d, module=TwoHeads())
    assert alike.kind == "no conflict"
    assert alike.model == d
    half = dict(state)
    half["left.bias"] = state["left.bias"] + 1
    other = dict(state)
    other["left.weight"] = state["left.weight"] + 1
    e, f = sides(ws, base, half, other)  # different tensors of one layer
    assert ws.lineage.merge(e, f, module=TwoHeads()).kind == "conflict"


def test_without_a_module_layers_count_as_a_chain(ws: dk.Workspace, base: str) -> None:
    state = ws.models.load(base)
    a, b = sides(ws, base, changed(state, "left"), changed(state, "right"))
    merge = ws.lineage.merge(a, b)
    assert (merge.kind, merge.connections) == ("possible conflict", (("left", "right"),))


def test_models_of_a_run_take_the_flow_from_its_module(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset))
    base = run.trained[0].model
    state = ws.models.load(base)
    a, b = sides(ws, base, changed(state, "0"), changed(state, "2"))
    assert ws.lineage.merge(a, b).connections == (("0", "2"),)


def test_added_layers_come_along(ws: dk.Workspace, base: str) -> None:
    state = ws.models.load(base)
    a, b = sides(ws, base, {**state, "third.weight": torch.ones(2, 4)}, changed(state, "right"))
    ws.lineage.register(lambda state: len(state) == 7, name="seven")
    merge = ws.lineage.merge(a, b, module=TwoHeads())
    assert merge.kind == "possible conflict"  # the module does not have that layer
    assert merge.model is not None
    assert set(ws.models.load(merge.model)) == {*state, "third.weight"}


def test_a_merge_needs_a_common_ancestor(ws: dk.Workspace, base: str) -> None:
    torch.manual_seed(9)
    stranger = ws.lineage.add(TwoHeads())
    with pytest.raises(Conflict, match=r"operator=Mean\(\)"):
        ws.lineage.merge(base, stranger)
    mean = ws.lineage.merge(base, stranger, operator=Mean())
    assert mean.model is not None
    x, y = (ws.models.load(one)["body.weight"] for one in (base, stranger))
    assert ws.models.load(mean.model)["body.weight"].allclose((x + y) / 2)
    with pytest.raises(InvalidInput, match="3 models merge with an operator only"):
        child = ws.lineage.add(changed(ws.models.load(base), "left"), parents=[base])
        ws.lineage.merge(base, child, child)


def test_a_merge_is_a_recipe_that_an_update_is_carried_through(ws: dk.Workspace, base: str) -> None:
    state = ws.models.load(base)
    grow = lambda state: changed(state, "left")  # noqa: E731
    a = ws.lineage.add(grow, parents=[base])
    b = ws.lineage.add(changed(state, "right"), parents=[base])
    ties = ws.lineage.merge(a, b, operator=Ties(density=0.5, scale=0.9)).model
    assert ties is not None
    new_state = changed(state, "left", by=7.0)
    new = ws.lineage.add(new_state, version_of=a)
    done = ws.lineage.cascade(a, new, dry_run=False)
    expected = Ties(density=0.5, scale=0.9)(state, [new_state, ws.models.load(b)])
    rebuilt = ws.models.load(done.rebuilt[ties])
    assert all(rebuilt[name].equal(value) for name, value in expected.items())


# -- operators --


def random_states(seed: int, n: int, shape: tuple[int, ...] = (4, 5)) -> list[State]:
    generator = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(shape, generator=generator), "steps": torch.tensor(i)} for i in range(n)]


def test_operators_are_their_formulas() -> None:
    base, *models = random_states(0, 4)
    weights = [model["w"].numpy().astype(np.float64) for model in models]
    start = base["w"].numpy().astype(np.float64)
    mean = Mean(weights=(1.0, 2.0, 3.0))(base, models)
    assert np.allclose(mean["w"], sum(k * w for k, w in zip((1, 2, 3), weights, strict=True)) / 6, atol=1e-6)
    task = TaskArithmetic(0.4)(base, models)
    assert np.allclose(task["w"], start + 0.4 * sum(w - start for w in weights), atol=1e-6)
    assert mean["steps"] == task["steps"] == 1  # what is no weight comes from the first model
    assert TaskArithmetic(1.0)(base, models[:1])["w"].allclose(models[0]["w"])
    with pytest.raises(InvalidInput, match="one number for each of 3 models"):
        Mean(weights=(1.0,))(base, models)


@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_ties_is_the_papers_algorithm(seed: int, density: float, n: int) -> None:
    """Against a plain loop over the weights: trim, elect, merge the disjoint."""
    base, *models = random_states(seed, n + 1)
    start = base["w"].double().flatten().tolist()
    changes = [(model["w"].double() - base["w"].double()).flatten().tolist() for model in models]
    keep = max(1, round(density * len(start)))
    for change in changes:
        smallest = sorted(change, key=abs)[: len(change) - keep]
        for value in smallest:
            change[change.index(value)] = 0.0
    merged = []
    for i, first in enumerate(start):
        votes = [change[i] for change in changes]
        sign = np.sign(sum(votes))
        agreeing = [vote for vote in votes if vote and np.sign(vote) == sign]
        merged.append(first + 0.7 * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    found = Ties(density=density, scale=0.7)(base, models)["w"]
    assert np.allclose(found.flatten(), merged, atol=1e-5)


def test_operators_keep_the_type_and_refuse_other_shapes() -> None:
    base, one, two = ({"w": state["w"].bfloat16()} for state in random_states(0, 3))
    for operator in (Mean(), TaskArithmetic(), Ties()):
        assert operator(base, [one, two])["w"].dtype == torch.bfloat16
        with pytest.raises(InvalidInput, match="different names or shapes"):
            operator(base, [one, {"w": torch.ones(3)}])
    with pytest.raises(InvalidInput, match="was changed by several"):
        Layers()(base, [one, two])
    with pytest.raises(InvalidInput, match="density"):
        Ties(density=0)
    with pytest.raises(InvalidInput, match="must be one number for each of 2"):
        Mean(("a", "b"))(base, [one, two])  # type: ignore[arg-type]
    small = {"w": one["w"].to(torch.float8_e4m3fn)}
    for operator in (TaskArithmetic(), Ties()):
        assert operator(small, [small, small])["w"].float().equal(small["w"].float())
        for other in ({}, {"w": torch.ones(1)}):  # a base that would be broadcast
            with pytest.raises(InvalidInput, match="different names or shapes"):
                operator(other, [one, two])


# -- structure --


def test_the_flow_of_data_is_traced_through_operations_and_branches() -> None:
    graph = flow(TwoHeads())
    assert set(graph.edges) == {("body", "left"), ("body", "right")}
    assert graph.graph["traced"]
    assert connected(graph, ["left"], ["right"]) == []
    assert connected(graph, ["right"], ["body"]) == [("body", "right")]


def test_layers_written_by_hand_see_what_they_are_given() -> None:
    class Own(nn.Module):
        def __init__(self, plain: bool) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))
            self.second = nn.Linear(3, 3)
            self.plain = plain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = torch.exp(self.scale) * 2  # of the module's own tensors only
            x = self.first(x)
            return self.second(x if self.plain else x * weight)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rsqrt(x.pow(2).mean()) * x * self.weight + self.bias

    assert set(flow(Own(plain=False)).edges) == {("first", ""), ("", "second")}
    assert set(flow(Own(plain=True)).edges) == {("first", "second")}
    assert set(flow(nn.Sequential(nn.Linear(3, 3), Normed(), nn.Linear(3, 3))).edges) == {("0", "1"), ("1", "2")}


def test_what_cannot_be_traced_is_a_chain() -> None:
    class Unruly(TwoHeads):
        def forward(self, x: torch.Tensor) -> Any:
            return self.left(self.body(x)) if x.sum() > 0 else self.right(self.body(x))

    graph = flow(Unruly())
    assert not graph.graph["traced"]
    assert nx.has_path(graph, "left", "right")


def test_the_structure_diff_shows_settings_layers_and_connections() -> None:
    wide = diff_structure(flow(TwoHeads()), flow(TwoHeads(8)))
    assert wide.divergence == 1.0
    assert {sign for sign, *_ in wide.lines} == {"-", "+"}

    class Chained(TwoHeads):
        def forward(self, x: torch.Tensor) -> Any:
            x = self.left(torch.relu(self.body(x)))
            return self.right(torch.cat([x, x], 1))

    chained = diff_structure(flow(TwoHeads()), flow(Chained()))
    assert ("-", "body", "right") in chained.connections
    assert ("+", "left", "right") in chained.connections
    assert diff_structure(flow(TwoHeads()), flow(TwoHeads())).divergence == 0.0
    strided = diff_structure(flow(nn.Sequential(nn.Conv2d(1, 2, 3))), flow(nn.Sequential(nn.Conv2d(1, 2, 3, stride=2))))
    assert strided.divergence == 1.0


# -- diff --


def test_the_tensor_diff_measures_what_numpy_does() -> None:
    generator = torch.Generator().manual_seed(0)
    a = {"w": torch.randn(20, 30, generator=generator), "b": torch.randn(30, generator=generator)}
    low = 0.1 * torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    b = {"w": a["w"] + low, "b": a["b"].clone()}
    b["b"][:15] += 1
    rows = {row["name"]: row for row in diff_tensors(a, b).iter_rows(named=True)}
    x, y = a["w"].double().numpy(), b["w"].double().numpy()
    assert rows["w"]["delta"] == pytest.approx(np.linalg.norm(y - x))
    assert rows["w"]["relative"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert rows["w"]["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert rows["w"]["rank"] == 2
    assert (rows["b"]["unchanged"], rows["b"]["rank"]) == (0.5, None)


def test_complex_and_empty_tensors_are_compared() -> None:
    a, b = torch.tensor([1 + 1j, 2 + 0j]), torch.tensor([1 + 5j, 2 + 0j])
    row = diff_tensors({"w": a}, {"w": b}).row(0, named=True)
    x, y = a.numpy(), b.numpy()
    assert row["delta"] == np.linalg.norm(y - x) and row["unchanged"] == 0.5
    assert np.isclose(row["cosine"], np.vdot(x, y).real / np.linalg.norm(x) / np.linalg.norm(y))
    for shape in ((0, 3), (3, 0), (0,)):
        empty = torch.zeros(shape)
        assert diff_tensors({"w": empty}, {"w": empty.double()})["change"].to_list() == ["retyped"]


def test_every_kind_of_change_is_told() -> None:
    same = torch.randn(3)
    a = {
        "same": same,
        "old": torch.ones(2, 2),
        "gone": torch.zeros(5),
        "type": torch.ones(2),
        "shape": torch.ones(2),
        "empty": torch.empty(0),
    }
    b = {
        "same": same.clone(),
        "new": torch.ones(2, 2),
        "more": torch.zeros(6),
        "type": torch.ones(2).half(),
        "shape": torch.ones(3),
        "empty": torch.empty(0),
    }
    found = dict(diff_tensors(a, b).select("name", "change").iter_rows())
    assert found == {
        "same": "same",
        "old -> new": "renamed",
        "gone": "removed",
        "more": "added",
        "type": "retyped",
        "shape": "reshaped",
        "empty": "same",
    }


def test_models_are_compared_with_their_scores(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset))
    first, last = run.trained[0].model, run.trained[-1].model
    ws.lineage.register(lambda state: float(state["0.weight"].sum()), name="sum")
    ws.lineage.test([first, last])
    diff = ws.lineage.diff(first, last, modules=(make_model(), make_model()))
    scores = {row["name"]: row for row in diff.scores.iter_rows(named=True)}
    matrix = run.matrix().filter(metric="accuracy")
    for column, model in (("a", first), ("b", last)):
        assert scores["accuracy"][column] == pytest.approx(matrix.filter(model=model)["value"].mean())
        assert scores["sum"][column] == pytest.approx(float(ws.models.load(model)["0.weight"].sum()))
    assert diff.layers == ["0", "2"]
    assert diff.structure is not None and diff.structure.divergence == 0
    assert "4 changed" in repr(diff) and "accuracy" in diff._repr_html_()


def test_a_merge_that_gives_its_base_again_leaves_the_base_the_base(ws: dk.Workspace) -> None:
    base = ws.lineage.add({"w": torch.ones(4)})
    left, right = (ws.lineage.add({"w": torch.ones(4) + change}, parents=[base]) for change in (0.5, -0.5))
    before = repr(ws.lineage.merge(left, right))
    assert ws.lineage.merge(left, right, operator=dk.lineage.Mean()).model == base
    assert ws.lineage.common_ancestor(left, right) == base
    assert repr(ws.lineage.merge(left, right)) == before
