"""The graph of models: where each came from, what it was trained on, and how to test, update and erase it.

Nodes are the models of the store; edges are `derived` (trained or made from) and `version` (next version of). The
catalog answers questions; what has to train again asks the `Recipe` of a run, which the workspace brings along. No
user code is loaded to list or show anything.
"""

from dynkit.lineage.facade import Lineage
from dynkit.lineage.listing import Card, Log
from dynkit.lineage.operators import Layers, Mean, TaskArithmetic, Ties
from dynkit.lineage.origins import Origin
from dynkit.lineage.placing import Candidate, Placement

__all__ = [
    "Candidate",
    "Card",
    "Layers",
    "Lineage",
    "Log",
    "Mean",
    "Origin",
    "Placement",
    "TaskArithmetic",
    "Ties",
]
