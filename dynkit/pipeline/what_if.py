"""Where other triggers would have fired on a finished run, without training again.

The stream of the run is walked once more by another trigger. After each training that it asks for, it sees the newest
model that the run had really trained by then. A trigger that looks at samples only fires exactly where it would have;
for one that looks at models the answer is an assumption from the moment on at which it would have trained and the run
did not. Selections are not asked: a run skips a training for which its selection chooses nothing.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import polars as pl

from dynkit import html
from dynkit.data import Dataset
from dynkit.drift import Threshold
from dynkit.errors import Conflict, InvalidInput
from dynkit.models import ModelStore
from dynkit.pipeline.declaration import Pipeline
from dynkit.pipeline.payload import parts
from dynkit.pipeline.replay import BLOCK_ROWS
from dynkit.pipeline.run import Run
from dynkit.pipeline.stream import Stream
from dynkit.pipeline.view import View
from dynkit.policies import as_trigger
from dynkit.training import resolve_device
from dynkit.triggers import AtLeast, Drift
from dynkit.types import RunView, Trained, Trigger

__all__ = ["WhatIf", "what_if"]


@dataclasses.dataclass(frozen=True)
class WhatIf:
    """Result of `what_if`.

    Parameters
    ----------
    run : str
    frame : pl.DataFrame
        A row per variant, the run itself first: variant, triggers (how many), positions (samples seen at each) and
        exact, whether running it would fire at the same positions.
    """

    run: str
    frame: pl.DataFrame

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {n} triggers" + ("" if exact else " (assumed)") for name, n, exact in self._rows())

    def _repr_html_(self) -> str:
        rows = [[name, str(n), "yes" if exact else "assumed"] for name, n, exact in self._rows()]
        return html.table(("variant", "triggers", "exact"), rows, numbers=("triggers",))

    def _rows(self) -> Iterable[tuple[str, int, bool]]:
        return self.frame.select("variant", "triggers", "exact").iter_rows()


def what_if(
    run: Run,
    trigger: Trigger | Mapping[str, Trigger] | None = None,
    *,
    drift_threshold: float | Sequence[float] | None = None,
) -> WhatIf:
    """Tell where other triggers would have fired on a run.

    Parameters
    ----------
    run : Run
        Finished. Its code is loaded, as resuming it does.
    trigger : Trigger or mapping of name to Trigger
        The variants.
    drift_threshold : float or sequence of float
        Variants of the run's own trigger, in which each `Drift` has this threshold of the score.

    Returns
    -------
    WhatIf

    Raises
    ------
    InvalidInput
        When neither or both are given, or the run's trigger has no `Drift`.
    Conflict
        When the run has not finished or was a live one.
    """
    if (trigger is None) == (drift_threshold is None):
        raise InvalidInput("give either trigger or drift_threshold: dk.what_if(run, drift_threshold=[0.01, 0.02])")
    if run.status != "finished" or run.pipeline.get("live"):
        kind = "a live run" if run.pipeline.get("live") else run.status
        raise Conflict(f"run {run.id} is {kind}; a what-if replays a finished run of one dataset version")
    walk = _Walk(run)
    if drift_threshold is not None:
        given = [float(one) for one in np.atleast_1d(drift_threshold)]
        variants = {f"drift_threshold={one!r}": walk.with_threshold(one) for one in given}
    elif isinstance(trigger, Mapping):
        variants = {name: copy.deepcopy(as_trigger(one)) for name, one in trigger.items()}
    else:
        variants = {repr(trigger): copy.deepcopy(as_trigger(trigger))}
    found = {name: walk.fired(variant) for name, variant in variants.items()}
    own = [one.position for one in run.trained]
    rows = {"the run": (own, True), **found}
    frame = pl.DataFrame(
        {
            "variant": list(rows),
            "triggers": [len(positions) for positions, _ in rows.values()],
            "positions": pl.Series([positions for positions, _ in rows.values()], dtype=pl.List(pl.Int64)),
            "exact": [exact for _, exact in rows.values()],
        }
    )
    return WhatIf(run.id, frame)


class _Walk:
    """The stream and the models of a finished run, for triggers to walk along."""

    def __init__(self, run: Run) -> None:
        row = run._row()
        dataset = Dataset(run._catalog, row.dataset, row.dataset_version)
        self._pipeline = Pipeline(dataset=dataset, **parts(run.folder))
        self._stream = Stream(dataset, live=False)
        self._store = ModelStore(run._catalog)
        self._trained = run.trained

    def with_threshold(self, threshold: float) -> Trigger:
        """Return the run's trigger with another threshold of its drift."""
        replaced: Trigger | None = _with_threshold(self._pipeline.trigger, Threshold(threshold))
        if replaced is None:
            raise InvalidInput("the run's trigger has no Drift; pass trigger=... instead of drift_threshold")
        return replaced

    def fired(self, trigger: Trigger) -> tuple[list[int], bool]:
        """Return numbers of samples at which a trigger, which nobody else uses, fires, and whether that is certain."""
        device = resolve_device(self._pipeline.training.device)
        view = View(self._stream, self._store, self._pipeline, device, lambda samples: None)
        watched = _Watched(view)
        for row in range(0, len(self._stream), BLOCK_ROWS):
            for seen in view.fires(lambda new, _: trigger(new, cast(RunView, watched)), row, BLOCK_ROWS):
                if self._stream.trainable[:seen].any():
                    view.trained += (self._imagined(len(view.trained), seen, view.last_ns(seen)),)
        positions = [one.position for one in view.trained]
        return positions, not watched.looked or positions == [one.position for one in self._trained]

    def _imagined(self, index: int, seen: int, last_ns: int) -> Trained:
        """Return a training that did not happen, with the model and the seconds of the run's last one by then."""
        known = [one for one in self._trained if one.position <= seen] or self._trained[:1]
        if not known:
            return Trained(index, seen, last_ns, "", 0, 0.0)
        return Trained(index, seen, last_ns, known[-1].model, known[-1].samples, known[-1].train_s)


class _Watched:
    """A view that notes whether a trigger looks at models or trainings."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.looked = False

    def report(self, position: int, **numbers: Any) -> None:
        """Nobody asks what a trigger saw that did not happen."""

    def __getattr__(self, name: str) -> Any:
        self.looked |= name in ("trained", "model", "predict", "score", "embed", "gradients", "fit")
        return getattr(self._view, name)


def _with_threshold(trigger: Any, threshold: Threshold) -> Any:
    """Return a trigger, or votes of triggers, with this threshold in each drift; None when there is no drift."""
    if isinstance(trigger, Drift):
        return trigger.decided_by(threshold)
    if not isinstance(trigger, AtLeast):
        return None
    replaced = [_with_threshold(one, threshold) for one in trigger.triggers]
    if not any(replaced):
        return None
    return AtLeast(trigger.n, [new or copy.deepcopy(old) for new, old in zip(replaced, trigger.triggers, strict=True)])
