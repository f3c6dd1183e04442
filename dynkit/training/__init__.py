"""Training: which settings (`Training`), by which loop (`fit`)."""

from dynkit.training.fit import Fit, FitContext, fit, predict, resolve_device, seeded
from dynkit.training.settings import Training

__all__ = ["Fit", "FitContext", "Training", "fit", "predict", "resolve_device", "seeded"]
