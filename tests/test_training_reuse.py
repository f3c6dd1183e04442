"""A second forward pass that takes what the first computed gives what it gives without, and computes less."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dynkit.training import seeded
from dynkit.training.reuse import Kept, Recorded

N = 24
ROWS = torch.tensor([17, 2, 2, 9, 23, 0])


class Residual(nn.Module):
    """One layer used twice, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x).tanh()
        return self.head(x + self.layer(h))


class Tokens(nn.Module):
    """Several rows of a matrix for each sample, batch first or second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.token = nn.Linear(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.layers = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.token(x.unflatten(1, (4, 2)))
        if not self.batch_first:
            h = h.transpose(0, 1).contiguous()
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.layers(h).mean(1 if self.batch_first else 0)


def tokens() -> nn.Module:
    return Tokens(batch_first=True)


def tokens_second() -> nn.Module:
    return Tokens(batch_first=False)


class Similar(nn.Module):
    """Rows that depend on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x @ x.mT).softmax(1) @ x + x.mean(0))


class Doubling(nn.Module):
    """Weights that change at each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale *= 2
        return functional.linear(x, self.layer.weight * self.scale, self.layer.bias)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3))


def in_place() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.Hardswish(True), nn.Linear(32, 3)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(6, 4, 1), nn.SiLU(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def token_wise() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (4, 2)), nn.Linear(2, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Flatten(), nn.Linear(256, 3)
    )


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))


def regularised() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Linear(16, 3))


NETWORKS: dict[Callable[[], nn.Module], float] = {  # at most this share of the second pass is computed
    perceptron: 0.0,
    convolutional: 0.0,
    Residual: 0.0,
    token_wise: 0.0,
    in_place: 1.0,
    normalised: 0.9,
    regularised: 0.9,
    tokens: 1.0,
    tokens_second: 1.0,
    Similar: 1.0,
    Doubling: 1.0,
}


def passed(model: nn.Module, x: torch.Tensor, *, reuse: bool) -> tuple[torch.Tensor, int]:
    """Score all rows of a batch, then learn from some; return the outputs, and the operations of the second pass."""
    recorded = Recorded()
    model.eval()
    with torch.no_grad(), recorded:
        model(x)
    model.train()
    with FlopCounterMode(display=False) as flops:
        if reuse:
            with Kept(recorded, ROWS, N):
                outputs = model(x[ROWS])
        else:
            outputs = model(x[ROWS])
    outputs.square().sum().backward()
    return outputs, flops.get_total_flops()


@pytest.mark.parametrize(("make", "share"), NETWORKS.items(), ids=[make.__name__ for make in NETWORKS])
def test_outputs_and_gradients_are_those_of_a_pass_of_its_own(make: Callable[[], nn.Module], share: float) -> None:
    found = []
    for reuse in (True, False):
        with seeded(0):
            model = make()
            outputs, flops = passed(model, torch.randn(N, 8), reuse=reuse)
            found.append((outputs, [p.grad for p in model.parameters()], [*model.buffers()], flops))
    (outputs, *gradients, flops), (expected, *others, all_flops) = found
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, others, rtol=1e-5, atol=1e-5)
    assert flops <= share * all_flops


@pytest.mark.parametrize("rows", [torch.arange(N).flip(0), torch.arange(N) // 2], ids=["all", "twice"])
def test_as_many_rows_as_before_are_not_taken_for_something_else(rows: torch.Tensor) -> None:
    """Where samples are the second dimension, rows are not samples, though they may be as many."""

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, N * 2), nn.LayerNorm(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x).unflatten(1, (N, 2)).transpose(0, 1)
            over_all = functional.layer_norm(x.relu(), x.shape)
            return self.norm(h.relu())[:N].mean(0) + self.norm(self.first(x)[:, :2].relu()) + over_all[:, :2]

    with seeded(0):
        model, x = Second(), torch.randn(N, 8)
    recorded = Recorded()
    with torch.no_grad():
        with recorded:
            model(x)
        with Kept(recorded, rows, N):
            outputs = model(x[rows])
        torch.testing.assert_close(outputs, model(x[rows]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", ["input", "weight", "order"])
def test_what_is_not_the_same_is_computed(changed: str) -> None:
    with seeded(0):
        model, x = perceptron(), torch.randn(N, 8)
    recorded = Recorded()
    with torch.no_grad(), recorded:
        model(x)
    inputs = x[ROWS]
    with torch.no_grad():
        if changed == "input":
            inputs[3, 5] += 1
        elif changed == "weight":
            model[0].weight += 1  # type: ignore[operator,index]
        else:
            inputs = inputs.flip(0)
        with Kept(recorded, ROWS, N):
            outputs = model(inputs)
        torch.testing.assert_close(outputs, model(inputs), rtol=1e-5, atol=1e-6)
