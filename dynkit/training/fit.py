"""The training loop, and what a loop of the user's own gets.

A fit function is ``(model, batches, context) -> None``: it trains `model` in place over `batches`. `fit` is the
built-in one and an example of how to write another: iterate over `batches` once per epoch (each batch is a dict of
tensors on the device), compute `context.loss`, and `context.report` what should be kept.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from dynkit.data import Batch, Batches
from dynkit.errors import InvalidInput, TrainingError
from dynkit.training.losses import losses, predict
from dynkit.training.settings import Training

__all__ = ["Fit", "FitContext", "fit", "resolve_device", "seeded"]

_FUSED = {"adam", "adamw", "sgd", "adagrad"}  # one kernel for all parameters, also on the CPU
_CHECK_LOSS_EVERY = 100  # batches; reading the loss makes a GPU wait


class Fit(Protocol):
    """Trains `model` in place."""

    def __call__(self, model: nn.Module, batches: Batches, context: "FitContext", /) -> None: ...


@dataclass
class FitContext:
    """What a fit function may use besides the model and the batches.

    Parameters
    ----------
    training : Training
        The settings as declared.
    device : torch.device
        Where model and batches are.
    validation : Batches or None
        The held-out samples when `training.validation` asks for them.
    history : list of dict
        What was reported, kept with the model.
    """

    training: Training
    device: torch.device
    validation: Batches | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def report(self, **values: Any) -> None:
        """Keep numbers (an epoch's losses, say; tensors of one number too) with the model that comes out."""
        self.history.append({name: value if isinstance(value, int) else float(value) for name, value in values.items()})

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch, weighted by its weights: sum(w_i * loss_i) / sum(w_i).

        Raises
        ------
        TrainingError
            When the outputs do not fit the loss.
        """
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()  # mixed precision is for the model; labels keep theirs
        per_sample = losses(self.training.loss, outputs, batch["label"])
        if "weight" not in batch:
            return per_sample.mean()
        if per_sample.ndim == 0:
            raise TrainingError(
                "the selection gives weights; the loss must return one value per sample, not their mean"
            )
        weight = batch["weight"]
        return (per_sample * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def fit(model: nn.Module, batches: Batches, context: FitContext) -> None:
    """Train for `epochs` passes with early stopping on the validation share, as `Training` declares.

    Raises
    ------
    TrainingError
        When the loss is not finite.
    """
    training = context.training
    optimizer = _optimizer(model, training)
    scheduler = _scheduler(optimizer, training, training.epochs * len(batches))
    half = torch.float16 if context.device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(context.device.type, enabled=training.amp and half is torch.float16)
    best_loss, best_state, epochs_since_best = math.inf, None, 0
    for epoch in range(training.epochs):
        model.train()
        total = torch.zeros((), device=context.device)
        for step, batch in enumerate(batches):
            with torch.autocast(context.device.type, dtype=half, enabled=training.amp):
                loss = context.loss(predict(model, batch), batch)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch has no types here
            if training.grad_clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            if scheduler is not None:
                scheduler.step()
            total += loss.detach() * len(batch["label"])
            if step % _CHECK_LOSS_EVERY == 0:
                _check_finite(total, epoch, step, training)
        _check_finite(total, epoch, len(batches) - 1, training)
        report = {"epoch": epoch, "loss": float(total) / batches.samples}
        if context.validation is not None:
            report["validation_loss"] = _validation_loss(model, context)
            epochs_since_best += 1
            if report["validation_loss"] < best_loss:
                best_loss, epochs_since_best = report["validation_loss"], 0
                best_state = deepcopy(model.state_dict()) if training.patience else None
        context.report(**report)
        if training.patience and epochs_since_best >= training.patience:
            break
    if best_state is not None:
        model.load_state_dict(best_state)


def _check_finite(total: torch.Tensor, epoch: int, step: int, training: Training) -> None:
    if not math.isfinite(float(total)):
        raise TrainingError(
            f"the loss is {float(total)} in epoch {epoch + 1} by batch {step + 1}; look at the model and the features, "
            f"or lower lr={training.lr} or set grad_clip=1.0"
        )


def _validation_loss(model: nn.Module, context: FitContext) -> float:
    assert context.validation is not None
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for batch in context.validation:
            total += float(context.loss(predict(model, batch), batch)) * len(batch["label"])
    return total / context.validation.samples


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError("the model has no parameters to train")
    if callable(training.optimizer):
        made: torch.optim.Optimizer = training.optimizer(parameters, training.lr)
        return made
    by_name = {name.lower(): value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    options: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay}
    if training.optimizer in _FUSED and all(parameter.is_floating_point() for parameter in parameters):
        options["fused"] = True
    optimizer: torch.optim.Optimizer = by_name[training.optimizer](parameters, **options)
    return optimizer


def _scheduler(optimizer: torch.optim.Optimizer, training: Training, steps: int) -> Any:
    if callable(training.schedule):
        return training.schedule(optimizer, steps)
    schedules = torch.optim.lr_scheduler
    if training.schedule == "linear":
        return schedules.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    if training.schedule == "cosine":
        return schedules.CosineAnnealingLR(optimizer, T_max=steps)
    return None


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a name; ``"auto"`` takes the best there is.

    Raises
    ------
    InvalidInput
        When torch does not know the name or the machine does not have it.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device(found.type if found is not None else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise InvalidInput(f"device {device!r} cannot be used: {first_line}; try 'auto' or 'cpu'") from None
    return resolved


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global random state inside the block; restore it after."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
