"""Runs: the same result inline, in the background and after any accident; control and failure."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import sqlalchemy as sa
import torch
from streams import make_frame, make_model, make_pipeline, replayed
from torch import nn

import dynkit as dk
from dynkit import testing
from dynkit.catalog import runs
from dynkit.data import Batches
from dynkit.errors import Conflict, InvalidInput, NotFound, PolicyError, StorageError, TrainingError, WaitTimeout
from dynkit.pipeline.owner import Owner
from dynkit.pipeline.replay import replay
from dynkit.pipeline.worker import _pipeline
from dynkit.training import FitContext, fit, seeded


def same(a: dk.Run, b: dk.Run) -> bool:
    """Whether two runs came to the same models and scores."""
    return a.matrix().equals(b.matrix()) and a.composite().equals(b.composite()) and not a.matrix().is_empty()


def until(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


class Slowly(nn.Module):
    """A model that takes its time, so that a run can be caught in the middle."""

    def __init__(self, seconds: float = 0.01) -> None:
        super().__init__()
        self.body = make_model()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.body(x)


def test_events_tell_the_story_in_order(dataset: dk.Dataset) -> None:
    events = list(make_pipeline(dataset).replay())
    kinds = [event.kind for event in events]
    assert kinds == ["started", *["triggered", "selected", "trained"] * 6, *["evaluated"] * 7, "finished"]
    assert [event.seq for event in events] == list(range(len(events)))
    run = dk.Workspace(dataset.catalog.root).run(events[0].run)
    assert run.events() == events
    assert run.events(since=3) == events[3:]
    assert (run.status, run.error, run.progress["fraction"]) == ("finished", None, 1.0)
    assert [one.position for one in run.trained] == [500, 1000, 1500, 2000, 2500, 3000]
    assert run.models()["samples"].to_list() == [400, 800, 1200, 1600, 2000, 2400]


def test_a_run_does_what_a_hand_written_loop_does(dataset: dk.Dataset) -> None:
    """Selection, warm start, evaluation and composite, re-done without the loop."""
    run = replayed(make_pipeline(dataset, selection=dk.selection.New()))
    frame = make_frame()
    state = None
    for index, end in enumerate(range(500, 3001, 500)):
        keys = np.arange(end - 500, end)
        assert run.selection(index)["key"].to_list() == keys.tolist()
        seed = int(np.random.SeedSequence([3, index]).generate_state(1)[0])
        training = dk.Training(epochs=1, batch_size=64, lr=1e-2)
        with seeded(seed):
            model = make_model()
            if state is not None:
                model.load_state_dict(state)
            cpu = torch.device("cpu")
            fit(
                model,
                Batches(dataset.open(), keys, batch_size=64, device=cpu, shuffle=True, seed=seed),
                FitContext(training, cpu),
            )
        state = model.state_dict()
        stored = dk.Workspace(dataset.catalog.root).models.load(run.trained[index].model)
        assert all(stored[name].equal(value) for name, value in state.items())
    x = torch.tensor(frame.select("a", "b", "c").to_numpy(), dtype=torch.float32)
    right = (model.eval()(x).argmax(1).numpy() == frame["late"].to_numpy())[
        -408:
    ].mean()  # the last window holds 408 samples
    last = run.matrix().filter(pl.col("metric") == "accuracy", pl.col("model") == run.trained[-1].model).tail(1)
    assert last["value"].item() == pytest.approx(right)


def test_the_background_gives_the_same_result_and_leaves_the_caller_free(dataset: dk.Dataset) -> None:
    pipeline = make_pipeline(dataset)
    inline = replayed(pipeline)
    began = time.perf_counter()
    run = pipeline.start()
    assert time.perf_counter() - began < 1.0
    assert run.status == "running"
    assert run.pid != os.getpid()
    assert run.wait(120) == "finished"
    assert same(run, inline)


def test_lineage_knows_parents_and_versions(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    warm = [one.model for one in replayed(make_pipeline(dataset)).trained]
    fresh = [one.model for one in replayed(make_pipeline(dataset, training=dk.Training(lr=0.1))).trained]
    graph = ws.lineage.to_networkx()
    edges = {(a, b, kind) for a, b, kind in graph.edges(keys=True)}
    assert edges == {(a, b, kind) for a, b in pairwise(warm) for kind in ("derived", "version")} | {
        (a, b, "version") for a, b in pairwise(fresh)
    }
    assert ws.lineage.ancestors(warm[-1]) == set(warm[:-1])
    assert ws.lineage.descendants(warm[0]) == set(warm[1:])
    assert ws.lineage.ancestors(fresh[-1]) == set()
    with pytest.raises(NotFound):
        ws.lineage.ancestors("nothing")


def test_a_run_stays_on_the_version_of_its_start(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    stream = make_pipeline(dataset).replay()
    first = next(stream)
    dataset.append(make_frame(100, seed=9))
    *_, last = stream
    assert first.data["samples"] == 3000
    assert ws.run(last.run).trained[-1].position == 3000
    assert ws.find(make_pipeline(dataset)) is None  # another version is another input
    assert ws.find(make_pipeline(dataset.at(1))).id == last.run  # type: ignore[union-attr]


# -- accidents -------------------------------------------------------------------------------------------------------


def test_killed_at_ten_random_moments_a_run_ends_in_the_same_result(dataset: dk.Dataset) -> None:
    pipeline = make_pipeline(
        dataset,
        model=lambda: Slowly(0.002),
        trigger=Every(200),
        training=dk.Training(epochs=2, batch_size=64, warm_start=True),
    )
    undisturbed = replayed(pipeline)
    rng = random.Random(11)
    run = pipeline.start()
    for _ in range(10):
        if rng.random() < 0.7:  # in the middle of work, or at any time since the process began
            _await_progress(run, events=rng.randint(1, 4))
        time.sleep(rng.uniform(0, 0.4))
        if run.status == "finished":
            break
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait(10) == "interrupted"
        assert "signal 9" in str(run.error)
        run = dk.Workspace(dataset.catalog.root).run(run.id)  # as a restarted notebook would
        run.resume()
    assert run.wait(120) == "finished", run.error
    kinds = [event.kind for event in run.events()]
    assert kinds.count("interrupted") == 10
    assert kinds.count("resumed") > 1  # some of them after a trigger was committed
    assert same(run, undisturbed)
    assert [one.position for one in run.trained] == [one.position for one in undisturbed.trained]


def _await_progress(run: dk.Run, events: int) -> None:
    seen = len(run.events())
    until(lambda: len(run.events()) >= seen + events or run.status != "running")


class Every:
    """A trigger that counts in its own attributes."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen = 0

    def __call__(self, new: pl.DataFrame, run: Any) -> list[int]:
        positions = []
        for row in range(new.height):
            self.seen += 1
            if self.seen % self.n == 0:
                positions.append(row)
        return positions


