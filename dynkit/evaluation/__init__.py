"""Evaluation: windows of time, metrics, the models x windows matrix and the composite curves drawn from it."""

from dynkit.evaluation import metrics, windows
from dynkit.evaluation.composite import composite, mean_scores, shared
from dynkit.evaluation.matrix import evaluate
from dynkit.evaluation.settings import Evaluation

__all__ = ["Evaluation", "composite", "evaluate", "mean_scores", "metrics", "shared", "windows"]
