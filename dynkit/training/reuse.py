"""One forward pass for two: what a model computed for a whole batch is used again for the rows that were kept of it.

A batch is scored by a forward pass of all of it, without gradients. When the kept rows go through the model again, now
with gradients, operations find their results in what was computed before, as far as their inputs are the same rows and
their weights the same: known to be, where the input is itself such a result, else compared. What differs (after
dropout, after a batch normalisation that learns) is computed as ever. Only operations are listed whose row of the
result depends on the same row of the input alone, so that the same input has the same result, whatever the model does
with them. Cheap ones are computed twice, for what that costs is to write the result; of them only is known whether
the input was the same.

The results for the whole batch are in memory until its step is done, nearly as if it were trained on whole.
"""

import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Kept", "Recorded"]

_aten = torch.ops.aten
_PLACE: dict[Any, int] = {  # of the argument that has samples as rows
    _aten.addmm.default: 1,
    _aten.mm.default: 0,
    _aten.convolution.default: 0,
    _aten.max_pool2d_with_indices.default: 0,
    _aten.native_layer_norm.default: 0,
}
_Values = tuple[Any, ...]


@dataclass(frozen=True)
class _Call:
    """An operation of the first pass.

    Parameters
    ----------
    args : tuple
        Without the samples where their origin is known.
    origin : int or None
        Number of the result that the samples were.
    rows : int
    stride : tuple
        Of the samples.
    results : tuple of Tensor
        None of a cheap operation.
    numbers : tuple of int
        Of the results.
    versions : list of int
        A tensor that is changed in place afterwards is not what it was.
    """

    args: _Values
    origin: int | None
    rows: int
    stride: tuple[int, ...]
    results: tuple[torch.Tensor, ...]
    numbers: tuple[int, ...]
    versions: list[int]


class _Origins:
    """Which tensors are which results; those of the first pass are forgotten when nothing else holds them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}

    def note(self, tensor: torch.Tensor, number: int) -> None:
        self._known[tensor.data_ptr()] = weakref.ref(tensor), _version(tensor), number

    def of(self, tensor: torch.Tensor) -> int | None:
        """Return the number of the result that a tensor is, or a view of."""
        found, version, number = self._known.get(tensor.data_ptr(), (lambda: None, 0, 0))
        there = found()
        return number if there is not None and _version(there) == version == _version(tensor) else None


class Recorded(TorchDispatchMode):
    """While this is entered, operations are computed and their results kept."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.calls: dict[Any, deque[_Call]] = defaultdict(deque)
        self._origins, self._numbers = _Origins(), count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Values = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute, and keep arguments and results."""
        result = func(*args, **(kwargs or {}))
        if not kwargs and (kind := _kind(func, args)):
            place, results = _PLACE.get(func, 0), result if isinstance(result, tuple) else (result,)
            numbers = tuple(next(self._numbers) for _ in results)
            samples, origin = args[place], self._origins.of(args[place])
            if origin is not None:
                args = (*args[:place], None, *args[place + 1 :])
            kept = results if func in _PLACE else ()
            call = _Call(args, origin, len(samples), samples.stride(), kept, numbers, _versions(args + kept))
            self.calls[kind].append(call)
            for one, number in zip(results, numbers, strict=True):
                self._origins.note(one, number)
        return result


class Kept(TorchDispatchMode):
    """While this is entered, operations on some rows of a recorded batch take their results from it.

    Parameters
    ----------
    recorded : Recorded
        Used up: each result is given once.
    rows : (k,) int64
        Which rows of the recorded batch there are now, in order.
    size : int
        Samples of the recorded batch.
    """

    def __init__(self, recorded: Recorded, rows: torch.Tensor, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls, self._rows, self._size = recorded.calls, rows, size
        self._origins = _Origins()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Values = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Find the result, or compute it."""
        if kwargs or not (kind := _kind(func, args)) or not (waiting := self._calls.get(kind)):
            return func(*args, **(kwargs or {}))
        call = waiting.popleft()
        if call.versions != _versions(call.args + call.results) or not self._same(call, args, _PLACE.get(func, 0)):
            return func(*args)
        taken = tuple(self._of(result) for result in call.results) or (func(*args),)
        for one, number in zip(taken, call.numbers, strict=True):
            self._origins.note(one, number)
        return taken if len(taken) > 1 else taken[0]

    def _same(self, call: _Call, now: _Values, place: int) -> bool:
        weights = (pair for i, pair in enumerate(zip(call.args, now, strict=True)) if i != place)
        if not all(_one(*pair) or torch.equal(*pair) for pair in weights if isinstance(pair[0], torch.Tensor)):
            return False
        each, rest = divmod(call.rows, self._size)  # rows of a sample, such as one for each of its tokens
        if rest or len(now[place]) != each * len(self._rows):
            return False
        if call.origin is not None:
            return self._origins.of(now[place]) == call.origin and now[place].stride() == call.stride
        return torch.equal(self._of(call.args[place]), now[place])

    def _of(self, whole: torch.Tensor) -> torch.Tensor:
        """Take the rows of the kept samples out of what was computed for all."""
        if len(whole) == self._size:
            return whole.index_select(0, self._rows)
        return whole.reshape(self._size, -1).index_select(0, self._rows).reshape(-1, *whole.shape[1:])


def _kind(func: Any, args: _Values) -> Any:
    """Return what two calls have in common before their values are compared; None of an operation not listed."""
    place = _PLACE.get(func)
    if place is None:
        one = len(args) == 1 and isinstance(args[0], torch.Tensor) and args[0].ndim > 1
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not one or drawn or torch.Tag.pointwise not in func.tags or func._schema.is_mutable:
            return None
        place = 0
    samples = args[place]
    if samples.stride(0) < max(samples.stride()):
        return None  # they are not one after the other
    if func is _aten.native_layer_norm.default and len(args[1]) == samples.ndim:
        return None  # over all of them
    described = (
        tuple(arg.shape[1:] if i == place else arg.shape) if isinstance(arg, torch.Tensor) else repr(arg)
        for i, arg in enumerate(args)
    )
    return func, *described


def _version(tensor: torch.Tensor) -> int:
    """Counter of changes in place."""
    return -1 if tensor.is_inference() else tensor._version


def _versions(values: _Values) -> list[int]:
    return [_version(value) for value in values if isinstance(value, torch.Tensor)]


def _one(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same place in memory, read in the same way."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype
