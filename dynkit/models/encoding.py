"""One tensor as a frame: a prediction, what the prediction misses, and a coder for that.

All predictions are tried on a sample of the tensor, the best one and none at all are coded on it, and the winner codes
the tensor in full; what is not smaller than the tensor stays raw. `encode` decodes what it made and compares hashes
before it gives it away.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from dynkit.errors import InvalidInput
from dynkit.models.coding import Grouping, compress, decompress
from dynkit.models.prediction import Prediction, fitted, predict
from dynkit.models.tensors import (
    Bits,
    bits_of,
    digest,
    dtype_name,
    exponents,
    is_float,
    ordered,
    raw,
    restored,
    tensor_of,
    torch_dtype,
    width,
)

__all__ = ["Frame", "Ref", "decode", "encode", "on_grid"]

Ref = tuple[int, int]  # a pack, and a place in it

_SMALL = 128  # bytes that a frame with a base does not pay for
_SAMPLE = 1 << 14  # elements
_RUNS = 16
_GROUPED = 1 << 13  # elements for which histograms by exponent are worth their place
_DENSE = 0.5  # share of numbers that are not zero
_POOR = 0.75  # share of a tensor above which its prediction is doubted
_EXTRA = 1.5  # bits per element that a coder takes besides the size of the number
_GAIN = 0.05  # bits per element that anything must gain over the nearest parent
_ALONE = ("auto", "planes", "bytes", "raw")  # coders of a tensor that nothing predicts
_ELEMENTWISE = ("parent", "mean", "linear", "threshold")


@dataclass(frozen=True)
class Frame:
    """How a tensor is stored.

    Parameters
    ----------
    id : bytes
        Its identity.
    dtype, shape
    size : int
        Stored bytes.
    checksum : int
        XXH3 of them.
    coder : str
    predictor : str
    options : tuple
    bases : tuple of Ref
        Tensors that the prediction is made from.
    side : int
        The first bytes belong to the prediction.
    step : float
        Not 0: what the prediction misses is a multiple of this.
    """

    id: bytes
    dtype: str
    shape: tuple[int, ...]
    size: int
    checksum: int
    coder: str
    predictor: str = "none"
    options: tuple[Any, ...] = ()
    bases: tuple[Ref, ...] = ()
    side: int = 0
    step: float = 0.0

    @property
    def raw_bytes(self) -> int:
        """Size of the tensor in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * torch_dtype(self.dtype).itemsize


def encode(
    key: bytes,
    target: torch.Tensor,
    bases: Sequence[tuple[Ref, torch.Tensor]] = (),
    *,
    parents: int = 0,
    admits: Callable[[Sequence[Ref], int], bool] = lambda refs, size: True,
    burden: Callable[[Sequence[Ref]], float] = lambda refs: 0.0,
    step: float = 0.0,
) -> tuple[Frame, bytes, torch.Tensor]:
    """Find a small way to store a tensor.

    Parameters
    ----------
    key : bytes
        Its identity.
    target : Tensor
    bases : sequence of reference and tensor
        Related tensors, nearest first; the first `parents` of them from the model's parents.
    admits : callable
        Whether a tensor may depend on these references with so many bytes of its own.
    burden : callable
        Bits per element that a smaller frame must gain to be worth these references.
    step : float
        Not 0: the tensor was made by `on_grid` with this step from a base or from zeros.

    Returns
    -------
    Frame, its bytes, and the tensor decoded from them
    """
    target = target.detach().cpu().contiguous()
    places = _Places([ref for ref, _ in bases], [base for _, base in bases], parents, admits, burden)
    for grid in (step, 0.0) if step else (0.0,):
        for prediction in (*_ranked(target, places, grid), None):
            coded = _coded(key, target, prediction, places, grid)
            if coded is not None and admits(coded[0].bases, coded[0].size):
                frame, data, grouping = coded
                used = [places.tensors[places.refs.index(ref)] for ref in frame.bases]
                decoded = decode(frame, data, used, grouping)
                if digest(frame.dtype, frame.shape, raw(decoded)) == key:
                    return frame, data, decoded
    data = raw(target).tobytes()
    if digest(dtype_name(target.dtype), target.shape, np.frombuffer(data, np.uint8)) != key:
        raise InvalidInput("a tensor changed while it was stored; store a copy, or wait for the training step to end")
    return _frame(key, target, "raw", data), data, target.clone()


