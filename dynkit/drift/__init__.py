"""Whether data has changed, in which columns, and what that does to a model.

`test` compares two sets of samples as a whole, `columns` compares two tables column by column, `estimate_accuracy` says
how accurate a model is on samples that have no labels yet. A drift metric is a callable ``(reference, current) ->
float``, 0 where nothing changed; those in `metrics` also know how likely their score is by chance.
"""

from dynkit.drift.accuracy import AccuracyEstimate, estimate_accuracy, label_shift_weights
from dynkit.drift.columns import columns
from dynkit.drift.metrics import KS, MMD, Classifier, DriftTest, Energy, SlicedWasserstein, test

__all__ = [
    "KS",
    "MMD",
    "AccuracyEstimate",
    "Classifier",
    "DriftTest",
    "Energy",
    "SlicedWasserstein",
    "columns",
    "estimate_accuracy",
    "label_shift_weights",
    "test",
]
