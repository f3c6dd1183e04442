"""Samples for a training loop of the user's own: a torch IterableDataset over a version."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dynkit.data.batches import Batch, Batches, length_of
from dynkit.errors import InvalidInput
from dynkit.time import IntArray

if TYPE_CHECKING:
    from dynkit.data.dataset import Dataset

__all__ = ["IterableSamples"]


class IterableSamples(IterableDataset[Batch]):
    """Samples of a version for a `DataLoader`, every one of them once: across its workers, and across ranks.

    Parameters
    ----------
    dataset : Dataset
        Pinned to a version.
    keys : (N,) int64
    batch_size : int or None
        None yields single samples, for ``DataLoader(samples, batch_size=64)``. A number yields batches, much faster,
        for ``DataLoader(samples, batch_size=None)``, the same ones in the same order with any number of workers.
    shuffle : bool
        A new order for each `set_epoch`.
    seed : int
    rank, world_size : int or None
        This process's part, as in `torch.utils.data.DistributedSampler` but without repeated samples: the parts of
        ranks differ by at most one. None asks `torch.distributed`, if that is initialised.
    drop_last : bool
        Leave out samples so that all ranks have equally many.
    **options
        As in `Batches`: transform, fields, cache_bytes.

    Notes
    -----
    `state_dict` and `load_state_dict` continue in the middle of an epoch. A DataLoader with workers reads their state
    only if it is torchdata's ``StatefulDataLoader``; without workers any does.
    """

    def __init__(
        self,
        dataset: "Dataset",
        keys: IntArray,
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        self._ranks = world_size if world_size is not None else torch.distributed.get_world_size() if distributed else 1
        if not 0 <= self._rank < self._ranks:
            raise InvalidInput(f"rank={self._rank} must be in 0 to world_size - 1 = {self._ranks - 1}")
        self._dataset, self._keys, self._batch_size = dataset, keys, batch_size
        self._shuffle, self._seed, self._drop_last, self._options = shuffle, seed, drop_last, options
        self._epoch = 0
        self._position = 0  # samples of this epoch that this worker of this rank has handed out
        self._skip = 0

    def __len__(self) -> int:
        n = len(range(self._rank, self._usable, self._ranks))
        return n if self._batch_size is None else -(-n // self._batch_size)

    @property
    def _usable(self) -> int:
        return len(self._keys) - len(self._keys) % self._ranks if self._drop_last else len(self._keys)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the iterations to come."""
        if epoch != self._epoch:  # else a resumed epoch goes on
            self._epoch, self._skip = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where this worker is: epoch and samples handed out."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration begin where `state_dict` was taken."""
        self._epoch, self._skip = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        part = self._part(0 if worker is None else worker.id, 1 if worker is None else worker.num_workers)
        self._position, self._skip = self._skip, 0
        batches = Batches(
            self._dataset.open(), part[self._position :], batch_size=self._batch_size or 512, **self._options
        )
        for batch in batches:
            n = length_of(batch)
            if self._batch_size is not None:
                self._position += n
                yield batch
                continue
            columns = {name: tensor.unbind() for name, tensor in batch.items()}
            for i in range(n):
                self._position += 1
                yield {name: column[i] for name, column in columns.items()}

    def _part(self, worker: int, workers: int) -> IntArray:
        """Keys of this worker of this rank, in order."""
        order = self._keys
        if self._shuffle:
            version = self._dataset.open()
            batches = Batches(
                version, self._keys, batch_size=1, shuffle=True, seed=self._seed + self._epoch, **self._options
            )
            order = batches.keys()
        order = order[: self._usable][self._rank :: self._ranks]
        batch = np.arange(len(order)) // (self._batch_size or 1)
        mine: IntArray = order[batch % workers == worker]
        return mine
