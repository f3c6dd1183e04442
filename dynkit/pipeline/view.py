"""What policies see of the run that calls them."""

import datetime as dt
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import torch
from torch import nn

from dynkit.data import Batches, as_keys, held_out
from dynkit.errors import Conflict, PolicyError
from dynkit.models import ModelStore
from dynkit.pipeline.stream import Stream
from dynkit.policies import as_positions
from dynkit.time import IntArray, to_datetime
from dynkit.training import scores, seeded
from dynkit.training.scores import ScoreKind
from dynkit.training.train import Task, train
from dynkit.types import Trained, Trigger

if TYPE_CHECKING:
    from dynkit.pipeline.declaration import Pipeline

__all__ = ["View"]


class View:
    """The `RunView` that the loop moves along the stream; read-only for policies.

    Parameters
    ----------
    stream : Stream
        What the run walks.
    store : ModelStore
    pipeline : Pipeline
        Says how models are made, trained and read for.
    device : torch.device
    on_batch : callable
        Called with the number of samples of each batch that is read for a policy.
    """

    def __init__(
        self,
        stream: Stream,
        store: ModelStore,
        pipeline: "Pipeline",
        device: torch.device,
        on_batch: Callable[[int], None],
    ) -> None:
        self._stream = stream
        self._store = store
        self._pipeline = pipeline
        self._device = device
        self._on_batch = on_batch
        self._loaded: tuple[str, nn.Module] | None = None
        self._past_rows = 0
        self._reports: list[dict[str, Any]] = []
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
        if not self.trained or not self.trained[-1].model:
            return None
        newest = self.trained[-1].model
        if self._loaded is None or self._loaded[0] != newest:
            module = self._pipeline.model()
            module.load_state_dict(self._store.load(newest))
            self._loaded = newest, module.to(self._device).eval()
        return self._loaded[1]

    @property
    def past(self) -> pl.DataFrame:
        """See `RunView`."""
        return self._stream.table.head(self._past_rows)

    @property
    def epochs(self) -> int:
        """See `RunView`."""
        return self._pipeline.training.epochs

    def arrived(self, keys: Any) -> IntArray:
        """See `RunView`."""
        ends = [self._stream.row(trained.position) for trained in self.trained]
        return np.searchsorted(ends, self._stream.place(as_keys(keys)), side="right")

    def held_out(self, table: pl.DataFrame) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """See `RunView`."""
        return held_out(table, self._stream.version.manifest["splits"])

    def read(self, keys: Any) -> dict[str, torch.Tensor]:
        """See `RunView`."""
        return self._stream.version.gather(as_keys(keys))

    def predict(self, keys: Any, *, model: nn.Module | None = None) -> torch.Tensor:
        """See `RunView`."""
        return scores.collect(self._model(model), self._batches(keys), lambda outputs, batch: outputs)

    def score(self, kind: str, keys: Any, *, model: nn.Module | None = None) -> torch.Tensor:
        """See `RunView`."""
        loss = self._pipeline.training.loss
        return scores.collect(
            self._model(model),
            self._batches(keys),
            lambda outputs, batch: scores.per_sample(cast(ScoreKind, kind), outputs, batch["label"], loss),
        )

    def embed(self, keys: Any, *, model: nn.Module | None = None) -> torch.Tensor:
        """See `RunView`."""
        return scores.embeddings(self._model(model), self._batches(keys))

    def gradients(self, keys: Any, *, model: nn.Module | None = None) -> torch.Tensor:
        """See `RunView`."""
        loss = self._pipeline.training.loss
        return scores.collect(
            self._model(model),
            self._batches(keys),
            lambda outputs, batch: scores.gradients(outputs, batch["label"], loss),
        )

    def fit(self, keys: Any, *, seed: int) -> nn.Module:
        """See `RunView`."""
        task = Task(self._pipeline.training, seed, as_keys(keys))
        with seeded(seed):
            model = self._pipeline.model().to(self._device)
            train(model, self._stream.version, task, device=self._device, on_batch=self._on_batch)
        return model.eval()

    def report(self, position: int, **numbers: Any) -> None:
        """See `RunView`."""
        row = self._past_rows + position
        at = {"position": self._stream.position(row + 1), "at_ns": int(self._stream.time_ns[row])}
        self._reports.append({**at, **{name: _plain(name, value) for name, value in numbers.items()}})

    def reported(self) -> list[dict[str, Any]]:
        """Return what triggers reported since the last call, each with its position in the stream."""
        reports, self._reports = sorted(self._reports, key=lambda report: report["position"]), []
        return reports

    def _model(self, model: nn.Module | None) -> nn.Module:
        found = self.model if model is None else model
        if found is None:
            raise Conflict("the run has no model yet; a policy can ask run.model is None first")
        return found

    def _batches(self, keys: Any) -> Batches:
        return Batches(
            self._stream.version,
            as_keys(keys),
            batch_size=self._pipeline.evaluation.batch_size,
            device=self._device,
            on_batch=self._on_batch,
            cache_bytes=self._pipeline.training.cache_bytes,
        )

    def move(self, seen: int, *, since: int | None = None, past: int | None = None) -> None:
        """Stand after `seen` samples of the stream; a trigger within a block has only those before it as its past."""
        self.now_ns = self.last_ns(seen) if seen else self.start_ns
        self.samples_since_trigger = seen - self.last_row if since is None else since
        self._past_rows = seen if past is None else past

    def fires(self, trigger: Trigger, row: int, rows: int) -> Iterator[int]:
        """Show a trigger the next rows of the stream; yield each number of samples after which it wants training.

        Whoever iterates adds to `trained` before going on.
        """
        new = self._stream.table.slice(row, rows)
        self.move(row)
        for offset in as_positions(trigger(new, self), new.height):
            seen = row + offset + 1
            if seen > self.last_row:  # without new samples there is nothing to train on
                trainings = len(self.trained)
                yield seen
                trained = len(self.trained) > trainings
                self.move(seen, since=-(offset + 1) if trained else row - self.last_row, past=row)

    def last_ns(self, seen: int) -> int:
        """Latest timestamp of the first `seen` samples."""
        return int(self._stream.newest_ns[seen - 1])

    def see_all(self) -> None:
        """Stand at the end, in time: the view of windows."""
        self.move(len(self._stream))
        if self._stream.live and len(self._stream):
            self.start_ns, self.now_ns = int(self._stream.time_ns.min()), int(self._stream.time_ns.max())


def _plain(name: str, value: Any) -> Any:
    """Return what a trigger reports as a JSON value."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise PolicyError(f"run.report({name}={value!r}): only numbers, texts and lists of them can be kept") from None
    return value
