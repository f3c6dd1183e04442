"""Put a known drift into samples and labels of any origin.

A source is a `Stream` or a pair ``(x, y)`` of samples (N, ...) and labels (N,). Its order is not kept: rows are drawn
at random, and each at most once, so a model is never judged on a sample that it was trained on; what a construction
has no use for is left out. Samples come one a minute. The column ``concept`` says what a row is of; no model sees it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import scipy  # its parts load at first use

from dynkit.errors import InvalidInput, check_whole
from dynkit.streams.stream import Array, Stream, clocked, evenly, middles

__all__ = [
    "Source",
    "abrupt",
    "class_incremental",
    "corruption",
    "gradual",
    "mixture",
    "prior_shift",
    "recurring",
    "rotation",
]

Source = Stream | tuple[Any, Any]
Pool = tuple[Array, Array]

_GRID = 10_080  # places at which the mean share of a concept is taken; up to ten stages divide it


def abrupt(*concepts: Source, seed: int = 0) -> Stream:
    """Show one concept after the other, each for the same number of samples.

    Examples
    --------
    >>> from dynkit.streams import blobs
    >>> abrupt(blobs(300), blobs(500, seed=1)).drifts
    (300,)
    """
    first, pools = _concepts("abrupt", concepts)
    return _in_stages("abrupt", first, pools, np.eye(len(pools)), seed)


def recurring(*concepts: Source, cycles: int = 2, seed: int = 0) -> Stream:
    """Show one concept after the other, each for the same number of samples, and then from the first again.

    Parameters
    ----------
    *concepts : Stream or (x, y)
    cycles : int
        How many times each is seen.
    seed : int
    """
    check_whole("cycles", cycles, 1)
    first, pools = _concepts("recurring", concepts)
    return _in_stages("recurring", first, pools, np.tile(np.eye(len(pools)), (cycles, 1)), seed)


def mixture(first: Source, second: Source, *, shares: Sequence[float] = (0, 0.5, 1), seed: int = 0) -> Stream:
    """Mix two concepts in a proportion that changes: images of one kind, then of both, then of the other.

    Parameters
    ----------
    first, second : Stream or (x, y)
    shares : sequence of float
        Share of `second` in each stage; stages have the same length.
    seed : int
    """
    share = _between("shares", shares, 0, 1)
    source, pools = _concepts("mixture", (first, second))
    return _in_stages("mixture", source, pools, np.stack([1 - share, share], axis=1), seed)


def gradual(before: Source, after: Source, *, begin: float = 0.4, end: float = 0.6, seed: int = 0) -> Stream:
    """Let the samples of a new concept come more and more often, until the old one is gone.

    Parameters
    ----------
    before, after : Stream or (x, y)
    begin, end : float
        Where the change begins and is over, as shares of the stream. The share of `after` rises along a line.
    seed : int
    """
    if not 0 < begin < end < 1:
        raise InvalidInput(f"begin={begin!r}, end={end!r} must be shares of the stream, 0 < begin < end < 1")

    def share(u: Array) -> Array:
        second = np.clip((u - begin) / (end - begin), 0, 1)
        return np.stack([1 - second, second], axis=1)

    source, pools = _concepts("gradual", (before, after))
    x, y, chosen = _drawn(pools, share, seed)
    return _made(source, "gradual", x, y, (int(np.searchsorted(middles(len(x)), begin)),), chosen)


def prior_shift(source: Source, *, priors: Sequence[Sequence[float]] | None = None, seed: int = 0) -> Stream:
    """Change how often each class comes, and not what it looks like.

    Parameters
    ----------
    source : Stream or (x, y)
    priors : sequence of sequences of float or None
        For each stage the share of each class, in the order of the classes; stages have the same length. None: first
        all are as frequent, then each is 0.7 times as frequent as the one before it.
    seed : int
    """
    stream = _stream(source)
    x, y, classes = stream.x, stream.y, _classes(stream, "prior_shift")
    stages = np.asarray([np.ones(len(classes)), 0.7 ** np.arange(len(classes))] if priors is None else priors, float)
    if stages.ndim != 2 or stages.shape[1] != len(classes) or (stages < 0).any() or not (stages.sum(1) > 0).all():
        raise InvalidInput(f"priors must be a share for each of {len(classes)} classes in every stage, not {priors!r}")
    used = stages.sum(0) > 0
    pools = [(x[y == value], y[y == value]) for value in classes[used]]
    stages = stages[:, used] / stages.sum(1, keepdims=True)
    x, y, _ = _drawn(pools, _steps(stages), seed)
    stage, drifts = evenly(len(x), len(stages))
    return _made(stream, "prior-shift", x, y, drifts, stage)


def class_incremental(source: Source, *, stages: int | Sequence[Sequence[int]] = 5, seed: int = 0) -> Stream:
    """Let new classes come, and the old ones not any more.

    Parameters
    ----------
    source : Stream or (x, y)
    stages : int or sequence of sequences of int
        Into how many stages the classes are split, in their order; or the classes of each stage.
    seed : int

    References
    ----------
    van de Ven, Tuytelaars and Tolias, "Three types of incremental learning", Nature Machine Intelligence 4, 2022.

    Examples
    --------
    >>> x, y = np.arange(12.0).reshape(6, 2), np.array([0, 1, 2, 0, 1, 2])
    >>> stream = class_incremental((x, y), stages=[[2], [0, 1]])
    >>> stream.y[:2].tolist(), sorted(stream.y[2:].tolist()), stream.drifts
    ([2, 2], [0, 0, 1, 1], (2,))
    """
    stream = _stream(source)
    y, classes = stream.y, _classes(stream, "class_incremental")
    if isinstance(stages, int):
        check_whole("stages", stages, 2)
        parts = np.array_split(classes, min(stages, len(classes)))
    else:
        parts = [np.asarray(part) for part in stages]
    chosen = np.concatenate(parts) if parts else classes[:0]
    if len(parts) < 2 or len(np.unique(chosen)) < len(chosen) or not np.isin(chosen, classes).all():
        raise InvalidInput(f"stages={stages!r} must be at least two groups of different classes of {classes.tolist()}")
    stage_of = np.full(len(classes), -1)
    stage_of[np.searchsorted(classes, chosen)] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    stage = stage_of[np.searchsorted(classes, y)]
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(stage[order], kind="stable")]
    order = order[stage[order] >= 0]
    stage = stage[order]
    drifts = tuple(np.searchsorted(stage, np.arange(1, len(parts))).tolist())
    return _made(stream, "class-incremental", stream.x[order], y[order], drifts, stage)


def rotation(source: Source, *, degrees: Sequence[float] = (0, 45), seed: int = 0) -> Stream:
    """Turn samples, by a new angle in each stage.

    Parameters
    ----------
    source : Stream or (x, y)
        Images are turned about their centre; vectors in the plane of features 0 and 1, of 2 and 3, and so on.
    degrees : sequence of float
        Angle in each stage; stages have the same length.
    seed : int
    """
    return _transformed("rotation", _stream(source), degrees, _rotate, seed)


def _rotate(x: Array, angle: float, rng: np.random.Generator) -> Array:
    x = x.astype(np.result_type(x, np.float32))
    if x.ndim > 2:
        turned: Array = scipy.ndimage.rotate(x, angle, axes=(-1, -2), reshape=False, order=1)
        return turned
    even = x.shape[1] // 2 * 2
    a, b = x[:, 0:even:2], x[:, 1:even:2]
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turned = x.copy()
    turned[:, 0:even:2], turned[:, 1:even:2] = cos * a - sin * b, sin * a + cos * b
    return turned


def corruption(
    source: Source,
    kind: Literal["noise", "contrast", "blur", "occlusion"] = "noise",
    *,
    severities: Sequence[float] = (0, 0.5),
    seed: int = 0,
) -> Stream:
    """Damage samples, by as much as each stage says.

    Parameters
    ----------
    source : Stream or (x, y)
    kind : str
        ``"noise"``: normal, of `severity` standard deviations of all values. ``"contrast"``: a sample's values move
        to their mean by this share of their way. For images only, ``"blur"``: a Gaussian of an eighth of `severity`
        of the image's side; ``"occlusion"``: a black square of `severity` of its side, anywhere.
    severities : sequence of float
        In each stage, 0 (none) to 1; stages have the same length.
    seed : int

    References
    ----------
    Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR
    2019, section 3; kinds as there, scaled by one number.
    """
    kinds = {"noise": _noise, "contrast": _contrast, "blur": _blur, "occlusion": _occlusion}
    if kind not in kinds:
        raise InvalidInput(f"kind={kind!r} is not a corruption; expected one of: {', '.join(kinds)}")
    stream = _stream(source)
    if stream.x.ndim < 3 and kind in ("blur", "occlusion"):
        raise InvalidInput(f"kind={kind!r} needs images (N, H, W), not samples of shape {stream.x.shape[1:]}")
    return _transformed(f"corruption-{kind}", stream, _between("severities", severities, 0, 1), kinds[kind], seed)


def _noise(x: Array, severity: float, rng: np.random.Generator) -> Array:
    noisy: Array = x + rng.normal(scale=severity * x.std(), size=x.shape)
    return noisy


def _contrast(x: Array, severity: float, rng: np.random.Generator) -> Array:
    mean = x.mean(tuple(range(1, x.ndim)), keepdims=True, dtype=np.float32)
    moved: Array = mean + (1 - severity) * (x - mean)
    return moved


def _blur(x: Array, severity: float, rng: np.random.Generator) -> Array:
    sigma = severity * x.shape[-1] / 8
    blurred: Array = scipy.ndimage.gaussian_filter(x.astype(np.result_type(x, np.float32)), sigma, axes=(-1, -2))
    return blurred


def _occlusion(x: Array, severity: float, rng: np.random.Generator) -> Array:
    side = round(severity * x.shape[-1])
    top = rng.integers(0, x.shape[-2] - min(side, x.shape[-2]) + 1, len(x))[:, None, None]
    left = rng.integers(0, x.shape[-1] - min(side, x.shape[-1]) + 1, len(x))[:, None, None]
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    hidden = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return np.where(hidden if x.ndim == 3 else hidden[:, None], 0, x)


def _transformed(
    what: str,
    source: Stream,
    levels: Sequence[float] | Array,
    change: Callable[[Array, float, np.random.Generator], Array],
    seed: int,
) -> Stream:
    """Change the samples of each stage by its level; level 0 leaves them as they are."""
    x = source.x
    if not 1 < len(levels) <= len(x):
        raise InvalidInput(
            f"{list(levels)} must have a value for each of at least two stages, and no more than samples"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    stage, drifts = evenly(len(x), len(levels))
    moved = x[order]
    for i, level in enumerate(levels):
        if level:
            rows = stage == i
            moved[rows] = _as_dtype(change(moved[rows], float(level), rng), x.dtype)
    return _made(source, what, moved, source.y[order], drifts, stage)


def _as_dtype(values: Array, dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    return values.astype(dtype)


def _concepts(what: str, sources: Sequence[Source]) -> tuple[Stream, list[Pool]]:
    """Return the first concept, which gives its name, and samples and labels of all."""
    if len(sources) < 2:
        raise InvalidInput(f"{what} needs at least two concepts, not {len(sources)}")
    concepts = [_stream(source) for source in sources]
    shapes = dict.fromkeys(concept.x.shape[1:] for concept in concepts)
    if len(shapes) > 1:
        raise InvalidInput(f"concepts must have samples of one shape, not {' and '.join(map(str, shapes))}")
    return concepts[0], [(concept.x, concept.y) for concept in concepts]


def _in_stages(what: str, source: Stream, pools: Sequence[Pool], shares_SC: Array, seed: int) -> Stream:
    """Draw from concepts by their shares in each of S stages of the same length."""
    x, y, chosen = _drawn(pools, _steps(shares_SC), seed)
    return _made(source, what, x, y, evenly(len(x), len(shares_SC))[1], chosen)


def _steps(shares_SC: Array) -> Callable[[Array], Array]:
    """Shares at places u in (0, 1) of a stream of stages of the same length."""
    return lambda u: shares_SC[(u * len(shares_SC)).astype(int)]


def _drawn(pools: Sequence[Pool], share: Callable[[Array], Array], seed: int) -> tuple[Array, Array, Array]:
    """Draw each row from a concept by the shares (N, C) at its place u in (0, 1): as many rows as all have enough for.

    Returns
    -------
    tuple
        Samples, labels, and the concept of each.
    """
    sizes = np.array([len(x) for x, _ in pools])
    mean = share(middles(_GRID)).mean(0)
    n = int((sizes / np.maximum(mean, 1e-12)).min() + 1e-6)
    rng = np.random.default_rng(seed)
    drawn = rng.random((n, 1))
    while True:
        chosen = (drawn[:n] >= share(middles(n)).cumsum(1)[:, :-1]).sum(1)
        missing = int((np.bincount(chosen, minlength=len(sizes)) - sizes).max())
        if missing <= 0:
            break
        n -= missing
    x = np.empty((n, *pools[0][0].shape[1:]), np.result_type(*(x.dtype for x, _ in pools)))
    y = np.empty(n, np.result_type(*(y.dtype for _, y in pools)))
    for c, (pool_x, pool_y) in enumerate(pools):
        rows = rng.permutation(len(pool_x))[: int((chosen == c).sum())]
        x[chosen == c], y[chosen == c] = pool_x[rows], pool_y[rows]
    return x, y, chosen


def _stream(source: Source) -> Stream:
    """Make a pair of arrays a stream, checked."""
    if isinstance(source, Stream):
        return source
    try:
        x, y = (np.asarray(part) for part in source)
    except (TypeError, ValueError):
        raise InvalidInput(f"{type(source).__name__} is not a source; pass a Stream or arrays (x, y)") from None
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or not len(x):
        raise InvalidInput(f"a source is samples (N, ...) and labels (N,), not {x.shape} and {y.shape}")
    if x.dtype.kind not in "buif" or y.dtype.kind not in "buif" or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InvalidInput(f"samples ({x.dtype}) and labels ({y.dtype}) must be finite numbers")
    return clocked("arrays", x, y)


def _made(source: Stream, what: str, x: Array, y: Array, drifts: tuple[int, ...], concept: Array) -> Stream:
    """Name a construction after its source, whose reference training it keeps."""
    return clocked(
        f"{source.name}-{what}", x, y, drifts, {"concept": concept}, metrics=source.metrics, training=source.training
    )


def _classes(source: Stream, what: str) -> Array:
    y = source.y
    classes = np.unique(y)
    if y.dtype.kind == "f" or len(classes) < 2:
        raise InvalidInput(f"{what} needs at least two classes as whole numbers; labels are {y.dtype}")
    return classes


def _between(name: str, values: Sequence[float], low: float, high: float) -> Array:
    array = np.asarray(values, float)
    if array.ndim != 1 or len(array) < 2 or not ((array >= low) & (array <= high)).all():
        raise InvalidInput(f"{name}={values!r} must be at least two numbers from {low} to {high}")
    return array