@dataclass(frozen=True)
class _Places:
    refs: list[Ref]
    tensors: list[torch.Tensor]
    parents: int
    admits: Callable[[Sequence[Ref], int], bool]
    burden: Callable[[Sequence[Ref]], float]

    def of(self, prediction: Prediction) -> tuple[Ref, ...]:
        return tuple(self.refs[place] for place in prediction.bases)


def _ranked(target: torch.Tensor, places: _Places, step: float) -> list[Prediction]:
    """Return the predictions that a sample says are worth coding, best first: at most two."""
    if not places.refs or target.numel() * target.element_size() < _SMALL:
        return []
    cost: dict[Prediction, float] = {}
    some = _sample(target)
    elements = {place: _sample(base) for place, base in enumerate(places.tensors) if base.shape == target.shape}
    for prediction in _tried(fitted(target, places.tensors, places.parents)):
        if not places.admits(places.of(prediction), 0) or (step and prediction.kind not in ("parent", "mean")):
            continue
        try:
            if prediction.kind in _ELEMENTWISE:
                chosen = [elements[place] for place in prediction.bases]
                expected = predict(prediction.kind, prediction.options, b"", chosen, target.dtype, some.shape)
            else:
                expected = _sample(_expected(prediction, target, places))
        except RuntimeError:  # torch has not all operations of all types
            continue
        numbers = _residual(some, expected, step)
        if numbers is None:
            continue
        bits = float(np.log2(2 * np.abs(numbers.astype(np.float64)) + 1).mean())
        bits += bool(bits) * _EXTRA + 8 * len(prediction.side) / target.numel()
        if not places.admits(places.of(prediction), int(bits / 8 * target.numel())):
            continue
        cost[prediction] = bits + (prediction.kind != "parent") * _GAIN + places.burden(places.of(prediction))
        if not bits and not step:
            break
    return sorted(cost, key=cost.__getitem__)[:2]


def _tried(predictions: Iterator[Prediction]) -> Iterator[Prediction]:
    """Give predictions until none can be made: numbers may be too strange for it, or torch lacks an operation."""
    with contextlib.suppress(RuntimeError):
        yield from predictions


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if flat.numel() <= 2 * _SAMPLE:
        return flat
    run = _SAMPLE // _RUNS
    return torch.cat([flat[start : start + run] for start in np.linspace(0, flat.numel() - run, _RUNS, dtype=int)])


def _expected(prediction: Prediction, like: torch.Tensor, places: _Places) -> torch.Tensor:
    bases = [places.tensors[place] for place in prediction.bases]
    return predict(prediction.kind, prediction.options, prediction.side, bases, like.dtype, like.shape)


def _coded(
    key: bytes, target: torch.Tensor, prediction: Prediction | None, places: _Places, step: float
) -> tuple[Frame, bytes, Grouping | None] | None:
    """Code by this prediction, unless the tensor alone takes no more; None where it is on no grid of this step."""
    if not target.numel():
        return _frame(key, target, "raw", b""), b"", None
    alone = _alone(target, 0.0 if prediction else step)
    if alone is None:
        return None
    if prediction is None:
        coder, data, _ = _smallest(alone, None, _ALONE if not step else ("plain", "planes"))
        return _frame(key, target, coder, data, step=step), data, None
    expected = _expected(prediction, target, places)
    numbers = _residual(target, expected, step)
    if numbers is None:
        return None
    described = {
        "predictor": prediction.kind,
        "options": prediction.options,
        "bases": places.of(prediction),
        "side": len(prediction.side),
        "step": step,
    }
    if not numbers.any():
        return _frame(key, target, "zero", prediction.side, **described), prediction.side, None
    groups = exponents(bits_of(expected), target.dtype) if len(numbers) >= _GROUPED else None
    coder, data, grouping = _smallest(numbers, groups, ("planes", "plain" if groups is None else "grouped"))
    data = prediction.side + data
    if not step and len(data) > _POOR * target.nbytes:
        without = _coded(key, target, None, places, step)
        if without is not None and without[0].size <= len(data):
            return without
    return _frame(key, target, coder, data, **described), data, grouping


def _frame(key: bytes, target: torch.Tensor, coder: str, data: bytes, **described: Any) -> Frame:
    shape = tuple(target.shape)
    return Frame(key, dtype_name(target.dtype), shape, len(data), xxh3_64_intdigest(data), coder, **described)


