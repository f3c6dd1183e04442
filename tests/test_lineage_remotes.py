"""Workspaces that share models: only what is missing travels, histories unite, names move by compare-and-swap."""

from pathlib import Path

import pytest
import torch
from streams import make_frame, make_pipeline, replayed

import dynkit as dk
from dynkit.errors import Conflict, InvalidInput, NotFound
from dynkit.lineage import Mean


def big(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"body": torch.randn(100, 100, generator=generator), "head": torch.randn(10, generator=generator)}


@pytest.fixture
def shared(tmp_path: Path) -> dk.Workspace:
    ws = dk.Workspace(tmp_path / "shared")
    base = ws.lineage.add(big(0), name="main", tags=["x"], note="start")
    ws.lineage.add({**big(0), "head": torch.zeros(10)}, parents=[base], name="side")
    return ws


def edges(ws: dk.Workspace) -> set[tuple[str, str, str]]:
    return set(ws.lineage.to_networkx().edges(keys=True))


def test_a_clone_has_all_models_with_what_belongs_to_them(shared: dk.Workspace, tmp_path: Path) -> None:
    shared.lineage.register(lambda state: float(state["head"].sum()), name="sum")
    shared.lineage.test()
    mine = dk.Workspace.clone(shared.path, tmp_path / "mine")
    assert edges(mine) == edges(shared)
    for name in ("main", "side"):
        model = shared.models.resolve(name)
        assert mine.models.resolve(name) == mine.models.resolve(f"origin/{name}") == model
        ours, theirs = mine.models.load(model), shared.models.load(model)
        assert all(ours[key].equal(theirs[key]) for key in theirs)
        a, b = mine.lineage.show(model), shared.lineage.show(model)
        assert (a.created_ns, a.tags, a.notes, str(a.origins[0])) == (b.created_ns, b.tags, b.notes, str(b.origins[0]))
    assert all(one.remembered for one in mine.lineage.test(tests="sum"))
    assert mine.models.fsck(deep=True) == []


def test_only_what_is_missing_travels(shared: dk.Workspace, tmp_path: Path) -> None:
    mine = dk.Workspace.clone(shared.path, tmp_path / "mine")
    again = mine.lineage.pull()
    assert (again.models, again.size_bytes, again.edges, again.names) == ((), 0, 0, {})
    child = mine.lineage.add({**big(0), "head": torch.ones(10)}, parents=["main"], name="mine")
    mine.lineage.add(big(7), name="private")
    pushed = mine.lineage.push(models="mine")
    assert pushed.models == (child,)
    assert pushed.size_bytes == 40  # the head; the body is there
    assert pushed.known == 1 and pushed.edges == 1
    assert pushed.names == {"mine": (None, child)}
    assert "1 models, 40 B of tensors" in repr(pushed) and "moved" in pushed._repr_html_()
    assert shared.lineage.ancestors("mine") == {shared.models.resolve("main")}
    with pytest.raises(NotFound):
        shared.models.resolve("private")


def test_a_name_moves_on_but_never_away_from_work_that_is_not_here(shared: dk.Workspace, tmp_path: Path) -> None:
    a, b = (dk.Workspace.clone(shared.path, tmp_path / name) for name in "ab")
    base = shared.models.resolve("main")
    ours, theirs = (
        ws.lineage.add({**big(0), "head": torch.full((10,), value)}, parents=["main"], version_of="main")
        for ws, value in ((a, 1.0), (b, 2.0))
    )
    a.lineage.name(ours, "main", instead_of=base)
    b.lineage.name(theirs, "main", instead_of=base)
    assert a.lineage.push().names == {"main": (base, ours)}
    late = b.lineage.push()
    assert (late.names, late.rejected) == ({}, {"main": (ours, theirs)})
    assert "went apart" in repr(late)
    assert shared.models.resolve("main") == ours
    assert theirs in {entry.model for entry in shared.lineage.log()}  # the graph is united all the same
    pulled = b.lineage.pull()
    assert b.models.resolve("main") == theirs and b.models.resolve("origin/main") == ours
    assert pulled.rejected == {"main": (theirs, ours)}
    merged = b.lineage.merge("main", "origin/main", operator=Mean(), name="main").model
    assert b.lineage.push().names == {"main": (ours, merged)}
    assert a.lineage.pull().names["main"] == (ours, merged)
    assert edges(a) == edges(b) == edges(shared)
    behind = dk.Workspace(tmp_path / "b").lineage.push()
    assert behind.names == behind.rejected == {}


