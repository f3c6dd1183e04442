"""The main loop: replay a dataset in time order, train at triggers, evaluate, commit every step.

Read `replay` as the story of a run. It is a generator of Events; whoever iterates it drives it, and it commits each
step before it yields it. To continue a run, the loop starts at the block of the last committed trigger with the
policies as they were before that block; triggers that fire again there are recognised and not trained again. A live
run is the same loop over a stream that grows. Every
training and selection draws from a seed of its own (run seed, trigger index), so no random state needs saving.
"""

import copy
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import polars as pl

from dynkit.data import as_keys, in_split
from dynkit.errors import Conflict, InvalidInput, PolicyError
from dynkit.evaluation import evaluate
from dynkit.lineage.samples import content, write_selection
from dynkit.pipeline.owner import Owner
from dynkit.pipeline.stream import Stream
from dynkit.pipeline.train import train
from dynkit.pipeline.view import View
from dynkit.policies import describe
from dynkit.time import IntArray
from dynkit.training import resolve_device, seeded
from dynkit.types import Event, Trained, Window

if TYPE_CHECKING:
    from dynkit.pipeline.declaration import Pipeline

__all__ = ["BLOCK_ROWS", "replay"]

BLOCK_ROWS = 1000  # samples that a trigger sees at a time
_EVALUATION_SHARE = 0.1  # of the progress bar


def replay(load: "Callable[[Owner], Pipeline]", owner: Owner) -> Iterator[Event]:
    """Execute a run, yielding each committed event.

    Parameters
    ----------
    load : callable
        Gives the pipeline, its dataset at the run's version; a failure to load is the run's failure.
    owner : Owner
        Claim to the run.

    Yields
    ------
    Event
        ``started`` (or ``resumed``), for each trigger ``triggered``, ``selected``, ``trained``, then ``evaluated``
        per window and ``finished``.
    """
    with owner:
        loop = _Loop(load(owner), owner)
        yield owner.event(
            "resumed" if owner.committed else "started", samples=len(loop.stream), device=str(loop.device)
        )
        row, trigger = loop.restore()
        while (row := loop.more(row)) < len(loop.stream):
            owner.check()
            new = loop.stream.table.slice(row, BLOCK_ROWS)
            snapshot = _pickled(trigger)  # to continue from here, the trigger must see this block again
            loop.view.move(row)
            for offset in _positions(trigger(new, loop.view), new.height):
                seen = row + offset + 1
                if seen > loop.view.last_row:  # without new samples there is nothing to train on
                    yield from loop.train(seen, row, snapshot)
                    loop.view.move(seen, since=-(offset + 1))
            row += new.height
            loop.show("reading", row)
        loop.view.see_all()
        yield from loop.evaluate()
        yield owner.finish(triggers=len(loop.view.trained))


