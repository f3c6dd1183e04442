"""What a tensor is expected to be, computed from other tensors of the store.

Every prediction is the same bit by bit on any machine: elementwise IEEE operations in a recorded order, and products of
whole numbers that a double holds exactly. `fitted` finds the predictors that could explain a tensor; which one is used
is decided by what the residual costs (`dynkit.models.encoding`).

| predictor | explains |
|---|---|
| parent | fine-tuning; also in another precision |
| mean | the average of several models (federated masters), in the order of operations that the average was made by |
| linear | checkpoint streams (2 v1 - v2 and its like), weighted averages, task arithmetic, decaying optimizer states |
| threshold, mask | pruning by magnitude, or by anything else |
| lowrank | merged LoRA factors |
| rows | resized or reordered embeddings and heads |
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynkit.models.coding import compress, decompress, pack_numbers, unpack_numbers

__all__ = ["MEAN", "Prediction", "fitted", "predict"]

MEAN = (False, "after")  # the usual order of operations: all added up, then divided
_RANK = 48  # at most, of a low-rank difference
_FACTOR_BITS = 23  # so that sums of _RANK products stay below 2^53
_OVERSAMPLING = 8
_LARGE = 1024  # elements that are worth more than the common predictions
_HOW = ("after", "reciprocal", "each")  # a mean is divided
_SPARSE = 0.02  # share of zeros that hints at pruning


@dataclass(frozen=True)
class Prediction:
    """A predictor with its parameters.

    Parameters
    ----------
    kind : str
    bases : tuple of int
        Which of the tensors it was fitted to, by their place.
    options : tuple
        JSON values.
    side : bytes
        What else is stored: a mask, factors, rows.
    """

    kind: str
    bases: tuple[int, ...]
    options: tuple[Any, ...] = ()
    side: bytes = b""


def predict(
    kind: str, options: Sequence[Any], side: bytes, bases: Sequence[torch.Tensor], dtype: torch.dtype, shape: Any
) -> torch.Tensor:
    """Compute the expected tensor."""
    first = bases[0]
    if kind == "parent":
        return first.to(dtype)
    if kind == "mean":
        return _mean(bases, *options).to(dtype)
    if kind == "linear":
        return _linear(bases, options).to(dtype)
    if kind == "rows":
        return _rows(first.to(dtype), side, shape)
    if kind == "lowrank":
        return _with_product(first, options, side).to(dtype)
    kept = first.abs() > options[0] if kind == "threshold" else _unpack_mask(side, first.shape)
    return (
        first * kept.to(dtype) if options[-1] else torch.where(kept, first, torch.zeros((), dtype=dtype, device="cpu"))
    )


def fitted(target: torch.Tensor, bases: Sequence[torch.Tensor], parents: int) -> Iterator[Prediction]:
    """Yield predictions of `target` worth a trial.

    Parameters
    ----------
    target : Tensor
    bases : sequence of Tensor
        The first `parents` of them from the model's parents, then earlier ones.
    """
    for place, base in enumerate(bases):
        if base.shape != target.shape:
            yield from _by_rows(target, base, place)
        else:
            yield Prediction("parent", (place,))
    equal = [place for place, base in enumerate(bases) if base.shape == target.shape and base.dtype == target.dtype]
    if not equal or not (target.is_floating_point() and target.dtype.itemsize > 1):
        return
    if target.numel() >= _LARGE:
        yield from _pruned(target, bases[equal[0]], equal[0])
    several = [place for place in equal if place < parents]
    if len(several) > 1:
        for wide, how in (MEAN, (False, "reciprocal"), (False, "each"), *((True, how) for how in _HOW)):
            yield Prediction("mean", tuple(several), (wide, how))
        yield from _least_squares(target, bases, several)
    if target.numel() < _LARGE:
        return
    yield from _least_squares(target, bases, equal[:1])
    if len(equal) > 1:
        yield from _least_squares(target, bases, equal[:2])
    yield from _low_rank(target, bases[equal[0]], equal[0])


def _mean(bases: Sequence[torch.Tensor], wide: bool, how: str) -> torch.Tensor:
    """Average in the order of the bases; `wide` adds in the next precision."""
    dtype = bases[0].dtype
    inside = (torch.float64 if dtype.itemsize >= 4 else torch.float32) if wide else dtype
    terms = (base.to(inside) for base in bases)
    if how == "each":
        terms = (term / len(bases) for term in terms)
    total = functools.reduce(torch.add, terms)
    if how == "after":
        return total / len(bases)
    return total * (1 / len(bases)) if how == "reciprocal" else total


def _linear(bases: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return functools.reduce(torch.add, (base.double() * weight for base, weight in zip(bases, weights, strict=True)))


def _least_squares(target: torch.Tensor, bases: Sequence[torch.Tensor], places: Sequence[int]) -> Iterator[Prediction]:
    """Fit weights of the bases to some of the elements."""
    step = max(1, target.numel() // 8192)
    x = np.stack([_sampled(bases[place], step) for place in places], axis=1)
    y = _sampled(target, step)
    if len(y) <= len(places) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    yield Prediction("linear", tuple(places), tuple(weights.tolist()))


def _sampled(tensor: torch.Tensor, step: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return tensor.reshape(-1)[::step].double().numpy()


def _pruned(target: torch.Tensor, parent: torch.Tensor, place: int) -> Iterator[Prediction]:
    """Zeros where the parent has none: by its magnitude if one threshold tells them, else by a mask."""
    step = max(1, target.numel() // 8192)
    if np.count_nonzero(_sampled(target, step)) > (1 - _SPARSE) * -(-target.numel() // step):
        return
    zero = target == 0
    if bool((parent[zero] == 0).all()) or not bool(parent.isfinite().all()):
        return
    signed = bool(torch.signbit(target[zero]).any())  # a weight times a mask of zero keeps its sign
    size = parent.abs()
    threshold = size[zero].max()
    if bool(zero.all()) or bool(threshold < size[~zero].min()):
        yield Prediction("threshold", (place,), (threshold.item(), signed))
    else:
        mask = np.packbits((~zero).reshape(-1).numpy())
        yield Prediction("mask", (place,), (signed,), compress(mask, "bytes"))


def _unpack_mask(side: bytes, shape: torch.Size) -> torch.Tensor:
    packed = decompress(side, "bytes", 0, np.dtype(np.uint8))
    return torch.from_numpy(np.unpackbits(packed, count=shape.numel()).view(bool)).reshape(shape)


def _by_rows(target: torch.Tensor, parent: torch.Tensor, place: int) -> Iterator[Prediction]:
    """Rows that the parent has too, in place or elsewhere."""
    if target.dtype != parent.dtype or not (target.dim() and parent.dim()) or target.shape[1:] != parent.shape[1:]:
        return
    common = min(len(target), len(parent))
    if not common or not target[0].numel():
        return
    yield Prediction("rows", (place,))
    if target.dim() > 1:
        found = {row.tobytes(): i for i, row in enumerate(_row_bytes(parent))}
        rows = [found.get(row.tobytes(), -1) for row in _row_bytes(target)]
        if any(row not in (-1, i) for i, row in enumerate(rows)):
            yield Prediction("rows", (place,), (), pack_numbers(rows))


def _row_bytes(tensor: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return tensor.contiguous().reshape(len(tensor), -1).view(torch.uint8).numpy()


def _rows(parent: torch.Tensor, side: bytes, shape: Any) -> torch.Tensor:
    """Rows of the parent where they are known, zeros elsewhere."""
    expected = torch.zeros(shape, dtype=parent.dtype, device="cpu")
    if not side:
        common = min(len(parent), len(expected))
        expected[:common] = parent[:common]
        return expected
    rows = torch.tensor(unpack_numbers(side), device="cpu")
    known = rows >= 0
    expected[known] = parent[rows[known]]
    return expected


def _low_rank(target: torch.Tensor, parent: torch.Tensor, place: int) -> Iterator[Prediction]:
    """Factors of the difference, found by a randomised SVD (Halko, Martinsson and Tropp 2011, algorithm 4.1).

    The factors are rounded to 24 bits, so that their product is a sum of whole numbers below 2^53: exact in doubles,
    whatever order a matrix product adds in.
    """
    if target.dim() < 2:
        return
    matrices = target.reshape(len(target), -1), parent.reshape(len(target), -1)
    if min(matrices[0].shape) < 2 * _OVERSAMPLING or not _looks_low_rank(*matrices):
        return
    difference = matrices[0].double() - matrices[1].double()
    rng = np.random.default_rng(0)
    probes = torch.from_numpy(rng.standard_normal((difference.shape[1], _RANK + _OVERSAMPLING)))
    basis = torch.linalg.qr(difference @ probes).Q
    u, s, v = torch.linalg.svd(basis.T @ difference, full_matrices=False)
    rank = int(_rank(s.numpy() ** 2))
    if not 0 < rank <= min(_RANK, min(difference.shape) // 3):
        return
    root = s[:rank].sqrt()
    left, right = (basis @ u[:, :rank]) * root, v[:rank] * root[:, None]
    exponents = [_FACTOR_BITS - int(np.ceil(np.log2(float(factor.abs().max())))) for factor in (left, right)]
    whole = [(factor * 2.0**e).round().to(torch.int32) for factor, e in zip((left, right), exponents, strict=True)]
    numbers = torch.cat([part.reshape(-1) for part in whole]).numpy()
    yield Prediction("lowrank", (place,), (rank, *exponents), compress(numbers, "auto"))


def _looks_low_rank(target: torch.Tensor, parent: torch.Tensor) -> bool:
    """Look at the difference in 64 rows and 256 columns."""
    rows, columns = (slice(None, None, max(1, n // most)) for n, most in zip(target.shape, (64, 256), strict=True))
    part = (target[rows, columns].double() - parent[rows, columns].double())[:64, :256]
    if not bool(part.isfinite().all()):
        return False
    values = torch.linalg.eigvalsh(part @ part.T).flip(0).clamp_min(0).numpy()
    return 0 < _rank(values) <= len(part) * 3 // 4


def _rank(squares: "np.ndarray[Any, np.dtype[np.float64]]") -> int:
    """Squared singular values before they drop to rounding noise."""
    return int((squares > squares[0] * 1e-9).sum()) if squares[0] > 0 else 0


def _with_product(parent: torch.Tensor, options: Sequence[int], side: bytes) -> torch.Tensor:
    rank, left_exponent, right_exponent = options
    rows = len(parent)
    columns = parent.numel() // rows
    numbers = decompress(side, "auto", rank * (rows + columns), np.dtype(np.int32))
    left, right = (torch.from_numpy(part).double() for part in np.split(numbers, [rows * rank]))
    product = left.reshape(rows, rank) @ right.reshape(rank, columns)
    return parent.double() + (product * 2.0 ** -(left_exponent + right_exponent)).reshape(parent.shape)
