"""Every error that dynkit raises on purpose, grouped by what the caller would do about it.

::

    DynkitError
    ├── InvalidInput (ValueError)      an argument or the data itself: correct it and call again
    │   └── SpecError                  a pipeline written as YAML: `path` and `line` say where
    ├── NotFound (KeyError)            no such name, id or key
    ├── Conflict (RuntimeError)        right call, wrong moment: the state does not allow it
    ├── StorageError (OSError)         what is on disk is missing, damaged or of another format
    ├── PolicyError (RuntimeError)     a trigger, selection, metric or window broke its contract
    ├── TrainingError (RuntimeError)   a model or fit function misbehaved
    ├── RunFailed (RuntimeError)       somebody waited for a run that ended badly
    └── WaitTimeout (TimeoutError)     the wait ended, not the run

A message names the value, what was expected and what to type next.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "Conflict",
    "DynkitError",
    "InvalidInput",
    "NotFound",
    "PolicyError",
    "RunFailed",
    "SpecError",
    "StorageError",
    "TrainingError",
    "WaitTimeout",
    "check_whole",
    "did_you_mean",
]


class DynkitError(Exception):
    """Root of all errors raised by dynkit."""

    def __str__(self) -> str:
        # KeyError would show the repr of its message, quotes and escapes included.
        return " ".join(str(argument) for argument in self.args)


class InvalidInput(DynkitError, ValueError):
    """An argument or the data cannot be used as it is."""


class SpecError(InvalidInput):
    """A pipeline written as YAML is not valid.

    Parameters
    ----------
    message : str
        What is wrong and what was expected.
    path : str
        Where, as keys joined by dots (``trigger.amount.n``); empty for the whole document.
    line : int or None
        Line of the YAML text, from 1.
    """

    def __init__(self, message: str, path: str = "", line: int | None = None) -> None:
        where = [] if line is None else [f"line {line}"]
        super().__init__(": ".join([*where, *([path] if path else []), message]))
        self.path = path
        self.line = line


class NotFound(DynkitError, KeyError):
    """No such name, id or key."""


class Conflict(DynkitError, RuntimeError):
    """The state of the dataset, run or workspace does not allow this now."""


class StorageError(DynkitError, OSError):
    """Something on disk is missing, damaged or of a format this version does not read."""


class PolicyError(DynkitError, RuntimeError):
    """A policy (trigger, selection, windows, metric) broke its contract."""


class TrainingError(DynkitError, RuntimeError):
    """A model or a fit function misbehaved."""


class RunFailed(DynkitError, RuntimeError):
    """A run that was waited for did not finish; `run.error` has the traceback."""


class WaitTimeout(DynkitError, TimeoutError):
    """A wait reached its limit; what was waited for goes on."""


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse an argument that is not a whole number, or too small.

    >>> check_whole("n", 0, 1)
    Traceback (most recent call last):
      ...
    dynkit.errors.InvalidInput: n=0 must be a whole number, at least 1
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"{name}={value!r} must be a whole number, at least {least}")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest valid name, else the list of valid ones.

    >>> did_you_mean("lerning_rate", ["learning_rate", "epochs"])
    "; did you mean 'learning_rate'?"
    >>> did_you_mean("zzz", ["lr", "epochs"])
    '; expected one of: epochs, lr'
    """
    names = sorted(valid)
    lower = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {lower[near[0]]!r}?"
    return f"; expected one of: {', '.join(names)}" if names else ""