class _Loop:
    """What the steps of one run share."""

    def __init__(self, pipeline: "Pipeline", owner: Owner) -> None:
        self.pipeline = pipeline
        self.owner = owner
        self.stream = Stream(pipeline.dataset, live=owner.live)
        self._begin = 0  # position that the run goes on from; a live stream may have to grow up to it
        self.device = resolve_device(pipeline.training.device)
        self.selection = copy.deepcopy(pipeline.selection)
        self.view = View(self.stream, owner.store, pipeline.model, self.device)

    def restore(self) -> tuple[int, Any]:
        """Return where to go on, and the trigger as it was there."""
        if not self.owner.committed:
            return 0, copy.deepcopy(self.pipeline.trigger)  # a policy may change itself; the pipeline may not
        if self.owner.state is None:
            raise Conflict("samples of the run were erased, and its policies' state with them; start the pipeline anew")
        trigger, self.selection = map(pickle.loads, pickle.loads(self.owner.state))
        block_start = self._begin = self.owner.block_starts[-1]
        earlier = zip(self.owner.committed, self.owner.block_starts, strict=True)
        self.view.trained = tuple(trained for trained, start in earlier if start < block_start)
        return self.stream.row(block_start), trigger

    def more(self, row: int) -> int:
        """Return the row to go on from; in a live run at its end, once more samples are there."""
        while row == len(self.stream) and self.stream.live:
            position = max(self.stream.position(row), self._begin)
            self.owner.progress = {"phase": "waiting", "fraction": 0.0, "position": row}
            if not self.stream.wait(self._asked_to_finish):
                break
            row = self.stream.row(position)
            if not self.view.start_ns and len(self.stream):
                self.view.start_ns = int(self.stream.time_ns[0])
        return row

    def _asked_to_finish(self) -> bool:
        self.owner.check()
        return self.owner.finishing

    def show(self, phase: str, position: float, **details: Any) -> None:
        """Tell the progress; `position` is in samples of the stream."""
        fraction = (1 - _EVALUATION_SHARE) * position / len(self.stream)
        self.owner.progress = {"phase": phase, "fraction": fraction, "position": int(position), **details}

    def train(self, seen: int, block_row: int, snapshot: bytes) -> Iterator[Event]:
        """Select, train and commit at one trigger; recognise one that an earlier life of the run committed."""
        index, position = len(self.view.trained), self.stream.position(seen)
        trainable = self.stream.trainable[:seen]
        if index < len(self.owner.committed):
            known = self.owner.committed[index]
            if known.position == position:
                self.view.trained += (known,)
            elif trainable.any() and not (self.stream.live and position < known.position):
                raise PolicyError(
                    f"on continuing, trigger {index} fired after sample {position}, before it did after "
                    f"{known.position}: the trigger must decide from its arguments and its own attributes only"
                )
            return  # this one, or one that was skipped then
        last_ns = self.view.last_ns(seen)
        latency = {"latency_s": round(self.stream.waited_s(), 4)} if self.stream.live else {}
        new = seen - self.view.last_row
        yield self.owner.event("triggered", index=index, position=position, new=new, **latency)
        if not trainable.any():
            yield self.owner.event("skipped", index=index, reason="no sample has a label yet that is not held out")
            return
        self.view.move(seen, since=int(trainable[self.view.last_row :].sum()))
        started_s = time.perf_counter()
        keys, weights = self._select(index, seen)
        select_s = time.perf_counter() - started_s
        write_selection(self.owner.catalog.root, self.owner.run, index, keys, weights)
        yield self.owner.event("selected", index=index, samples=len(keys), seconds=round(select_s, 4))
        started_s = time.perf_counter()
        parent = self.view.trained[-1].model if self.pipeline.training.warm_start and self.view.trained else None
        outcome = train(
            self.pipeline,
            index,
            self.stream.version,
            keys,
            weights,
            parent=None if parent is None else self.owner.store.load(parent),
            device=self.device,
            on_batch=self._in_training(index, seen, len(keys)),
        )
        train_s = time.perf_counter() - started_s
        history = outcome.history
        self.show("storing", seen, trigger=index)
        trained, event = self.owner.commit_trained(
            Trained(index, position, last_ns, "", len(keys), train_s),
            outcome.state,
            parent=parent,
            columns={
                "block_start": self.stream.position(block_row),
                "dataset_version": self.stream.version.number,
                "selection": content(keys, weights),
                "select_s": select_s,
                "samples_passed": outcome.passed,
                "report": history,
            },
            policies=pickle.dumps((snapshot, _pickled(self.selection))),
            event={
                "index": index,
                "samples": len(keys),
                "seconds": round(train_s, 4),
                **(history[-1] if history else {}),
            },
        )
        self.view.trained += (trained,)
        yield event

    def _select(self, index: int, seen: int) -> "tuple[IntArray, np.ndarray[Any, Any] | None]":
        pool = self.stream.table.head(seen)
        trainable = self.stream.trainable[:seen]
        if not trainable.all():
            pool = pool.filter(trainable)
        rng = np.random.default_rng([self.pipeline.seed, index])
        keys, weights = _keys_and_weights(self.selection(pool, self.view, rng))
        rows = self.stream.place(keys)
        if len(keys) and not (rows.min() >= 0 and rows.max() < seen and trainable[rows].all()):
            raise PolicyError(f"the selection returned keys at trigger {index} that are not in its pool")
        if not len(keys):
            raise PolicyError(
                f"the selection returned no samples at trigger {index} ({seen} in the pool); return at least one key, "
                "or let the trigger decide not to train"
            )
        return keys, weights

    def _in_training(self, index: int, seen: int, selected: int) -> Any:
        """Make the function that the loader calls before each batch: obey requests, tell the progress."""
        before, done = self.view.last_row, 0
        training = self.pipeline.training
        total = training.epochs * (selected - int(training.validation * selected))
        base = {"phase": "training", "trigger": index, "samples": total}
        scale = (1 - _EVALUATION_SHARE) / len(self.stream)

        def on_batch(samples: int) -> None:
            nonlocal done
            self.owner.check()
            done += samples
            share = min(done / total, 1.0)
            position = before + share * (seen - before)
            self.owner.progress = {
                **base,
                "done": done,
                "fraction": scale * position,
                "position": int(position),
            }

        return on_batch

    def evaluate(self) -> Iterator[Event]:
        """Fill the models x windows matrix, window by window."""
        evaluation = self.pipeline.evaluation
        windows = list(evaluation.windows(self.view))
        if not all(isinstance(window, Window) for window in windows):
            raise PolicyError("windows must return dynkit Windows: Window(start_ns, end_ns)")
        models = dict.fromkeys(trained.model for trained in self.view.trained)
        done = self.owner.evaluated_windows()
        by_bounds = {(window.start_ns, window.end_ns): window for window in windows}
        if len(by_bounds) < len(set(windows)):
            raise PolicyError("windows returned two windows of the same bounds with different anchors")
        left = [by_bounds[bounds] for bounds in sorted(by_bounds) if bounds not in done]
        if not models or not left:
            return
        self._show_window(1, len(left))
        with seeded(self.pipeline.seed):
            module = self.pipeline.model()
        scored = evaluate(
            module,
            {model: self.owner.store.load(model) for model in models},
            left,
            self.stream.version,
            self._judged(),
            evaluation.resolved(),
            device=self.device,
            batch_size=evaluation.batch_size,
            on_batch=lambda samples: self.owner.check(),
        )
        for n, (window, samples, scores) in enumerate(scored, 1):
            yield self.owner.commit_window(window, samples, scores)
            self._show_window(n + 1, len(left))

    def _judged(self) -> pl.DataFrame:
        """Return samples to judge on, by time: those with a label, of the split if there is one."""
        table = self.stream.table.filter(pl.col("label").is_not_null())
        split = self.pipeline.evaluation.split
        if split is not None:
            table = table.filter(in_split(table, self.stream.version.manifest["splits"], split))
        return table.sort("timestamp", "key") if self.stream.live else table

    def _show_window(self, n: int, windows: int) -> None:
        """Tell that the n-th window, from 1, is being evaluated."""
        fraction = 1 - _EVALUATION_SHARE * (1 - (n - 1) / windows)
        n = min(n, windows)
        self.owner.progress = {"phase": "evaluating", "fraction": fraction, "window": n, "windows": windows}


