"""Selections by a score: chances and weights against closed forms, order against sorted scores, RHO-LOSS by hand."""

from itertools import permutations
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy import special, stats
from test_selection import STREAM, picked, view_of
from torch import nn

from dynkit import selection, testing
from dynkit.errors import InvalidInput, PolicyError

SCORES = torch.tensor([4.0, 1.0, 2.0, 0.5, 2.5])
P = (SCORES / SCORES.sum()).numpy()


@pytest.mark.parametrize("policy", [selection.Loss(n=1), selection.GradNorm(n=1)])
def test_one_draw_has_the_chance_of_its_score_and_weight_one_over_n_p(policy: Any) -> None:
    rng, counts = torch.Generator().manual_seed(0), np.zeros(5)
    for _ in range(4000):
        rows, weights = policy.choose(SCORES, rng)
        counts[rows] += 1
        assert weights.numpy() == pytest.approx(1 / (5 * P[rows]), rel=1e-5)
    assert stats.chisquare(counts, 4000 * P).pvalue > 1e-3


def test_several_draws_follow_each_other_without_replacement() -> None:
    expected = np.zeros(5)  # chance of each to be among three successive draws
    for a, b, c in permutations(range(5), 3):
        expected[[a, b, c]] += P[a] * P[b] / (1 - P[a]) * P[c] / (1 - P[a] - P[b])
    rng, counts = torch.Generator().manual_seed(1), np.zeros(5)
    for _ in range(4000):
        rows, _ = selection.Loss(n=3).choose(SCORES, rng)
        counts[rows] += 1
    assert np.abs(counts / 4000 - expected).max() < 4 * 0.5 / 4000**0.5


def test_the_weighted_mean_of_drawn_samples_is_that_of_all_in_expectation() -> None:
    values, rng = torch.tensor([1.0, -2.0, 3.0, 10.0, 5.0]), torch.Generator().manual_seed(2)
    draws = [selection.GradNorm(n=1).choose(SCORES, rng) for _ in range(20_000)]
    found = torch.cat([weights * values[rows] for rows, weights in draws if weights is not None])
    assert abs(float(found.mean()) - float(values.mean())) < 4 * float(found.std()) / 20_000**0.5


def test_samples_without_loss_can_be_drawn_and_no_weight_exceeds_a_thousand() -> None:
    scores = torch.tensor([0.0, 0.0, 0.0, 1.0])
    rows, weights = selection.Loss(n=4).choose(scores, torch.Generator().manual_seed(0))
    assert sorted(rows.tolist()) == [0, 1, 2, 3]
    assert weights is not None and weights.max() == pytest.approx(1000, rel=0.01)
    rows, weights = selection.Loss(n=2).choose(torch.zeros(4), torch.Generator().manual_seed(0))
    assert weights is not None and weights.tolist() == [1, 1]


def test_a_batch_is_not_balanced() -> None:
    with pytest.raises(InvalidInput, match="balance=True needs the whole pool"):
        selection.Loss(n=2, balance=True).choose(SCORES, torch.Generator())


def probabilities(pool: pl.DataFrame, ends: list[int]) -> np.ndarray[Any, Any]:
    return np.asarray(special.softmax(view_of(pool, ends, model=True).predict(pool["key"]).numpy(), axis=1))


def test_uncertain_samples_come_in_the_order_of_their_probabilities() -> None:
    p = np.sort(probabilities(STREAM, [300]), axis=1)
    by = {
        selection.Margin: p[:, -2] - p[:, -1],
        selection.LeastConfidence: -p[:, -1],
        selection.Entropy: special.entr(p).sum(1),
    }
    for kind, uncertainty in by.items():
        chosen = picked(kind(n=40), STREAM, [300], model=True)
        assert set(chosen["key"]) == set(np.argsort(-uncertainty)[:40].tolist())
        assert chosen["key"].is_sorted()
        expected = np.abs(uncertainty[chosen["key"].to_numpy()])
        found = 1 - chosen["score"] if kind is selection.LeastConfidence else chosen["score"]
        assert found.to_numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("policy", [selection.Loss(n=100, balance=True), selection.Entropy(n=100, balance=True)])
