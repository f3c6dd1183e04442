"""Training: which settings (`Training`), over which batches (`Batches`), by which loop (`fit`)."""

from dynkit.training.fit import Fit, FitContext, fit, predict, resolve_device, seeded
from dynkit.training.loader import Batch, Batches
from dynkit.training.settings import Training

__all__ = ["Batch", "Batches", "Fit", "FitContext", "Training", "fit", "predict", "resolve_device", "seeded"]