class Growing:
    """A selection that takes more each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, pool: pl.DataFrame, run: Any, rng: np.random.Generator) -> pl.DataFrame:
        self.asked += 1
        keys = rng.choice(pool["key"].to_numpy(), 100 * self.asked, replace=False)
        return pl.DataFrame({"key": keys, "weight": np.linspace(0.5, 1.5, len(keys))})


@pytest.mark.parametrize("stop_after", range(1, 26, 3))
def test_left_after_any_event_a_run_continues_to_the_same_result(dataset: dk.Dataset, stop_after: int) -> None:
    pipeline = make_pipeline(dataset, trigger=Every(450), selection=Growing())
    undisturbed = replayed(pipeline)
    stream = pipeline.replay()
    for _ in range(stop_after):
        event = next(stream)
    stream.close()
    run = dk.Workspace(dataset.catalog.root).run(event.run)
    assert run.status == "interrupted"
    with dataset.catalog.write() as connection:  # as `resume` does, but here instead of in a new process
        connection.execute(sa.update(runs).where(runs.c.id == run.id).values(status="running"))
    list(replay(_pipeline, Owner(dataset.catalog, run.id)))
    assert same(run, undisturbed)
    assert [run.selection(i).equals(undisturbed.selection(i)) for i in range(6)] == [True] * 6


def test_leaving_the_iteration_at_the_last_event_leaves_a_finished_run(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    for event in make_pipeline(dataset).replay():
        if event.kind == "finished":
            break
    assert ws.run(event.run).status == "finished"


def test_a_run_goes_on_in_a_workspace_that_was_moved(ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path) -> None:
    stream = make_pipeline(dataset).replay()
    for _ in range(5):
        event = next(stream)
    stream.close()
    undisturbed = replayed(make_pipeline(dataset))
    expected = undisturbed.matrix()
    ws.path.rename(tmp_path / "moved")
    run = dk.Workspace(tmp_path / "moved").run(event.run)
    assert run.resume().wait(60) == "finished", run.error
    assert run.matrix().equals(expected)
    assert not ws.path.exists()


def test_a_run_that_cannot_be_started_says_so_and_is_not_left_running(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    stream = make_pipeline(dataset).replay()
    event = next(stream)
    stream.close()
    run = ws.run(event.run)
    (run.folder / "worker.log").mkdir()
    with pytest.raises(StorageError, match="cannot be started"):
        run.resume()
    assert run.status == "failed"
    shutil.rmtree(run.folder)
    with pytest.raises(StorageError, match="do this in the directory where it was started"):
        run.resume()
    (ws.path / "runs").rename(ws.path / "elsewhere")
    (ws.path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write the run's folder"):
        make_pipeline(dataset).start()
    assert len(ws.runs()) == 1


def test_cancelled_inline_the_iteration_ends(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    stream = make_pipeline(dataset, model=lambda: Slowly(0.02)).replay()
    event = next(stream)
    asker = threading.Timer(0.5, lambda: ws.run(event.run).cancel())
    asker.start()
    *_, last = stream
    asker.join()
    assert ws.run(last.run).status == "cancelled"


def test_policies_of_a_pipeline_are_not_changed_by_its_runs(dataset: dk.Dataset) -> None:
    trigger = Every(450)
    pipeline = make_pipeline(dataset, trigger=trigger)
    assert same(replayed(pipeline), replayed(pipeline))
    assert trigger.seen == 0


def test_the_caller_killed_leaves_the_run_going(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from streams import *\nfrom test_pipeline import Slowly\nimport os\n"
        f"ws = dk.Workspace({str(tmp_path)!r})\n"
        "dataset = ws.ingest('stream', make_frame(), timestamp='when', label='late')\n"
        "run = make_pipeline(dataset, model=lambda: Slowly(0.003)).start()\n"
        "print(run.id, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    run = dk.Workspace(tmp_path).run(done.stdout.strip())
    assert run.status == "running"
    assert run.wait(120) == "finished"


def test_an_interrupt_of_the_callers_group_does_not_reach_the_run(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from streams import *\nfrom test_pipeline import Slowly\nimport os, signal\n"
        f"ws = dk.Workspace({str(tmp_path)!r})\n"
        "dataset = ws.ingest('stream', make_frame(), timestamp='when', label='late')\n"
        "run = make_pipeline(dataset, model=lambda: Slowly(0.003)).start()\n"
        "try:\n    os.killpg(os.getpgrp(), signal.SIGINT); run.wait()\n"
        "except KeyboardInterrupt:\n    print(run.wait(100))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, start_new_session=True
    )
    assert done.stdout.strip() == "finished", done.stderr


# -- control ---------------------------------------------------------------------------------------------------------


def test_pause_resume_and_cancel(dataset: dk.Dataset) -> None:
    run = make_pipeline(dataset, model=lambda: Slowly(0.02)).start()
    until(lambda: run.progress["phase"] == "training")
    assert run.pause().status == "paused"
    before = run.progress
    time.sleep(1.2)
    assert run.progress["fraction"] == before["fraction"]
    assert "left" in run._repr_html_() or before["eta_s"] is None
    assert "heard of at" in run._repr_html_()
    with pytest.raises(WaitTimeout, match=r"is still paused after 0\.1 s; it goes on"):
        run.wait(timeout_s=0.1)
    assert run.resume().status == "running"
    until(lambda: run.progress["fraction"] > before["fraction"])
    assert run.cancel().status == "cancelled"
    until(lambda: not psutil.pid_exists(run.pid) or psutil.Process(run.pid).status() == "zombie")
    assert {"paused", "continued", "cancelled"} <= {event.kind for event in run.events()}
    with pytest.raises(Conflict, match="is cancelled; only a running one can be asked to pause"):
        run.pause()
    assert run.resume().wait(120) == "finished"
    assert same(run, replayed(make_pipeline(dataset, model=lambda: Slowly(0))))
    with pytest.raises(Conflict, match="has finished"):
        run.resume()


def test_cancel_reaches_a_paused_run(dataset: dk.Dataset) -> None:
    run = make_pipeline(dataset, model=lambda: Slowly(0.02)).start()
    until(lambda: run.progress["phase"] == "training")
    assert run.pause().cancel().status == "cancelled"


def test_two_who_resume_start_one_worker(dataset: dk.Dataset) -> None:
    stream = make_pipeline(dataset, model=lambda: Slowly(0.005)).replay()
    event = next(stream)
    stream.close()
    run, other = (dk.Workspace(dataset.catalog.root).run(event.run) for _ in range(2))
    run.resume()
    other.resume()
    assert other.wait(120) == "finished"
    assert [event.kind for event in run.events()].count("started") == 2  # once here, once resumed before any trigger


# -- failure ---------------------------------------------------------------------------------------------------------


def raising() -> nn.Module:
    raise ZeroDivisionError("no model today")


def not_a_number(seed: int = 0) -> nn.Module:
    model = make_model()
    nn.init.constant_(model[0].weight, float("nan"))  # type: ignore[index, arg-type]
    return model


def wrong_shape() -> nn.Module:
    return nn.Linear(7, 2)


def leaving() -> nn.Module:
    os._exit(3)


def exiting() -> nn.Module:
    sys.exit("enough")


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (raising, "ZeroDivisionError: no model today"),
        (not_a_number, "the loss is nan"),
        (wrong_shape, "mat1 and mat2 shapes cannot be multiplied"),
        (leaving, "exited with code 3 after 'selected'"),
        (exiting, "SystemExit: enough"),
        (lambda: "text", "the model function returned str, not an nn.Module"),
    ],
)
def test_a_model_that_fails_fails_its_run_with_its_own_error(
    ws: dk.Workspace, dataset: dk.Dataset, model: Any, error: str
) -> None:
    run = make_pipeline(dataset, model=model).start()
    assert run.wait(60) == "failed"
    assert error in str(run.error)
    if model not in (leaving,):
        assert "Traceback" in str(run.error)
    if model is raising:
        assert 'raise ZeroDivisionError("no model today")' in str(run.error)
    assert run.events()[-1].kind == "failed"
    assert run.reason is not None
    assert error in run.reason
    assert "failed" in run._repr_html_()
    assert replayed(make_pipeline(dataset)).status == "finished"  # the workspace stays usable
    assert len(ws.runs()) == 2


def test_inline_a_failure_is_raised_and_recorded(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    with pytest.raises(ZeroDivisionError):
        replayed(make_pipeline(dataset, model=raising))
    assert ws.runs()[0].status == "failed"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trigger": lambda new, run: 3.5}, PolicyError, "the trigger returned 3.5"),
        ({"trigger": lambda new, run: [5, 5]}, PolicyError, "position 5 after 5"),
        ({"trigger": lambda new, run: [10**6]}, PolicyError, "expected increasing whole numbers from -1 to 999"),
        ({"trigger": lambda new, run: [0.5]}, PolicyError, "position 0.5"),
        ({"selection": lambda pool, run, rng: [2999]}, PolicyError, "not in its pool"),
        ({"selection": lambda pool, run, rng: [-1]}, PolicyError, "not in its pool"),
        ({"selection": lambda pool, run, rng: ["a"]}, PolicyError, "must return keys or a frame"),
        ({"selection": lambda pool, run, rng: pool.select("label")}, PolicyError, "without a column key"),
        ({"selection": lambda pool, run, rng: pool.select("key", weight=-1.0)}, PolicyError, "negative, null or not finite"),
        ({"evaluation": dk.Evaluation(windows=lambda run: [1])}, PolicyError, "windows must return"),
        ({"evaluation": dk.Evaluation(windows=lambda run: None)}, PolicyError, "windows must return"),
        ({"evaluation": dk.Evaluation(metrics=[lambda outputs, labels: "good"])}, PolicyError, "must return one number"),
        ({"evaluation": dk.Evaluation(windows=lambda run: [dk.Window(0, 9), dk.Window(0, 9, 3)])}, PolicyError, "two windows of the same"),
        ({"training": dk.Training(fit=lambda model, batches, context: model[0].weight.data.fill_(float("inf")))}, TrainingError, r"0\.weight of the model are not finite"),
    ],
)  # fmt: skip
def test_policies_that_break_their_contract_are_told(
    dataset: dk.Dataset, changes: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        replayed(make_pipeline(dataset, **changes))


def test_a_split_that_is_not_there_is_told_before_any_training(dataset: dk.Dataset) -> None:
    with pytest.raises(NotFound, match="no split 'tset'"):
        list(make_pipeline(dataset, evaluation=dk.Evaluation(split="tset")).replay())
    assert not dk.Workspace(dataset.catalog.root).runs()[0].trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "pipeline name 'a b'"),
        ({"model": 3}, "model=3 is not callable"),
        ({"trigger": dk.triggers.Amount}, "trigger=Amount is a class"),
        ({"selection": lambda pool: pool}, r"cannot be called with \(pool, run, rng\)"),
        ({"training": {"epochs": 3}}, "must be dk.Training"),
        ({"evaluation": ["accuracy"]}, "must be dk.Evaluation"),
        ({"seed": -1}, "seed=-1"),
        ({"training": dk.Training(device="cuda:99")}, "device 'cuda:99' cannot be used"),
    ],
)
def test_a_wrong_declaration_is_refused_before_anything_runs(
    ws: dk.Workspace, dataset: dk.Dataset, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        replayed(make_pipeline(dataset, **changes))
    assert all(run.status == "failed" for run in ws.runs())


def test_a_dataset_without_labels_is_refused(ws: dk.Workspace) -> None:
    dataset = ws.ingest("plain", make_frame(20), timestamp="when")
    with pytest.raises(InvalidInput, match="has no labels; ingest it with label="):
        make_pipeline(dataset)


def test_what_cannot_travel_is_refused_at_once(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    stream = (i for i in range(3))
    with pytest.raises(
        InvalidInput, match=r"the trigger of pipeline 'test' cannot travel to a worker process: .*generator"
    ):
        make_pipeline(dataset, trigger=lambda new, run: bool(next(stream))).start()
    assert ws.runs() == []


# -- what users write ------------------------------------------------------------------------------------------------

NOTEBOOK = """
import polars as pl, torch, dynkit as dk
from torch import nn
from dynkit.types import Window

