"""One forward pass for two: what a model computed for a whole batch is used again for the rows that were kept of it.

A batch is scored by a forward pass of all of it, without gradients. When the kept rows go through the model again, now
with gradients, operations find their results in what was computed before, as far as their inputs are the same rows and
their weights the same: known to be, where the input was itself taken from what was computed before, else compared.
What differs (after dropout, after a batch normalisation that learns) is computed as ever. Only operations are listed
whose row of the result depends on the same row of the input alone, so that the same input has the same result,
whatever the model does with them.

The results for the whole batch are in memory until its step is done, as if it were trained on whole.
"""

from collections import defaultdict, deque
from typing import Any, NamedTuple

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


class _Call(NamedTuple):
    args: _Values
    results: tuple[torch.Tensor, ...]
    versions: list[int]  # a tensor that is changed in place afterwards is not what it was


class Recorded(TorchDispatchMode):
    """While this is entered, operations are computed and their results kept."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.calls: dict[Any, deque[_Call]] = defaultdict(deque)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Values = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute, and keep arguments and results."""
        result = func(*args, **(kwargs or {}))
        if not kwargs and (kind := _kind(func, args)):
            results = result if isinstance(result, tuple) else (result,)
            self.calls[kind].append(_Call(args, results, _versions(args + results)))
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
        self._origins: dict[int, tuple[torch.Tensor, int, int]] = {}  # by address: it, its version, address it is of

    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Values = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Find the result, or compute it."""
        if not kwargs and (kind := _kind(func, args)) and (waiting := self._calls.get(kind)):
            call = waiting.popleft()
            if call.versions == _versions(call.args + call.results) and self._same(call.args, args, _place(func)):
                taken = tuple(self._take(result) for result in call.results)
                return taken if len(taken) > 1 else taken[0]
        return func(*args, **(kwargs or {}))

    def _same(self, then: _Values, now: _Values, place: int) -> bool:
        each, rest = divmod(len(then[place]), self._size)  # rows of a sample, such as one for each of its tokens
        if rest or len(now[place]) != each * len(self._rows):
            return False
        weights = (pair for i, pair in enumerate(zip(then, now, strict=True)) if i != place)
        if not all(_one(*pair) or torch.equal(*pair) for pair in weights if isinstance(pair[0], torch.Tensor)):
            return False
        return self._comes_from(then[place], now[place]) or torch.equal(self._of(then[place]), now[place])

    def _comes_from(self, then: torch.Tensor, now: torch.Tensor) -> bool:
        taken, version, origin = self._origins.get(now.data_ptr(), (now, -1, 0))
        return origin == then.data_ptr() and taken._version == version and then.stride() == now.stride()

    def _take(self, whole: torch.Tensor) -> torch.Tensor:
        taken = self._of(whole)
        self._origins[taken.data_ptr()] = taken, taken._version, whole.data_ptr()
        return taken

    def _of(self, whole: torch.Tensor) -> torch.Tensor:
        """Take the rows of the kept samples out of what was computed for all."""
        if len(whole) == self._size:
            return whole.index_select(0, self._rows)
        return whole.reshape(self._size, -1).index_select(0, self._rows).reshape(-1, *whole.shape[1:])


def _place(func: Any) -> int:
    return _PLACE.get(func, 0)


def _kind(func: Any, args: _Values) -> Any:
    """Return what two calls have in common before their values are compared; None of an operation not listed."""
    place = _PLACE.get(func)
    if place is None:
        one = len(args) == 1 and isinstance(args[0], torch.Tensor) and args[0].ndim > 1
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not one or drawn or torch.Tag.pointwise not in func.tags or func._schema.is_mutable:
            return None
        place = 0
    described = (
        tuple(arg.shape[1:] if i == place else arg.shape) if isinstance(arg, torch.Tensor) else repr(arg)
        for i, arg in enumerate(args)
    )
    return func, *described


def _versions(values: _Values) -> list[int]:
    """Counters of changes in place."""
    return [value._version for value in values if isinstance(value, torch.Tensor) and not value.is_inference()]


def _one(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same place in memory, read in the same way."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype
