"""The graph of models: where each came from, what it was trained on, and how to test, update, share and erase.

Nodes are the models of the store; edges are `derived` (trained or made from) and `version` (next version of). The
catalog answers questions; what has to train again asks the `Recipe` of a run, which the workspace brings along. No
user code is loaded to list or show anything.
"""

from dynkit.lineage.bisection import Bisection
from dynkit.lineage.blaming import Blame
from dynkit.lineage.cascade import Cascade, Step
from dynkit.lineage.diff import ModelDiff
from dynkit.lineage.erasure import Affected, Erasure
from dynkit.lineage.facade import Lineage
from dynkit.lineage.listing import Card, Entry, Log
from dynkit.lineage.merging import Merge
from dynkit.lineage.operators import Layers, Mean, TaskArithmetic, Ties
from dynkit.lineage.origins import Origin
from dynkit.lineage.placing import Candidate, Placement
from dynkit.lineage.remotes import Transfer
from dynkit.lineage.structure import StructureDiff
from dynkit.lineage.testing import Result, TestReport

__all__ = [
    "Affected",
    "Bisection",
    "Blame",
    "Candidate",
    "Card",
    "Cascade",
    "Entry",
    "Erasure",
    "Layers",
    "Lineage",
    "Log",
    "Mean",
    "Merge",
    "ModelDiff",
    "Origin",
    "Placement",
    "Result",
    "Step",
    "StructureDiff",
    "TaskArithmetic",
    "TestReport",
    "Ties",
    "Transfer",
]
