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
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import polars as pl

from dynkit.data import in_split
from dynkit.disk import locked
from dynkit.errors import Conflict, PolicyError
from dynkit.evaluation import evaluate
from dynkit.lineage.samples import content, write_selection
from dynkit.pipeline.owner import Owner
from dynkit.pipeline.stream import Stream
from dynkit.pipeline.train import Outcome, seed_of, train
from dynkit.pipeline.view import View
from dynkit.policies import as_chosen, describe, digest
from dynkit.training import resolve_device, seeded
from dynkit.training.checkpoint import read_state, write_state
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
        ``started`` (or ``resumed``), ``decided`` for what a trigger reports, for each trigger ``triggered``,
        ``selected``, ``trained``, then ``evaluated`` per window and ``finished``.
    """
    with owner:
        loop = _Loop(load(owner), owner)
        yield owner.event(
            "resumed" if owner.committed else "started", samples=len(loop.stream), device=str(loop.device)
        )
        row, trigger = loop.restore()
        while (row := loop.more(row)) < len(loop.stream):
            owner.check()
            snapshot = _pickled(trigger)  # to continue from here, the trigger must see this block again
            for seen in loop.view.fires(trigger, row, BLOCK_ROWS):
                yield from loop.decided()
                yield from loop.train(seen, row, snapshot)
            yield from loop.decided()
            row = min(row + BLOCK_ROWS, len(loop.stream))
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
        if pipeline.evaluation.split is not None:  # an unknown one is an error now, not after all trainings
            in_split(self.stream.table.head(0), self.stream.version.manifest["splits"], pipeline.evaluation.split)
        self._begin = 0  # position that the run goes on from; a live stream may have to grow up to it
        self.device = resolve_device(pipeline.training.device)
        self.selection = copy.deepcopy(pipeline.selection)
        self.view = View(self.stream, owner.store, pipeline, self.device, lambda samples: owner.check())

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

    def decided(self) -> Iterator[Event]:
        """Commit what the trigger reported, once: on continuing it decides again what it decided in an earlier life."""
        reports = [report for report in self.view.reported() if report["position"] > self.owner.decided]
        if reports:
            yield from self.owner.decide(reports)

    def train(self, seen: int, block_row: int, snapshot: bytes) -> Iterator[Event]:
        """Select, train and commit at one trigger; recognise one that an earlier life of the run committed."""
        index, position = len(self.view.trained), self.stream.position(seen)
        trainable = self.stream.trainable[:seen]
        if index < len(self.owner.committed):
            known = self.owner.committed[index]
            if known.position == position:
                self.view.trained += (known,)
            elif position not in self.owner.skipped and not (self.stream.live and position < known.position):
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
            yield self.owner.skip(index, position, "no sample has a label yet that is not held out")
            return
        self.view.move(seen, since=int(trainable[self.view.last_row :].sum()))
        started_s = time.perf_counter()
        chosen = self._select(index, seen)
        if not chosen.height:
            yield self.owner.skip(index, position, "the selection chose no sample")
            return
        select_s = time.perf_counter() - started_s
        write_selection(self.owner.catalog.root, self.owner.run, index, chosen)
        samples, selection = chosen["key"].n_unique(), content(chosen)
        yield self.owner.event("selected", index=index, samples=samples, seconds=round(select_s, 4))
        training = self._training(index, selection)
        with self._alone(training):
            earlier = self.owner.trained_before(training) if self.owner.reuse else None
            if earlier is None:
                started_s = time.perf_counter()
                outcome = self._fit(index, seen, chosen, selection)
                train_s = time.perf_counter() - started_s
            else:
                outcome = Outcome(self.owner.store.load(earlier.model), earlier.report, earlier.samples_passed)
                train_s = earlier.train_s
            self.show("storing", seen, trigger=index)
            trained, event = self.owner.commit_trained(
                Trained(index, position, last_ns, "", samples, train_s),
                outcome.state,
                parent=self._parent(),
                columns={
                    "block_start": self.stream.position(block_row),
                    "dataset_version": self.stream.version.number,
                    "selection": selection,
                    "training": training,
                    "select_s": select_s,
                    "samples_passed": outcome.passed,
                    "report": outcome.history,
                },
                policies=pickle.dumps((snapshot, _pickled(self.selection))),
                event={
                    "index": index,
                    "samples": samples,
                    "seconds": round(train_s, 4),
                    **({} if earlier is None else {"reused": earlier.run}),
                    **(outcome.history[-1] if outcome.history else {}),
                },
            )
        self.view.trained += (trained,)
        self._forget(index)
        yield event

    def _select(self, index: int, seen: int) -> pl.DataFrame:
        """Return key, and weight, epoch and score where the selection gave them; perhaps of no sample."""
        pool = self.stream.table.head(seen)
        trainable = self.stream.trainable[:seen]
        if not trainable.all():
            pool = pool.filter(trainable)
        rng = np.random.default_rng([self.pipeline.seed, index])
        chosen = as_chosen(_instructions(self.selection(pool, self.view, rng), pool), self.pipeline.training.epochs)
        rows = self.stream.place(chosen["key"].to_numpy())
        if chosen.height and not (rows.min() >= 0 and rows.max() < seen and trainable[rows].all()):
            raise PolicyError(f"the selection returned keys at trigger {index} that are not in its pool")
        return chosen

    def _training(self, index: int, selection: str) -> str:
        """Identity of a training: equal ones give equal models."""
        dataset, seed = self.pipeline.dataset.name, seed_of(self.pipeline, index)
        return digest([dataset, self.stream.number, selection, self._parent(), seed, self._recipe])

    @cached_property
    def _recipe(self) -> str:
        """Identity of model and settings, which may be much to hash: a module counts with its weights."""
        return digest([self.pipeline.model, self.pipeline.training])

    def _alone(self, training: str) -> AbstractContextManager[None]:
        """Keep other runs that want the same from training it a second time."""
        if not self.owner.reuse:
            return nullcontext()
        return locked(self.owner.catalog.root / "locks" / training, self.owner.check)

    def _fit(self, index: int, seen: int, chosen: pl.DataFrame, selection: str) -> Outcome:
        """Train one model; its state on the way and its optimizer are kept beside the run."""
        parent, carry = self._parent(), self.pipeline.training.carry_optimizer
        outcome = train(
            self.pipeline,
            index,
            self.stream.version,
            chosen,
            parent=None if parent is None else self.owner.store.load(parent),
            device=self.device,
            on_batch=self._in_training(index, seen, chosen),
            checkpoint=self._file(index, "checkpoint"),
            identity=f"{selection} {parent}",
            carried=read_state(self._file(index - 1, "optimizer")) if parent and carry else None,
        )
        if carry:
            write_state(self._file(index, "optimizer"), outcome.carried)
        return outcome

    def _parent(self) -> str | None:
        """Return the model that the next training starts from."""
        return self.view.trained[-1].model if self.pipeline.training.warm_start and self.view.trained else None

    def _file(self, index: int, kind: str) -> Path:
        """Where a training keeps its state."""
        return self.owner.folder / "training" / f"{index:06d}.{kind}"

    def _forget(self, index: int) -> None:
        """Remove what trainings kept, once they are committed; only the newest optimizer is still needed."""
        for path in (self.owner.folder / "training").glob("*"):
            if path != self._file(index, "optimizer"):
                path.unlink()

    def _in_training(self, index: int, seen: int, chosen: pl.DataFrame) -> Any:
        """Make the function that the loader calls before each batch: obey requests, tell the progress."""
        before, done = self.view.last_row, 0
        training = self.pipeline.training
        passes = 1 if "epoch" in chosen.columns else training.epochs
        total = passes * (chosen.height - int(training.validation * chosen.height))
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
        windows = evaluation.windows(self.view)
        windows = list(windows) if isinstance(windows, Iterable) else [windows]
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
            slices=evaluation.slices,
            device=self.device,
            batch_size=evaluation.batch_size,
            on_batch=lambda samples: self.owner.check(),
        )
        for n, (window, scores) in enumerate(scored, 1):
            yield self.owner.commit_window(window, scores)
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


def _instructions(chosen: Any, pool: pl.DataFrame) -> Any:
    """Leave out what a selection only passes on: the dataset's own columns epoch and score."""
    if not isinstance(chosen, pl.DataFrame) or "key" not in chosen.columns:
        return chosen
    own = [name for name in ("epoch", "score") if name in pool.columns and name in chosen.columns]
    if not own:
        return chosen
    same = chosen.select("key", *own).equals(chosen.select("key").join(pool, on="key", how="left").select("key", *own))
    return chosen.drop(own) if same else chosen


def _pickled(policy: Any) -> bytes:
    try:
        return bytes(cloudpickle.dumps(policy))
    except Exception as error:
        raise PolicyError(
            f"{describe(policy)} cannot be saved, so the run could not continue later: {error}"
        ) from error
