"""Erasure: which models learned from samples, and that afterwards nothing of them is left."""

import datetime as dt
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
import torch
from streams import START, make_frame, make_model, make_pipeline, replayed
from torch import nn

import dynkit as dk
from dynkit.catalog import origins, packs
from dynkit.data import Batches
from dynkit.errors import Conflict, InvalidInput, NotFound
from dynkit.lineage import erasure
from dynkit.models.reading import Reader
from dynkit.models.shelf import Shelf
from dynkit.training import FitContext, fit, seeded
from dynkit.training.train import Task, train

SECRET = np.array([1.2345678, -7.6543210, 3.1415927], np.float32)  # features of the samples to erase
ERASED = [120, 121, 700, 1234]
TRAINING = {"epochs": 1, "batch_size": 64, "lr": 1e-2}


@pytest.fixture
def dataset(ws: dk.Workspace) -> dk.Dataset:
    """The stream of the other tests, with recognisable features of the samples to erase."""
    frame = make_frame(1500)
    row = pl.int_range(pl.len()).is_in(ERASED)
    columns = [
        pl.when(row).then(float(value)).otherwise(pl.col(name)).alias(name)
        for name, value in zip("abc", SECRET, strict=True)
    ]
    return ws.ingest("stream", frame.with_columns(columns), timestamp="when", label="late")


def brute_force(ws: dk.Workspace, keys: list[int]) -> set[str]:
    """Affected models from the stored selections and the edges, one at a time."""
    affected = {
        one.model
        for run in ws.runs()
        for one in run.trained
        if set(keys) & set(run.selection(one.index)["key"].to_list())
    }
    edges = [(a, b) for a, b, kind in ws.lineage.to_networkx().edges(keys=True) if kind == "derived"]
    while new := {b for a, b in edges if a in affected} - affected:
        affected |= new
    return affected


def by_hand(dataset: dk.Dataset, run: dk.Run, *, warm: bool, validation: float = 0.0) -> Iterator[dict[str, Any]]:
    """Train from scratch what a run's stored selections say, without the erased samples."""
    state = None
    training = dk.Training(**TRAINING, validation=validation)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    for one in run.trained:
        selection = run.selection(one.index).filter(~pl.col("key").is_in(ERASED))
        keys = selection["key"].to_numpy().astype(np.int64)
        weights = selection["weight"].to_numpy(writable=True) if "weight" in selection.columns else None
        seed = int(np.random.SeedSequence([3, one.index]).generate_state(1)[0])
        held_out = None
        if validation:
            order = np.random.default_rng(seed).permutation(len(keys))
            n = int(validation * len(keys))
            held_out, keys = keys[order[:n]], keys[np.sort(order[n:])]
        with seeded(seed):
            model = make_model()
            if warm and state is not None:
                model.load_state_dict(state)
            version = dataset.open()
            batches = Batches(
                version, keys, weights=weights, batch_size=64, device=cpu, shuffle=True, seed=seed, last="join"
            )
            judge = None if held_out is None else Batches(version, held_out, batch_size=64, device=cpu)
            fit(model, batches, FitContext(training, cpu, judge))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        yield state


def weighted(pool: pl.DataFrame, run: Any, rng: np.random.Generator) -> pl.DataFrame:
    return pool.select("key", weight=pl.col("key") % 3 + 0.5)


def found_in(folder: Path, pattern: bytes) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and pattern in path.read_bytes()]


