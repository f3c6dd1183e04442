"""The training loop, and what a loop of the user's own gets.

A fit function is ``(model, batches, context) -> None``: it trains `model` in place over `batches`. `fit` is the
built-in one and an example of how to write another: iterate over `batches` once per epoch (each batch is a dict of
tensors on the device), compute `context.loss`, and `context.report` what should be kept.
"""

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from dynkit.data import Batch, Batches
from dynkit.errors import InvalidInput, TrainingError
from dynkit.training.checkpoint import Checkpoint
from dynkit.training.losses import losses, predict
from dynkit.training.settings import Training
from dynkit.training.steps import Steps, unwrapped

__all__ = ["Fit", "FitContext", "fit", "resolve_device", "seeded"]

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
    checkpoint : Checkpoint
        Keeps the state of a long training.
    carried : Any
        With `training.carry_optimizer`, what the previous training left here, and then what this one does.
    part : (int, int)
        Rank and number of processes that train together. The model then averages its gradients over them when
        `backward` is called, and `batches` are this process's parts of the batches.
    """

    training: Training
    device: torch.device
    validation: Batches | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    carried: Any = None
    part: tuple[int, int] = (0, 1)

    def report(self, **values: Any) -> None:
        """Keep numbers (an epoch's losses, say; tensors of one number too) with the model that comes out."""
        numbers = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        self.history.append({name: one if isinstance(one, int) else float(one) for name, one in numbers.items()})

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
    training, device = context.training, context.device
    steps = Steps(model, context, training.epochs * -(-len(batches) // training.accumulate))
    best = _Best(training.patience)
    first, done, total, passed = 0, 0, torch.zeros((), device=device), batches.passed
    saved = context.checkpoint.load()
    if saved is not None:
        steps.load_state_dict(saved["steps"])
        first, done, total = saved["epoch"], saved["done"], saved["total"].to(device)
        best, context.history[:] = saved["best"], saved["history"]
        batches.seek(first, done)
        passed = batches.passed
    for epoch in range(first, training.epochs):
        model.train()
        for step, group in enumerate(_groups(batches, training.accumulate)):
            total += steps(group) * (batches.passed - passed)
            passed, done = batches.passed, done + len(group)
            if step % _CHECK_LOSS_EVERY == 0:
                _check_finite(total, epoch, done, training)
            if context.checkpoint.due(len(group)):
                context.checkpoint.save(
                    {
                        "steps": steps.state_dict(),
                        "best": best,
                        "epoch": epoch,
                        "done": done,
                        "total": total,
                        "history": context.history,
                    }
                )
        _check_finite(total, epoch, done, training)
        report = {"epoch": epoch, "loss": steps.summed(float(total))[0] / context.part[1] / batches.samples}
        if context.validation is not None:
            report["validation_loss"] = _validation_loss(steps, context)
        if training.batch_selection is not None:
            report["kept"] = int(steps.summed(steps.kept)[0])
        context.report(**report)
        loss = report.get("validation_loss", report["loss"])
        steps.end_epoch(loss)
        if context.validation is not None and best.is_over(loss, steps.result):
            break
        done, total = 0, torch.zeros((), device=device)
    state = steps.result.state_dict() if best.state is None else best.state
    unwrapped(model).load_state_dict(state)
    context.carried = steps.optimizer_states()


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """So many batches at a time."""
    following = iter(batches)
    while group := list(islice(following, size)):
        yield group


@dataclass
class _Best:
    """The epoch of the lowest validation loss."""

    patience: int | None
    loss: float = math.inf
    state: dict[str, Any] | None = None
    epochs_since: int = 0

    def is_over(self, loss: float, model: nn.Module) -> bool:
        """Note the loss of one more epoch; say whether patience is at its end."""
        self.epochs_since += 1
        if loss < self.loss:
            self.loss, self.epochs_since = loss, 0
            self.state = deepcopy(model.state_dict()) if self.patience else None
        return self.patience is not None and self.epochs_since >= self.patience


def _check_finite(total: torch.Tensor, epoch: int, batches: int, training: Training) -> None:
    if not math.isfinite(float(total)):
        raise TrainingError(
            f"the loss is {float(total)} in epoch {epoch + 1} by batch {batches}; look at the model and the features, "
            f"or lower lr={training.lr} or set grad_clip=1.0"
        )


def _validation_loss(steps: Steps, context: FitContext) -> float:
    assert context.validation is not None
    model = steps.result.eval()
    total = 0.0
    with torch.inference_mode():
        for batch in context.validation:
            total += float(context.loss(predict(model, batch), batch)) * len(batch["label"])
    total, samples = steps.summed(total, context.validation.samples)
    return total / samples


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
