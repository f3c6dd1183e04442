"""The settings of a training, checked when they are written down."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynkit.errors import InvalidInput, check_whole, did_you_mean

__all__ = ["LOSSES", "OPTIMIZERS", "SCHEDULES", "Training"]

LOSSES = ("cross_entropy", "bce", "mse", "mae", "huber")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "adagrad", "nadam", "radam")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Training:
    """How to train at each trigger.

    Parameters
    ----------
    epochs : int
        Passes over the selected samples.
    batch_size : int
    optimizer : str or callable
        ``"adamw"``, ``"adam"``, ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, ``"nadam"``, ``"radam"``, or a function
        ``(parameters, lr) -> torch.optim.Optimizer``.
    lr : float
        Learning rate.
    weight_decay : float
    schedule : str or callable
        Learning rate over one training: ``"constant"``, ``"linear"`` or ``"cosine"`` (both down to 0), or a function
        ``(optimizer, steps) -> torch.optim.lr_scheduler.LRScheduler`` stepped after every batch.
    loss : str or callable
        ``"cross_entropy"`` (outputs (N, C)), ``"bce"`` (logits (N,) or (N, 1)), ``"mse"``, ``"mae"``, ``"huber"``, or
        a function ``(outputs, labels) -> loss``, scalar or per sample.
    warm_start : bool
        Start from the previous model of the run instead of a fresh one.
    amp : bool
        Automatic mixed precision: float16 with loss scaling on CUDA, bfloat16 elsewhere.
    grad_clip : float or None
        Largest norm of the gradient.
    validation : float
        Share of the selected samples held out to measure the loss after each epoch, in [0, 1).
    patience : int or None
        Stop after this many epochs without a lower validation loss and keep the best weights.
    seed : int or None
        None means the pipeline's.
    device : str
        ``"auto"`` (CUDA, then MPS, then CPU), ``"cpu"``, ``"cuda:0"``, ...
    cache_bytes : int or None
        Most memory for samples; see `dynkit.data.Batches`.
    fit : callable or None
        A training loop of your own, ``(model, batches, context) -> None``; see `dynkit.training.fit`.
    """

    epochs: int = 1
    batch_size: int = 256
    optimizer: str | Callable[..., Any] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: str | Callable[..., Any] = "constant"
    loss: str | Callable[..., Any] = "cross_entropy"
    warm_start: bool = False
    amp: bool = False
    grad_clip: float | None = None
    validation: float = 0.0
    patience: int | None = None
    seed: int | None = None
    device: str = "auto"
    cache_bytes: int | None = None
    fit: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, 1)
        for name in ("seed", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value >= 0):
                raise InvalidInput(f"{name}={value!r} must be a number, at least 0")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise InvalidInput(f"{name}={value!r} must be a number above 0")
        if not (isinstance(self.validation, int | float) and 0 <= self.validation < 1):
            raise InvalidInput(f"validation={self.validation!r} must be a share in [0, 1)")
        if self.patience is not None and not self.validation:
            raise InvalidInput("patience needs a validation share to measure; add validation=0.1")
        for name, valid in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("loss", LOSSES)):
            value = getattr(self, name)
            if not callable(value) and value not in valid:
                raise InvalidInput(f"{name}={value!r} is not known{did_you_mean(str(value), valid)}")
        if self.fit is not None and not callable(self.fit):
            raise InvalidInput(f"fit={self.fit!r} is not callable; pass a function of (model, batches, context)")