def test_models_of_runs_tell_where_they_come_from(ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path) -> None:
    run = replayed(make_pipeline(dataset))
    mine = dk.Workspace.clone(ws.path, tmp_path / "mine")
    model = run.trained[2].model
    (origin,) = mine.lineage.show(model).origins
    assert origin.how == "pulled" and origin.parents == (run.trained[1].model,)
    assert f"trained by run {run.id} at trigger 2" in str(origin)
    assert origin.recipe["pipeline"]["trigger"] == {"amount": {"n": 500}}
    assert mine.lineage.ancestors(model) == ws.lineage.ancestors(model)
    ws.lineage.add_remote("copy", mine.path)
    ws.lineage.pull("copy")
    assert [one.how for one in ws.lineage.show(model).origins] == ["trained"]  # nothing that is told comes back


def test_a_function_that_made_a_model_travels_with_it(shared: dk.Workspace, tmp_path: Path) -> None:
    made = shared.lineage.add(lambda state: {"body": state["body"] * 2}, parents=["main"], name="made")
    mine = dk.Workspace.clone(shared.path, tmp_path / "mine")
    new = mine.lineage.add(big(3), version_of="main")
    done = mine.lineage.cascade("main", new, dry_run=False)
    assert mine.models.load(done.rebuilt[made])["body"].equal(big(3)["body"] * 2)


def test_metadata_names_with_slashes_and_every_origin_travel(shared: dk.Workspace, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(big(5), tmp_path / "own.safetensors", {"license": "MIT"})
    model = shared.lineage.add(tmp_path / "own.safetensors", name="team/own", how="from the hub")
    shared.lineage.add(big(5), how="from a colleague")
    shared.lineage.add_remote("other", shared.path)
    shared.lineage.name(model, "other/own")  # as a pull from there would call it
    mine = dk.Workspace.clone(shared.path, tmp_path / "mine")
    assert mine.models.metadata(model) == {"license": "MIT"}
    assert mine.models.resolve("team/own") == mine.models.resolve("origin/team/own") == model
    assert "other/own" not in mine.models.names()
    assert [str(one) for one in mine.lineage.show(model).origins] == ["added: from the hub", "added: from a colleague"]


def test_a_test_whose_dataset_is_elsewhere_could_not_run(shared: dk.Workspace, tmp_path: Path) -> None:
    shared.ingest("stream", make_frame(10), timestamp="when", label="late")
    shared.lineage.register(lambda state, samples: True, name="on data", dataset="stream")
    shared.lineage.register(lambda state: True, name="plain")
    mine = dk.Workspace.clone(shared.path, tmp_path / "mine")
    report = mine.lineage.test()
    assert {one.test for one in report if one.passed} == {"plain"}
    assert all("no dataset 'stream'" in str(one.error) for one in report if one.test == "on data")


def test_a_clone_goes_on_but_takes_no_other_workspace(shared: dk.Workspace, tmp_path: Path) -> None:
    mine = dk.Workspace.clone(shared.path, tmp_path / "mine")
    shared.lineage.add(big(7), name="new")
    assert "new" in dk.Workspace.clone(shared.path, mine.path).models.names()
    dk.Workspace(tmp_path / "third").lineage.add_remote("origin", mine.path)
    for path in (tmp_path / "third", shared.path):
        with pytest.raises(Conflict, match=r"there is a workspace at .* already; pull from"):
            dk.Workspace.clone(shared.path, path)


def test_wrong_remotes_are_refused(shared: dk.Workspace, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no workspace at"):
        shared.lineage.add_remote("origin", tmp_path / "nothing")
    with pytest.raises(NotFound, match="no workspace at"):
        dk.Workspace.clone(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(NotFound, match="add_remote"):
        shared.lineage.push()
    with pytest.raises(InvalidInput, match="without '/'"):
        shared.lineage.add_remote("a/b", shared.path)
    shared.lineage.add_remote("self", shared.path)
    with pytest.raises(Conflict, match="itself"):
        shared.lineage.push("self")