def test_the_affected_models_are_those_of_a_brute_force_search(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    replayed(make_pipeline(dataset, name="warm"))
    replayed(make_pipeline(dataset, name="warm-again"))
    replayed(make_pipeline(dataset, name="fresh", selection=dk.selection.New(), training=dk.Training(**TRAINING)))
    held = dk.Training(**TRAINING, validation=0.5)
    replayed(make_pipeline(dataset, name="held", selection=dk.selection.New(), training=held))
    for keys in ([120], [1234], ERASED, [1499], list(range(500))):
        affected = ws.lineage.affected_by(keys)
        assert set(affected) == brute_force(ws, keys)
        assert len(affected) == len(set(affected))
    new = ws.lineage.affected_by([700])
    fresh, held_run = (ws.runs(name)[0] for name in ("fresh", "held"))
    assert fresh.trained[1].model in new.direct and fresh.trained[0].model not in new
    assert held_run.trained[1].model in new.direct  # a validation sample decides, too
    assert "learned from these 1 samples of stream" in repr(new)
    assert "through ancestors" in new._repr_html_()


@pytest.mark.parametrize("case", ["warm", "fresh", "validation", "weights"])
def test_rebuilt_models_equal_training_from_scratch_and_nothing_is_left(
    ws: dk.Workspace, dataset: dk.Dataset, case: str
) -> None:
    warm = case != "fresh"
    validation = 0.3 if case == "validation" else 0.0
    run = replayed(
        make_pipeline(
            dataset,
            selection=weighted
            if case == "weights"
            else dk.selection.Random(fraction=0.9)
            if case == "warm"
            else dk.selection.New(),
            training=dk.Training(**TRAINING, warm_start=warm, validation=validation),  # type: ignore[arg-type]
        )
    )
    expected = list(by_hand(dataset.at(1), run, warm=warm, validation=validation))
    before = [one.model for one in run.trained]
    affected = set(ws.lineage.affected_by(ERASED))
    assert affected == brute_force(ws, ERASED)
    old_states = {model: ws.models.load(model) for model in before}
    ws.lineage.name(before[-1], "best")
    ws.lineage.note(before[-1], "keep", tags=["production"])
    assert found_in(ws.path, SECRET.tobytes())

    planned = ws.lineage.erase(ERASED)
    assert not planned.done and "dry run" in repr(planned) and len(planned.origins) == len(affected)
    assert [one.model for one in run.trained] == before  # nothing has changed
    report = ws.lineage.erase(ERASED, dry_run=False)

    assert report.done, report
    after = [one.model for one in run.trained]
    for model, state in zip(after, expected, strict=True):
        stored = ws.models.load(model)
        assert all(stored[name].equal(value) for name, value in state.items())
    assert {old for old, new in zip(before, after, strict=True) if old != new} == affected == set(report.removed)
    assert ws.models.resolve("best") == after[-1]
    card = ws.lineage.show("best")
    assert (card.tags, card.notes) == (("production",), ("keep",))
    assert ws.lineage.ancestors(after[-1]) == (set(after[:-1]) if warm else set())
    assert ws.lineage.versions(after[0]) == after
    assert not found_in(ws.path, SECRET.tobytes())
    for model in affected:
        for name, tensor in old_states[model].items():
            if not any(tensor.equal(ws.models.load(new)[name]) for new in after):
                assert not found_in(ws.path, tensor.numpy().tobytes())
        assert not found_in(ws.path / "models", model.encode())
    matrix = run.matrix()
    assert set(matrix["model"]) == set(after)
    assert run.composite().height
    assert not set(run.selection(1)["key"]) & set(ERASED)
    assert run.events()[-1].kind == "erased"
    assert len(ws.dataset("stream")) == 1496
    assert len(ws.lineage.affected_by(ERASED)) == 0
    assert report._repr_html_()


def test_models_of_people_and_merges_are_made_anew_too(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=dk.Training(**TRAINING)))
    first, second, third = (one.model for one in run.trained)
    halved = ws.lineage.add(lambda state: {n: t / 2 for n, t in state.items()}, parents=[second], name="halved")
    clean = ws.lineage.add({"w": torch.ones(3)}, name="clean")
    report = ws.lineage.erase([700], dry_run=False)
    assert report.done
    assert set(report.removed) == {second, halved}
    new = run.trained[1].model
    assert [one.model for one in run.trained] == [first, new, third]
    expected = {name: tensor / 2 for name, tensor in ws.models.load(new).items()}
    made = ws.models.load("halved" if "halved" in expected else ws.models.resolve("halved"))
    assert all(made[name].equal(tensor) for name, tensor in expected.items())
    assert ws.lineage.ancestors("halved") == {new}
    assert ws.models.resolve("clean") == clean


def test_a_model_without_a_recipe_is_removed_only_when_asked_to(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=dk.Training(**TRAINING)))
    second = run.trained[1].model
    brought = ws.lineage.add({"w": torch.ones(3)}, parents=[second], name="brought")
    above = ws.lineage.add(lambda state: {"w": state["w"] + 1}, parents=[brought])
    plan = ws.lineage.erase([700])
    assert set(plan.blocked) == {brought, above}
    before = ws.lineage.to_networkx()
    with pytest.raises(Conflict, match="2 affected models have no recipe"):
        ws.lineage.erase([700], dry_run=False)
    assert ws.lineage.to_networkx().adj == before.adj
    report = ws.lineage.erase([700], dry_run=False, drop=True)
    assert report.done
    assert set(report.removed) == {second, brought, above}
    assert not ws.lineage.search("brought")


