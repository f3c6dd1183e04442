"""The steps of one training: batches become gradients, gradients become weights.

Gradients of several batches, and of several processes, are weighted so that their sum is the gradient of one large
batch: each batch's mean loss counts by its share of the weight of all samples of the step.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dynkit.data import Batch
from dynkit.data.batches import length_of, take_batch
from dynkit.errors import PolicyError, TrainingError
from dynkit.training.losses import predict
from dynkit.training.optimizers import make_optimizers, make_schedulers, step_schedulers
from dynkit.training.reuse import Kept, Recorded
from dynkit.training.scores import per_sample
from dynkit.training.settings import Training
from dynkit.types import BatchSelection

if TYPE_CHECKING:
    from dynkit.training.fit import FitContext

__all__ = ["Steps", "unwrapped"]

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module out of the one that shares its gradients with other processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class Steps:
    """Takes a step per call, as `Training` declares: optimizers, schedules, precision, clipping, average.

    Parameters
    ----------
    model : nn.Module
    context : FitContext
    steps : int
        How many there will be, for the schedules.
    """

    def __init__(self, model: nn.Module, context: "FitContext", steps: int) -> None:
        training, device = context.training, context.device
        self._context = context
        self._model = unwrapped(model)
        self._wrapped = model
        self._forward: Any = torch.compile(model) if training.compile else model
        self._optimizers = make_optimizers(self._model, training)
        if context.carried is not None:
            _carry(self._optimizers, context.carried)
        self._schedulers = make_schedulers(self._optimizers, training, steps)
        self._half = _half(training, device)
        scaled = training.amp is not False and self._half is torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self._average = None
        if training.ema is not None:
            self._average = AveragedModel(self._model, multi_avg_fn=partial(_average, training.ema))

        self._rng = torch.Generator(device).manual_seed(torch.initial_seed())
        self.kept = 0  # samples of this epoch that were trained on

    @property
    def result(self) -> nn.Module:
        """The model whose weights count: the average, if there is one."""
        return self._model if self._average is None else self._average.module

    def __call__(self, batches: list[Batch]) -> torch.Tensor:
        """Take one step on some batches; return their mean loss (this process's part of it), on the device."""
        training = self._context.training
        again: AbstractContextManager[Any] = nullcontext()
        if training.batch_selection is not None:
            # Several batches that wait for their step would all be in memory: then nothing is kept for the second pass.
            recorded = Recorded() if len(batches) == 1 and not training.compile else None
            chosen = [self._chosen(batch, training.batch_selection, recorded) for batch in batches]
            if recorded is not None:
                again = Kept(recorded, chosen[0][1], length_of(batches[0]))
            batches = [batch for batch, _ in chosen]
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch, share in zip(batches, self._shares(batches), strict=True):
            with self._apart(batch is not batches[-1]):
                with self._autocast():
                    with again:
                        outputs = predict(self._forward, batch)
                    loss = self._context.loss(outputs, batch)
                if share is not None:
                    loss = loss * share
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch has no types here
            losses.append(loss.detach())
        if training.grad_clip is not None:
            for optimizer in self._optimizers:
                self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), training.grad_clip)
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        step_schedulers(self._schedulers)
        if self._average is not None:
            self._average.update_parameters(self._model)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _chosen(self, batch: Batch, selection: BatchSelection, recorded: Recorded | None) -> tuple[Batch, torch.Tensor]:
        """Score a batch as the model is; return what the selection keeps, and which rows these are."""
        self._model.eval()
        with torch.no_grad(), self._autocast(), recorded or nullcontext():
            outputs = predict(self._model, batch)
        self._model.train()
        scores = per_sample(selection.kind, outputs, batch["label"], self._context.training.loss)
        try:
            rows, weights = selection.choose(scores, self._rng)
        except RuntimeError as error:
            if torch.isfinite(scores).all():
                raise
            raise TrainingError(f"scores of a batch ({selection.kind}) are not finite, as its loss: {error}") from None
        if not len(rows):
            raise PolicyError(f"{selection!r} chose no sample out of {len(scores)}")
        chosen = take_batch(batch, rows)
        if weights is not None:
            chosen["weight"] = chosen["weight"] * weights if "weight" in chosen else weights
        self.kept += len(rows)
        return chosen, rows

    def _autocast(self) -> torch.autocast:
        enabled = bool(self._context.training.amp)
        return torch.autocast(self._context.device.type, dtype=self._half, enabled=enabled)

    def end_epoch(self, loss: float) -> None:
        """Tell the schedules that follow the loss."""
        step_schedulers(self._schedulers, loss)
        self.kept = 0

    def _shares(self, batches: list[Batch]) -> Iterable[torch.Tensor | None]:
        """Factor of each batch's mean loss; None where there is one batch in one process.

        Processes average their gradients, hence the factor of their number.
        """
        _, processes = self._context.part
        if len(batches) == 1 and processes == 1:
            return [None]
        device = self._context.device
        own = torch.stack([_weight(batch).to(device) for batch in batches])
        total = own.sum()
        if processes > 1:
            torch.distributed.all_reduce(total)
        return processes * own / total.clamp_min(torch.finfo(own.dtype).tiny)

    def _apart(self, more: bool) -> AbstractContextManager[None]:
        """Keep gradients to this process while there are more to come."""
        if more and isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return nullcontext()

    def summed(self, *values: float) -> list[float]:
        """Add numbers up over all processes."""
        if self._context.part[1] == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self._context.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def optimizer_states(self) -> list[dict[str, Any]]:
        """State of each optimizer, for the next training."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, but the random state."""
        return {
            "model": self._model.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": self._rng.get_state(),
            "kept": self.kept,
            "stateful": [one.state_dict() for one in self._stateful],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._model.load_state_dict(state["model"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._scaler.load_state_dict(state["scaler"])
        self._rng.set_state(state["random"])
        self.kept = state["kept"]
        for one, values in zip(self._stateful, state["stateful"], strict=True):
            one.load_state_dict(values)

    @property
    def _stateful(self) -> list[Any]:
        return list(chain(self._optimizers, self._schedulers))


def _half(training: Training, device: torch.device) -> torch.dtype:
    if isinstance(training.amp, str):
        return _HALVES[training.amp]
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def _weight(batch: Batch) -> torch.Tensor:
    """Weight of all samples of a batch together."""
    return batch["weight"].sum() if "weight" in batch else torch.tensor(float(length_of(batch)))


def _average(
    decay: float, averages: list[torch.Tensor], weights: list[torch.Tensor], steps: torch.Tensor | int
) -> None:
    """Exponential moving average; its decay grows in the first steps, so that they do not outweigh the rest."""
    decay = min(decay, (1 + int(steps)) / (10 + int(steps)))
    torch._foreach_lerp_(averages, weights, 1 - decay)


def _carry(optimizers: list[torch.optim.Optimizer], states: list[dict[str, Any]]) -> None:
    """Give optimizers the state that others of the same parameters ended with, but not their learning rate."""
    for optimizer, state in zip(optimizers, states, strict=True):
        now = optimizer.state_dict()
        before = [group["params"] for group in state["param_groups"]]
        if before != [group["params"] for group in now["param_groups"]]:
            raise TrainingError(
                "the model's parameters are not those of the optimizer state; set carry_optimizer=False"
            )
        optimizer.load_state_dict({"state": state["state"], "param_groups": now["param_groups"]})
