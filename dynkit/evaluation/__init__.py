"""Evaluation: windows of time, metrics, the models x windows matrix and the composite curves drawn from it."""

from dynkit.evaluation import metrics, windows
from dynkit.evaluation.composite import composite, mean_scores, shared
from dynkit.evaluation.matrix import Scored, evaluate
from dynkit.evaluation.settings import Evaluation
from dynkit.evaluation.transfer import transfer

__all__ = ["Evaluation", "Scored", "composite", "evaluate", "mean_scores", "metrics", "shared", "transfer", "windows"]
