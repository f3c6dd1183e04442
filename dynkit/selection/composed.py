"""Selections made of selections: of a part of the pool, of two parts, or another one from some trigger on.

An inner selection gets its part as its pool, and a view of the run in which as many samples are new as that part has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from dynkit.data.splits import select_rows
from dynkit.errors import InvalidInput, check_whole
from dynkit.policies import as_chosen, as_selection
from dynkit.selection.sampling import All
from dynkit.types import RunView, Selection

__all__ = ["New", "Replay", "Schedule", "Where"]

_ALL = All()


@dataclass(frozen=True)
class New:
    """The samples since the last trigger, or a selection of them.

    Parameters
    ----------
    triggers : int
        Those of the last so many triggers; 1 means the present one's only.
    then : Selection
        Which of them.

    Examples
    --------
    >>> from dynkit.selection import Loss, New
    >>> policy = New(then=Loss(fraction=0.5))
    """

    triggers: int = 1
    then: Selection = _ALL

    def __post_init__(self) -> None:
        check_whole("triggers", self.triggers, 1)
        as_selection(self.then)

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> Any:
        """Keys, or keys and weights, of the newest samples of the pool."""
        new = run.samples_since_trigger
        if self.triggers > 1:
            new = int((run.arrived(pool["key"]) > len(run.trained) - self.triggers).sum())
        return self.then(pool.tail(new), _Part(run, min(run.samples_since_trigger, pool.height)), rng)


@dataclass(frozen=True)
class Where:
    """The samples that a condition is true for, or a selection of them.

    Parameters
    ----------
    expression : pl.Expr or str
        Condition on the columns of the pool, as an expression or as SQL: ``"carrier = 'UA' AND distance > 500"``.
    then : Selection
        Which of them.

    Examples
    --------
    >>> from dynkit.selection import Random, Where
    >>> policy = Where("carrier = 'UA'", then=Random(n=1000))
    """

    expression: pl.Expr | str
    then: Selection = _ALL

    def __post_init__(self) -> None:
        _condition(self.expression)
        as_selection(self.then)

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> Any:
        """Keys, or keys and weights, of samples that the condition is true for."""
        chosen = select_rows(pool, _condition(self.expression))
        new = int(chosen[pool.height - run.samples_since_trigger :].sum())
        return self.then(pool.filter(chosen), _Part(run, new), rng)


@dataclass(frozen=True)
class Replay:
    """The samples since the last trigger together with some of the older ones, against forgetting.

    Parameters
    ----------
    old : Selection
        Which of the samples before the last trigger, such as ``Random(n=10_000)`` or ``Reservoir(n=10_000)``.
    new : Selection
        Which of the samples since.
    """

    old: Selection
    new: Selection = _ALL

    def __post_init__(self) -> None:
        as_selection(self.old)
        as_selection(self.new)

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> pl.DataFrame:
        """Keys of both, with weights where one of them gives any; a weight that is not given is 1."""
        new = min(run.samples_since_trigger, pool.height)
        parts = [(self.old, pool.head(pool.height - new), 0), (self.new, pool.tail(new), new)]
        chosen = [as_chosen(then(part, _Part(run, n), rng), run.epochs) for then, part, n in parts if part.height]
        if any("epoch" in frame.columns for frame in chosen):
            every = pl.DataFrame({"epoch": np.arange(run.epochs)})
            chosen = [frame if "epoch" in frame.columns else frame.join(every, how="cross") for frame in chosen]
        both = pl.concat(chosen, how="diagonal")
        return both.with_columns(pl.col("weight").fill_null(1.0)) if "weight" in both.columns else both


@dataclass(frozen=True)
class Schedule:
    """Another selection from some trigger on.

    Parameters
    ----------
    steps : sequence of (int, Selection)
        Number of the first trigger, from 0, and the selection that begins there.

    Examples
    --------
    Three trainings on everything, then on the half with the largest losses:

    >>> from dynkit.selection import All, Loss, Schedule
    >>> policy = Schedule([(0, All()), (3, Loss(fraction=0.5))])
    """

    steps: Sequence[tuple[int, Selection]]

    def __post_init__(self) -> None:
        try:
            steps = tuple((first, as_selection(selection)) for first, selection in self.steps)
        except (TypeError, ValueError) as error:
            raise InvalidInput(
                f"steps={self.steps!r} must be pairs of a trigger and a selection: [(0, All()), ...]: {error}"
            ) from None
        firsts = [first for first, _ in steps]
        for first in firsts:
            check_whole("trigger", first, 0)
        if not firsts or firsts[0] != 0 or any(a >= b for a, b in pairwise(firsts)):
            raise InvalidInput(f"steps must begin at increasing triggers, the first at 0, not {firsts}")
        object.__setattr__(self, "steps", steps)

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> Any:
        """Select as the newest step that has begun."""
        begun = [selection for first, selection in self.steps if first <= len(run.trained)]
        return begun[-1](pool, run, rng)


class _Part:
    """The run's view for a part of the pool: as many samples are new as it has."""

    def __init__(self, run: RunView, samples_since_trigger: int) -> None:
        self._run = run
        self.samples_since_trigger = samples_since_trigger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def _condition(expression: pl.Expr | str) -> pl.Expr:
    if isinstance(expression, pl.Expr):
        return expression
    try:
        return pl.sql_expr(expression)
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise InvalidInput(
            f"expression={expression!r} is neither a Polars expression nor SQL: {str(error).splitlines()[0]}; write it "
            "like \"carrier = 'UA'\""
        ) from None
