"""Scores of samples against closed forms and scipy."""

import numpy as np
import pytest
import torch
from scipy import special, stats
from streams import make_frame, make_pipeline, replayed
from torch import nn
from torch.nn import functional

import dynkit as dk
from dynkit.errors import InvalidInput, TrainingError
from dynkit.training.scores import collect, embeddings, gradients, per_sample

RNG = np.random.default_rng(0)
LOGITS = torch.from_numpy(RNG.normal(size=(40, 5))).float()
LABELS = torch.from_numpy(RNG.integers(0, 5, 40))


def test_gradient_of_cross_entropy_is_softmax_less_one_hot() -> None:
    expected = LOGITS.softmax(1) - functional.one_hot(LABELS, 5)
    torch.testing.assert_close(gradients(LOGITS, LABELS, "cross_entropy"), expected)
    norm = per_sample("grad_norm", LOGITS, LABELS, "cross_entropy")
    np.testing.assert_allclose(norm, np.linalg.norm(expected.numpy(), axis=1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_gradient_of_one_output(shape: tuple[int, ...]) -> None:
    outputs, labels = LOGITS[:, 0].reshape(shape), LABELS % 2
    expected = (LOGITS[:, 0].sigmoid() - labels).reshape(-1, 1)
    torch.testing.assert_close(gradients(outputs, labels, "bce"), expected)
    residual = (LOGITS[:, 0] - labels).reshape(-1, 1)
    torch.testing.assert_close(gradients(outputs, labels, "mse"), 2 * residual)


def test_uncertainty_is_that_of_the_softmax() -> None:
    p = special.softmax(LOGITS.numpy().astype(np.float64), axis=1)
    ordered = np.sort(p, axis=1)
    expected = {
        "entropy": stats.entropy(p, axis=1),
        "margin": ordered[:, -1] - ordered[:, -2],
        "least_confidence": 1 - ordered[:, -1],
        "loss": -np.log(p[np.arange(40), LABELS.numpy()]),
    }
    for kind, value in expected.items():
        np.testing.assert_allclose(per_sample(kind, LOGITS, LABELS, "cross_entropy"), value, rtol=1e-5, err_msg=kind)


def test_one_output_is_scored_as_two_classes() -> None:
    two = torch.stack([torch.zeros(40), LOGITS[:, 0]], 1)
    for kind in ("entropy", "margin", "least_confidence"):
        one = per_sample(kind, LOGITS[:, 0], LABELS % 2, "bce")
        torch.testing.assert_close(one, per_sample(kind, two, LABELS % 2, "cross_entropy"))


def test_a_loss_that_is_a_mean_cannot_score() -> None:
    with pytest.raises(TrainingError, match="one value per sample"):
        per_sample("loss", LOGITS, LABELS, functional.cross_entropy)
    with pytest.raises(InvalidInput, match="did you mean 'entropy'"):
        per_sample("entrpy", LOGITS, LABELS, "cross_entropy")


class TwoHeads(nn.Module):
    """The layer that is declared first runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.body = nn.Linear(3, 8)
        self.drop = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.body(x))))


def test_embeddings_are_the_input_of_the_linear_layer_that_runs_last() -> None:
    model, x = TwoHeads(), torch.randn(30, 3)
    batches = [{"x": part} for part in x.split(7)]
    torch.testing.assert_close(embeddings(model, batches), torch.relu(model.body(x)).detach())
    assert model.training  # as it was
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    outputs = collect(model, batches, lambda outputs, batch: outputs)
    torch.testing.assert_close(outputs, model.head(torch.relu(model.body(x))).detach())


def test_a_model_without_linear_layer_is_its_own_embedding() -> None:
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten())
    x = torch.randn(5, 1, 6)
    torch.testing.assert_close(embeddings(model, [{"x": x}]), model(x).detach())


def test_a_selection_sees_scores_of_the_newest_model(tmp_path) -> None:
    dataset = dk.Workspace(tmp_path).ingest("s", make_frame(1500), timestamp="when", label="late")
    seen = []

    def hardest(pool, run, rng):  # type: ignore[no-untyped-def]
        if run.model is None:
            return pool["key"]
        keys = pool["key"][:50]
        batch = run.read(keys)
        outputs = run.model(batch["x"]).detach()
        torch.testing.assert_close(run.predict(keys), outputs)
        loss = functional.cross_entropy(outputs, batch["label"], reduction="none")
        torch.testing.assert_close(run.score("loss", keys), loss)
        torch.testing.assert_close(run.embed(keys), run.model[:2](batch["x"]).detach())
        assert run.gradients(keys).shape == (50, 2)
        twin = run.fit(keys, seed=1)
        assert not torch.equal(run.score("loss", keys, model=twin), loss)
        seen.append(len(pool))
        return keys

    run = replayed(make_pipeline(dataset, selection=hardest))
    assert seen == [1000, 1500]
    assert [trained.samples for trained in run.trained] == [500, 50, 50]


def test_without_a_model_there_is_nothing_to_score(tmp_path) -> None:
    dataset = dk.Workspace(tmp_path).ingest("s", make_frame(600), timestamp="when", label="late")
    pipeline = make_pipeline(dataset, selection=lambda pool, run, rng: pool["key"][run.score("loss", pool["key"]) > 1])
    with pytest.raises(dk.errors.Conflict, match="no model yet"):
        replayed(pipeline)
