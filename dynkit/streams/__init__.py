"""Streams to try policies on, each loaded in one line.

Real ones, from files that package registries hold; synthetic ones with a drift at a known row, which need nothing; and
constructions that put a known drift into any samples and labels::

    dk.streams.flights()                                    # a year of flights
    dk.streams.sea()                                        # a concept that changes three times
    dk.streams.class_incremental(dk.streams.digits())       # two more classes at a time

All return a `Stream`: a frame in the order of time, the rows at which a drift begins, a small reference model, and a
pipeline to start from. Nothing is fetched on import, and the same arguments give the same stream.
"""

from dynkit.streams.construct import (
    abrupt,
    class_incremental,
    corruption,
    gradual,
    mixture,
    prior_shift,
    recurring,
    rotation,
)
from dynkit.streams.real import digits, fashion_mnist, flights, mnist, power, spam
from dynkit.streams.stream import Stream
from dynkit.streams.synthetic import blobs, hyperplane, sea

__all__ = [
    "Stream",
    "abrupt",
    "blobs",
    "class_incremental",
    "corruption",
    "digits",
    "fashion_mnist",
    "flights",
    "gradual",
    "hyperplane",
    "mixture",
    "mnist",
    "power",
    "prior_shift",
    "recurring",
    "rotation",
    "sea",
    "spam",
]