def wide_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 256), nn.ReLU(), nn.Linear(256, 2))


def test_what_is_stored_as_a_difference_from_a_tainted_tensor_is_stored_anew(
    ws: dk.Workspace, dataset: dk.Dataset
) -> None:
    """A clean model, near to a tainted one of which its parent is the next version."""
    options = dk.Training(**TRAINING)  # type: ignore[arg-type]
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=options, model=wide_model))
    tainted = ws.models.load(run.trained[1].model)
    torch.manual_seed(5)
    parent = ws.lineage.add(wide_model(), version_of=run.trained[1].model)
    near = {name: t + 1e-4 * torch.randn(t.shape) for name, t in tainted.items()}
    clean = ws.lineage.add(near, parents=[parent])
    with ws.catalog.read() as connection:
        ids = list(connection.scalars(sa.select(packs.c.id)))
    with Reader(Shelf(ws.catalog)) as reader:
        reader.prepare(ids)
        frames = [frame for id in ids for frame in reader.pack(id).frames if frame is not None]
        based = {reader.frame(base).id.hex() for frame in frames for base in frame.bases}
    assert based & set(ws.models.manifest(run.trained[1].model).values())
    report = ws.lineage.erase([700], dry_run=False)
    assert report.done, report
    assert all(ws.models.load(clean)[name].equal(tensor) for name, tensor in near.items())
    assert ws.models.fsck(deep=True) == []


def with_optimizer(dataset: dk.Dataset, run: dk.Run, erased: list[int]) -> Iterator[dict[str, Any]]:
    """As `by_hand`, where each training goes on with the optimizer of the one before."""
    training = dk.Training(**TRAINING, warm_start=True, carry_optimizer=True)  # type: ignore[arg-type]
    state, carried = None, None
    for one in run.trained:
        keys = run.selection(one.index).filter(~pl.col("key").is_in(erased))["key"].to_numpy(writable=True)
        seed = int(np.random.SeedSequence([3, one.index]).generate_state(1)[0])
        with seeded(seed):
            model = make_model()
            if state is not None:
                model.load_state_dict(state)
            task = Task(training, seed, keys.astype(np.int64), carried=carried)
            carried = train(model, dataset.open(), task, device=torch.device("cpu")).carried
        state = {name: value.clone() for name, value in model.state_dict().items()}
        yield state


def test_an_optimizer_that_is_handed_on_is_made_anew_too(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    """Also the one of the last clean training, which nothing has kept."""
    training = dk.Training(**TRAINING, warm_start=True, carry_optimizer=True)  # type: ignore[arg-type]
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=training))
    everything, expected = (list(with_optimizer(dataset.at(1), run, erased)) for erased in ([], [700]))
    assert all(ws.models.load(run.trained[2].model)[name].equal(value) for name, value in everything[2].items())
    assert any((run.folder / "training").iterdir())
    report = ws.lineage.erase([700], dry_run=False)
    assert report.done and len(report.removed) == 2
    for one, state in zip(run.trained, expected, strict=True):
        stored = ws.models.load(one.model)
        assert all(stored[name].equal(value) for name, value in state.items())
    assert not (run.folder / "training").exists()


def test_a_training_without_any_samples_left_is_undone(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    training = dk.Training(**TRAINING, warm_start=True)
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=training))
    first, second, _ = run.trained
    report = ws.lineage.erase(range(500, 1000), dry_run=False)
    assert report.done
    assert report.rebuilt[second.model] is None
    assert [one.index for one in run.trained] == [0, 2]
    assert ws.lineage.ancestors(run.trained[1].model) == {first.model}
    assert run.selection(2).height == 500
    assert set(run.matrix()["model"]) == {one.model for one in run.trained}


