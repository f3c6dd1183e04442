"""The state of a training on disk: to go on in its middle after a kill, and to hand an optimizer's state on.

A file is what `torch.save` writes, followed by its BLAKE3 hash; it appears at once or not at all. Like the pipeline's
own pickle it lies in the run's folder, and is loaded only to execute the run.
"""

import io
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from dynkit.disk import flush
from dynkit.errors import StorageError
from dynkit.time import to_seconds

__all__ = ["Checkpoint", "read_state", "write_state"]

_HASH_BYTES = 32
_ASK_EVERY = 100  # times that several processes are due, they agree on the time once


class Checkpoint:
    """Where a training keeps its state; without a path it keeps none.

    Parameters
    ----------
    path : Path or None
    every : int, str or None
        Batches, or time (``"5m"``), from one state to the next.
    identity : str
        Of the training; a state of another one is not loaded.
    part : (int, int)
        Rank and number of processes that train together; the first one writes.

    Examples
    --------
    In a fit function::

        saved = context.checkpoint.load()         # None, or what was saved when the run was killed
        ...
        if context.checkpoint.due(1):             # after each batch
            context.checkpoint.save({"model": model.state_dict(), "epoch": epoch, "batch": batch})
    """

    def __init__(
        self,
        path: Path | None = None,
        every: int | str | None = None,
        identity: str = "",
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._path = None if every is None else path
        self._batches = every if isinstance(every, int) else None
        self._seconds = to_seconds(every, "checkpoint") if isinstance(every, str) else None
        self._identity = identity
        self._rank, self._ranks = part
        self._since = self._asked = 0
        self._saved_s = time.monotonic()

    def load(self) -> Any:
        """Return the state that was saved last, after setting the random states; None: begin at the beginning."""
        if self._path is None or not self._path.exists():
            return None
        found = read_state(self._path)
        if found["identity"] != self._identity:
            return None
        _set_random_state(found["random"][self._rank])
        return found["state"]

    def due(self, batches: int) -> bool:
        """Whether to save now, after so many more batches."""
        if self._path is None:
            return False
        self._since += batches
        if self._batches is not None:
            return self._since >= self._batches
        assert self._seconds is not None
        self._asked += 1
        if self._ranks == 1:
            return time.monotonic() - self._saved_s >= self._seconds
        if self._asked % _ASK_EVERY:
            return False
        answer = [time.monotonic() - self._saved_s >= self._seconds]
        torch.distributed.broadcast_object_list(answer)
        return answer[0]

    def save(self, state: Any) -> None:
        """Write a state, with the random states, in place of the one before.

        Raises
        ------
        StorageError
            When the disk refuses; the state before is still there.
        """
        assert self._path is not None, "saved when it was not due"
        self._since, self._saved_s = 0, time.monotonic()
        randoms: list[Any] = [_random_state()] * self._ranks
        if self._ranks > 1:
            torch.distributed.all_gather_object(randoms, randoms[0])
        if self._rank == 0:
            write_state(self._path, {"identity": self._identity, "random": randoms, "state": state})


def write_state(path: Path, state: Any) -> None:
    """Write tensors and plain values to a file, whole or not at all.

    Raises
    ------
    StorageError
    """
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, new)
        digest = blake3().update_mmap(new).digest()
        with new.open("ab") as stream:
            stream.write(digest)
        flush(new)
        new.replace(path)
        flush(path.parent)
    except (OSError, RuntimeError) as error:  # torch raises the latter when the disk is full
        raise StorageError(f"cannot write the training's state to {path}: {error}") from error


def read_state(path: Path) -> Any:
    """Read what `write_state` wrote; tensors come to the CPU.

    Raises
    ------
    StorageError
        When it is not there, or its content is not what was written.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StorageError(f"the training's state {path} cannot be read: {error.strerror or error}") from error
    content = memoryview(raw)[:-_HASH_BYTES]
    if blake3(content).digest() != raw[-_HASH_BYTES:]:
        raise StorageError(f"the training's state {path} is damaged; remove it to train from the beginning")
    # Not weights_only: a user's schedule may keep anything in its state.
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
