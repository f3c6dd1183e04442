"""Tests of models: where they apply, what is remembered, bisection and blame."""

import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import polars as pl
import pytest
import torch
from streams import make_frame, make_model, make_pipeline, replayed

import dynkit as dk
from dynkit.errors import InvalidInput, NotFound
from dynkit.lineage.bisection import bisect


def grown(rng: np.random.Generator, n: int, most_parents: int) -> "nx.DiGraph[str]":
    """A random DAG whose last node comes from all: each node has parents among those before it."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_node("0")
    for i in range(1, n):
        for parent in rng.choice(i, size=min(i, int(rng.integers(1, most_parents + 1))), replace=False):
            graph.add_edge(str(parent), str(i))
    return graph


def oracle(broken: set[str], silent: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    return lambda node: None if node in silent else node not in broken


def bound(n: int) -> int:
    """Tests that halving needs at most where nodes have at most two parents: of n suspects 2n/3 stay at the worst."""
    return 0 if n <= 1 else 1 + bound((2 * n + 1) // 3)


def test_bisection_finds_the_planted_fault_on_500_random_graphs_within_the_bound() -> None:
    rng = np.random.default_rng(0)
    excess = []
    for case in range(500):
        n = int(rng.integers(2, 120))
        graph = grown(rng, n, most_parents=2)
        bad = str(rng.integers(1, n))
        line = sorted({bad, *nx.ancestors(graph, bad)}, key=int)
        fault = line[rng.integers(len(line))]
        broken = {fault, *nx.descendants(graph, fault)}
        good = [node for node in graph if node not in broken and rng.random() < 0.1]
        cleared = set(good).union(*(nx.ancestors(graph, node) for node in good))
        asked: list[str] = []

        def passes(node: str, asked: list[str] = asked, broken: set[str] = broken) -> bool:
            asked.append(node)
            return node not in broken

        found = bisect(graph, good, bad, passes)
        suspects = set(line) - cleared
        assert found.first == fault, case
        assert len(asked) == len(set(asked)) == len(found.tested)
        assert len(asked) <= bound(len(suspects))
        assert not {bad, *cleared} & set(asked)
        excess.append(len(asked) - math.log2(len(suspects)))
    assert np.mean(excess) < 0.5


def test_bisection_of_a_chain_needs_log2_tests() -> None:
    for n in (2, 3, 10, 100, 257):
        graph: nx.DiGraph[str] = nx.path_graph([str(i) for i in range(n)], create_using=nx.DiGraph)
        for fault in range(1, n, max(1, n // 20)):
            found = bisect(graph, ["0"], str(n - 1), lambda node, fault=fault: int(node) < fault)
            assert found.first == str(fault)
            assert len(found.tested) <= math.ceil(math.log2(n - 1)) if n > 2 else not found.tested


def test_bisection_goes_around_what_cannot_be_tested() -> None:
    rng = np.random.default_rng(1)
    exact = 0
    for _ in range(200):
        n = int(rng.integers(3, 60))
        graph = grown(rng, n, most_parents=3)
        fault = str(rng.integers(0, n))
        broken = {fault, *nx.descendants(graph, fault)}
        bad = max(broken, key=int)
        silent = {str(node) for node in range(n) if rng.random() < 0.3}
        found = bisect(graph, [], bad, oracle(broken, silent))
        assert fault in found.suspects
        assert found.first in (None, fault)
        assert len({node for node, _ in found.tested}) == len(found.tested)
        if found.first is None:  # nothing that could tell was left out
            assert all(node in silent or node == bad or node in broken for node in found.suspects)
        exact += found.first is not None
    assert exact > 100


def test_bisection_of_several_faults_finds_a_model_that_fails_while_all_its_parents_pass() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        graph = grown(rng, 60, most_parents=2)
        faults = [str(i) for i in rng.integers(0, 60, size=3)]
        broken = set(faults).union(*(nx.descendants(graph, fault) for fault in faults))
        bad = max(broken, key=int)
        found = bisect(graph, [], bad, oracle(broken))
        assert found.first in broken
        assert not broken & set(graph.predecessors(found.first))


def test_a_good_model_that_comes_from_the_bad_one_is_refused() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph([("a", "b")])
    with pytest.raises(InvalidInput, match="swap good and bad"):
        bisect(graph, ["b"], "a", lambda node: True)


def below(limit: float) -> Any:
    return lambda state: bool(state["w"].max() < limit)


def chain(ws: dk.Workspace, n: int) -> list[str]:
    models: list[str] = []
    for i in range(n):
        models.append(
            ws.lineage.add({"w": torch.tensor([float(i)])}, parents=models[-1:], version_of=(models or [None])[-1])
        )
    return models


def test_models_of_a_workspace_are_bisected_and_results_remembered(ws: dk.Workspace) -> None:
    models = chain(ws, 20)
    ws.lineage.register(below(13), name="small")
    with pytest.raises(NotFound, match="no dataset 'nope'"):
        ws.lineage.register(below(13), dataset="nope")
    with pytest.raises(InvalidInput, match="at_least=nan"):
        ws.lineage.register(below(13), at_least=float("nan"))
    found = ws.lineage.bisect("small", models[0], models[-1])
    assert found.first == models[13]
    assert len(found.tested) <= 5
    assert "the first bad model is" in repr(found) and "verdict" in found._repr_html_()
    again = ws.lineage.test([models[12], models[13]], "small")
    assert [(one.passed, one.remembered) for one in again] == [(True, True), (False, True)]  # both were needed
    assert ws.lineage.bisect(below(4), [models[1], models[2]], models[9]).first == models[4]
    odd = ws.lineage.bisect(lambda state: None if state["w"] in (2, 3) else bool(state["w"] < 3), [], models[5])
    assert odd.first is None and set(odd.suspects) == set(models[2:5])
    assert "cannot be told apart" in repr(odd)


def test_tests_apply_by_model_name_pattern_and_tag(ws: dk.Workspace) -> None:
    a = ws.lineage.add({"w": torch.tensor([1.0])}, name="text-a", tags=["text"])
    b = ws.lineage.add({"w": torch.tensor([2.0])}, name="text-b")
    c = ws.lineage.add({"w": torch.tensor([3.0])}, name="image")
    ws.lineage.register(below(2.5), name="by-pattern", pattern="text-*")
    ws.lineage.register(below(0.5), name="by-tag", tag="text")
    ws.lineage.register(below(9), name="by-model", models=["image"])
    ws.lineage.register(lambda state: float(state["w"].sum()), name="everywhere", at_least=2)
    report = ws.lineage.test()
    assert {(one.model, one.test, one.passed) for one in report} == {
        (a, "by-pattern", True),
        (b, "by-pattern", True),
        (a, "by-tag", False),
        (c, "by-model", True),
        (a, "everywhere", False),
        (b, "everywhere", True),
        (c, "everywhere", True),
    }
    assert not report.passed
    assert "failed 1" in repr(report) and "2 failed" in repr(report)
    assert [one.test for one in ws.lineage.test("image")] == ["by-model", "everywhere"]
    assert [one.test for one in ws.lineage.test(["image", a], "by-tag")] == ["by-tag", "by-tag"]
    with pytest.raises(NotFound, match="did you mean 'by-tag'"):
        ws.lineage.test(a, "by-tags")
    with pytest.raises(InvalidInput, match="is no test"):
        ws.lineage.register(3)  # type: ignore[arg-type]
    assert ws.lineage.show(b).tests["value"].to_list() == [None, 2.0]


def test_results_are_remembered_by_model_code_and_data(ws: dk.Workspace, tmp_path: Path) -> None:
    model = ws.lineage.add({"w": torch.ones(2)})
    dataset = ws.ingest("stream", make_frame(50), timestamp="when", label="late")
    calls = tmp_path / "calls"
    calls.write_text("")

    def count(state: Any, samples: dk.Dataset, calls: Path = calls) -> int:
        calls.write_text(calls.read_text() + "x")
        return len(samples)

    ws.lineage.register(count, dataset="stream", at_least=60)
    results = [ws.lineage.test()[0] for _ in range(2)]
    assert [(one.passed, one.value, one.remembered) for one in results] == [(False, 50.0, False), (False, 50.0, True)]
    dataset.append(make_frame(10, seed=1))
    assert ws.lineage.test()[0].passed
    assert len(calls.read_text()) == 2
    ws.lineage.register(count, dataset="stream", at_least=61)  # other code
    assert ws.lineage.test()[0].passed is False
    assert len(calls.read_text()) == 3
    assert ws.lineage.show(model).tests.rows() == [("count", False, 60.0, 2)]  # of the code now


def test_a_test_that_breaks_is_reported_and_not_remembered(ws: dk.Workspace) -> None:
    ws.lineage.add({"w": torch.ones(2)})
    ws.lineage.register(lambda state: state["missing"], name="broken")
    ws.lineage.register(lambda state: float("nan"), name="unknown")
    for _ in range(2):
        report = ws.lineage.test()
        broken, unknown = report
        assert (broken.passed, broken.remembered) == (None, False)
        assert broken.error == "broken: KeyError: 'missing'"
        assert (unknown.passed, unknown.error) == (None, None)
        assert not report.passed


def test_what_a_test_says_counts_as_it_is_meant(ws: dk.Workspace) -> None:
    base = ws.lineage.add({"w": torch.ones(2)}, name="base")
    child = ws.lineage.add(lambda state: {"w": state["w"] * 200}, parents="base", name="child")
    ws.lineage.register(lambda state: (state["w"] < 100).all(), name="small")  # a tensor
    ws.lineage.register(lambda state: float("nan"), name="nan", at_least=0.5, models="child")
    ws.lineage.register(lambda state: False, name="nowhere", models=[])
    report = ws.lineage.test()
    said = {(one.model, one.test): one.passed for one in report}
    assert said == {(base, "small"): True, (child, "small"): False, (child, "nan"): False}
    for options in ({"at_least": "0.9"}, {"tag": ["x"]}, {"pattern": 5}):
        with pytest.raises(InvalidInput, match="must be"):
            ws.lineage.register(lambda state: True, name="wrong", **options)  # type: ignore[arg-type]
    assert len(ws.lineage.test()) == 3


def test_what_breaks_while_looking_for_a_fault_is_told(ws: dk.Workspace) -> None:
    base = ws.lineage.add({"w": torch.ones(2)})
    middle, last = (ws.lineage.add({"w": torch.full((2,), value)}, parents=[base]) for value in (2.0, 3.0))
    ws.lineage.add({"w": torch.full((2,), 3.0)}, parents=[middle])
    found = ws.lineage.bisect(lambda state: state["typo"], [], last)
    assert found.first is None
    assert "the test broke 2 times: <lambda>: KeyError: 'typo'" in repr(found)
    with pytest.raises(InvalidInput, match=r"measures; say what passes: register it with at_least="):
        ws.lineage.bisect(lambda state: 0.3, base, last)
    with pytest.raises(InvalidInput, match="broke: <lambda>: KeyError: 'typo'"):
        ws.lineage.blame(lambda state: state["typo"], last)


def poisoned(n: int = 1500, keys: range = range(640, 700)) -> pl.DataFrame:
    """The stream with some labels turned and features made large, which spoils what is trained on them."""
    bad = pl.int_range(pl.len()).is_in(list(keys))
    return make_frame(n).with_columns(
        late=pl.when(bad).then(1 - pl.col("late")).otherwise(pl.col("late")),
        a=pl.when(bad).then(pl.col("a") * 50).otherwise(pl.col("a")),
        b=pl.when(bad).then(pl.col("b") * 50).otherwise(pl.col("b")),
    )


def test_blame_finds_the_upstream_model_and_the_samples(ws: dk.Workspace) -> None:
    dataset = ws.ingest("stream", poisoned(), timestamp="when", label="late")
    training = dk.Training(epochs=2, batch_size=32, lr=1e-2, warm_start=True)
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=training))
    first, second, third = (one.model for one in run.trained)
    clean = make_frame(500, seed=9)
    x = torch.tensor(clean.select("a", "b", "c").to_numpy(), dtype=torch.float32)
    y = torch.tensor(clean["late"].to_numpy())

    def accuracy(state: dict[str, torch.Tensor], x: torch.Tensor = x, y: torch.Tensor = y) -> float:
        model = make_model()
        model.load_state_dict(state)
        return float((model(x).argmax(1) == y).float().mean())

    scores = [accuracy(ws.models.load(model)) for model in (first, second, third)]
    limit = (scores[0] + scores[1]) / 2
    assert scores[0] - scores[1] > 0.05, scores
    ws.lineage.register(accuracy, at_least=limit)
    found = ws.lineage.bisect("accuracy", first, second)
    assert found.first == second
    blame = ws.lineage.blame("accuracy", second)
    assert blame.parents == ((first, True),)
    assert blame.upstream == ()
    assert blame.new.tolist() == list(range(500, 1000))
    poison = set(range(640, 700))
    assert poison & set(blame.samples.tolist())
    assert len(blame.samples) <= 250
    assert 1 <= blame.trainings <= 20
    assert "new samples it passes" in repr(blame)
    if scores[2] < limit:
        assert ws.lineage.blame("accuracy", third).upstream == (second,)
    with pytest.raises(InvalidInput, match="nothing is to blame"):
        ws.lineage.blame("accuracy", first)
    assert len(ws.lineage.log()) == 3  # what was tried is not kept
