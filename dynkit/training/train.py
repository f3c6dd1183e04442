"""One training: a model, the samples it learns from, and the loop that the settings name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynkit.data import Batches, Version
from dynkit.errors import TrainingError
from dynkit.time import IntArray
from dynkit.training.checkpoint import Checkpoint
from dynkit.training.fit import FitContext, fit
from dynkit.training.settings import Training

__all__ = ["Fitted", "Task", "train"]


@dataclass(frozen=True)
class Task:
    """What one training is about, ready to be sent to another process.

    Parameters
    ----------
    training : Training
    seed : int
        Of the order of samples and the share that is held out.
    keys : (N,) int64
    weights : (N,) float32 or None
    epochs : (N,) int64 or None
        In which epoch each sample is used; None: in all of them.
    checkpoint : Path or None
        File that keeps the state of the training.
    identity : str
        What the model comes from; a checkpoint of another training is not gone on from.
    carried : Any
        What the previous training left for this one.
    """

    training: Training
    seed: int
    keys: IntArray
    weights: "np.ndarray[Any, Any] | None" = None
    epochs: "np.ndarray[Any, Any] | None" = None
    checkpoint: Path | None = None
    identity: str = ""
    carried: Any = None


@dataclass(frozen=True)
class Fitted:
    """What a training leaves besides the weights: its reports, how many samples it took, and its optimizers' state."""

    history: list[dict[str, Any]]
    passed: int
    carried: Any


def train(
    model: nn.Module,
    version: Version,
    task: Task,
    *,
    device: torch.device,
    on_batch: Callable[[int], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Fitted:
    """Train `model`, which is on the device, in place.

    Parameters
    ----------
    model : nn.Module
    version : Version
        Where the samples are.
    task : Task
    device : torch.device
    on_batch : callable, optional
        Called with the number of samples before each batch.
    part : (int, int)
        Rank and number of processes that do this together.
    """
    training = task.training
    rank, processes = part
    keys, weights, held_out = _split(task)
    options: dict[str, Any] = {
        "batch_size": training.batch_size,
        "device": device,
        "cache_bytes": training.cache_bytes,
    }
    batches = Batches(
        version,
        keys,
        weights=weights,
        epochs=task.epochs,
        shuffle=True,
        seed=task.seed,
        last="join",
        on_batch=on_batch,
        part=part,
        **options,
    )
    context = FitContext(
        training,
        device,
        validation=Batches(version, held_out[rank::processes], **options) if len(held_out) else None,
        checkpoint=Checkpoint(task.checkpoint, training.checkpoint, task.identity, part),
        carried=task.carried,
        part=part,
    )
    try:
        (training.fit or fit)(model, batches, context)
    except ValueError as error:
        if len(keys) > 1:
            raise
        raise TrainingError(
            f"one sample cannot train this model: {error}; let the trigger wait for more, or select older ones as well"
        ) from error
    return Fitted(context.history, batches.passed, context.carried)


def _split(task: Task) -> "tuple[IntArray, np.ndarray[Any, Any] | None, IntArray]":
    """Keys and weights to train on, and keys to validate on."""
    first = np.sort(np.unique(task.keys, return_index=True)[1])  # of samples that were chosen several times
    if not task.training.validation or len(first) < 2:
        return task.keys, task.weights, task.keys[:0]
    if task.epochs is not None:
        raise TrainingError("a selection that differs from epoch to epoch leaves no validation share; use validation=0")
    n = max(1, int(task.training.validation * len(first)))
    held_out = task.keys[first[np.random.default_rng(task.seed).permutation(len(first))[:n]]]
    rows = np.flatnonzero(~np.isin(task.keys, held_out))
    return task.keys[rows], None if task.weights is None else task.weights[rows], held_out
