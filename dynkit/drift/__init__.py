"""Whether data has changed, in which columns, and what that does to a model.

`test` compares two sets of samples as a whole, `prepared` keeps a reference for many of them, `columns` compares two
tables column by column, a stream detector finds where a stream of numbers changes, `estimate_accuracy` and
`estimate_loss` say how good a model is on samples that have no labels yet. A drift metric is a callable ``(reference,
current) -> float``, 0 where nothing changed; those of `METRICS` also know how likely their score is by chance.
"""

from dynkit.drift.accuracy import AccuracyEstimate, estimate_accuracy, label_shift_weights
from dynkit.drift.columns import columns
from dynkit.drift.criteria import Decision, DynamicQuantile, DynamicRollingAverage, PValue, Threshold
from dynkit.drift.error_streams import DDM, EDDM, HDDM_A, HDDM_W
from dynkit.drift.kernels import MMD, BlockMMD, Energy
from dynkit.drift.loss import LossEstimate, estimate_loss
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
from dynkit.drift.streams import ADWIN, KSWIN, PageHinkley, as_detector

__all__ = [
    "ADWIN",
    "DDM",
    "EDDM",
    "HDDM_A",
    "HDDM_W",
    "JS",
    "KS",
    "KSWIN",
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
    "LossEstimate",
    "PValue",
    "PageHinkley",
    "PredictedClasses",
    "Reference",
    "SlicedWasserstein",
    "Threshold",
    "Wasserstein",
    "as_detector",
    "columns",
    "estimate_accuracy",
    "estimate_loss",
    "label_shift_weights",
    "prepared",
    "resolve",
    "test",
]
