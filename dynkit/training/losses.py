"""What a model says of a batch, and how wrong it is: outputs and losses per sample."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dynkit.data import Batch
from dynkit.errors import TrainingError

__all__ = ["losses", "predict"]

_NOT_FIELDS = {"label", "weight"}
_PER_SAMPLE: dict[str, Callable[..., torch.Tensor]] = {
    "bce": functional.binary_cross_entropy_with_logits,
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,
}


def predict(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the outputs of a model for a batch: called with the one field, or with several as keyword arguments."""
    fields = {name: tensor for name, tensor in batch.items() if name not in _NOT_FIELDS}
    outputs = model(next(iter(fields.values()))) if len(fields) == 1 else model(**fields)
    n = next(iter(fields.values())).size(0)
    if not isinstance(outputs, torch.Tensor) or outputs.ndim == 0 or len(outputs) != n:
        found = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise TrainingError(f"the model returned {found} for a batch of {n} samples; expected a tensor ({n}, ...)")
    return outputs


def losses(loss: str | Callable[..., Any], outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss per sample (N,), or what a user's function returns.

    Raises
    ------
    TrainingError
        When outputs or labels do not fit the loss.
    """
    if callable(loss):
        value = loss(outputs, labels)
        if not isinstance(value, torch.Tensor) or (value.ndim and len(value) != len(labels)):
            raise TrainingError("the loss function must return a tensor, scalar or one value per sample")
        return value.flatten(1).mean(1) if value.ndim > 1 else value
    if loss == "cross_entropy":
        if outputs.ndim != 2 or outputs.shape[1] < 2 or labels.is_floating_point():
            raise TrainingError(
                f"cross_entropy needs outputs (N, classes) and integer labels, not {tuple(outputs.shape)} and "
                f"{labels.dtype}; for one output use loss='bce' (two classes) or 'mse' (numbers)"
            )
        try:
            return functional.cross_entropy(outputs, labels.long(), reduction="none")
        except IndexError:
            low, high = int(labels.min()), int(labels.max())
            raise TrainingError(
                f"labels go from {low} to {high}, but the model has {outputs.shape[1]} outputs"
            ) from None
    if outputs.shape != labels.shape:
        if outputs.shape != (*labels.shape, 1):
            raise TrainingError(f"{loss} needs one output per sample, (N,) or (N, 1), not {tuple(outputs.shape)}")
        outputs = outputs.squeeze(-1)
    values: torch.Tensor = _PER_SAMPLE[loss](outputs, labels.to(outputs.dtype), reduction="none")
    return values