@pytest.mark.parametrize("step", ["_judge", "replace_models", "rewrite_selections", "free", "_checks", "_rebuild"])
def test_an_interrupted_erasure_is_completed_by_asking_again(
    ws: dk.Workspace, dataset: dk.Dataset, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut is an exception that nothing handles: before a step, and after the second model was rebuilt."""
    run = replayed(make_pipeline(dataset, training=dk.Training(**TRAINING, warm_start=True)))
    expected = list(by_hand(dataset.at(1), run, warm=True))

    class PowerCut(BaseException):
        pass

    def cut(*args: Any, **kwargs: Any) -> Any:
        raise PowerCut

    with monkeypatch.context() as patch:
        if step == "_rebuild":
            real, calls = type(ws.lineage._workshop)._remember, []

            def second(self: Any, *args: Any) -> Any:
                calls.append(args)
                return real(self, *args) if len(calls) < 2 else cut()

            patch.setattr(type(ws.lineage._workshop), "_remember", second)
        else:
            patch.setattr(erasure, step, cut)
        with pytest.raises(PowerCut):
            ws.lineage.erase(ERASED, dry_run=False)
    report = dk.Workspace(ws.path).lineage.erase(ERASED, dry_run=False)
    assert report.done
    for one, state in zip(run.trained, expected, strict=True):
        stored = ws.models.load(one.model)
        assert all(stored[name].equal(value) for name, value in state.items())
    assert not found_in(ws.path, SECRET.tobytes())


def test_samples_are_erased_twice_in_a_row(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    """The second time, the version that the run was trained on is gone."""
    run = replayed(make_pipeline(dataset, training=dk.Training(**TRAINING, warm_start=True)))
    expected = list(by_hand(dataset.at(1), run, warm=True))
    for keys in (ERASED[:2], ERASED[2:]):
        assert ws.lineage.erase(keys, dry_run=False).done
    for one, state in zip(run.trained, expected, strict=True):
        stored = ws.models.load(one.model)
        assert all(stored[name].equal(value) for name, value in state.items())


def test_a_rebuild_has_the_threads_and_folder_of_its_run(
    ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of threads can change the last bits."""
    seen = tmp_path / "seen"
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")

    def noting(model: nn.Module, batches: Batches, context: FitContext, seen: Path = seen) -> None:
        with seen.open("a") as file:
            file.write(f"{torch.get_num_threads()} {Path.cwd().name}\n")
        fit(model, batches, context)

    replayed(make_pipeline(dataset, training=dk.Training(**TRAINING, fit=noting)))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    assert ws.lineage.erase(ERASED, dry_run=False).done
    lines = seen.read_text().splitlines()
    assert len(lines) > 4 and set(lines) == {"1 home"}
    assert (torch.get_num_threads(), Path.cwd()) == (2, tmp_path)


def test_models_of_a_live_run_are_made_anew_from_the_versions_that_they_saw(
    ws: dk.Workspace, dataset: dk.Dataset
) -> None:
    options = dk.Training(**TRAINING, warm_start=True)  # type: ignore[arg-type]
    run = make_pipeline(dataset, selection=dk.selection.New(), training=options).start(live=True)
    deadline = time.monotonic() + 120
    while len(run.trained) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    dataset.append(make_frame(500, seed=8, start=START + dt.timedelta(days=20)))
    while len(run.trained) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    run.finish()
    assert run.wait(120) == "finished"
    versions = [ws.lineage.show(one.model).origins[0].dataset_version for one in run.trained]
    assert (versions[0], versions[-1]) == (1, 2)
    expected = list(by_hand(dataset.at(2), run, warm=True))
    report = ws.lineage.erase(ERASED, dry_run=False)
    assert report.done, report
    for one, state in zip(run.trained, expected, strict=True):
        stored = ws.models.load(one.model)
        assert all(stored[name].equal(value) for name, value in state.items())
    assert set(run.matrix()["model"]) == {one.model for one in run.trained}


def test_a_model_with_two_origins_is_saved_by_the_one_that_has_a_recipe(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=dk.Training(**TRAINING)))  # type: ignore[arg-type]
    second = run.trained[1].model
    halved = ws.lineage.add(lambda state: {n: t / 2 for n, t in state.items()}, parents=[second], name="halved")
    assert ws.lineage.add(ws.models.load(halved), parents=[second]) == halved  # brought, too
    above = ws.lineage.add(lambda state: {n: t * 3 for n, t in state.items()}, parents=[halved], name="above")
    assert ws.lineage.erase([700]).blocked == ()
    report = ws.lineage.erase([700], dry_run=False)
    assert report.done
    assert set(report.removed) == {second, halved, above}
    expected = {name: tensor / 2 * 3 for name, tensor in ws.models.load(run.trained[1].model).items()}
    assert all(ws.models.load("above")[name].equal(tensor) for name, tensor in expected.items())
    assert [one.how for one in ws.lineage.show("halved").origins] == ["made"]


