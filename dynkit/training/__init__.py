"""Training: which settings (`Training`), by which loop (`fit`), and what a model says of samples (`scores`)."""

from dynkit.training.fit import Fit, FitContext, fit, resolve_device, seeded
from dynkit.training.losses import losses, predict
from dynkit.training.settings import Optimizer, Schedule, Training

__all__ = [
    "Fit",
    "FitContext",
    "Optimizer",
    "Schedule",
    "Training",
    "fit",
    "losses",
    "predict",
    "resolve_device",
    "seeded",
]
