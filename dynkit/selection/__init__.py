"""Selections: which samples to train on, with which weights.

A selection gets the pool (all samples up to the trigger that may be trained on, in replay order: key, timestamp, label,
scalar columns), the run's view and a random generator that belongs to this trigger. It returns keys, or a frame with a
column key and, as it likes, weight (of the sample in the loss), score (kept to be read later) and epoch (in which the
sample is used; without it, in every one).

`sampling` draws by age, chance or group; `scored`, `rho_loss` and `coresets` ask the run's newest model; `rs2` draws
anew for every epoch; `composed` makes selections of selections.
"""

from dynkit.selection.composed import New, Replay, Schedule, Where
from dynkit.selection.coresets import Craig, FacilityLocation, GradMatch, GraphCut, KCenter, LogDeterminant
from dynkit.selection.rho_loss import RhoLoss
from dynkit.selection.rs2 import RS2
from dynkit.selection.sampling import (
    All,
    ClassBalanced,
    Freshness,
    Random,
    RandomWithoutReuse,
    Recent,
    Reservoir,
    TriggerBalanced,
)
from dynkit.selection.scored import Entropy, GradNorm, LeastConfidence, Loss, Margin

__all__ = [
    "RS2",
    "All",
    "ClassBalanced",
    "Craig",
    "Entropy",
    "FacilityLocation",
    "Freshness",
    "GradMatch",
    "GradNorm",
    "GraphCut",
    "KCenter",
    "LeastConfidence",
    "LogDeterminant",
    "Loss",
    "Margin",
    "New",
    "Random",
    "RandomWithoutReuse",
    "Recent",
    "Replay",
    "Reservoir",
    "RhoLoss",
    "Schedule",
    "TriggerBalanced",
    "Where",
]
