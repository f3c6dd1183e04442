"""Training: batches hold exactly the selected samples, settings do what they say, wrong models are told apart."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import make_frame, make_model
from torch import nn

import dynkit as dk
from dynkit.data import Batches
from dynkit.errors import InvalidInput, TrainingError
from dynkit.training import FitContext, Training, fit, resolve_device, seeded
from dynkit.training.train import Task, train

CPU = torch.device("cpu")


@given(st.integers(1, 700), st.integers(1, 300), st.integers(0, 99), st.integers(1, 40_000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_epoch_hands_out_every_sample_once(
    dataset: dk.Dataset, n: int, size: int, seed: int, super_bytes: int
) -> None:
    keys = np.random.default_rng(seed).choice(3000, n, replace=False)
    weights = keys.astype(np.float32)
    batches = Batches(
        dataset.open(), keys, weights=weights, batch_size=size, device=CPU, shuffle=True, seed=seed, last="join"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynkit.data.batches._SUPER_BATCH_BYTES", super_bytes)
        epochs = [list(batches) for _ in range(2)]
    truth = dataset.read(keys)
    sample_of = {float(w): x for w, x in zip(weights, truth["x"], strict=True)}
    for epoch in epochs:
        assert len(epoch) == len(batches)
        assert sorted(torch.cat([batch["weight"] for batch in epoch]).tolist()) == sorted(weights.tolist())
        sizes = [len(batch["label"]) for batch in epoch]
        assert max(sizes) <= size + 1
        assert size == 1 or n == 1 or min(sizes) > 1
        assert all(
            sample_of[float(w)].equal(x) for batch in epoch for w, x in zip(batch["weight"], batch["x"], strict=True)
        )
    assert batches.passed == 2 * n
    if n > 20:
        assert not torch.cat([b["weight"] for b in epochs[0]]).equal(torch.cat([b["weight"] for b in epochs[1]]))


def trained(
    dataset: dk.Dataset, training: Training, model: nn.Module | None = None, **more: Any
) -> tuple[nn.Module, FitContext]:
    """Fit on the first 500 samples of the stream."""
    with seeded(0):
        model = make_model() if model is None else model
        keys = np.arange(500)
        batches = Batches(
            dataset.open(), keys, batch_size=training.batch_size, device=CPU, shuffle=True, seed=1, **more
        )
        validation = (
            Batches(dataset.open(), np.arange(500, 700), batch_size=64, device=CPU) if training.validation else None
        )
        context = FitContext(training, CPU, validation)
        fit(model, batches, context)
    return model, context


def test_the_loop_is_a_hand_written_one(dataset: dk.Dataset) -> None:
    model, context = trained(dataset, Training(epochs=2, batch_size=50, optimizer="sgd", lr=0.1))
    with seeded(0):
        expected = make_model()
    samples = dataset.read(range(500))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for epoch in range(2):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(1 + epoch))
        losses = []
        for rows in order.split(50):
            loss = nn.functional.cross_entropy(expected(samples["x"][rows]), samples["label"][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert context.history[epoch]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "optimizer",
    ["adam", "adamw", "sgd", "rmsprop", "adagrad", "nadam", "radam", lambda p, lr: torch.optim.Adamax(p, lr)],
)
def test_every_optimizer_learns(dataset: dk.Dataset, optimizer: Any) -> None:
    lr = 0.5 if optimizer in ("sgd", "adagrad") else 0.02
    _, context = trained(dataset, Training(epochs=8, batch_size=50, optimizer=optimizer, lr=lr))
    assert context.history[-1]["loss"] < min(0.5, 0.9 * context.history[0]["loss"])


@pytest.mark.parametrize(
    "schedule", ["constant", "linear", "cosine", lambda o, n: torch.optim.lr_scheduler.StepLR(o, n)]
)
@pytest.mark.parametrize("amp", [False, True])
def test_schedules_and_mixed_precision_learn(dataset: dk.Dataset, schedule: Any, amp: bool) -> None:
    _, context = trained(dataset, Training(epochs=8, batch_size=50, lr=0.03, schedule=schedule, amp=amp, grad_clip=1.0))
    assert context.history[-1]["loss"] < 0.4


def test_schedules_end_at_zero(dataset: dk.Dataset) -> None:
    seen: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    for schedule, middle in (("linear", 0.5), ("cosine", 0.5)):
        seen.clear()
        trained(
            dataset,
            Training(epochs=2, batch_size=50, optimizer=lambda p, lr: Watched(p, lr), lr=1.0, schedule=schedule),
        )
        assert len(seen) == 20
        assert seen[0] == 1.0
        assert seen[10] == pytest.approx(middle)
        assert seen[-1] < 0.06


def test_gradient_clipping_limits_the_step(dataset: dk.Dataset) -> None:
    before = make_model()
    start = {name: value.clone() for name, value in before.state_dict().items()}
    after, _ = trained(dataset, Training(batch_size=500, optimizer="sgd", lr=1.0, grad_clip=1e-3), before)
    moved = math.sqrt(sum(float((value - start[name]).square().sum()) for name, value in after.state_dict().items()))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_weights_weigh_the_loss(dataset: dk.Dataset) -> None:
    weights = np.concatenate([np.ones(250), np.zeros(250)]).astype(np.float32)
    model, _ = trained(dataset, Training(batch_size=500, optimizer="sgd", lr=0.1), weights=weights)
    with seeded(0):
        half = make_model()
    samples = dataset.read(range(250))
    nn.functional.cross_entropy(half(samples["x"]), samples["label"]).backward()
    for a, b in zip(model.parameters(), half.parameters(), strict=True):
        assert b.grad is not None
        torch.testing.assert_close(a, b - 0.1 * b.grad)


def test_mixed_precision_keeps_the_labels_precision(dataset: dk.Dataset) -> None:
    outputs = torch.full((2,), 1000.0, dtype=torch.bfloat16)
    context = FitContext(Training(loss="mse"), CPU)
    assert float(context.loss(outputs, {"x": outputs, "label": torch.tensor([1001.0, 1002.0])})) == 2.5


def test_a_batch_without_weight_is_no_failure() -> None:
    context = FitContext(Training(loss="mse"), CPU)
    zero = context.loss(torch.ones(2), {"x": torch.ones(2), "label": torch.zeros(2), "weight": torch.zeros(2)})
    assert float(zero) == 0


def test_reports_take_tensors_and_numpy_numbers() -> None:
    context = FitContext(Training(), CPU)
    context.report(a=torch.tensor(1.5), b=np.float32(2))
    assert context.history == [{"a": 1.5, "b": 2.0}]


def test_early_stopping_keeps_the_best(dataset: dk.Dataset) -> None:
    settings = Training(epochs=50, batch_size=50, lr=0.3, validation=0.2, patience=2)
    model, context = trained(dataset, settings)
    losses = [report["validation_loss"] for report in context.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 50
    samples = dataset.read(range(500, 700))
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(samples["x"]), samples["label"]))
    assert loss == pytest.approx(losses[best], rel=1e-4)


def returning(shape: tuple[int, ...]) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), *shape) + self.weight

    return Model()


class Strange(nn.Linear):
    def __init__(self, result: Any) -> None:
        super().__init__(3, 2)
        self.result = result

    def forward(self, x: torch.Tensor) -> Any:
        return self.result


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (returning(()), "cross_entropy", "cross_entropy needs outputs"),
        (returning((1,)), "cross_entropy", "use loss='bce'"),
        (returning((2, 2)), "cross_entropy", "cross_entropy needs outputs"),
        (returning((2,)), "mse", "mse needs one output per sample"),
        (returning((3,)), "bce", "bce needs one output per sample"),
        (Strange("text"), "mse", "the model returned str for a batch of"),
        (Strange(torch.zeros(7, 2)), "mse", r"the model returned \(7, 2\) for a batch of"),
        (Strange(None), "mse", "the model returned NoneType"),
        (nn.Flatten(), "mse", "no parameters to train"),
        (returning((2,)), lambda o, y: 3, "must return a tensor"),
        (returning((2,)), lambda o, y: o.sum() * float("nan"), "the loss is nan in epoch 1 by batch 1"),
    ],
)
def test_what_does_not_fit_together_is_told(dataset: dk.Dataset, model: nn.Module, loss: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        trained(dataset, Training(loss=loss), model)


def test_labels_beyond_the_outputs_are_told(ws: dk.Workspace) -> None:
    import polars as pl

    dataset = ws.ingest("many", make_frame(800).with_columns(pl.lit(4).alias("late")), timestamp="when", label="late")
    with pytest.raises(TrainingError, match="labels go from 4 to 4, but the model has 2 outputs"):
        trained(dataset, Training())


@pytest.mark.parametrize(("keys", "share"), [(np.repeat(np.arange(50), 4), 0.2), (np.arange(5), 0.1)])
def test_no_sample_is_trained_on_and_validated_on(dataset: dk.Dataset, keys: np.ndarray, share: float) -> None:
    seen: list[set[tuple[float, ...]]] = []

    def own(model: nn.Module, batches: Batches, context: FitContext) -> None:
        for part in (batches, context.validation):
            assert part is not None
            seen.append({tuple(row) for batch in part for row in batch["x"].tolist()})

    train(make_model(), dataset.open(), Task(Training(validation=share, fit=own), 0, keys), device=CPU)
    assert not seen[0] & seen[1]
    assert (len(seen[0]), len(seen[1])) == ((40, 10) if len(keys) == 200 else (4, 1))


def test_a_batch_from_which_samples_are_chosen_keeps_two(dataset: dk.Dataset) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    half = Training(batch_size=249, batch_selection=dk.selection.Loss(fraction=0.5))
    _, context = trained(dataset, half, model())  # 249, 249 and 2
    assert context.history[-1]["kept"] == 124 + 124 + 2
    with pytest.raises(TrainingError, match="one sample cannot train this model: Expected more than 1 value"):
        train(model(), dataset.open(), Task(Training(), 0, np.arange(1)), device=CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": None}, "epochs=None"),
        ({"accumulate": None}, "accumulate=None"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"lr": None}, "lr=None"),
        ({"weight_decay": "x"}, "weight_decay='x'"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"lr": 0}, "lr=0"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"grad_clip": -1}, "grad_clip=-1"),
        ({"validation": 1}, "validation=1"),
        ({"patience": 3}, "patience needs a validation share"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"loss": "crossentropy"}, "did you mean 'cross_entropy'"),
        ({"fit": 3}, "fit=3 is not callable"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Training(**changes)


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in {"cpu", "cuda", "mps", "xpu"}
    with pytest.raises(InvalidInput, match="device 'gpu' cannot be used"):
        resolve_device("gpu")


def test_seeding_is_local() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    with seeded(1):
        inside = torch.rand(1), np.random.rand()
    with seeded(1):
        assert (torch.rand(1), np.random.rand()) == inside
    assert torch.cat([first, torch.rand(1)]).equal(expected)