def test_erasing_refuses_what_cannot_be(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    stream = make_pipeline(dataset).replay()
    next(stream)
    with pytest.raises(Conflict, match="is going"):
        ws.lineage.erase([1], dry_run=False)
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput, match="no keys"):
        ws.lineage.erase([])
    with pytest.raises(NotFound, match=r"2 keys were never given to a sample of 's.*': \[-1, 999999\]"):
        ws.lineage.erase([1, -1, 999_999])
    ws.ingest("other", make_frame(10), timestamp="when", label="late")
    with pytest.raises(InvalidInput, match="has 2 datasets"):
        ws.lineage.affected_by([1])
    assert len(ws.lineage.affected_by([1], dataset="other")) == 0


def test_a_run_whose_samples_were_erased_does_not_go_on(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    stream = make_pipeline(dataset).replay()
    events = [next(stream) for _ in range(4)]
    stream.close()  # type: ignore[attr-defined]
    assert ws.lineage.erase(ERASED, dry_run=False).done
    run = ws.run(events[0].run).resume()
    assert run.wait(60) == "failed"


def halved(state: Any) -> Any:
    return {name: tensor / 2 for name, tensor in state.items()}


def test_only_a_recipe_clears_a_model_of_what_it_learned(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    """The same bits brought again without parents, and parents that are told only later."""
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=dk.Training(**TRAINING)))  # type: ignore[arg-type]
    second = run.trained[1].model
    assert ws.lineage.add(ws.models.load(second), name="prod") == second
    assert ws.lineage.erase([700], dry_run=False).done
    assert second not in ws.models
    assert ws.models.resolve("prod") == run.trained[1].model
    third = run.trained[2].model
    brought = ws.lineage.add(halved(ws.models.load(third)), name="brought")
    assert ws.lineage.add(halved(ws.models.load(third)), parents=[third]) == brought
    assert ws.lineage.erase([1234]).blocked == (brought,)


def test_models_removed_by_hand_hide_nothing_and_block_only_what_needs_them(
    ws: dk.Workspace, dataset: dk.Dataset
) -> None:
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=dk.Training(**TRAINING)))  # type: ignore[arg-type]
    second = run.trained[1].model
    middle = ws.lineage.add(halved, parents=[second], version_of=run.trained[0].model)
    last = ws.lineage.add(halved, parents=[middle], version_of=middle)
    before = ws.lineage.versions(last)
    ws.models.remove(middle)
    assert ws.lineage.ancestors(last) == {second}
    assert ws.lineage.versions(last) == [one for one in before if one != middle]
    assert last in ws.lineage.affected_by([700])
    assert ws.lineage.erase([700]).blocked == (last,)
    report = ws.lineage.erase([700], dry_run=False, drop=True)
    assert report.done and set(report.removed) == {second, last}


def test_a_recipe_that_fails_now_is_named_and_dropped_when_asked_to(
    ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path
) -> None:
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=dk.Training(**TRAINING)))  # type: ignore[arg-type]
    needed = tmp_path / "needed"
    needed.write_text("x")
    made = ws.lineage.add(
        lambda state: {**state, "n": torch.tensor(len(needed.read_text()))}, parents=[run.trained[1].model]
    )
    needed.unlink()
    with pytest.raises(Conflict, match=rf"model {made[:12]} cannot be made anew: FileNotFoundError.*drop=True"):
        ws.lineage.erase([700], dry_run=False)
    report = ws.lineage.erase([700], dry_run=False, drop=True)
    assert report.done and report.blocked == (made,)
    assert made not in ws.models


def test_models_that_come_meanwhile_are_a_conflict_and_nothing_is_erased(
    ws: dk.Workspace, dataset: dk.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=dk.Training(**TRAINING)))  # type: ignore[arg-type]
    second, judge = run.trained[1].model, erasure._judge
    comings: list[Any] = [
        lambda: ws.lineage.add(halved, parents=[second]),
        lambda: replayed(make_pipeline(dataset, selection=dk.selection.New(), name="again")),
    ]
    for coming in comings:
        with monkeypatch.context() as patch:
            patch.setattr(erasure, "_judge", lambda *args, coming=coming: (coming(), judge(*args))[1])
            with pytest.raises(Conflict, match="came meanwhile, and nothing was erased yet; ask again"):
                ws.lineage.erase([700], dry_run=False)
        assert second in ws.models and len(dataset) == 1500
    assert ws.lineage.erase([700], dry_run=False).done


