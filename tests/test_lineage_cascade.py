"""The update cascade: a new version of a model reaches all that was made from the old one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import make_model, make_pipeline, replayed

import dynkit as dk
from dynkit.data import Batches
from dynkit.errors import InvalidInput, NotFound
from dynkit.training import FitContext, fit, seeded

State = dict[str, torch.Tensor]


def combine(*states: State) -> State:
    """Depends on the order of the parents."""
    return {"w": sum((i + 2) * state["w"] for i, state in enumerate(states)) + 0.1}  # type: ignore[dict-item]


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_cascade_equals_the_same_rebuilds_by_hand(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Random graphs of functions of several parents, against evaluating them one by one."""
    ws = dk.Workspace(tmp_path_factory.mktemp("ws"))
    n = data.draw(st.integers(2, 7))
    parents = [sorted(data.draw(st.sets(st.integers(0, i - 1), max_size=3)), reverse=True) for i in range(1, n)]
    rng = np.random.default_rng(0)
    values = [torch.tensor(rng.normal(size=3))]
    ids = [ws.lineage.add({"w": values[0]})]
    for i, above in enumerate(parents, 1):
        if above:
            ids.append(ws.lineage.add(combine, parents=[ids[j] for j in above], how="combined"))
            values.append(combine(*({"w": values[j]} for j in above))["w"])
        else:
            values.append(torch.tensor(rng.normal(size=3)))
            ids.append(ws.lineage.add({"w": values[i]}))
        assert ws.models.load(ids[i])["w"].equal(values[i])
    changed = torch.tensor(rng.normal(size=3))
    new = ws.lineage.add({"w": changed}, version_of=ids[0])
    by_hand = {0: changed}
    for i, above in enumerate(parents, 1):
        if by_hand.keys() & set(above):
            by_hand[i] = combine(*({"w": by_hand.get(j, values[j])} for j in above))["w"]
    planned = ws.lineage.cascade(ids[0], new)
    assert {one.model for one in planned.steps} == {ids[i] for i in by_hand if i} == ws.lineage.descendants(ids[0])
    assert len(ws.lineage.log(None)) == len(set(ids)) + 1
    done = ws.lineage.cascade(ids[0], new, dry_run=False)
    assert done.rebuilt.keys() == {ids[i] for i in by_hand if i}
    for i, value in by_hand.items():
        if i:
            rebuilt = done.rebuilt[ids[i]]
            assert ws.models.load(rebuilt)["w"].equal(value)
            assert ws.lineage.versions(ids[i])[-1] == rebuilt
            assert ws.models.load(ids[i])["w"].equal(values[i])
            above = {done.rebuilt.get(ids[j], new if j == 0 else ids[j]) for j in parents[i - 1]}
            assert set(ws.lineage.show(rebuilt).parents) == above
    again = ws.lineage.cascade(ids[0], new, dry_run=False)
    assert again.rebuilt == done.rebuilt
    for rebuilt in done.rebuilt.values():
        assert len(ws.lineage.show(rebuilt).origins) == 1