def _smallest(numbers: Bits, groups: Bits | None, coders: Sequence[str]) -> tuple[str, bytes, Grouping | None]:
    """Code by the coder that is best on a sample."""
    if len(numbers) <= 2 * _SAMPLE:
        grouping = Grouping.by(groups) if groups is not None else None
        coded = {coder: compress(numbers, coder, grouping) for coder in coders}
        best = min(coded, key=lambda coder: len(coded[coder]))
        return best, coded[best], grouping
    run = _SAMPLE // _RUNS
    starts = np.linspace(0, len(numbers) - run, _RUNS, dtype=int)
    rows = (starts[:, None] + np.arange(run)).reshape(-1)
    some = numbers[rows]
    best = "grouped"
    if groups is None or np.count_nonzero(some) < _DENSE * len(some):  # else there are no runs for others to find
        grouping = Grouping.by(groups[rows]) if groups is not None else None
        best = min(coders, key=lambda coder: len(compress(some, coder, grouping)))
    grouping = Grouping.by(groups) if groups is not None and best == "grouped" else None
    return best, compress(numbers, best, grouping), grouping


def _residual(target: torch.Tensor, expected: torch.Tensor, step: float) -> Bits | None:
    """Return what the prediction misses, signed, small where it is near; None where it is on no grid of this step."""
    if step:
        steps = ((target.double() - expected.double()) / step).round().reshape(-1)
        if not bool((steps.abs() < 2**30).all()) or not on_grid(expected.reshape(-1), steps, step).equal(
            target.reshape(-1)
        ):
            return None
        return steps.to(torch.int32).numpy()
    return np.subtract(bits_of(target), bits_of(expected)).view(f"<i{width(target.dtype)}")


def _alone(target: torch.Tensor, step: float) -> Bits | None:
    """Return the numbers of a tensor that nothing predicts; None where it is on no grid of this step."""
    if step:
        return _residual(target, torch.zeros_like(target), step)
    bits = bits_of(target)
    if is_float(target.dtype):
        name = f"<f{bits.itemsize}"
        native = bits.itemsize > 1 and dtype_name(target.dtype) in ("float16", "float32", "float64")
        return bits.view(name) if native else ordered(bits, target.dtype)
    return bits


def decode(frame: Frame, data: Any, bases: Sequence[torch.Tensor], grouping: Grouping | None = None) -> torch.Tensor:
    """Inverse of `encode`: the tensor, in memory of its own; the grouping may be at hand."""
    dtype = torch_dtype(frame.dtype)
    count = frame.raw_bytes // max(1, dtype.itemsize // (2 if dtype.is_complex else 1))
    side, rest = (bytes(data[: frame.side]), data[frame.side :]) if frame.side else (b"", data)
    if frame.predictor == "none" and not frame.step:
        bits = decompress(rest, frame.coder, count, np.dtype(f"<u{width(dtype)}"))
        if frame.coder == "auto" and is_float(dtype) and frame.dtype not in ("float16", "float32", "float64"):
            bits = restored(bits, dtype)
        return tensor_of(bits, dtype, frame.shape)
    if frame.predictor == "none":
        expected = torch.zeros(frame.shape, dtype=dtype, device="cpu")
    else:
        expected = predict(frame.predictor, frame.options, side, bases, dtype, frame.shape)
    if frame.coder == "zero":
        return expected.clone() if any(expected is base for base in bases) else expected
    if frame.coder == "grouped" and grouping is None:
        groups = exponents(bits_of(expected), dtype)
        assert groups is not None
        grouping = Grouping.by(groups)
    numbers = decompress(rest, frame.coder, count, np.dtype("<i4" if frame.step else f"<i{width(dtype)}"), grouping)
    if frame.step:
        return on_grid(expected, torch.from_numpy(numbers).reshape(frame.shape), frame.step)
    bits = numbers.view(f"<u{numbers.itemsize}")
    bits += bits_of(expected)
    return tensor_of(bits, dtype, frame.shape)


def on_grid(expected: torch.Tensor, steps: torch.Tensor, step: float) -> torch.Tensor:
    """Return the values that are so many steps from the expected ones."""
    return (expected.double() + steps.double() * step).to(expected.dtype)
