"""Batch-then-sample: of every batch, exactly the chosen samples are trained on, with their weights."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from streams import make_model, make_pipeline, replayed
from test_training import trained
from test_training_resume import Noisy
from torch import nn

import dynkit as dk
from dynkit.data import Batches
from dynkit.data.batches import take_batch
from dynkit.errors import PolicyError, TrainingError
from dynkit.training import Training, seeded
from dynkit.training.scores import KINDS, per_sample


@dataclass(frozen=True)
class Top:
    """The largest scores."""

    fraction: float
    kind: str = "loss"

    def choose(self, scores: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        return scores.topk(max(1, round(self.fraction * len(scores)))).indices, None


@dataclass(frozen=True)
class Drawn:
    """By chance in proportion to the scores, with weights that make up for it."""

    fraction: float
    kind: str = "grad_norm"

    def choose(self, scores: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        p = scores / scores.sum()
        rows = torch.multinomial(p, max(1, round(self.fraction * len(scores))), generator=rng)
        return rows, 1 / (len(scores) * p[rows])


def by_hand(
    dataset: dk.Dataset, selection: Any, *, accumulate: int = 1, weights: np.ndarray | None = None
) -> tuple[nn.Module, list[float]]:
    """SGD on the chosen samples of each of the batches of `trained`."""
    with seeded(0):
        model, rng = make_model(), torch.Generator().manual_seed(0)
        keys = np.arange(500)
        batches = list(Batches(dataset.open(), keys, batch_size=50, shuffle=True, seed=1, weights=weights))
    losses = []
    for group in (batches[i : i + accumulate] for i in range(0, len(batches), accumulate)):
        x, y, w = [], [], []
        for batch in group:
            scores = per_sample(selection.kind, model(batch["x"]).detach(), batch["label"], "cross_entropy")
            rows, weight = selection.choose(scores, rng)
            weight = torch.ones(len(rows)) if weight is None else weight
            x.append(batch["x"][rows])
            y.append(batch["label"][rows])
            w.append(weight * batch["weight"][rows] if weights is not None else weight)
        each = nn.functional.cross_entropy(model(torch.cat(x)), torch.cat(y), reduction="none")
        loss = (each * torch.cat(w)).sum() / torch.cat(w).sum()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    "selection", [Top(0.5), Drawn(0.3), dk.selection.Entropy(fraction=0.1), dk.selection.Loss(fraction=0.5)]
)
def test_the_chosen_samples_are_trained_on(
    dataset: dk.Dataset, selection: Any, accumulate: int, weighted: bool
) -> None:
    weights = np.random.default_rng(0).exponential(size=500).astype(np.float32) if weighted else None
    settings = Training(batch_size=50, optimizer="sgd", lr=0.1, batch_selection=selection, accumulate=accumulate)
    model, context = trained(dataset, settings, weights=weights)
    expected, losses = by_hand(dataset, selection, accumulate=accumulate, weights=weights)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    sizes = [min(accumulate, 10 - i) for i in range(0, 10, accumulate)]
    assert context.history[0]["loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-4)
    assert context.history[0]["kept"] == 10 * round(selection.fraction * 50)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amp", [False, "bf16"])
def test_every_kind_of_score_learns(dataset: dk.Dataset, kind: str, amp: Any) -> None:
    selection = Top(0.5, kind) if kind != "margin" else Drawn(0.5, "margin")
    model, _ = trained(dataset, Training(epochs=15, batch_size=50, lr=0.03, batch_selection=selection, amp=amp))
    samples = dataset.read(range(500))
    with torch.no_grad():
        assert float((model(samples["x"]).argmax(1) == samples["label"]).float().mean()) > 0.8


def test_scores_are_of_the_model_as_it_is_evaluated(dataset: dk.Dataset) -> None:
    """No dropout, and batch statistics of the kept samples only."""
    seen: list[tuple[bool, int]] = []

    class Noting(Noisy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, len(x)))
            return super().forward(x)

    model, _ = trained(dataset, Training(batch_size=50, batch_selection=Top(0.2)), Noting())
    assert seen == [(False, 50), (True, 10)] * 10
    assert model.layers[1].num_batches_tracked == 10  # type: ignore[index,union-attr]


def test_losses_that_are_not_numbers_are_told(dataset: dk.Dataset) -> None:
    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return outputs.sum(1) * math.nan

    with pytest.raises(TrainingError, match="the loss is nan in epoch 1 by batch 1"):
        trained(dataset, Training(loss=loss, batch_selection=Top(0.5)))
    with pytest.raises(TrainingError, match=r"scores of a batch \(loss\) are not finite"):
        trained(dataset, Training(loss=loss, batch_selection=Drawn(0.5, "loss")))


def test_a_choice_of_nothing_is_told(dataset: dk.Dataset) -> None:
    class Nothing(Top):
        def choose(self, scores: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, None]:
            return torch.zeros(0, dtype=torch.int64), None

    with pytest.raises(PolicyError, match="chose no sample out of"):
        trained(dataset, Training(batch_selection=Nothing(0.5)))


def test_jagged_samples_are_taken_whole() -> None:
    rows = torch.tensor([3, 0, 0, 2])
    lists = [torch.arange(n) + 10 * n for n in (2, 0, 5, 1)]
    batch = {"t": torch.nested.nested_tensor(lists, layout=torch.jagged), "label": torch.arange(4)}
    taken = take_batch(batch, rows)
    assert taken["label"].equal(rows)
    assert [one.tolist() for one in taken["t"].unbind()] == [lists[i].tolist() for i in rows.tolist()]


def test_a_run_trains_so(dataset: dk.Dataset) -> None:
    training = dk.Training(batch_size=64, lr=1e-2, batch_selection=dk.selection.GradNorm(fraction=0.25))
    first, second = (replayed(make_pipeline(dataset, training=training)) for _ in range(2))
    assert [one.model for one in first.trained] == [one.model for one in second.trained]
    plain = replayed(make_pipeline(dataset, training=dk.Training(batch_size=64, lr=1e-2)))
    assert first.trained[0].model != plain.trained[0].model
