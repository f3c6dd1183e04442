"""A step is what it says: which optimizer moves which weights, by which rate, from how many batches, in which precision."""

import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from streams import make_model
from test_training import CPU, trained
from torch import nn

import dynkit as dk
from dynkit.data import Batches
from dynkit.errors import InvalidInput, SpecError, TrainingError
from dynkit.training import FitContext, Optimizer, Schedule, Training, fit, seeded
from dynkit.training.optimizers import make_optimizers


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x).relu())


def one_step(
    dataset: dk.Dataset, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], nn.Module]:
    """Weights before and after one step on 500 samples, and the model with its gradients."""
    with seeded(0):
        model = TwoParts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(dataset, Training(batch_size=500, **settings), model)
    return before, dict(model.state_dict()), model


# -- optimizers ------------------------------------------------------------------------------------------------------


def test_each_part_of_a_model_has_its_optimizer(dataset: dk.Dataset) -> None:
    before, after, model = one_step(
        dataset,
        optimizer=[
            Optimizer("sgd", modules="backbone", lr=0.5),
            Optimizer("sgd", modules="*.bias", lr=0.25, weight_decay=0.1),
            Optimizer("adam"),
        ],
        lr=0.01,
    )
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(after["backbone.weight"], before["backbone.weight"] - 0.5 * gradient["backbone.weight"])
    torch.testing.assert_close(after["backbone.bias"], before["backbone.bias"] - 0.5 * gradient["backbone.bias"])
    decayed = gradient["head.bias"] + 0.1 * before["head.bias"]
    torch.testing.assert_close(after["head.bias"], before["head.bias"] - 0.25 * decayed)
    step = after["head.weight"] - before["head.weight"]  # Adam's first step is lr * sign(gradient)
    torch.testing.assert_close(step, -0.01 * gradient["head.weight"].sign(), rtol=1e-3, atol=1e-6)


def test_optimizers_stay_in_the_order_of_the_settings() -> None:
    made = make_optimizers(TwoParts(), Training(optimizer=[Optimizer("adam"), Optimizer("sgd", modules="head")]))
    assert [type(one).__name__ for one in made] == ["Adam", "SGD"]
    assert [len(one.param_groups[0]["params"]) for one in made] == [2, 2]


def test_options_reach_the_optimizer(dataset: dk.Dataset) -> None:
    (made,) = make_optimizers(make_model(), Training(optimizer=Optimizer("sgd", options={"momentum": 0.9}), lr=0.1))
    assert made.defaults["momentum"] == 0.9
    assert made.defaults["lr"] == 0.1


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        ([Optimizer("sgd", modules="head")], "backbone.weight, backbone.bias of the model have no optimizer"),
        ([Optimizer(), Optimizer("sgd", modules="top")], "modules='top'; the model has backbone, head"),
        ([Optimizer("sgd", modules="*"), Optimizer()], "no parameter is left for the optimizer of modules=None"),
        ([Optimizer("sgd", options={"momentun": 0.9})], "refuses {'momentun': 0.9}"),
    ],
)
def test_parameters_without_an_optimizer_are_told(optimizers: list[Optimizer], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make_optimizers(TwoParts(), Training(optimizer=optimizers))


# -- schedules -------------------------------------------------------------------------------------------------------


class Watched(torch.optim.SGD):
    """Notes its learning rate at every step."""

    seen: list[float]

    def step(self, closure: Any = None) -> Any:
        self.seen.append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates(dataset: dk.Dataset, schedule: Any, **settings: Any) -> list[float]:
    """Learning rate of each of 20 steps."""

    class Here(Watched):
        seen: list[float] = []  # noqa: RUF012  # this is what is looked at

    options = {"epochs": 2, "batch_size": 50, "lr": 1.0, "schedule": schedule, **settings}
    trained(dataset, Training(optimizer=lambda p, lr: Here(p, lr), **options))
    return Here.seen


@pytest.mark.parametrize(
    ("schedule", "decline"),
    [
        (Schedule("constant", warmup=5), lambda t: 1.0),
        (Schedule("linear", warmup=5), lambda t: 1 - t),
        (Schedule("cosine", warmup=0.25), lambda t: (1 + math.cos(math.pi * t)) / 2),
        (Schedule("polynomial", warmup=5, power=3, end=0.1), lambda t: 0.1 + 0.9 * (1 - t) ** 3),
        ("polynomial", lambda t: (1 - t) ** 2),
    ],
)
def test_schedules_rise_and_decline(dataset: dk.Dataset, schedule: Any, decline: Any) -> None:
    warmup = 0 if isinstance(schedule, str) else 5
    expected = [(i + 1) / 5 for i in range(warmup)] + [decline(i / (20 - warmup)) for i in range(20 - warmup)]
    assert rates(dataset, schedule) == pytest.approx(expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=n + 1),
        lambda o, n: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7),
    ],
)
def test_a_scheduler_of_torch_is_stepped_after_every_step(dataset: dk.Dataset, make: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, expected = make(optimizer, 20), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(dataset, make) == pytest.approx(expected)


def test_a_scheduler_that_follows_the_loss_sees_that_of_each_epoch(dataset: dk.Dataset) -> None:
    def plateau(optimizer: Any, steps: int) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)

    seen = rates(dataset, plateau, epochs=4, lr=0.5)  # no epoch is ten times better than the best: halved after each
    assert seen == [0.5] * 10 + [0.25] * 10 + [0.125] * 10 + [0.0625] * 10