def test_trainings_of_a_run_are_done_again_from_the_new_version(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    options = dk.Training(epochs=1, batch_size=64, lr=1e-2, warm_start=True)
    run = replayed(make_pipeline(dataset, training=options))
    models = [one.model for one in run.trained]
    pruned = {name: torch.where(t.abs() < 0.1, 0.0, t) for name, t in ws.models.load(models[2]).items()}
    new = ws.lineage.add(pruned, parents=[models[2]], version_of=models[2], name="pruned")
    done = ws.lineage.cascade(models[2], new, dry_run=False)
    assert [one.model for one in done.steps] == models[3:]
    state, parent = pruned, new
    cpu = torch.device("cpu")
    for index in range(3, 6):
        keys = run.selection(index)["key"].to_numpy().astype(np.int64)
        seed = int(np.random.SeedSequence([3, index]).generate_state(1)[0])
        with seeded(seed):
            model = make_model()
            model.load_state_dict(state)
            batches = Batches(dataset.open(), keys, batch_size=64, device=cpu, shuffle=True, seed=seed, last="join")
            fit(model, batches, FitContext(options, cpu))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        rebuilt = done.rebuilt[models[index]]
        assert all(ws.models.load(rebuilt)[name].equal(value) for name, value in state.items())
        card = ws.lineage.show(rebuilt)
        assert card.parents == (parent,)
        assert (card.origins[0].how, card.origins[0].training) == ("rebuilt", (run.id, index))
        assert card.samples()["key"].to_list() == keys.tolist()
        parent = rebuilt
    assert [one.model for one in run.trained] == models  # the run is as it was
    assert models[3] in ws.lineage.affected_by(run.selection(3)["key"].head(1))
    assert set(done.rebuilt.values()) <= set(ws.lineage.affected_by(run.selection(0)["key"].head(1)))


def test_a_cascade_skips_what_it_is_told_to_and_what_has_no_recipe(ws: dk.Workspace) -> None:
    base = ws.lineage.add({"w": torch.ones(2)})
    a, b = (ws.lineage.add(f, parents=[base]) for f in (lambda s: {"w": s["w"] * 2}, lambda s: {"w": s["w"] * 7}))
    below_a = ws.lineage.add(lambda s: {"w": s["w"] + 1}, parents=[a])
    both = ws.lineage.add(combine, parents=[a, b])
    brought = ws.lineage.add({"w": torch.zeros(2)}, parents=[b])
    new = ws.lineage.add({"w": torch.full((2,), 5.0)}, version_of=base)
    plan = ws.lineage.cascade(base, new, skip=[a])
    assert {one.model: one.action for one in plan.steps} == {
        a: "skip",
        b: "rebuild",
        below_a: "keep",
        both: "rebuild",
        brought: "blocked",
    }
    assert plan.estimated_s > 0 and "Plan to rebuild 2 of 5" in repr(plan) and "blocked" in plan._repr_html_()
    done = ws.lineage.cascade(base, new, skip=lambda model: model == a, dry_run=False)
    assert done.rebuilt.keys() == {b, both}
    assert ws.models.load(done.rebuilt[both])["w"].equal(
        combine({"w": torch.full((2,), 2.0)}, {"w": torch.full((2,), 35.0)})["w"]
    )
    with pytest.raises(InvalidInput, match="same model"):
        ws.lineage.cascade(base, base)
    with pytest.raises(NotFound):
        ws.lineage.cascade(base, "nobody")


def test_names_move_to_versions_that_pass_and_a_failure_stops_there(ws: dk.Workspace) -> None:
    base = ws.lineage.add({"w": torch.ones(2)}, name="base")
    good = ws.lineage.add(lambda s: {"w": s["w"] * 2}, parents=[base], name="good", tags=["small"])
    bad = ws.lineage.add(lambda s: {"w": s["w"] * 10}, parents=[base], name="bad", tags=["small"])
    below = ws.lineage.add(lambda s: {"w": s["w"] + 1}, parents=[bad], name="below")
    ws.lineage.register(lambda s: bool(s["w"].max() < 20), name="limit", tag="small")
    assert ws.lineage.test().passed
    new = ws.lineage.add({"w": torch.full((2,), 5.0)}, version_of=base)
    done = ws.lineage.cascade("base", new, dry_run=False)
    assert {one.model: one.action for one in done.steps} == {good: "rebuild", bad: "rebuild", below: "stop"}
    assert ws.models.resolve("good") == done.rebuilt[good]
    assert ws.models.resolve("bad") == bad
    assert (done.reports[good].passed, done.reports[bad].passed) == (True, False)
    assert ws.lineage.show("good").tags == ("small",)
    assert "failed" in repr(done)
    further = ws.lineage.cascade(base, new, dry_run=False, stop_on_failure=False)
    assert below in further.rebuilt
    assert further.rebuilt.items() > done.rebuilt.items()


def test_an_interrupted_cascade_goes_on_where_it_stopped(ws: dk.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [ws.lineage.add({"w": torch.ones(2)})]
    for _ in range(4):
        models.append(ws.lineage.add(combine, parents=models[-1:]))
    new = ws.lineage.add({"w": torch.full((2,), 5.0)}, version_of=models[0])
    workshop, made = type(ws.lineage._workshop), []
    real = workshop._made

    def third(self: Any, *args: Any) -> Any:
        made.append(args)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(workshop, "_made", third)
    with pytest.raises(KeyboardInterrupt):
        ws.lineage.cascade(models[0], new, dry_run=False)
    assert len(ws.lineage.versions(models[2])) == 2
    done = ws.lineage.cascade(models[0], new, dry_run=False)
    assert len(made) == 3 + 2  # the first two were not made again
    assert len(done.rebuilt) == 4


def test_models_that_were_made_together_are_made_together_again(ws: dk.Workspace, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.write_text("")

    def tasks(state: State, calls: Path = calls) -> dict[str, State]:
        calls.write_text(calls.read_text() + "x")
        body = state["w"] * 2
        return {"a": {"w": body, "head": body[:1]}, "b": {"w": body, "head": body[1:]}}

    base = ws.lineage.add({"w": torch.arange(2.0)})
    group = ws.lineage.add_group(tasks, parents=[base], how="two heads")
    assert group.keys() == {"a", "b"}
    assert "two heads (a)" in str(ws.lineage.show(group["a"]).origins[0])
    new = ws.lineage.add({"w": torch.arange(2.0) + 5}, version_of=base)
    done = ws.lineage.cascade(base, new, dry_run=False)
    assert {name: ws.models.load(done.rebuilt[model])["head"].tolist() for name, model in group.items()} == {
        "a": [10.0],
        "b": [12.0],
    }
    assert calls.read_text() == "xx"  # once for both, each time
    with pytest.raises(InvalidInput, match="mapping of names"):
        ws.lineage.add_group(lambda state: 3, parents=[base])


def test_the_new_version_itself_is_not_rebuilt(ws: dk.Workspace) -> None:
    base = ws.lineage.add({"w": torch.ones(2)})
    new = ws.lineage.add(lambda s: {"w": s["w"] + 3}, parents=[base], version_of=base)
    below_new = ws.lineage.add(lambda s: {"w": s["w"] + 4}, parents=[new])
    child = ws.lineage.add(lambda s: {"w": s["w"] * 2}, parents=[base])
    done = ws.lineage.cascade(base, new, dry_run=False)
    assert done.rebuilt.keys() == {child}
    assert below_new not in {one.model for one in done.steps}
