"""Optimizers and schedules of torch, made from the settings."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from dynkit.errors import TrainingError
from dynkit.training.settings import Optimizer, Schedule, Training

__all__ = ["make_optimizers", "make_schedulers", "step_schedulers"]

_FUSED = {"adam", "adamw", "sgd", "adagrad"}  # one kernel for all parameters, also on the CPU


def make_optimizers(model: nn.Module, training: Training) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a model's parameters, in the order of the settings.

    Raises
    ------
    TrainingError
        When one has no parameters, or a parameter no optimizer.
    """
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not left:
        raise TrainingError("the model has no parameters to train")
    parts: dict[int, list[nn.Parameter]] = {}
    settings = list(enumerate(training.optimizers))
    for place, one in sorted(settings, key=lambda item: not item[1].patterns):  # that of all others comes last
        names = [name for name in left if not one.patterns or any(_matches(name, some) for some in one.patterns)]
        if not names:
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
            raise TrainingError(
                f"no parameter is left for the optimizer of modules={one.modules!r}; the model has {known}"
            )
        parts[place] = [left.pop(name) for name in names]
    if left:
        raise TrainingError(
            f"{', '.join(list(left)[:3])} of the model have no optimizer; add one without modules=..., or "
            "requires_grad_(False) to leave them as they are"
        )
    return [_optimizer(one, parts[place], training) for place, one in settings]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter or a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _optimizer(one: Optimizer, parameters: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    lr = training.lr if one.lr is None else one.lr
    if callable(one.name):
        made: torch.optim.Optimizer = one.name(parameters, lr, **one.options)
        return made
    by_name = {name.lower(): value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    weight_decay = training.weight_decay if one.weight_decay is None else one.weight_decay
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if one.name in _FUSED and all(parameter.is_floating_point() for parameter in parameters):
        options["fused"] = True
    try:
        optimizer: torch.optim.Optimizer = by_name[one.name](parameters, **{**options, **one.options})
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"the optimizer {one.name} refuses {dict(one.options)}: {error}") from error
    return optimizer


def make_schedulers(optimizers: list[torch.optim.Optimizer], training: Training, steps: int) -> list[Any]:
    """Make the schedulers of the optimizers, for so many steps; none for a learning rate that stays."""
    made = []
    for one, optimizer in zip(training.optimizers, optimizers, strict=True):
        schedule = training.schedule if one.schedule is None else one.schedule
        if isinstance(schedule, str):
            schedule = Schedule(schedule)
        if not isinstance(schedule, Schedule):
            made.append(schedule(optimizer, steps))
        elif schedule != Schedule():
            factor: Callable[[int], float] = partial(schedule.factor, steps=steps)
            made.append(LambdaLR(optimizer, factor))
    return made


def step_schedulers(schedulers: list[Any], loss: float | None = None) -> None:
    """Go on by a step, or, where a schedule follows the loss, by an epoch."""
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            if loss is not None:
                scheduler.step(loss)
        elif loss is None:
            scheduler.step()
