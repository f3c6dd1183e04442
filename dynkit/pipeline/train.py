"""One training of a pipeline: what a run does at a trigger, and a rebuild does again.

Everything random draws from the seed of (pipeline, trigger), so the same samples, weights and parent give the same
model wherever it is called from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynkit.data import Batches, Version
from dynkit.errors import TrainingError
from dynkit.time import IntArray
from dynkit.training import FitContext, fit, seeded

if TYPE_CHECKING:
    from dynkit.pipeline.declaration import Pipeline

__all__ = ["Outcome", "train"]


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
    """

    state: dict[str, torch.Tensor]
    history: list[dict[str, Any]]
    passed: int


def train(
    pipeline: "Pipeline",
    index: int,
    version: Version,
    keys: IntArray,
    weights: "np.ndarray[Any, Any] | None",
    *,
    parent: dict[str, torch.Tensor] | None,
    device: torch.device,
    on_batch: Callable[[int], None] | None = None,
) -> Outcome:
    """Train the model of a trigger.

    Parameters
    ----------
    pipeline : Pipeline
    index : int
        Of the trigger; the seed depends on it.
    version : Version
        Where the samples are read.
    keys, weights : arrays
        What was selected, validation samples included.
    parent : dict or None
        State to begin with; None: that of a fresh model.
    device : torch.device
    on_batch : callable, optional
        As in `Batches`.

    Raises
    ------
    TrainingError
    """
    training = pipeline.training
    seed = pipeline.seed if training.seed is None else training.seed
    seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    n_validation = int(training.validation * len(keys))
    held_out: IntArray | None = None
    if n_validation:
        order = np.random.default_rng(seed).permutation(len(keys))
        held_out, rows = keys[order[:n_validation]], np.sort(order[n_validation:])
        keys, weights = keys[rows], None if weights is None else weights[rows]
    with seeded(seed):
        model = pipeline.model()
        if not isinstance(model, torch.nn.Module):
            raise TrainingError(f"the model function returned {type(model).__name__}, not an nn.Module")
        if parent is not None:
            model.load_state_dict(parent)
        model.to(device)
        options: dict[str, Any] = {
            "batch_size": training.batch_size,
            "device": device,
            "cache_bytes": training.cache_bytes,
        }
        batches = Batches(
            version, keys, weights=weights, shuffle=True, seed=seed, last="join", on_batch=on_batch, **options
        )
        validation = None if held_out is None else Batches(version, held_out, **options)
        context = FitContext(training, device, validation)
        (training.fit or fit)(model, batches, context)
    state = {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in model.state_dict().items()
    }
    # A buffer may hold infinities on purpose (an attention mask).
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if bad:
        raise TrainingError(f"after training, {', '.join(bad)} of the model are not finite (NaN or infinity)")
    return Outcome(state, context.history, batches.passed)
