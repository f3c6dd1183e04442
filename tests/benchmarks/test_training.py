"""What batch-then-sample costs, and what the settings of a training cost that does not use them.

``make bench`` prints the tables. The yardstick of batch-then-sample is the least that it can do: a forward and
backward pass of the kept samples with a step of the optimizer, and a forward pass of the dropped ones without
gradients, on the same batches; which samples are kept is known beforehand there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from racing import raced
from torch import nn
from torch.nn import functional

import dynkit as dk
from dynkit.data import Batches
from dynkit.training import FitContext, Training, fit, seeded

N, SIDE, BATCH = 2048, 28, 256
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Top:
    """The largest scores."""

    fraction: float
    kind: str = "loss"

    def choose(self, scores: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, None]:
        return scores.topk(round(self.fraction * len(scores))).indices, None


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def deeper() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dk.Dataset:
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(N, 1, SIDE, SIDE)).astype(np.float32)}
    ws = dk.Workspace(tmp_path_factory.mktemp("ws"))
    times = np.datetime64("2020-01-01", "ns") + np.arange(N)
    return ws.ingest(
        "images", {**arrays, "label": rng.integers(0, 10, N), "timestamp": times}, timestamp="timestamp", label="label"
    )


def batches(dataset: dk.Dataset) -> Batches:
    return Batches(dataset.open(), np.arange(N), batch_size=BATCH, shuffle=True, seed=1)


def least(dataset: dk.Dataset, model: nn.Module, kept: int) -> None:
    """Train on the first `kept` samples of each batch, and look at the others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for batch in batches(dataset):
        with torch.no_grad():
            functional.cross_entropy(model(batch["x"][kept:]), batch["label"][kept:], reduction="none")
        loss = functional.cross_entropy(model(batch["x"][:kept]), batch["label"][:kept])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trained(dataset: dk.Dataset, model: nn.Module, **settings: Any) -> None:
    fit(model, batches(dataset), FitContext(Training(batch_size=BATCH, **settings), CPU))


@pytest.mark.parametrize("make", [perceptron, convolutional, deeper])
def test_batch_then_sample_against_the_least_it_can_cost(images: dk.Dataset, make: Callable[[], nn.Module]) -> None:
    torch.set_num_threads(1)
    with seeded(0):
        model = make()
    print(f"\n{make.__name__}, {N} samples in batches of {BATCH}, 1 thread")
    print(f"{'kept':>8} {'seconds':>8} {'least':>8} {'ratio':>6} {'/ all samples':>14}")
    for fraction in (0.5, 0.25, 0.125):
        median = raced(
            {
                "selected": lambda f=fraction: trained(images, model, batch_selection=Top(f)),
                "least": lambda f=fraction: least(images, model, round(f * BATCH)),
                "all": lambda: trained(images, model),
            },
            rounds=15,
        )
        ratios = median["selected"] / median["least"], median["selected"] / median["all"]
        print(f"{fraction:8} {median['selected']:8.3f} {median['least']:8.3f} {ratios[0]:6.2f} {ratios[1]:14.2f}")


def test_checkpoints_accumulation_and_averages_cost(images: dk.Dataset, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with seeded(0):
        model = perceptron()
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "accumulate=2": {"accumulate": 2},
        "ema=0.999": {"ema": 0.999},
        "grad_clip=1": {"grad_clip": 1.0},
        "cosine, warm-up": {"schedule": dk.training.Schedule("cosine", warmup=0.1)},
    }
    median = raced({name: lambda s=some: trained(images, model, **s) for name, some in settings.items()})
    print(f"\nperceptron, {N} samples, one epoch")
    for name, seconds in median.items():
        print(f"{name:16} {seconds:8.3f} {seconds / median['plain']:6.2f}")