LIMIT = 700

def model():
    return nn.Linear(3, 2)

def helper(n):
    return n > LIMIT

def trigger(new, run):
    position = 0
    while position < new.height:
        if helper(run.samples_since_trigger + position + 1):
            yield position
            assert run.samples_since_trigger == -(position + 1)
        position += 1

def selection(pool, run, rng):
    recent = pool.tail(300)
    if run.model is not None:
        samples = run.read(recent["key"])
        with torch.no_grad():
            losses = nn.functional.cross_entropy(run.model(samples["x"]), samples["label"], reduction="none")
        return recent.with_columns(weight=pl.Series(losses.numpy())).select("key", "weight")
    return recent["key"]

def brier(outputs, labels):
    return float(((outputs.softmax(1)[:, 1] - labels) ** 2).mean())

def windows(run):
    half = (run.start_ns + run.now_ns) // 2
    return [Window(run.start_ns, half), Window(half, run.now_ns + 1)]

def fit(model, batches, context):
    optimizer = torch.optim.SGD(model.parameters(), lr=context.training.lr)
    for batch in batches:
        optimizer.zero_grad()
        loss = context.loss(model(batch["x"]), batch)
        loss.backward()
        optimizer.step()
    context.report(last=float(loss.detach()))

if __name__ == "__main__":
    import sys
    dataset = dk.Workspace(sys.argv[1]).dataset("stream")
    pipeline = dk.Pipeline(
        name="own", dataset=dataset, model=model, trigger=trigger, selection=selection, seed=1,
        training=dk.Training(batch_size=50, lr=0.5, fit=fit),
        evaluation=dk.Evaluation(windows=windows, metrics=[brier, "accuracy"]),
    )
    run = pipeline.start()
    assert run.wait(100) == "finished", run.error
    *_, last = pipeline.replay()
    print(run.id, last.run)