def test_accumulated_steps_are_what_schedules_count(dataset: dk.Dataset) -> None:
    assert rates(dataset, "linear", accumulate=4) == pytest.approx([1 - i / 6 for i in range(6)])


# -- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighted", "loss"), [(False, "cross_entropy"), (True, "cross_entropy"), (False, nn.CrossEntropyLoss())]
)
def test_accumulated_batches_are_one_large_batch(dataset: dk.Dataset, weighted: bool, loss: Any) -> None:
    weights = np.random.default_rng(0).exponential(size=500).astype(np.float32) if weighted else None
    settings: dict[str, Any] = {"epochs": 3, "optimizer": "sgd", "lr": 0.5, "loss": loss, "grad_clip": 0.4}
    large, report = trained(dataset, Training(batch_size=120, **settings), weights=weights)
    small, other = trained(dataset, Training(batch_size=30, accumulate=4, **settings), weights=weights)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert [r["loss"] for r in report.history] == pytest.approx([r["loss"] for r in other.history], rel=1e-5)


# -- average of the weights ------------------------------------------------------------------------------------------


def test_the_average_is_what_comes_out_and_what_is_validated(dataset: dk.Dataset) -> None:
    seen: list[list[torch.Tensor]] = []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            seen.append([parameter.detach().clone() for parameter in self.param_groups[0]["params"]])
            return result

    settings = Training(epochs=3, batch_size=50, optimizer=lambda p, lr: Noting(p, lr), lr=0.5, ema=0.8, validation=0.2)
    model, context = trained(dataset, settings)
    average = seen[0]
    for n, weights in enumerate(seen[1:], 1):
        decay = min(0.8, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for a, b in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(a.detach(), b)
    samples = dataset.read(range(500, 700))
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(samples["x"]), samples["label"]))
    assert context.history[-1]["validation_loss"] == pytest.approx(loss, rel=1e-4)


def test_an_average_has_the_newest_statistics_of_batches(dataset: dk.Dataset) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    plain, _ = trained(dataset, Training(batch_size=50, optimizer="sgd", lr=1e-9), model())
    averaged, _ = trained(dataset, Training(batch_size=50, optimizer="sgd", lr=1e-9, ema=0.99), model())
    assert averaged[1].num_batches_tracked == plain[1].num_batches_tracked == 10  # type: ignore[index]


