"""Lossy storage, if a test allows it: `guard`.

The difference to the parent, or to the mean of several, is rounded to multiples of a step, twice the error. The loop is
closed: to the parent as it is stored, so that errors do not add up along a chain (as in Delta-DNN, Hu et al. 2020, with
a step of 2 ln(1 + e)). The rounded model is judged by the user's metric next to the original. Where it is as good as
`max_drop` asks, it is stored, under an identity of its own, with the evidence; else the original is.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dynkit.errors import InvalidInput, PolicyError
from dynkit.models.encoding import on_grid
from dynkit.models.prediction import MEAN, predict
from dynkit.models.tensors import manifest_id, tensor_id

__all__ = ["Guard", "guard"]

State = Mapping[str, torch.Tensor]
Bases = Mapping[str, Sequence[torch.Tensor]]
Scores = np.ndarray[Any, np.dtype[np.float64]]

_DOUBLINGS = 12
_BISECTIONS = 5
_RESAMPLES = 2000
_CONFIDENCE = 0.95


def guard(
    metric: Callable[[State], Any],
    direction: Literal["max", "min"],
    max_drop: float,
    *,
    error: float = 1e-4,
    search: bool = False,
    seed: int = 0,
) -> "Guard":
    """Allow a model to be stored approximately, as long as it passes a test.

    Parameters
    ----------
    metric : callable
        ``(state dict) -> number``, or an array of numbers, one for each test sample, of which the mean is meant. With
        an array the drop has a confidence interval, and its upper end must be within `max_drop`.
    direction : "max" or "min"
        Which way is better.
    max_drop : float
        How much worse the metric may become, as a share of what it was.
    error : float
        How far any weight may be from what it was.
    search : bool
        Look for the largest error that passes, from `error` on.
    seed : int
        Of the bootstrap.

    Raises
    ------
    InvalidInput

    Examples
    --------
    >>> import dynkit as dk, tempfile, torch
    >>> state = {"weight": torch.randn(100, 100)}
    >>> store = dk.Workspace(tempfile.mkdtemp()).models
    >>> policy = guard(lambda s: 1 / (1 + float((s["weight"] - state["weight"]).abs().max())), "max", 0.02)
    >>> model = store.put(state, policy=policy)
    >>> store.metadata(model)["guard"]["accepted"]
    True
    """
    return Guard(metric, direction, max_drop, error, search, seed)


@dataclass(frozen=True)
class Guard:
    """See `guard`."""

    metric: Callable[[State], Any]
    direction: Literal["max", "min"]
    max_drop: float
    error: float = 1e-4
    search: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise InvalidInput(
                f"metric={self.metric!r} must be a function of a state dict; without a test nothing is stored lossily"
            )
        if self.direction not in ("max", "min"):
            raise InvalidInput(f'direction={self.direction!r} must be "max" or "min": which way the metric is better')
        if not self.max_drop >= 0:
            raise InvalidInput(f"max_drop={self.max_drop!r} must be a share of the metric, such as 0.02")
        if not 0 < self.error < np.inf:
            raise InvalidInput(f"error={self.error!r} must be a positive number, such as 1e-4")

    def applied(self, state: State, bases: Bases) -> tuple[dict[str, torch.Tensor], float, dict[str, Any]]:
        """Return the state to store, the step of its grid (0: it is the original) and the evidence.

        Parameters
        ----------
        state : mapping of name to Tensor
        bases : mapping of name to list of Tensor
            What the tensors may be predicted from.
        """
        before = self._scores(state)
        state = {name: tensor.detach().cpu() for name, tensor in state.items()}
        trial = functools.partial(_Trial.of, self, state, bases, before)
        best = trial(self.error)
        if self.search and best.passed:
            best = _widest(trial, best)
        evidence = {
            "source": manifest_id({name: tensor_id(tensor) for name, tensor in state.items()}),
            "metric": getattr(self.metric, "__qualname__", type(self.metric).__qualname__),
            "direction": self.direction,
            "max_drop": self.max_drop,
            "accepted": best.passed,
            "error": best.error,
            "largest_error": _largest_error(state, best.state),
            "before": float(before.mean()),
            "after": best.after,
            "drop": best.drop,
            "drop_interval": best.interval,
        }
        if not best.passed:
            return dict(state), 0.0, evidence
        return best.state, 2 * best.error, evidence

    def _scores(self, state: State) -> Scores:
        value = self.metric({name: tensor.clone() for name, tensor in state.items()})
        try:
            scores = np.atleast_1d(np.asarray(value, np.float64))
        except (TypeError, ValueError):
            scores = np.empty(0)
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise PolicyError(f"the guard's metric returned {value!r}; it must return a finite number, or one a sample")
        return scores


@dataclass(frozen=True)
class _Trial:
    """A model rounded with one error, and how it did."""

    error: float
    state: dict[str, torch.Tensor]
    after: float
    drop: float
    interval: list[float] | None
    passed: bool

    @classmethod
    def of(cls, guard: Guard, state: State, bases: Bases, before: Scores, error: float) -> "_Trial":
        """Try an error."""
        rounded = quantised(state, bases, error)
        after = guard._scores(rounded)
        sign = 1.0 if guard.direction == "max" else -1.0
        scale = abs(before.mean()) or 1.0
        drop = float(sign * (before.mean() - after.mean()) / scale)
        interval = _interval(sign * (before - after) / scale, guard.seed) if 1 < len(before) == len(after) else None
        worst = drop if interval is None else interval[1]
        return cls(error, rounded, float(after.mean()), drop, interval, worst <= guard.max_drop)


def _interval(drops: Scores, seed: int) -> list[float]:
    """Paired bootstrap interval of the mean drop (Efron and Tibshirani 1993, percentile method)."""
    rng = np.random.default_rng(seed)
    means = [float(drops[rng.integers(0, len(drops), len(drops))].mean()) for _ in range(_RESAMPLES)]
    tail = (1 - _CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(means, [tail, 1 - tail])]


def _widest(trial: Callable[[float], _Trial], best: _Trial) -> _Trial:
    """Double the error until the test fails, then bisect on a geometric scale."""
    low = best
    for _ in range(_DOUBLINGS):
        wider = trial(low.error * 2)
        if not wider.passed:
            break
        low = wider
    else:
        return low
    high_error = wider.error
    for _ in range(_BISECTIONS):
        middle = trial(float(np.sqrt(low.error * high_error)))
        if middle.passed:
            low = middle
        else:
            high_error = middle.error
    return low


def quantised(state: State, bases: Bases, error: float) -> dict[str, torch.Tensor]:
    """Round every float tensor, closed loop, where that keeps the error; others stay."""
    return {name: _rounded(tensor, bases.get(name, []), error) for name, tensor in state.items()}


def _rounded(tensor: torch.Tensor, bases: Sequence[torch.Tensor], error: float) -> torch.Tensor:
    if not tensor.numel() or not tensor.is_floating_point() or not bool(tensor.double().isfinite().all()):
        return tensor
    expected = min(_expectations(tensor, bases), key=lambda one: float((one.double() - tensor.double()).abs().sum()))
    steps = ((tensor.double() - expected.double()) / (2 * error)).round()
    near = on_grid(expected, steps, 2 * error)
    kept = bool((steps.abs() < 2**30).all()) and float((near.double() - tensor.double()).abs().amax()) <= 1.01 * error
    return near if kept else tensor


def _expectations(tensor: torch.Tensor, bases: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return zeros, the bases and their mean: what `encode` can find on a grid again."""
    same = [base for base in bases if base.shape == tensor.shape and base.dtype == tensor.dtype]
    found = [torch.zeros_like(tensor), *same]
    if len(same) > 1:
        found.append(predict("mean", MEAN, b"", same, tensor.dtype, tensor.shape))
    return found


def _largest_error(state: State, other: State) -> float:
    pairs = ((state[name], other[name]) for name in state if state[name].is_floating_point() and state[name].numel())
    return max((float((a.double() - b.double()).abs().amax()) for a, b in pairs), default=0.0)