"""


def test_functions_written_in_a_notebook_work_in_the_worker(
    ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path
) -> None:
    """The code is the ``__main__`` of a process, as a notebook's cells are."""
    script = tmp_path / "notebook.py"
    script.write_text(NOTEBOOK)
    done = subprocess.run([sys.executable, script, str(ws.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    background, inline = (ws.run(run) for run in done.stdout.split())
    assert same(background, inline)
    assert [one.position for one in background.trained] == [701, 1402, 2103, 2804]
    assert background.matrix()["metric"].unique(maintain_order=True).to_list() == ["brier", "accuracy"]
    assert background.matrix()["window_start"].n_unique() == 2
    assert background.composite().filter(pl.col("metric") == "accuracy")["value"].item() > 0.8
    assert '"last"' in background.models()["report"][0]
    assert "weight" in background.selection(1).columns


def test_code_that_changed_after_the_start_does_not_change_the_run(
    ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path
) -> None:
    module = tmp_path / "mine.py"
    module.write_text("from torch import nn\ndef model(): return nn.Linear(3, 2)\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]\n"
        "import mine, pathlib\nfrom streams import *\n"
        f"dataset = dk.Workspace({str(ws.path)!r}).dataset('stream')\n"
        "stream = make_pipeline(dataset, model=mine.model).replay()\nprint(next(stream).run)\nstream.close()\n"
        "pathlib.Path(mine.__file__).write_text('broken')\n"
    )
    run = ws.run(subprocess.check_output([sys.executable, "-c", code], text=True).strip())
    assert run.resume().wait(60) == "finished", run.error


def test_a_module_as_model_is_copied_for_each_training(dataset: dk.Dataset) -> None:
    module = make_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    a = replayed(make_pipeline(dataset, model=module))
    b = replayed(make_pipeline(dataset, model=module))
    assert same(a, b)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


def test_same_seed_same_result_other_seed_other_result(dataset: dk.Dataset) -> None:
    a, b, c = (replayed(make_pipeline(dataset, seed=seed)) for seed in (1, 1, 2))
    assert same(a, b)
    assert not same(a, c)
    d, e = (replayed(make_pipeline(dataset, seed=seed, training=dk.Training(seed=9))) for seed in (1, 1))
    assert same(d, e)


def test_a_run_leaves_the_callers_random_state_alone(dataset: dk.Dataset) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    replayed(make_pipeline(dataset))
    assert torch.rand(3).equal(expected)


def test_a_stream_that_never_triggers_finishes_with_nothing(dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset, trigger=lambda new, run: False))
    assert (run.status, run.trained) == ("finished", [])
    assert run.matrix().columns == ["window_start", "window_end", "model", "metric", "value"]
    assert run.composite().is_empty()
    assert "finished" in run._repr_html_()


def test_time_triggers_over_gaps_do_not_train_twice_on_the_same(dataset: dk.Dataset, ws: dk.Workspace) -> None:
    gap = pl.concat([make_frame(100), make_frame(100, seed=1, start=make_frame(1)["when"][0].replace(month=6))])
    run = replayed(make_pipeline(ws.ingest("gap", gap, timestamp="when", label="late"), trigger=dk.triggers.Time("1d")))
    assert [one.position for one in run.trained] == [100]


def test_what_a_pipeline_shows(dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset))
    assert repr(run) == f"Run({run.id!r}, 'test', finished)"
    page = run._repr_html_()
    assert "<script" not in page
    assert "data:image/svg+xml;base64," in page
    assert run.pipeline["trigger"] == {"amount": {"n": 500}}
    assert run.pipeline["training"]["lr"] == 1e-2


def test_runs_are_found_by_name_and_beginning_of_the_id(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    a, b = replayed(make_pipeline(dataset, name="a")), replayed(make_pipeline(dataset, name="b"))
    assert [run.id for run in ws.runs()] == [b.id, a.id]
    assert [run.id for run in ws.runs("a")] == [a.id]
    assert ws.run(a.id[:5]).id == a.id
    assert a.id in ws.runs()._repr_html_()
    with pytest.raises(NotFound, match="no run begins with 'zz'"):
        ws.run("zz")
    with pytest.raises(NotFound, match="has no trigger 99"):
        a.selection(99)


def test_places_that_are_no_workspace_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("s3://bucket/prefix", "postgresql://me@host/db", "~nobody-here/ws", "a\0b", Path("s3://bucket/p")):
        with pytest.raises(InvalidInput, match=r"is no folder|cannot be a folder"):
            dk.Workspace(root)
    for storage in ("bucket/prefix", "s3:/bucket", "", "s3://"):
        with pytest.raises(InvalidInput, match="must be a place in a bucket, such as 's3://bucket/prefix'"):
            dk.Workspace("ws", storage=storage)
    assert list(tmp_path.iterdir()) == []
    ws = dk.Workspace("ws")
    for wrong in ("", 5):
        with pytest.raises(InvalidInput, match="is no run; give the id"):
            ws.run(wrong)  # type: ignore[arg-type]
    for several in ("0f77", ["alpha"]):
        with pytest.raises(InvalidInput, match="runs must be runs"):
            dk.compare(several)  # type: ignore[arg-type]


def test_streams_of_the_public_checks_see_what_runs_see(ws: dk.Workspace) -> None:
    """The view of `dynkit.testing` and the loop's agree on when a trigger fires."""
    table = testing.stream(3500)
    frame = table.select("timestamp", "label", f=pl.col("key").cast(pl.Float32))
    dataset = ws.ingest("checks", frame, timestamp="timestamp", label="label")
    for trigger in (dk.triggers.Amount(333), dk.triggers.Time("3d"), Every(777)):
        run = replayed(make_pipeline(dataset, model=lambda: nn.Linear(1, 3), trigger=trigger))
        assert [one.position for one in run.trained] == testing.positions(trigger, table, 1000)
