"""Turn what a user has into one policy type, once; describe it; tell whether it changed.

A policy is a callable or a frozen dataclass with ``__call__``. `as_trigger` and its siblings accept it or say what is
wrong with it before anything runs. `describe` gives the record that the catalog keeps; `digest` gives its identity, by
which the same cell with the same inputs finds its earlier run. Nothing here runs or pickles user code.
"""

import copy
import dataclasses
import dis
import functools
import inspect
import os
import re
import sys
import sysconfig
import types as python_types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from blake3 import blake3

from dynkit.errors import InvalidInput, PolicyError
from dynkit.types import DriftMetric, Metric, Model, Selection, Trigger, Windows

__all__ = [
    "as_chosen",
    "as_drift_metric",
    "as_metric",
    "as_model",
    "as_positions",
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


def as_positions(decision: object, height: int) -> Iterator[int]:
    """Check what a trigger answered about `height` rows, and give the row positions one by one.

    Raises
    ------
    PolicyError
        When it answered something else.
    """
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


def as_chosen(chosen: object, epochs: int) -> pl.DataFrame:
    """Check what a selection answered, for a training of so many epochs.

    Returns
    -------
    pl.DataFrame
        Column key (Int64), and weight (Float32), epoch (Int64, from 0) and score (Float64) where they were given.

    Raises
    ------
    PolicyError
        When it answered something else.
    """
    try:
        if not isinstance(chosen, pl.DataFrame | pl.Series):
            chosen = pl.Series(np.asarray(chosen))
        given = chosen if isinstance(chosen, pl.DataFrame) else pl.DataFrame({"key": chosen})
        if "key" not in given.columns:
            raise PolicyError(f"the selection returned a frame without a column key: {given.columns}")
        keys = given["key"]
        if len(keys) and not keys.dtype.is_integer():
            hint = "; return pool.filter(mask)['key']" if keys.dtype == pl.Boolean else ""
            raise PolicyError(
                "the selection must return keys or a frame with columns key and weight; "
                f"its keys are {keys.dtype}, not whole numbers{hint}"
            )
        columns = [keys.cast(pl.Int64).rename("key")]
        for name, dtype in (("weight", pl.Float32), ("epoch", pl.Int64), ("score", pl.Float64)):
            if name in given.columns:
                columns.append(given[name].cast(dtype))
        frame = pl.DataFrame(columns).rechunk()
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        raise PolicyError(f"the selection must return keys or a frame with columns key and weight: {error}") from None
    if keys.null_count():
        raise PolicyError("the selection returned keys that are null")
    if "weight" in frame.columns:
        weight = frame["weight"]
        if weight.null_count() or not weight.is_finite().all() or not (weight >= 0).all():
            raise PolicyError("the selection returned weights that are negative, null or not finite")
    if "epoch" in frame.columns and frame.height:
        counts = frame["epoch"].value_counts()
        if (
            sorted(counts["epoch"].to_list(), key=str) != sorted(range(epochs), key=str)
            or counts["count"].n_unique() > 1
        ):
            raise PolicyError(f"the selection must name as many samples in each epoch, from 0 to {epochs - 1}")
    return frame


def as_selection(value: object) -> Selection:
    """Return `value` as a Selection: a callable ``(pool, run, rng) -> keys | frame(key, weight)``."""
    return cast(Selection, _as_callable(value, "selection", ("pool", "run", "rng")))


def as_windows(value: object) -> Windows:
    """Return `value` as Windows: a callable ``(run) -> windows``."""
    return cast(Windows, _as_callable(value, "windows", ("run",)))


def as_drift_metric(value: object) -> DriftMetric:
    """Return `value` as a DriftMetric: a callable ``(reference, current) -> float``."""
    return cast(DriftMetric, _as_callable(value, "metric", ("reference", "current")))


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
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


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
    if isinstance(value, pl.Expr):
        return str(value)
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
    return _digest(value, {})


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


_Memo = dict[int, tuple[object, str]]  # the object is kept, so that its id is not used again


def _digest(value: Any, memo: _Memo) -> str:
    """Hash of a value: of its type and its parts. An object that contains itself counts as its type there."""
    if id(value) in memo:
        return memo[id(value)][1]
    kind = type(value).__name__
    memo[id(value)] = value, f"inside {kind}"
    parts = _parts(value)
    hasher = blake3(kind.encode())
    for part in [parts] if isinstance(parts, bytes) else (_digest(part, memo).encode() for part in parts):
        hasher.update(len(part).to_bytes(8, "little")).update(part)
    memo[id(value)] = value, hasher.hexdigest()
    return hasher.hexdigest()


def _parts(value: Any) -> bytes | list[Any]:
    """Parts that make up a value's identity, or bytes where it has no parts. Library code is its name."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value).encode()
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, python_types.CodeType):
        return [value.co_code, value.co_names, value.co_varnames, value.co_consts]
    if isinstance(value, python_types.ModuleType):
        return _module_parts(value) if is_user_code(value.__name__) else value.__name__.encode()
    if isinstance(value, python_types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, type | python_types.FunctionType | python_types.BuiltinFunctionType):
        if not is_user_code(value.__module__):
            return f"{value.__module__}.{value.__qualname__}".encode()
        return _class_parts(value) if isinstance(value, type) else _function_parts(value)
    if hasattr(value, "__dynkit_digest__"):  # a dataset counts by name and version
        return list(value.__dynkit_digest__())
    if dataclasses.is_dataclass(value):
        return [type(value), *(getattr(value, field.name) for field in dataclasses.fields(value))]
    if hasattr(value, "__array__") and hasattr(value, "dtype"):  # NumPy arrays and tensors
        if hasattr(value, "detach"):
            value = value.detach().cpu().resolve_conj().resolve_neg()
            array = value.float().numpy() if re.search("bfloat16|float8", str(value.dtype)) else value.numpy()
        else:
            array = np.asarray(value)
        return [str(value.dtype), list(array.shape), array.tobytes()]
    try:
        return list(value.__reduce_ex__(4))  # the class and the state, in parts of their own
    except Exception:  # what cannot be taken apart: its class and, where there are any, its attributes
        return [type(value), vars(value) if hasattr(value, "__dict__") else repr(value)]


def _module_parts(module: python_types.ModuleType) -> list[Any]:
    """Source of a user's module, and what it takes from other user modules."""
    file = module.__file__
    used = [
        (name, item)
        for name, item in sorted(vars(module).items())
        if isinstance(item, python_types.ModuleType | python_types.FunctionType | type)
        and is_user_code(getattr(item, "__module__", None) or getattr(item, "__name__", None))
        and getattr(item, "__module__", None) != module.__name__
    ]
    return [Path(file).read_bytes() if file and Path(file).exists() else module.__name__, *used]


def _class_parts(cls: type[Any]) -> list[Any]:
    members = [(name, item) for name, item in vars(cls).items() if inspect.isroutine(item) or not name.startswith("__")]
    return [cls.__qualname__, *cls.__bases__, *members]


def _function_parts(function: Any) -> list[Any]:
    used = sorted(_global_names(function.__code__) & function.__globals__.keys())
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [
        function.__qualname__,
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        cells,
        [(name, function.__globals__[name]) for name in used],
    ]


def _global_names(code: python_types.CodeType) -> set[str]:
    """Globals that a function reads, in functions inside it too."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (constant for constant in code.co_consts if isinstance(constant, python_types.CodeType))
    return names.union(*map(_global_names, inner))
