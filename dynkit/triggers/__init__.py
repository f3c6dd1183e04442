"""Triggers: after which samples to train.

A trigger gets the next rows of the stream (`new`: key, timestamp, label, scalar columns, in replay order) and the
run's view, and answers with row positions of `new` after which to train; -1 is "before the first of them". Any split
of the stream into blocks gives the same positions.

`Amount` and `Time` count. `Drift`, `Performance` and `Cost` look every so many samples and report what they saw.
`any_of`, `all_of`, `majority` and `at_least` let several decide together.
"""

from dynkit.triggers.cost import Cost
from dynkit.triggers.drift import Drift
from dynkit.triggers.intervals import Amount, Time
from dynkit.triggers.performance import AvoidableMisclassifications, Performance
from dynkit.triggers.votes import AtLeast, all_of, any_of, at_least, majority

__all__ = [
    "Amount",
    "AtLeast",
    "AvoidableMisclassifications",
    "Cost",
    "Drift",
    "Performance",
    "Time",
    "all_of",
    "any_of",
    "at_least",
    "majority",
]
