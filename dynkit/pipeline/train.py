"""One training of a pipeline: what a run does at a trigger, and a rebuild does again.

Everything random draws from the seed of (pipeline, trigger), so the same samples, weights and parent give the same
model wherever it is called from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from dynkit.data import Version
from dynkit.errors import TrainingError
from dynkit.training import seeded
from dynkit.training.processes import train_together
from dynkit.training.train import Task
from dynkit.training.train import train as train_here

if TYPE_CHECKING:
    from dynkit.pipeline.declaration import Pipeline

__all__ = ["Outcome", "seed_of", "train"]


@dataclass(frozen=True)
class Outcome:
    """What one training gave.

    Parameters
    ----------
    state : dict
        Name to tensor on the CPU.
    history : list of dict
        What the fit function reported.
    passed : int
        Samples handed to the fit function, all epochs together.
    carried : Any
        State of its optimizers.
    """

    state: dict[str, torch.Tensor]
    history: list[dict[str, Any]]
    passed: int
    carried: Any = None


def seed_of(pipeline: "Pipeline", index: int) -> int:
    """Seed of everything random in the training at a trigger."""
    seed = pipeline.seed if pipeline.training.seed is None else pipeline.training.seed
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def train(
    pipeline: "Pipeline",
    index: int,
    version: Version,
    chosen: pl.DataFrame,
    *,
    parent: dict[str, torch.Tensor] | None,
    device: torch.device,
    on_batch: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
    identity: str = "",
    carried: Any = None,
) -> Outcome:
    """Train the model of a trigger.

    Parameters
    ----------
    pipeline : Pipeline
    index : int
        Of the trigger; the seed depends on it.
    version : Version
        Where the samples are read.
    chosen : pl.DataFrame
        Columns key, and perhaps weight and epoch; validation samples included.
    parent : dict or None
        State to begin with; None: that of a fresh model.
    device : torch.device
    on_batch : callable, optional
        As in `Batches`.
    checkpoint, identity, carried
        As in `Task`.

    Raises
    ------
    TrainingError
    """
    seed = seed_of(pipeline, index)
    task = Task(
        pipeline.training,
        seed,
        chosen["key"].to_numpy(writable=True),
        chosen["weight"].to_numpy(writable=True) if "weight" in chosen.columns else None,
        chosen["epoch"].to_numpy(writable=True) if "epoch" in chosen.columns else None,
        checkpoint=checkpoint,
        identity=identity,
        carried=carried,
    )
    with seeded(seed):
        model = pipeline.model()
        if not isinstance(model, torch.nn.Module):
            raise TrainingError(f"the model function returned {type(model).__name__}, not an nn.Module")
        if parent is not None:
            model.load_state_dict(parent)
        model.to(device)
        if pipeline.training.processes == 1:
            done = train_here(model, version, task, device=device, on_batch=on_batch)
        else:
            dataset = pipeline.dataset.at(version.number)
            done = train_together(model, dataset, task, device=device, on_batch=on_batch or (lambda samples: None))
    state = {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in model.state_dict().items()
    }
    # A buffer may hold infinities on purpose (an attention mask).
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if bad:
        raise TrainingError(f"after training, {', '.join(bad)} of the model are not finite (NaN or infinity)")
    return Outcome(state, done.history, done.passed, done.carried)