# -- precision and compilation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (True, torch.bfloat16)])
def test_the_precision_is_the_one_that_was_asked_for(dataset: dk.Dataset, amp: Any, dtype: torch.dtype) -> None:
    seen = set()

    class Noting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs = super().forward(x)
            seen.add(outputs.dtype)
            return outputs

    with seeded(0):
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), Noting(8, 2))
    _, context = trained(dataset, Training(epochs=8, batch_size=50, lr=0.03, amp=amp, grad_clip=1.0), model)
    assert seen == {dtype}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert context.history[-1]["loss"] < 0.4


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, where it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_model_learns_the_same(dataset: dk.Dataset) -> None:
    plain, _ = trained(dataset, Training(epochs=2, batch_size=60, lr=0.03))
    compiled, _ = trained(dataset, Training(epochs=2, batch_size=60, lr=0.03, compile=True))
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Training(accumulate=0), "accumulate=0"),
        (lambda: Training(processes=1.5), "processes=1.5"),
        (lambda: Training(processes=2, device="cuda:1"), "device='cuda:1' is one; processes=2 need device='cuda'"),
        (lambda: Training(ema=1), "ema=1 must be a decay between 0 and 1"),
        (lambda: Training(amp="half"), "amp='half' must be"),
        (lambda: Training(checkpoint="5"), "checkpoint: '5' is not a duration"),
        (lambda: Training(checkpoint="1mo"), "checkpoint: '1mo' follows the calendar"),
        (lambda: Training(checkpoint=0), "checkpoint=0"),
        (lambda: Training(carry_optimizer=True), "add warm_start=True"),
        (lambda: Training(batch_selection=3), "batch_selection=3 does not choose by scores"),
        (lambda: Training(optimizer=[]), r"optimizer=\[\] must be"),
        (lambda: Training(optimizer=3), "optimizer=3 must be"),
        (lambda: Training(optimizer=["sgd", 3]), "optimizer=3 is not known"),
        (lambda: Training(optimizer=[Optimizer(), "sgd"]), "give one of them modules"),
        (lambda: Optimizer("adm"), "did you mean 'adam'"),
        (lambda: Optimizer(modules=["head", 3]), r"modules=\['head', 3\]"),
        (lambda: Optimizer(lr=-1), "lr=-1"),
        (lambda: Optimizer(options=3), "options=3"),
        (lambda: Schedule("cosin"), "did you mean 'cosine'"),
        (lambda: Schedule(warmup=2.5), "warmup=2.5"),
        (lambda: Schedule(warmup=-1), "warmup=-1"),
        (lambda: Schedule(end=2), "end=2"),
        (lambda: Schedule(power=0), "power=0"),
    ],
)
def test_wrong_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_equal_seeds_give_equal_models(dataset: dk.Dataset) -> None:
    settings = Training(epochs=2, batch_size=30, accumulate=3, ema=0.9, schedule=Schedule("cosine", warmup=0.1))
    a, _ = trained(dataset, settings)
    b, _ = trained(dataset, settings)
    assert all(x.equal(y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_batch_can_be_begun_at(dataset: dk.Dataset) -> None:
    def batches() -> Batches:
        return Batches(dataset.open(), np.arange(301), batch_size=30, shuffle=True, seed=4, last="join")

    whole = batches()
    epochs = [list(whole) for _ in range(3)]
    for epoch, start in [(0, 3), (1, 0), (2, 9), (2, 10)]:
        later = batches()
        later.seek(epoch, start)
        assert later.passed == 301 * epoch + sum(len(batch["label"]) for batch in epochs[epoch][:start])
        for a, b in zip(later, epochs[epoch][start:], strict=True):
            assert a["x"].equal(b["x"])
        assert later.passed == 301 * (epoch + 1)
        if epoch < 2:
            assert next(iter(later))["x"].equal(epochs[epoch + 1][0]["x"])


def test_the_context_has_what_a_loop_of_ones_own_needs(dataset: dk.Dataset) -> None:
    context = FitContext(Training(checkpoint=1), CPU)
    assert context.checkpoint.load() is None
    assert not context.checkpoint.due(1)  # it was given no file
    batches = Batches(dataset.open(), np.arange(100), batch_size=10)
    fit(make_model(), batches, context)
    assert len(context.carried) == 1


def test_settings_are_the_same_in_yaml(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    text = """\
dataset: stream
model: make
trigger: {amount: 500}
selection: all
training:
  optimizer:
    - sgd: {modules: [head, "*.bias"], lr: 0.5, options: {momentum: 0.9}, schedule: {linear: {end: 0.1}}}
    - adamw
    - own: {modules: backbone}
  schedule: {cosine: {warmup: 0.1}}
  accumulate: 4
  ema: 0.99
  amp: bf16
  compile: true
  processes: 2
  checkpoint: 30s
  batch_selection: {loss: {fraction: 0.5}}
"""
    names = {"make": make_model, "own": torch.optim.Adamax}
    training = dk.pipeline.build(text, ws.catalog, name="p", namespace=names).training
    assert training == Training(
        optimizer=[
            Optimizer(
                "sgd",
                modules=["head", "*.bias"],
                lr=0.5,
                options={"momentum": 0.9},
                schedule=Schedule("linear", end=0.1),
            ),
            "adamw",
            Optimizer(torch.optim.Adamax, modules="backbone"),
        ],
        schedule=Schedule("cosine", warmup=0.1),
        accumulate=4,
        ema=0.99,
        amp="bf16",
        compile=True,
        processes=2,
        checkpoint="30s",
        batch_selection=dk.selection.Loss(fraction=0.5),
    )
    for old, new, message in [
        ("accumulate: 4", "accumulate: 0", "line 11: training.accumulate: accumulate=0"),
        ("{warmup: 0.1}", "{warm: 0.1}", r"line 10: training.schedule.cosine.warm: .*did you mean 'warmup'"),
        ("lr: 0.5", "lr: -1", r"line 7: training.optimizer.0.sgd.lr: lr=-1"),
        ("    - adamw", "    - adam2", r"line 8: training.optimizer.1: .*did you mean 'adam'"),
    ]:
        with pytest.raises(SpecError, match=message):
            dk.pipeline.build(text.replace(old, new), ws.catalog, name="p", namespace=names)
