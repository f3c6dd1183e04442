"""Whether data has changed, in which columns, and what that does to a model.

`test` compares two sets of samples as a whole, `prepared` keeps a reference for many of them, `columns` compares two
tables column by column, a stream detector finds where a stream of numbers changes, `estimate_accuracy` and
`estimate_loss` say how good a model is on samples that have no labels yet. A drift metric is a callable ``(reference,
current) -> float``, 0 where nothing changed; those of `METRICS` also know how likely their score is by chance.
"""

from dynkit.drift.accuracy import AccuracyEstimate, estimate_accuracy, label_shift_weights
from dynkit.drift.columns import columns
from dynkit.drift.criteria import Decision, DynamicQuantile, DynamicRollingAverage, PValue, Threshold
from dynkit.drift.kernels import MMD, BlockMMD, Energy
from dynkit.drift.marginals import (
    JS,
    KS,
    PSI,
    CramerVonMises,
    Hellinger,
    PredictedClasses,
    SlicedWasserstein,
    Wasserstein,
)
from dynkit.drift.metrics import METRICS, Classifier, Coverage, DriftTest, Reference, prepared, resolve, test

__all__ = [
    "JS",
    "KS",
    "METRICS",
    "MMD",
    "PSI",
    "AccuracyEstimate",
    "BlockMMD",
    "Classifier",
    "Coverage",
    "CramerVonMises",
    "Decision",
    "DriftTest",
    "DynamicQuantile",
    "DynamicRollingAverage",
    "Energy",
    "Hellinger",
    "PValue",
    "PredictedClasses",
    "Reference",
    "SlicedWasserstein",
    "Threshold",
    "Wasserstein",
    "columns",
    "estimate_accuracy",
    "label_shift_weights",
    "prepared",
    "resolve",
    "test",
]
