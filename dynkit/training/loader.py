"""Batches: exactly the selected samples, gathered from storage as tensors on the device.

Samples are gathered a super-batch at a time (one vectorised copy out of the mapped files, one transfer to the
device) and handed out in slices, so the cost per batch is a slice.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from dynkit.data import Version
from dynkit.time import IntArray

__all__ = ["Batch", "Batches"]

Batch = dict[str, torch.Tensor]

_SUPER_BATCH_BYTES = 8 << 20


class Batches:
    """The batches of one training or evaluation; each iteration is one epoch in a new order.

    Parameters
    ----------
    version : Version
        Where the samples are.
    keys : (N,) int64
        Which ones.
    weights : (N,) float32 or None
        Added to each batch as ``weight``.
    batch_size : int
        The last batch may be smaller; a single sample left over joins the batch before it, because layers that
        normalise over a batch cannot train on one.
    shuffle_seed : int or None
        None keeps the order of `keys`; the order of epoch e depends on the seed and e only.
    device : torch.device
    on_batch : callable, optional
        Called with the number of samples before each batch is handed out.

    Notes
    -----
    A batch is a dict: the dataset's fields, ``label`` when it has labels, ``weight`` when there are weights.
    """

    def __init__(
        self,
        version: Version,
        keys: IntArray,
        *,
        batch_size: int,
        device: torch.device,
        weights: "np.ndarray[tuple[int], np.dtype[np.float32]] | None" = None,
        shuffle_seed: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self._version = version
        self._keys = keys
        self._weights = None if weights is None else torch.from_numpy(weights)
        self._batch_size = batch_size
        self._device = device
        self._shuffle_seed = shuffle_seed
        self._on_batch = on_batch
        self._epoch = 0
        self.passed = 0  # samples handed out so far, all epochs together

    def __len__(self) -> int:
        return sum(1 for _ in _spans(len(self._keys), self._batch_size))

    @property
    def samples(self) -> int:
        """Number of samples of one epoch."""
        return len(self._keys)

    def __iter__(self) -> Iterator[Batch]:
        for super_batch in self.super_batches():
            n = len(next(iter(super_batch.values())))
            for low, high in _spans(n, self._batch_size):
                if self._on_batch is not None:
                    self._on_batch(high - low)
                self.passed += high - low
                yield {name: tensor[low:high] for name, tensor in super_batch.items()}

    def super_batches(self) -> Iterator[Batch]:
        """One epoch in pieces of several batches, each gathered at once."""
        order = self._order()
        for low, high in _spans(len(self._keys), self._super_batch_rows()):
            some = slice(low, high) if order is None else order[low:high]
            gathered = self._version.gather(self._keys[some])
            if self._weights is not None:
                gathered["weight"] = self._weights[some]
            if self._device.type == "cuda":
                gathered = {name: tensor.pin_memory() for name, tensor in gathered.items()}
            yield {name: tensor.to(self._device, non_blocking=True) for name, tensor in gathered.items()}

    def _order(self) -> IntArray | None:
        if self._shuffle_seed is None:
            return None
        generator = torch.Generator().manual_seed((self._shuffle_seed + self._epoch) % 2**63)
        self._epoch += 1
        order: IntArray = torch.randperm(len(self._keys), generator=generator).numpy()
        return order

    def _super_batch_rows(self) -> int:
        """As many whole batches as fit in the super-batch size, at least one."""
        row_bytes = 0
        for field in self._version.schema["fields"].values():
            row_bytes += np.dtype(field["dtype"]).itemsize * int(np.prod(field["shape"], dtype=np.int64))
        batch_bytes = max(row_bytes * self._batch_size, 1)
        return self._batch_size * max(1, _SUPER_BATCH_BYTES // batch_bytes)


def _spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut ``range(n)`` into spans of `size`; the last may be smaller, but one left over joins its predecessor."""
    for low in range(0, n, size):
        if size > 1 and n - low == size + 1:
            yield low, n
            return
        yield low, min(low + size, n)
