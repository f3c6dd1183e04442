"""A training that was killed in its middle ends in the same weights, bit by bit; the next one may start from its optimizer."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streams import make_model, make_pipeline, replayed
from test_training import CPU
from torch import nn

import dynkit as dk
from dynkit.data import Batches
from dynkit.errors import StorageError
from dynkit.training import FitContext, Optimizer, Schedule, Training, fit, seeded
from dynkit.training.checkpoint import Checkpoint, read_state, write_state


class Noisy(nn.Module):
    """A model whose outputs depend on every random state there is, and on statistics of batches."""

    def __init__(self, pause_s: float = 0.0, passes: Path | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        self.pause_s = pause_s
        self.passes = passes  # gets a byte for every batch trained on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.pause_s)
            if self.passes is not None:
                with self.passes.open("ab") as stream:
                    stream.write(b".")
            x = x * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand())
        return self.layers(x)


EVERYTHING: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 20,
    "accumulate": 2,
    "optimizer": [Optimizer("sgd", modules="layers.0", options={"momentum": 0.9}), Optimizer("adamw")],
    "lr": 0.02,
    "schedule": Schedule("cosine", warmup=0.2),
    "ema": 0.9,
    "grad_clip": 1.0,
    "validation": 0.2,
    "patience": 3,
    "checkpoint": 7,
}


class Killed(BaseException):
    """Ends a training where a kill would."""


def train_once(
    dataset: dk.Dataset, path: Path, training: Training, kill_at: int | None = None, identity: str = "a"
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    def on_batch(samples: int) -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            raise Killed

    seen = 0
    with seeded(1):
        model = Noisy()
        batches = Batches(
            dataset.open(), np.arange(401), batch_size=20, shuffle=True, seed=1, last="join", on_batch=on_batch
        )
        validation = Batches(dataset.open(), np.arange(500, 600), batch_size=64)
        context = FitContext(training, CPU, validation, checkpoint=Checkpoint(path, training.checkpoint, identity))
        fit(model, batches, context)
    assert batches.passed == training.epochs * 401
    return model.state_dict(), context.history


@dataclass(frozen=True)
class Drawn:
    """Samples of a batch, by chance."""

    kind: str = "loss"

    def choose(self, scores: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, None]:
        return torch.multinomial(scores, len(scores) // 2, generator=rng), None


@pytest.mark.parametrize("more", [{}, {"amp": "fp16"}, {"batch_selection": Drawn()}])
@pytest.mark.parametrize("kill_at", [5, 9, 17, 22, 41, 60])  # batches of 20 an epoch; the 7th, rounded up, is saved
def test_a_training_goes_on_from_any_batch_to_the_same_end(
    dataset: dk.Dataset, tmp_path: Path, kill_at: int, more: dict[str, Any]
) -> None:
    training = Training(**EVERYTHING, **more)
    expected, history = train_once(dataset, tmp_path / "undisturbed", training)
    path = tmp_path / "state"
    with pytest.raises(Killed):
        train_once(dataset, path, training, kill_at)
    assert path.exists() == (kill_at > 8)
    found, reports = train_once(dataset, path, training)
    assert all(found[name].equal(value) for name, value in expected.items())
    assert reports == history


def test_a_checkpoint_of_another_training_is_not_gone_on_from(dataset: dk.Dataset, tmp_path: Path) -> None:
    training = Training(**EVERYTHING)
    expected, _ = train_once(dataset, tmp_path / "undisturbed", training)
    with pytest.raises(Killed):
        train_once(dataset, tmp_path / "state", training, 30, identity="b")
    found, _ = train_once(dataset, tmp_path / "state", training)
    assert all(found[name].equal(value) for name, value in expected.items())


def test_time_makes_a_checkpoint_due(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state", "1ms")
    time.sleep(0.03)
    assert checkpoint.due(1)
    checkpoint.save({"a": 1})
    rare = Checkpoint(tmp_path / "other", "1h")
    time.sleep(0.03)
    assert not rare.due(1)
    assert Checkpoint(tmp_path / "state", 1).load() == {"a": 1}


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, {"a": torch.arange(1000)})
    assert read_state(path)["a"].equal(torch.arange(1000))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=r"is damaged; remove it to train from the beginning"):
        read_state(path)
    with pytest.raises(StorageError, match="cannot be read"):
        read_state(tmp_path / "nothing")


def test_a_state_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state"
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom dynkit.training.checkpoint import write_state\n"
        "path = Path(sys.argv[1])\n"
        "for i in range(10**6):\n    write_state(path, {'i': torch.full((100_000,), i)})\n"
        "    print(i, flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            last = int(process.stdout.readline())
        process.kill()
        last = max([last, *map(int, process.stdout.read().split())])
    assert int(read_state(path)["i"][-1]) in (last, last + 1)


# -- runs ------------------------------------------------------------------------------------------------------------


def models(run: dk.Run) -> list[str]:
    return [one.model for one in run.trained]


def files(run: dk.Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "training").glob("*"))


def test_a_process_killed_within_trainings_ends_in_the_same_models(dataset: dk.Dataset, tmp_path: Path) -> None:
    settings = {**EVERYTHING, "batch_size": 40, "validation": 0.0, "patience": None, "checkpoint": 4}
    training = dk.Training(**settings, warm_start=True, carry_optimizer=True)
    options: dict[str, Any] = {"trigger": dk.triggers.Amount(1500), "training": training}
    undisturbed = replayed(make_pipeline(dataset, model=Noisy, **options))
    passes = tmp_path / "passes"
    passes.touch()
    run = make_pipeline(dataset, model=lambda: Noisy(0.005, passes), **options).start()
    batches = [90, 180]  # of the two trainings
    for kill_at in (60, 90 + 120):
        until(run, lambda at=kill_at: passes.stat().st_size >= at)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait(10) == "interrupted"
        run.resume()
    assert run.wait(120) == "finished", run.error
    assert models(run) == models(undisturbed)
    assert sum(batches) <= passes.stat().st_size < sum(batches) + 40  # few were done twice, if any
    assert files(run) == files(undisturbed) == ["000001.optimizer"]


def until(run: dk.Run, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert run.status == "running", run.error
        time.sleep(0.005)


def test_a_loop_of_ones_own_goes_on_from_what_it_saved(dataset: dk.Dataset) -> None:
    def own(model: nn.Module, batches: Batches, context: FitContext) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        saved = context.checkpoint.load()
        start = 0
        if saved is not None:
            model.load_state_dict(saved["model"])
            start = saved["batch"]
            batches.seek(0, start)
            context.report(resumed=start)
        for i, batch in enumerate(batches, start + 1):
            loss = context.loss(model(batch["x"]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if context.checkpoint.due(1):
                context.checkpoint.save({"model": model.state_dict(), "batch": i})

    training = dk.Training(batch_size=20, fit=own, checkpoint=5)
    options: dict[str, Any] = {"trigger": dk.triggers.Amount(3000), "training": training}
    undisturbed = replayed(make_pipeline(dataset, model=Noisy, **options))
    run = make_pipeline(dataset, model=lambda: Noisy(0.01), **options).start()
    until(run, (run.folder / "training" / "000000.checkpoint").exists)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(10) == "interrupted"
    run.resume()
    assert run.wait(60) == "finished", run.error
    assert models(run) == models(undisturbed)
    report = next(event.data for event in run.events() if event.kind == "trained")
    assert report["resumed"] >= 5
    assert report["resumed"] % 5 == 0


# -- optimizer state -------------------------------------------------------------------------------------------------


def test_the_next_training_starts_from_the_optimizer_of_the_last(dataset: dk.Dataset) -> None:
    """Two trainings of a run are one training of SGD with momentum by hand."""
    training = dk.Training(
        batch_size=100,
        optimizer=Optimizer("sgd", options={"momentum": 0.9}),
        lr=0.1,
        schedule="linear",  # begins anew: only the momentum is carried
        warm_start=True,
        carry_optimizer=True,
    )
    pipeline = make_pipeline(dataset, trigger=dk.triggers.Amount(1000), selection=dk.selection.New(), training=training)
    run = replayed(pipeline)
    store = dk.Workspace(dataset.catalog.root).models
    with seeded(int(np.random.SeedSequence([3, 0]).generate_state(1)[0])):
        model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for index, trained in enumerate(run.trained):
        keys = np.arange(1000 * index, 1000 * (index + 1))
        seed = int(np.random.SeedSequence([3, index]).generate_state(1)[0])
        batches = Batches(dataset.open(), keys, batch_size=100, shuffle=True, seed=seed)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 10)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch["x"]), batch["label"]).backward()
            optimizer.step()
        for name, value in store.load(trained.model).items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_damaged_optimizer_state_ends_the_run_with_a_clear_error(dataset: dk.Dataset) -> None:
    training = dk.Training(batch_size=100, warm_start=True, carry_optimizer=True)
    stream = make_pipeline(dataset, trigger=dk.triggers.Amount(1000), training=training).replay()
    run = None
    with pytest.raises(StorageError, match=r"000000\.optimizer is damaged"):
        for event in stream:
            run = dk.Workspace(dataset.catalog.root).run(event.run)
            if event.kind == "trained":
                path = run.folder / "training" / "000000.optimizer"
                path.write_bytes(path.read_bytes()[:-1])
    assert run is not None
    assert run.status == "failed"