def _pickled(policy: Any) -> bytes:
    try:
        return bytes(cloudpickle.dumps(policy))
    except Exception as error:
        raise PolicyError(
            f"{describe(policy)} cannot be saved, so the run could not continue later: {error}"
        ) from error


def _positions(decision: Any, height: int) -> Iterator[int]:
    """Row positions of a trigger's decision, checked, lazily: a generator goes on after each training."""
    if isinstance(decision, bool | np.bool_) or decision is None:
        if decision:
            yield height - 1
        return
    if not isinstance(decision, Iterable):
        raise PolicyError(f"the trigger returned {decision!r}; expected True, False or row positions of `new`")
    last = -2
    for position in decision:
        if not isinstance(position, int | np.integer) or isinstance(position, bool) or not last < position < height:
            raise PolicyError(
                f"the trigger returned position {position!r} after {last}; expected increasing whole numbers "
                f"from -1 to {height - 1}"
            )
        last = int(position)
        yield last


def _keys_and_weights(chosen: Any) -> "tuple[IntArray, np.ndarray[Any, Any] | None]":
    """Convert what a selection returned to int64 keys and float32 weights."""
    weights = None
    if isinstance(chosen, pl.DataFrame):
        if "key" not in chosen.columns:
            raise PolicyError(f"the selection returned a frame without a column key: {chosen.columns}")
        if "weight" in chosen.columns:
            weights = chosen["weight"].cast(pl.Float32).to_numpy(writable=True)
            if not (np.isfinite(weights).all() and (weights >= 0).all()):
                raise PolicyError("the selection returned weights that are negative, null or not finite")
        chosen = chosen["key"]
    try:
        return np.ascontiguousarray(as_keys(chosen)), weights
    except (InvalidInput, TypeError, ValueError) as error:
        raise PolicyError(f"the selection must return keys or a frame with columns key and weight: {error}") from error
