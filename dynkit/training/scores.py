"""Numbers that a model gives to samples: how hard each is, where it lies, which way it pulls the weights.

Scores are computed from a model's outputs, so that a training that has just made the outputs can score them without
another pass. Everything here runs in evaluation mode, batch by batch, and leaves the results on the CPU.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from dynkit.data import Batch
from dynkit.errors import InvalidInput, TrainingError, did_you_mean
from dynkit.training.losses import losses, predict

__all__ = ["KINDS", "ScoreKind", "collect", "embeddings", "gradients", "per_sample", "probabilities"]

ScoreKind = Literal["loss", "grad_norm", "margin", "least_confidence", "entropy"]
KINDS: tuple[ScoreKind, ...] = ("loss", "grad_norm", "margin", "least_confidence", "entropy")


def per_sample(
    kind: ScoreKind, outputs: torch.Tensor, labels: torch.Tensor, loss: str | Callable[..., Any]
) -> torch.Tensor:
    """Score each sample from a model's outputs.

    Parameters
    ----------
    kind : str
        ``"loss"``; ``"grad_norm"``, the norm of the loss's gradient by the outputs, which bounds that by all weights
        (Katharopoulos and Fleuret 2018, equation 20); ``"margin"``, the largest probability less the second, small
        where the model hesitates; ``"least_confidence"``, one less the largest probability; ``"entropy"``, in nats.
    outputs : (N, C), (N, 1) or (N,)
        Logits; of one output per sample the two probabilities are of its sigmoid.
    labels : (N,)
    loss : str or callable
        As in `Training`.

    Returns
    -------
    (N,) float32

    Raises
    ------
    InvalidInput
        When the kind is not known.
    TrainingError
        When the loss gives no value per sample.
    """
    if kind not in KINDS:
        raise InvalidInput(f"score {kind!r} is not known{did_you_mean(kind, KINDS)}")
    outputs = outputs.float()
    if kind == "loss":
        return _each(losses(loss, outputs, labels), len(labels)).float()
    if kind == "grad_norm":
        norm: torch.Tensor = torch.linalg.vector_norm(gradients(outputs, labels, loss), dim=1)
        return norm
    p = probabilities(outputs)
    if kind == "entropy":
        entropy: torch.Tensor = torch.special.entr(p).sum(1)
        return entropy
    top = p.topk(2, dim=1).values
    return top[:, 0] - top[:, 1] if kind == "margin" else 1 - top[:, 0]


def gradients(outputs: torch.Tensor, labels: torch.Tensor, loss: str | Callable[..., Any]) -> torch.Tensor:
    """Gradient of each sample's loss by its own outputs (N, C) float32.

    Raises
    ------
    TrainingError
        When the loss gives no value per sample.
    """
    with torch.inference_mode(False), torch.enable_grad():  # outputs may come from either
        leaf = outputs.detach().float().clone().requires_grad_()
        total = _each(losses(loss, leaf, labels.clone()), len(labels)).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient.reshape(len(outputs), -1)


def _each(values: torch.Tensor, n: int) -> torch.Tensor:
    if values.shape != (n,):
        raise TrainingError("scores need a loss that returns one value per sample, not their mean")
    return values


def probabilities(outputs: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, C) of logits; of one output per sample, those of both classes (N, 2)."""
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        p = outputs.reshape(-1).sigmoid()
        return torch.stack([1 - p, p], 1)
    return outputs.softmax(1)


def collect(
    model: nn.Module, batches: Iterable[Batch], of: Callable[[torch.Tensor, Batch], torch.Tensor]
) -> torch.Tensor:
    """Compute something of a model's outputs, batch by batch.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of Batch
        On the model's device, in order.
    of : callable
        ``(outputs, batch) -> (n, ...)``.

    Returns
    -------
    (N, ...)
        On the CPU.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            found = [of(predict(model, batch), batch).cpu() for batch in batches]
            return torch.cat(found) if found else torch.empty(0)
    finally:
        model.train(training)


def embeddings(model: nn.Module, batches: Iterable[Batch]) -> torch.Tensor:
    """Return what goes into the model's last linear layer, by sample.

    Parameters
    ----------
    model : nn.Module
        Of a model without a linear layer, the outputs are its embeddings.
    batches : iterable of Batch

    Returns
    -------
    (N, D) float32
    """
    seen: list[torch.Tensor] = []  # of the linear layers of one pass, in the order in which they run

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])

    def of(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        found = seen[-1] if seen and len(seen[-1]) == len(outputs) else outputs
        seen.clear()
        return found.reshape(len(outputs), -1).float()

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        return collect(model, batches, of)
    finally:
        for hook in hooks:
            hook.remove()
