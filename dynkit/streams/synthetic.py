"""Streams drawn from a formula: no files, any length, drift at rows that are known."""

from collections.abc import Sequence

import numpy as np

from dynkit.errors import InvalidInput, check_whole
from dynkit.streams.stream import Stream, clocked, evenly

__all__ = ["blobs", "hyperplane", "sea"]


def sea(n: int = 12_000, *, thresholds: Sequence[float] = (8, 9, 7, 9.5), noise: float = 0.1, seed: int = 0) -> Stream:
    """Draw the SEA concepts: samples stay as they are, the meaning of their label changes.

    Three features are uniform in [0, 10); the label says whether the first two add up to at most the concept's
    threshold. The third means nothing.

    Parameters
    ----------
    n : int
        Samples.
    thresholds : sequence of float
        One per concept; concepts share the stream evenly. A value that comes again is a concept that recurs.
    noise : float
        Share of labels that are turned over.
    seed : int

    References
    ----------
    Street and Kim, "A streaming ensemble algorithm (SEA) for large-scale classification", KDD 2001, section 3.1.
    """
    check_whole("n", n, max(len(thresholds), 1))
    if not thresholds or not 0 <= noise <= 0.5:
        raise InvalidInput(
            f"thresholds={thresholds!r}, noise={noise!r}: give one threshold at least, noise in [0, 0.5]"
        )
    rng = np.random.default_rng(seed)
    stage, drifts = evenly(n, len(thresholds))
    x = rng.uniform(0, 10, (n, 3)).astype(np.float32)
    y = x[:, 0] + x[:, 1] <= np.asarray(thresholds)[stage]
    return clocked("sea", x, (y ^ (rng.random(n) < noise)).astype(np.int64), drifts, {"concept": stage})


def hyperplane(n: int = 10_000, *, features: int = 10, noise: float = 0.05, seed: int = 0) -> Stream:
    """Draw a moving hyperplane: the border between two classes stands still for half of the stream, then moves.

    Features are uniform in [0, 1); the label says whether their weighted sum is at least half the sum of the weights,
    so that classes stay balanced. From row n / 2 on the weights move at a constant rate, to new ones at the end.

    Parameters
    ----------
    n : int
        Samples.
    features : int
    noise : float
        Share of labels that are turned over.
    seed : int

    References
    ----------
    Hulten, Spencer and Domingos, "Mining time-changing data streams", KDD 2001, section 4.1; there weights take a step
    of random direction every so many samples.
    """
    check_whole("n", n, 2)
    check_whole("features", features, 2)
    if not 0 <= noise <= 0.5:
        raise InvalidInput(f"noise={noise!r} must be in [0, 0.5]")
    rng = np.random.default_rng(seed)
    x = rng.random((n, features), dtype=np.float32)
    before, after = rng.normal(size=(2, features))
    moved = np.clip((np.arange(n) - n // 2) / (n - n // 2), 0, 1)[:, None]
    weights = (1 - moved) * before + moved * after
    y = (weights * (x - 0.5)).sum(1) >= 0
    return clocked("hyperplane", x, (y ^ (rng.random(n) < noise)).astype(np.int64), (n // 2,))


def blobs(n: int = 10_000, *, classes: int = 10, features: int = 16, seed: int = 0) -> Stream:
    """Draw Gaussian classes without any drift: for the constructions, where no file is at hand.

    Centres are normal with standard deviation 1, samples normal around them with the same.

    Parameters
    ----------
    n : int
        Samples.
    classes, features : int
    seed : int
    """
    check_whole("n", n, 1)
    check_whole("classes", classes, 2)
    check_whole("features", features, 1)
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, features))
    y = rng.permutation(np.arange(n) % classes)
    return clocked("blobs", (centres[y] + rng.normal(size=(n, features))).astype(np.float32), y)
