"""What policies see of the run that calls them."""

import datetime as dt
from typing import Any

import torch
from torch import nn

from dynkit.data import as_keys
from dynkit.models import ModelStore
from dynkit.pipeline.stream import Stream
from dynkit.time import to_datetime
from dynkit.types import Model, Trained

__all__ = ["View"]


class View:
    """The `RunView` that the loop moves along the stream; read-only for policies.

    Parameters
    ----------
    stream : Stream
        What the run walks.
    store : ModelStore
    factory : Model
        Makes a module for the newest model's weights.
    device : torch.device
    """

    def __init__(self, stream: Stream, store: ModelStore, factory: Model, device: torch.device) -> None:
        self._stream = stream
        self._store = store
        self._factory = factory
        self._device = device
        self._loaded: tuple[str, nn.Module] | None = None
        self.start_ns: int = int(stream.time_ns[0]) if len(stream) else 0
        self.now_ns: int = self.start_ns
        self.samples_since_trigger = 0
        self.trained: tuple[Trained, ...] = ()

    @property
    def last_row(self) -> int:
        """Rows of the stream up to the last trigger, 0 before the first."""
        return self._stream.row(self.trained[-1].position) if self.trained else 0

    @property
    def start(self) -> dt.datetime:
        """See `RunView`."""
        return to_datetime(self.start_ns)

    @property
    def now(self) -> dt.datetime:
        """See `RunView`."""
        return to_datetime(self.now_ns)

    @property
    def model(self) -> nn.Module | None:
        """See `RunView`; loaded when first asked for."""
        if not self.trained:
            return None
        newest = self.trained[-1].model
        if self._loaded is None or self._loaded[0] != newest:
            module = self._factory()
            module.load_state_dict(self._store.load(newest))
            self._loaded = newest, module.to(self._device).eval()
        return self._loaded[1]

    def read(self, keys: Any) -> dict[str, torch.Tensor]:
        """See `RunView`."""
        return self._stream.version.gather(as_keys(keys))

    def move(self, seen: int, *, since: int | None = None) -> None:
        """Stand after `seen` samples of the stream."""
        self.now_ns = self.last_ns(seen) if seen else self.start_ns
        self.samples_since_trigger = seen - self.last_row if since is None else since

    def last_ns(self, seen: int) -> int:
        """Timestamp of the last of the first `seen` samples."""
        return int(self._stream.time_ns[seen - 1])

    def see_all(self) -> None:
        """Stand at the end, in time: the view of windows."""
        self.move(len(self._stream))
        if self._stream.live and len(self._stream):
            self.start_ns, self.now_ns = int(self._stream.time_ns.min()), int(self._stream.time_ns.max())
