"""The settings of a training, checked when they are written down."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynkit.errors import InvalidInput, check_whole, did_you_mean
from dynkit.time import to_seconds
from dynkit.types import BatchSelection

__all__ = ["LOSSES", "OPTIMIZERS", "SCHEDULES", "Optimizer", "Schedule", "Training"]

LOSSES = ("cross_entropy", "bce", "mse", "mae", "huber")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "adagrad", "nadam", "radam")
SCHEDULES = ("constant", "linear", "cosine", "polynomial")


@dataclass(frozen=True)
class Schedule:
    """Learning rate over one training: warm-up, then a decline.

    Parameters
    ----------
    name : str
        The decline: ``"constant"`` (none), ``"linear"``, ``"cosine"`` (Loshchilov and Hutter 2017, equation 5, without
        restarts) or ``"polynomial"``, ``(1 - t) ** power`` for t from 0 to 1.
    warmup : int or float
        Steps of linear rise, the first at ``lr / warmup``; a number below 1 is a share of all steps.
    end : float
        Share of the learning rate that the decline ends at.
    power : float
        Of the polynomial.

    Examples
    --------
    >>> Schedule("cosine", warmup=100).factor(99, 1000)
    1.0
    """

    name: str = "constant"
    warmup: int | float = 0
    end: float = 0.0
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise InvalidInput(f"schedule={self.name!r} is not known{did_you_mean(str(self.name), SCHEDULES)}")
        _check_number("warmup", self.warmup, least=0)
        if self.warmup >= 1 and not isinstance(self.warmup, int):
            raise InvalidInput(f"warmup={self.warmup!r} must be a whole number of steps, or a share below 1")
        _check_number("power", self.power)
        if not (isinstance(self.end, int | float) and 0 <= self.end <= 1):
            raise InvalidInput(f"end={self.end!r} must be a share in [0, 1]")

    def factor(self, step: int, steps: int) -> float:
        """Share of the learning rate in a step, from 0, of so many."""
        warmup = self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.end + (1 - self.end) * self._decline(min((step - warmup) / max(steps - warmup, 1), 1.0))

    def _decline(self, t: float) -> float:
        if self.name == "cosine":
            return (1 + math.cos(math.pi * t)) / 2
        return 1.0 if self.name == "constant" else float((1 - t) ** (1 if self.name == "linear" else self.power))


@dataclass(frozen=True)
class Optimizer:
    """An optimizer for some of a model's parameters.

    Parameters
    ----------
    name : str or callable
        ``"adamw"``, ``"adam"``, ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, ``"nadam"``, ``"radam"``, or a function
        ``(parameters, lr) -> torch.optim.Optimizer``.
    modules : str, sequence of str or None
        Which parameters: names of modules or parameters, or patterns of them (``"backbone"``, ``"layers.*.norm"``,
        ``"*.bias"``). None takes those that no other optimizer has.
    lr, weight_decay : float or None
        None takes them from `Training`.
    schedule : str, Schedule, callable or None
        None takes it from `Training`.
    options : mapping
        Further arguments of the torch optimizer: ``{"momentum": 0.9}``.

    Notes
    -----
    Of several optimizers, the first whose `modules` match a parameter has it. Two of the same name are what torch
    calls parameter groups.
    """

    name: str | Callable[..., Any] = "adamw"
    modules: str | Sequence[str] | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str | Schedule | Callable[..., Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("optimizer", self.name, OPTIMIZERS)
        if self.lr is not None:
            _check_number("lr", self.lr)
        if self.weight_decay is not None:
            _check_number("weight_decay", self.weight_decay, least=0)
        _check_name("schedule", self.schedule, SCHEDULES)
        patterns = () if self.modules is None else self.patterns
        if not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise InvalidInput(f"modules={self.modules!r} must be a name such as 'backbone', or several")
        if not isinstance(self.options, Mapping):
            raise InvalidInput(f"options={self.options!r} must be a mapping such as {{'momentum': 0.9}}")

    @property
    def patterns(self) -> tuple[str, ...]:
        """`modules`, as several."""
        return (self.modules,) if isinstance(self.modules, str) else tuple(self.modules or ())


@dataclass(frozen=True)
class Training:
    """How to train at each trigger.

    Parameters
    ----------
    epochs : int
        Passes over the selected samples.
    batch_size : int
        Samples that go through the model at once; with several `processes`, through all of them together.
    accumulate : int
        Batches whose gradients make one step of the optimizer, as if they were one batch.
    optimizer : str, callable, Optimizer or sequence of them
        ``"adamw"``, ``"adam"``, ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, ``"nadam"``, ``"radam"``, a function
        ``(parameters, lr) -> torch.optim.Optimizer``, or `Optimizer` for its options or for parts of the model.
    lr : float
        Learning rate.
    weight_decay : float
    schedule : str, Schedule or callable
        Learning rate over one training: ``"constant"``, ``"linear"``, ``"cosine"``, ``"polynomial"`` (all down to 0),
        `Schedule` for a warm-up, or a function ``(optimizer, steps) -> torch.optim.lr_scheduler.LRScheduler``; stepped
        after every step of the optimizer.
    loss : str or callable
        ``"cross_entropy"`` (outputs (N, C)), ``"bce"`` (logits (N,) or (N, 1)), ``"mse"``, ``"mae"``, ``"huber"``, or
        a function ``(outputs, labels) -> loss``, scalar or per sample.
    batch_selection : BatchSelection or None
        Train only on those samples of every batch that it chooses by their scores, such as
        ``dk.selection.Loss(fraction=0.5)``. One step is made of what is kept of one batch, or of `accumulate`.
    warm_start : bool
        Start from the previous model of the run instead of a fresh one.
    carry_optimizer : bool
        Start also from the previous training's optimizer state (its moments, not its learning rate).
    ema : float or None
        Decay of an exponential moving average of the weights; the average is validated, stored and started from.
    amp : bool or str
        Automatic mixed precision: ``"bf16"``, ``"fp16"`` with loss scaling, or True: fp16 on CUDA, bf16 elsewhere.
    compile : bool
        Let `torch.compile` make the model faster, for some seconds at its first batch.
    processes : int
        Train in so many processes of this machine, on a GPU each, or all on the CPU.
    grad_clip : float or None
        Largest norm of the gradient.
    validation : float
        Share of the selected samples held out to measure the loss after each epoch, in [0, 1).
    patience : int or None
        Stop after this many epochs without a lower validation loss and keep the best weights.
    checkpoint : int, str or None
        Keep the state of a training after so many batches, or so much time (``"5m"``); a run that was killed goes on
        from there.
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
    optimizer: str | Callable[..., Any] | Optimizer | Sequence[str | Callable[..., Any] | Optimizer] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: str | Schedule | Callable[..., Any] = "constant"
    loss: str | Callable[..., Any] = "cross_entropy"
    warm_start: bool = False
    amp: bool | str = False
    grad_clip: float | None = None
    validation: float = 0.0
    patience: int | None = None
    seed: int | None = None
    device: str = "auto"
    cache_bytes: int | None = None
    fit: Callable[..., Any] | None = None
    accumulate: int = 1
    batch_selection: BatchSelection | None = None
    carry_optimizer: bool = False
    ema: float | None = None
    compile: bool = False
    processes: int = 1
    checkpoint: int | str | None = "5m"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "processes"):
            check_whole(name, getattr(self, name), 1)
        if self.patience is not None:
            check_whole("patience", self.patience, 1)
        if self.seed is not None:
            check_whole("seed", self.seed, 0)
        _check_number("weight_decay", self.weight_decay, least=0)
        _check_number("lr", self.lr)
        if self.grad_clip is not None:
            _check_number("grad_clip", self.grad_clip)
        if not (isinstance(self.validation, int | float) and 0 <= self.validation < 1):
            raise InvalidInput(f"validation={self.validation!r} must be a share in [0, 1)")
        if self.patience is not None and not self.validation:
            raise InvalidInput("patience needs a validation share to measure; add validation=0.1")
        if self.ema is not None and not (isinstance(self.ema, float) and 0 < self.ema < 1):
            raise InvalidInput(f"ema={self.ema!r} must be a decay between 0 and 1, such as 0.999")
        if self.carry_optimizer and not self.warm_start:
            raise InvalidInput("carry_optimizer needs the weights it belongs to; add warm_start=True")
        if not isinstance(self.amp, bool) and self.amp not in ("bf16", "fp16"):
            raise InvalidInput(f"amp={self.amp!r} must be True, False, 'bf16' or 'fp16'")
        if isinstance(self.checkpoint, str):
            to_seconds(self.checkpoint, "checkpoint")
        elif self.checkpoint is not None:
            check_whole("checkpoint", self.checkpoint, 1)
        if self.processes > 1 and ":" in self.device:
            kind = self.device.partition(":")[0]
            raise InvalidInput(f"device={self.device!r} is one; processes={self.processes} need device={kind!r}")
        _check_name("schedule", self.schedule, SCHEDULES)
        _check_name("loss", self.loss, LOSSES)
        if self.fit is not None and not callable(self.fit):
            raise InvalidInput(f"fit={self.fit!r} is not callable; pass a function of (model, batches, context)")
        if self.batch_selection is not None and not hasattr(self.batch_selection, "choose"):
            raise InvalidInput(
                f"batch_selection={self.batch_selection!r} does not choose by scores; pass a scored selection such as "
                "dk.selection.Loss(fraction=0.5)"
            )
        self._check_optimizers()

    def _check_optimizers(self) -> None:
        given = self.optimizer
        if not (given and isinstance(given, str | Optimizer | Sequence)) and not callable(given):
            raise InvalidInput(f"optimizer={given!r} must be a name, a function, an Optimizer or a list of them")
        if sum(not one.patterns for one in self.optimizers) > 1:
            raise InvalidInput("two optimizers are for all other parameters; give one of them modules=...")

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """`optimizer`, as several."""
        several = isinstance(self.optimizer, Sequence) and not isinstance(self.optimizer, str)
        given: Any = self.optimizer if several else (self.optimizer,)
        return tuple(one if isinstance(one, Optimizer) else Optimizer(one) for one in given)


def _check_name(what: str, value: object, valid: tuple[str, ...]) -> None:
    """Refuse a name that is not one of these; functions and settings pass."""
    if value is not None and not callable(value) and not isinstance(value, Schedule) and value not in valid:
        raise InvalidInput(f"{what}={value!r} is not known{did_you_mean(str(value), valid)}")


def _check_number(name: str, value: object, *, least: float | None = None) -> None:
    """Refuse what is no finite number, or less than `least`; without one, what is not above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and (value > 0 if least is None else value >= least)):  # type: ignore[operator]  # it is a number
        bound = "above 0" if least is None else f"at least {least:g}"
        raise InvalidInput(f"{name}={value!r} must be a number, {bound}")