def test_clocks_of_others_do_not_change_the_order(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    """A model that a colleague, whose clock is an hour behind, made from one of a run."""
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=dk.Training(**TRAINING)))  # type: ignore[arg-type]
    made = ws.lineage.add(halved, parents=[run.trained[1].model], name="made")
    with ws.catalog.write() as connection:
        connection.execute(sa.update(origins).values(created_ns=origins.c.created_ns - 3600 * 10**9))
    assert ws.lineage.erase([700]).blocked == ()
    assert ws.lineage.erase([700], dry_run=False).done
    assert made not in ws.models
    expected = halved(ws.models.load(run.trained[1].model))
    assert all(ws.models.load("made")[name].equal(tensor) for name, tensor in expected.items())


def test_tensors_without_a_model_are_removed_by_who_asks_again(
    ws: dk.Workspace, dataset: dk.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An erasure that was interrupted after the models were replaced knows them no more when it goes on."""
    options = dk.Training(**TRAINING)  # type: ignore[arg-type]
    run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=options, model=wide_model))
    tainted = ws.models.load(run.trained[1].model)
    parent = ws.lineage.add(wide_model(), version_of=run.trained[1].model)
    ws.lineage.add({name: t + 1e-4 * torch.randn(t.shape) for name, t in tainted.items()}, parents=[parent])
    gone = set(ws.models.manifest(run.trained[1].model).values())
    with monkeypatch.context() as patch:
        patch.setattr(erasure, "free", lambda store: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ws.lineage.erase([700], dry_run=False)
    assert ws.models.tensors() & gone
    assert ws.lineage.erase([700], dry_run=False).done
    assert not ws.models.tensors() & gone


def test_scores_events_and_tests_follow_the_models(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    window = dk.Window(*(dataset.table()["timestamp"].to_physical()[[600, 610]].to_list()))
    pipeline = make_pipeline(
        dataset,
        selection=dk.selection.New(),
        training=dk.Training(**TRAINING),  # type: ignore[arg-type]
        evaluation=dk.Evaluation(windows=lambda run: [window]),
        trigger=dk.triggers.any_of(dk.triggers.Amount(500), dk.triggers.Drift(every=250)),
    )
    run = replayed(pipeline)
    old = [one.model for one in run.trained]
    ws.lineage.register(lambda state: True, name="one", models=[old[-1]])
    assert len(run.matrix()) and len(run.decisions())
    erased = sorted({*range(600, 610), 1234})
    assert ws.lineage.erase(erased, dry_run=False).done
    assert len(run.matrix()) == len(run.decisions()) == 0  # no sample is left in the window
    new = {one.index: one.model for one in run.trained}
    told = {event.data["index"]: event.data for event in run.events() if event.kind == "trained"}
    assert {index: one["model"] for index, one in told.items()} == new
    assert all(one["samples"] == run.selection(index).height for index, one in told.items())
    assert [one.model for one in ws.lineage.test()] == [run.trained[-1].model] != [old[-1]]


def test_the_optimizer_of_a_rebuilt_model_is_found_in_a_new_process_too(tmp_path: Path) -> None:
    found = []
    for again in (False, True):
        ws = dk.Workspace(tmp_path / str(again))
        dataset = ws.ingest("stream", make_frame(1500), timestamp="when", label="late")
        training = dk.Training(**TRAINING, warm_start=True, carry_optimizer=True)  # type: ignore[arg-type]
        run = replayed(make_pipeline(dataset, selection=dk.selection.New(), training=training))
        first = run.trained[0].model
        torch.manual_seed(1)
        new = ws.lineage.add({n: torch.randn_like(t) for n, t in ws.models.load(first).items()}, version_of=first)
        rebuilt = ws.lineage.cascade(first, new, dry_run=False).rebuilt
        last = rebuilt[run.trained[2].model]
        opened = dk.Workspace(ws.path) if again else ws
        report = opened.lineage.erase([int(run.selection(2)["key"][3])], dry_run=False)
        found.append(report.rebuilt[last])
    assert found[0] == found[1] is not None