def test_balanced_selections_take_every_class_at_one_ratio(policy: Any) -> None:
    labels = STREAM["label"].to_numpy()
    chosen = picked(policy, STREAM, [300], model=True)
    taken = np.bincount(labels[chosen["key"].to_numpy()])
    assert taken.sum() == 100
    assert np.abs(taken - np.bincount(labels) / 6).max() < 1


def test_balanced_weights_are_those_of_each_class_alone() -> None:
    losses = view_of(STREAM, [300], model=True).score("loss", STREAM["key"]).numpy()
    labels = STREAM["label"].to_numpy()
    chosen = picked(selection.Loss(n=100, balance=True), STREAM, [300], model=True)
    rows = chosen["key"].to_numpy()
    assert chosen["score"].to_numpy() == pytest.approx(losses[rows])
    for label in range(3):
        mine = losses[labels == label]
        chances = np.maximum(mine, 1e-3 * mine.mean())
        own = labels[rows] == label
        chance = np.maximum(losses[rows][own], 1e-3 * mine.mean()) / chances.sum()
        assert chosen["weight"].to_numpy()[own] == pytest.approx(1 / (len(mine) * chance), rel=1e-4)


def test_without_a_model_samples_are_drawn_uniformly() -> None:
    for policy in (selection.Loss(fraction=0.1), selection.RhoLoss(fraction=0.1), selection.KCenter(fraction=0.1)):
        assert picked(policy, STREAM, []).equals(picked(selection.Random(fraction=0.1), STREAM, []))


def test_scores_that_are_not_finite_are_an_error() -> None:
    view = view_of(STREAM, [300], model=True)
    assert view.model is not None
    nn.init.constant_(next(view.model.parameters()), float("inf"))
    for policy in (selection.Loss(n=5), selection.Craig(n=5)):
        with pytest.raises(PolicyError, match="finite"):
            policy(STREAM, view, np.random.default_rng(0))


class Watching(testing.StreamView):
    """Notes which samples trained each model."""

    def fit(self, keys: Any, *, seed: int) -> nn.Module:
        model = super().fit(keys, seed=seed)
        self.__dict__.setdefault("fitted", []).append((set(keys), model))
        return model


@pytest.mark.parametrize("twin", [False, True])
def test_rho_loss_takes_the_largest_loss_less_that_of_a_model_which_has_not_seen_the_sample(twin: bool) -> None:
    plain = view_of(STREAM, [300], model=True)
    view = Watching(past=plain.past, trained=plain.trained, model=plain.model)
    chosen = selection.RhoLoss(n=25, twin=twin, holdout=0.2)(STREAM, view, np.random.default_rng(0))
    assert isinstance(chosen, pl.DataFrame)
    fitted = view.__dict__["fitted"]
    assert [len(keys) for keys, _ in fitted] == ([300, 300] if twin else [120])
    reducible: dict[int, float] = {}
    for keys, model in fitted:
        others = [key for key in STREAM["key"] if key not in keys]
        difference = view.score("loss", others) - view.score("loss", others, model=model)
        reducible |= dict(zip(others, difference.tolist(), strict=True))
    best = sorted(reducible, key=lambda key: -reducible[key])[:25]
    assert chosen["key"].to_list() == sorted(best)
    assert chosen["score"].to_list() == pytest.approx([reducible[key] for key in sorted(best)], abs=1e-5)


class Noisy(testing.StreamView):
    """Every third label is that of the next class."""

    def read(self, keys: Any) -> dict[str, torch.Tensor]:
        batch = super().read(keys)
        return {"x": batch["x"], "label": (batch["label"] + torch.from_numpy(np.asarray(keys) % 3 == 0)) % 3}


def test_rho_loss_leaves_noise_alone() -> None:
    view = Noisy(past=STREAM)
    view.model = nn.Linear(8, 8)
    for parameter in view.model.parameters():
        nn.init.zeros_(parameter)  # knows nothing, so that all losses are the same
    shares = []
    for policy in (selection.Loss(n=60), selection.RhoLoss(n=60, twin=True)):
        chosen = policy(STREAM, view, np.random.default_rng(0))
        assert isinstance(chosen, pl.DataFrame)
        shares.append(float(np.mean(chosen["key"].to_numpy() % 3 == 0)))
    assert shares[0] > 0.2 and shares[1] < 0.5 * shares[0]
