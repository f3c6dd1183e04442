"""Turn what a user has into one policy type, once; describe it; tell whether it changed.

A policy is a callable or a frozen dataclass with ``__call__``. `as_trigger` and its siblings accept it or say what is
wrong with it before anything runs. `describe` gives the record that the catalog keeps; `digest` gives its identity, by
which the same cell with the same inputs finds its earlier run. Nothing here runs or pickles user code.
"""

import copy
import dataclasses
import functools
import inspect
import os
import re
import sys
import sysconfig
import types as python_types
from collections.abc import Callable
from typing import Any, cast

import cloudpickle
from blake3 import blake3

from dynkit.errors import InvalidInput
from dynkit.types import Metric, Model, Selection, Trigger, Windows

__all__ = [
    "as_metric",
    "as_model",
    "as_selection",
    "as_trigger",
    "as_windows",
    "describe",
    "digest",
    "is_user_code",
    "snake_case",
]


def as_trigger(value: object) -> Trigger:
    """Return `value` as a Trigger: a callable ``(new, run) -> bool | positions``."""
    return cast(Trigger, _as_callable(value, "trigger", ("new", "run")))


def as_selection(value: object) -> Selection:
    """Return `value` as a Selection: a callable ``(pool, run, rng) -> keys | frame(key, weight)``."""
    return cast(Selection, _as_callable(value, "selection", ("pool", "run", "rng")))


def as_windows(value: object) -> Windows:
    """Return `value` as Windows: a callable ``(run) -> windows``."""
    return cast(Windows, _as_callable(value, "windows", ("run",)))


def as_metric(value: object) -> Metric:
    """Return `value` as a Metric: a callable ``(outputs, labels) -> float``."""
    return cast(Metric, _as_callable(value, "metric", ("outputs", "labels")))


def as_model(value: object) -> Model:
    """Return `value` as a Model: a callable ``() -> nn.Module``; an nn.Module is copied each time."""
    torch = sys.modules.get("torch")  # a module instance cannot exist before torch was imported
    if torch is not None and isinstance(value, torch.nn.Module):
        return _Copied(value)
    return cast(Model, _as_callable(value, "model", ()))


@dataclasses.dataclass(frozen=True)
class _Copied:
    """A model given as a module: every training starts from a copy of it."""

    module: Any

    def __call__(self) -> Any:
        return copy.deepcopy(self.module)


def _as_callable(value: object, role: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    call = f"({', '.join(arguments)})"
    if inspect.isclass(value) and arguments:
        raise InvalidInput(f"{role}={value.__name__} is a class; pass an instance: {role}={value.__name__}(...)")
    if not callable(value):
        raise InvalidInput(f"{role}={value!r} is not callable; pass a built-in or a function of {call}")
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError as error:
        raise InvalidInput(f"{role}={_name(value)} cannot be called with {call}: {error}") from None
    except ValueError:  # some C callables have no signature; the call itself will tell
        pass
    return value


def snake_case(name: str) -> str:
    """Spell a class name the way YAML does.

    >>> snake_case("BetweenTriggers")
    'between_triggers'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _name(value: object) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def describe(value: Any) -> Any:
    """Record of a policy as plain JSON values: names and parameters, not code.

    >>> from dynkit.triggers import Amount
    >>> describe(Amount(5000))
    {'amount': {'n': 5000}}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, _Copied):
        return f"copy of {type(value.module).__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {snake_case(type(value).__name__): fields}
    if isinstance(value, functools.partial):
        return {_name(value.func): describe(value.keywords)}
    return _name(value)


def digest(value: Any) -> str:
    """Identity of a policy or pipeline: parameters, and for user code the code itself.

    Equal in another kernel for the same source; different when a function, a default, a closure or a global that
    the function uses changes. Library code counts by its name.
    """
    hasher = blake3()
    _feed(hasher.update, value, set())
    return hasher.hexdigest()


def is_user_code(module: str | None) -> bool:
    """Whether a module is the user's own (a notebook, a script beside it) and so travels with the run by value."""
    if module is None or module == "__main__":
        return True
    if module.split(".")[0] in {"dynkit", "dynkit_jupyter", "builtins"}:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return False
    installed = f"{os.sep}site-packages{os.sep}" in file or f"{os.sep}dist-packages{os.sep}" in file
    return not installed and not file.startswith((sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")))


def _feed(write: Callable[[bytes], Any], value: Any, seen: set[int]) -> None:
    """Write a canonical form of `value` to a hash. Recursion ends at library code and at what was seen."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        write(f"{type(value).__name__}:{value!r};".encode())
        return
    if id(value) in seen:
        write(b"seen;")
        return
    seen.add(id(value))
    write(f"<{type(value).__name__}>".encode())
    if isinstance(value, dict):
        for key, item in value.items():
            _feed(write, key, seen)
            _feed(write, item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(write, item, seen)
    elif isinstance(value, set | frozenset):
        for item in sorted(value, key=repr):
            _feed(write, item, seen)
    elif isinstance(value, python_types.CodeType):
        write(value.co_code)
        _feed(write, [*value.co_names, *value.co_varnames, *value.co_consts], seen)
    elif isinstance(value, python_types.FunctionType) and is_user_code(value.__module__):
        _feed_function(write, value, seen)
    elif isinstance(value, type) and is_user_code(value.__module__):
        members = vars(value).items()
        _feed(write, value.__qualname__, seen)
        _feed(write, list(value.__bases__), seen)
        _feed(write, [(k, v) for k, v in members if not k.startswith("__") or inspect.isroutine(v)], seen)
    elif isinstance(value, python_types.ModuleType):
        write(value.__name__.encode())
    elif isinstance(value, type | python_types.FunctionType | python_types.BuiltinFunctionType):
        write(f"{value.__module__}.{value.__qualname__};".encode())
    elif isinstance(value, functools.partial):
        _feed(write, [value.func, value.args, value.keywords], seen)
    elif isinstance(value, python_types.MethodType):
        _feed(write, [value.__func__, value.__self__], seen)
    elif hasattr(value, "__dynkit_digest__"):  # a dataset counts by name and version
        _feed(write, value.__dynkit_digest__(), seen)
    elif dataclasses.is_dataclass(value):
        _feed(write, type(value), seen)
        _feed(write, [getattr(value, f.name) for f in dataclasses.fields(value)], seen)
    else:
        write(cloudpickle.dumps(value))
    write(b"</>")


def _feed_function(write: Callable[[bytes], Any], function: python_types.FunctionType, seen: set[int]) -> None:
    closure = inspect.getclosurevars(function)
    write(function.__qualname__.encode())
    _feed(write, function.__code__, seen)
    _feed(write, [function.__defaults__, function.__kwdefaults__], seen)
    _feed(write, sorted(closure.nonlocals.items()), seen)
    _feed(write, sorted(closure.globals.items()), seen)
