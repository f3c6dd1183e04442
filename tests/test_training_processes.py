"""Several processes that train together give what one gives with the same batches; nothing of them is left behind."""

import atexit
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import make_model, make_pipeline, replayed
from test_training import CPU
from test_training_resume import Noisy, models, until
from torch import nn

import dynkit as dk
from dynkit.data import Batches
from dynkit.errors import InvalidInput, TrainingError
from dynkit.training import FitContext, Optimizer, Training, seeded
from dynkit.training.processes import train_together
from dynkit.training.train import Fitted, Task, train


@given(st.integers(1, 700), st.integers(1, 100), st.integers(2, 5), st.sampled_from(["keep", "drop", "join"]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_batches_make_the_whole_batches(
    dataset: dk.Dataset, n: int, size: int, processes: int, last: str
) -> None:
    def batches(part: tuple[int, int]) -> Batches:
        keys = np.arange(n)
        weights = keys.astype(np.float32)
        return Batches(
            dataset.open(), keys, weights=weights, batch_size=size, shuffle=True, seed=3, last=last, part=part
        )

    whole = batches((0, 1))
    parts = [batches((rank, processes)) for rank in range(processes)]
    for _ in range(2):
        for batch, *shares in zip(whole, *parts, strict=True):
            if len(batch["label"]) < 2 * processes:
                assert all(share["weight"].equal(batch["weight"]) for share in shares)
            else:
                assert torch.cat([share["weight"] for share in shares]).equal(batch["weight"])
                sizes = [len(share["label"]) for share in shares]
                assert max(sizes) - min(sizes) <= 1
                assert min(sizes) >= 2
    assert {part.passed for part in parts} == {whole.passed}
    assert {len(part) for part in parts} == {len(whole)}


def both(dataset: dk.Dataset, model: nn.Module, **options: Any) -> tuple[nn.Module, Fitted, nn.Module, Fitted]:
    """Train in one process, and in two."""
    task = {"seed": 5, "keys": np.arange(403), **options}
    settings = task.pop("training")
    with seeded(0):
        alone, together = (make_model() if model is None else model for _ in range(2))
    together.load_state_dict(alone.state_dict())
    one = train(alone, dataset.open(), Task(Training(**settings), **task), device=CPU)
    seen: list[int] = []
    pinned = dataset.at(dataset.version)
    two_task = Task(Training(processes=2, **settings), **task)
    two = train_together(together, pinned, two_task, device=CPU, on_batch=seen.append)
    assert sum(seen) <= two.passed
    return alone, one, together, two


def test_two_processes_train_as_one_does(dataset: dk.Dataset) -> None:
    training = {
        "epochs": 3,
        "batch_size": 40,  # 10 and 3 left over, too few for two processes to share
        "accumulate": 2,
        "optimizer": [Optimizer("sgd", modules="0", options={"momentum": 0.9}), Optimizer("adamw")],
        "lr": 0.05,
        "schedule": "cosine",
        "ema": 0.9,
        "grad_clip": 0.5,
        "validation": 0.0,
    }
    weights = np.random.default_rng(0).exponential(size=403).astype(np.float32)
    alone, one, together, two = both(dataset, None, training=training, weights=weights)
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert [r["loss"] for r in two.history] == pytest.approx([r["loss"] for r in one.history], rel=1e-5)
    assert two.passed == one.passed == 3 * 403


def test_two_processes_stop_as_early_as_one(dataset: dk.Dataset) -> None:
    training = {"epochs": 30, "batch_size": 51, "lr": 0.3, "validation": 0.2, "patience": 2}
    alone, one, together, two = both(dataset, None, training=training)
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    losses = [[report["validation_loss"] for report in outcome.history] for outcome in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) < 30


def test_an_error_in_a_process_is_raised_as_it_is(dataset: dk.Dataset) -> None:
    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        atexit.register(os.abort)
        return outputs.sum() * float("nan")

    before = psutil.Process().children()
    task = Task(Training(loss=loss, processes=2), 0, np.arange(400))
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1 by batch 1") as caught:
        train_together(make_model(), dataset.at(1), task, device=CPU, on_batch=lambda samples: None)
    assert "of 2:\nTraceback" in caught.value.__notes__[0]
    assert _trainers(before) == []


def test_a_process_that_dies_is_told(dataset: dk.Dataset) -> None:
    def own(model: nn.Module, batches: Batches, context: FitContext) -> None:
        if context.part[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for batch in batches:
            context.loss(model(batch["x"]), batch).backward()

    task = Task(Training(fit=own, processes=2), 0, np.arange(400))
    with pytest.raises(TrainingError, match=r"process 1 of the 2 that train was ended by SIGKILL \(that can mean"):
        train_together(make_model(), dataset.at(1), task, device=CPU, on_batch=lambda samples: None)


def test_a_loop_of_ones_own_shares_its_gradients(dataset: dk.Dataset) -> None:
    def own(model: nn.Module, batches: Batches, context: FitContext) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for batch in batches:
            optimizer.zero_grad()
            context.loss(model(batch["x"]), batch).backward()
            optimizer.step()
        context.report(rank=context.part[0], processes=context.part[1])
        if context.part[1] == 2:  # what is left of Gloo could abort a Python that ends, so none may
            atexit.register(os.abort)

    training = {"batch_size": 50, "fit": own}
    alone, one, together, two = both(dataset, None, training=training, keys=np.arange(400))
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert (one.history, two.history) == ([{"rank": 0, "processes": 1}], [{"rank": 0, "processes": 2}])


def test_a_run_killed_while_two_processes_train_goes_on_from_there(dataset: dk.Dataset, tmp_path: Path) -> None:
    passes = tmp_path / "passes"
    passes.touch()
    training = dk.Training(batch_size=40, lr=0.02, processes=2, checkpoint=5, device="cpu")
    options: dict[str, Any] = {"trigger": dk.triggers.Amount(3000), "training": training}
    undisturbed = replayed(make_pipeline(dataset, model=Noisy, **options))
    run = make_pipeline(dataset, model=lambda: Noisy(0.01, passes), **options).start()
    until(run, lambda: passes.stat().st_size >= 2 * 30)  # of 2 * 60
    run.pause()
    deadline = time.monotonic() + 60
    while run.status != "paused":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    stood = passes.stat().st_size
    time.sleep(1)
    assert passes.stat().st_size == stood
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(10) == "interrupted"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    run.resume()
    assert run.wait(120) == "finished", run.error
    assert models(run) == models(undisturbed)
    assert passes.stat().st_size < 2 * (60 + 15)


def test_more_processes_than_devices_are_refused(dataset: dk.Dataset) -> None:
    with pytest.raises(InvalidInput, match="processes=2 needs CUDA or the CPU, not meta; add device='cpu'"):
        train_together(
            make_model(),
            dataset.at(1),
            Task(Training(processes=2), 0, np.arange(4)),
            device=torch.device("meta"),
            on_batch=lambda samples: None,
        )


def _trainers(before: list[psutil.Process]) -> list[psutil.Process]:
    children = [child for child in psutil.Process().children() if child not in before]
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
