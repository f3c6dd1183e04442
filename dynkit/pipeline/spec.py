"""Pipelines written as YAML: the same thing as the Python constructors, spelled differently.

::

    dataset: flights
    model: make_model                  # a name of the notebook, or package.module:name
    trigger: {time: {every: 30d}}      # triggers.Time(every="30d"); {time: 30d} does too
    selection: {random: {fraction: 0.5}}
    training: {epochs: 2, lr: 1e-3}
    evaluation: {windows: {tumbling: 30d}, metrics: [accuracy, roc_auc]}
    seed: 1

A mapping with one key names a built-in (or ``package.module:name``) and gives its parameters; a single value goes to
the first parameter. ``$name`` stands for the value of a notebook variable. Parameters are validated by pydantic
against the dataclasses themselves; `dynkit.pipeline.json_schema` turns the same into JSON Schema.
"""

import dataclasses
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import polars as pl
import pydantic

from dynkit import selection, triggers
from dynkit.catalog import Catalog
from dynkit.data import Dataset
from dynkit.drift import METRICS as DRIFT_METRICS
from dynkit.drift import DynamicQuantile, DynamicRollingAverage, PValue, Threshold
from dynkit.drift.criteria import Criterion
from dynkit.errors import DynkitError, InvalidInput, SpecError, did_you_mean
from dynkit.evaluation import windows
from dynkit.evaluation.metrics import NAMES as METRICS
from dynkit.evaluation.settings import Evaluation
from dynkit.pipeline.declaration import Pipeline
from dynkit.policies import snake_case
from dynkit.training.settings import LOSSES, OPTIMIZERS, SCHEDULES, Optimizer, Schedule, Training
from dynkit.types import DriftMetric, Metric, Selection, Trigger
from dynkit.yaml import Document, Path, parse

__all__ = [
    "BUILT_IN",
    "KEYS",
    "NAMED",
    "REQUIRED",
    "ROLES",
    "SETTINGS",
    "build",
    "field_names",
    "has_policies",
    "pydantic_model",
]

_CRITERIA = (Threshold, DynamicQuantile, DynamicRollingAverage, PValue, triggers.AvoidableMisclassifications)
BUILT_IN: dict[str, dict[str, Callable[..., Any]]] = {
    "trigger": {
        **{snake_case(cls.__name__): cls for cls in (triggers.Amount, triggers.Time, triggers.Drift)},
        **{snake_case(cls.__name__): cls for cls in (triggers.Performance, triggers.Cost, triggers.AtLeast)},
        **{function.__name__: function for function in (triggers.any_of, triggers.all_of, triggers.majority)},
    },
    "selection": {snake_case(name): getattr(selection, name) for name in selection.__all__},
    "windows": {snake_case(name): getattr(windows, name) for name in windows.__all__},
    "metrics": dict(METRICS),
    "criterion": {snake_case(cls.__name__): cls for cls in _CRITERIA},
    "drift_metric": dict(DRIFT_METRICS),
    "model": {},
}
NAMED = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "loss": LOSSES, "fit": ()}
SETTINGS: dict[str, type[Any]] = {"optimizer": Optimizer, "schedule": Schedule}  # a name with parameters makes these
_OPAQUE = ("windows", "metrics", "batch_selection")  # policies: made and checked where they are read
KEYS = ("name", "dataset", "model", "trigger", "selection", "training", "evaluation", "seed")
ROLES: dict[Any, str] = {
    Trigger: "trigger",
    Selection: "selection",
    Metric: "metrics",
    DriftMetric: "drift_metric",
    Criterion: "criterion",
}
REQUIRED = ("dataset", "model", "trigger", "selection")


def build(
    text: str,
    catalog: Catalog,
    *,
    name: str | None = None,
    namespace: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Pipeline:
    """Make the Pipeline that a YAML text declares.

    Parameters
    ----------
    text : str
    catalog : Catalog
        Where its dataset is.
    name : str or None
        The pipeline's name; None takes it from the key ``name``.
    namespace : mapping or None
        The notebook's variables, where bare names are looked up.
    device : str or None
        Overrides ``training.device``.

    Raises
    ------
    SpecError
        One line with the line number, the path in the YAML, the value, what was expected and the nearest valid name.
    """
    builder = _Builder(parse(text), namespace or {})
    top = builder.mapping((), builder.document.value, KEYS, "a pipeline")
    for key in REQUIRED:
        if key not in top:
            raise builder.error((), f"key {key!r} is missing; a pipeline needs {', '.join(REQUIRED)}")
    if name is not None and top.get("name", name) != name:
        raise builder.error(("name",), f"the pipeline is called {name!r} already; leave this key out")
    if name is None and "name" not in top:
        raise builder.error((), "key 'name' is missing; give the pipeline a name")
    training = dict(builder.mapping(("training",), top.get("training", {}), field_names(Training), "training"))
    if device is not None:
        training["device"] = device
    judging = builder.mapping(("evaluation",), top.get("evaluation", {}), field_names(Evaluation), "evaluation")
    options: dict[str, Any] = {"seed": top["seed"]} if "seed" in top else {}
    options["name"] = name if name is not None else top["name"]
    with builder.at(("dataset",)):
        if not isinstance(top["dataset"], str):
            raise InvalidInput(f"{top['dataset']!r} is not a dataset name; expected text")
        options["dataset"] = Dataset(catalog, top["dataset"])
    options["model"] = builder.model(("model",), top["model"])
    for role in ("trigger", "selection"):
        options[role] = builder.policy((role,), top[role], role)
    options["training"] = builder.training(("training",), training)
    options["evaluation"] = builder.evaluation(("evaluation",), judging)
    with builder.at(()):
        return Pipeline(**options)


class _Builder:
    """Turns parts of a document into objects; every error carries its place."""

    def __init__(self, document: Document, namespace: Mapping[str, Any]) -> None:
        self.namespace = namespace
        self.document = document
        self.document = Document(self._substituted((), document.value), document.lines)

    def error(self, path: Path, message: str) -> SpecError:
        return self.document.error(path, message)

    @contextmanager
    def at(self, path: Path) -> Iterator[None]:
        """Turn the errors of Python constructors into errors at a place of the document."""
        try:
            yield
        except SpecError:
            raise
        except DynkitError as error:
            name = str(error).partition("=")[0].partition(":")[0]
            inner = (*path, name)
            raise self.error(inner if inner in self.document.lines else path, str(error)) from None

    def _substituted(self, path: Path, value: Any) -> Any:
        """Replace ``$name`` by the notebook's variable, everywhere."""
        if isinstance(value, dict):
            return {key: self._substituted((*path, key), item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._substituted((*path, i), item) for i, item in enumerate(value)]
        if isinstance(value, str) and value.startswith("$"):
            if value[1:] not in self.namespace:
                raise self.error(path, f"{value!r}: no variable {value[1:]!r} in the notebook{self._near(value[1:])}")
            return self.namespace[value[1:]]
        return value

    def _near(self, name: str) -> str:
        near = did_you_mean(name, [key for key in self.namespace if not key.startswith("_")])
        return near if near.startswith("; did") else ""

    def mapping(self, path: Path, value: Any, keys: typing.Iterable[str], what: str) -> dict[str, Any]:
        """Check that `value` is a mapping with these keys only."""
        if not isinstance(value, dict):
            found = "nothing" if value is None else repr(value)
            raise self.error(path, f"{found} is not {what}; expected keys: {', '.join(keys)}")
        for key in value:
            if not isinstance(key, str):
                raise self.error(path, f"key {key!r} must be text")
            if key not in keys:
                raise self.error((*path, key), f"key {key!r} is not known{did_you_mean(key, keys)}")
        return value

    def policy(self, path: Path, value: Any, role: str) -> Any:
        """Make a built-in from its name and parameters, or find the user's own."""
        named, parameters, inner = self._named(path, value, role)
        if named in BUILT_IN[role]:
            return self._construct(inner, BUILT_IN[role][named], {} if parameters is None else parameters)
        found = self._find(path, named, role)
        if parameters is None and not isinstance(found, type):
            return found
        return self._called(inner, found, parameters)

    def model(self, path: Path, value: Any) -> Any:
        """Find the user's model; parameters are kept for each time it is made."""
        named, parameters, inner = self._named(path, value, "model")
        found = self._find(path, named, "model")
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, dict):
            raise self.error(inner, f"{parameters!r} must be a mapping of parameters")
        self._check_call(inner, found, parameters)
        return functools.partial(found, **parameters) if parameters else found

    def _check_call(self, path: Path, found: Callable[..., Any], parameters: dict[str, Any]) -> None:
        try:
            signature = inspect.signature(found)
        except ValueError:  # of C, some have none
            return
        if not any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values()):
            self.mapping(path, parameters, list(signature.parameters), "parameters")
        try:
            signature.bind(**parameters)
        except TypeError as error:
            raise self.error(path, f"the model cannot be made: {error}") from None

    def _named(self, path: Path, value: Any, role: str) -> tuple[str, Any, Path]:
        """Split ``name`` or ``{name: parameters}``."""
        if isinstance(value, str):
            return value, None, path
        if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value)), str):
            name, parameters = next(iter(value.items()))
            return name, {} if parameters is None else parameters, (*path, name)
        if callable(value):  # from $name
            raise self.error(path, f"write the name without '$' to use a function as {role}")
        found = f"{len(value)} keys ({', '.join(map(str, value))})" if isinstance(value, dict) else repr(value)
        names = ", ".join(BUILT_IN.get(role, NAMED.get(role, ()))) or "model"
        raise self.error(
            path, f"{found} is not one {role}; expected a name or {{name: parameters}} with one of: {names}"
        )

    def _find(self, path: Path, name: str, role: str) -> Callable[..., Any]:
        """Look a bare name up in the notebook, or import ``package.module:name``."""
        if ":" in name:
            module, _, attribute = name.partition(":")
            try:
                found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
            except (ImportError, AttributeError, ValueError) as error:
                raise self.error(path, f"{name!r} cannot be imported: {error}") from None
        elif name in self.namespace:
            found = self.namespace[name]
        else:
            public = [key for key, value in self.namespace.items() if callable(value) and not key.startswith("_")]
            built_in = list(BUILT_IN.get(role, NAMED.get(role, ())))
            near = did_you_mean(name, [*built_in, *public])
            if not near.startswith("; did"):
                known = f"one of {', '.join(built_in)}, " if built_in else ""
                near = f"; expected {known}a notebook's function or package.module:name"
            raise self.error(path, f"{role} {name!r} is not known{near}")
        if not callable(found):
            raise self.error(path, f"{name!r} is {found!r:.60}, not a function or class that can be a {role}")
        return typing.cast(Callable[..., Any], found)

    def _construct(self, path: Path, cls: Callable[..., Any], parameters: Any) -> Any:
        """Make a built-in dataclass from YAML parameters, or a vote from a list of triggers."""
        if not isinstance(cls, type):
            if not isinstance(parameters, list) or not parameters:
                raise self.error(path, f"{parameters!r} is not a list of triggers")
            return cls(*(self.policy((*path, i), one, "trigger") for i, one in enumerate(parameters)))
        fields = field_names(cls)
        if not isinstance(parameters, dict):
            if not fields:
                raise self.error(path, f"{snake_case(cls.__name__)} takes no parameters, not {parameters!r}")
            parameters = {fields[0]: parameters}
        parameters = self.mapping(path, parameters, fields, snake_case(cls.__name__)) if fields or parameters else {}
        hints = typing.get_type_hints(cls)
        parameters = {name: self._nested((*path, name), hints[name], value) for name, value in parameters.items()}
        with self.at(path):
            return cls(**self._validated(path, cls, parameters))

    def _nested(self, path: Path, hint: Any, value: Any) -> Any:
        """Make the policies and find the functions that a parameter of this type expects; other values stay."""
        if hint in ROLES:
            return self.policy(path, value, ROLES[hint])
        parts, kind = typing.get_args(hint), typing.get_origin(hint)
        if kind in (typing.Union, types.UnionType):
            return self._one_of(path, parts, value)
        if not has_policies(hint) or value is None:
            return value
        if kind is tuple and Ellipsis not in parts:
            if not isinstance(value, list) or len(value) != len(parts):
                raise self.error(path, f"{value!r} must be a list of {len(parts)} values")
        elif isinstance(value, list):
            parts = parts[:1] * len(value)
        else:
            raise self.error(path, f"{value!r} is not a list")
        return [self._nested((*path, i), part, item) for i, (part, item) in enumerate(zip(parts, value, strict=True))]

    def _one_of(self, path: Path, parts: tuple[Any, ...], value: Any) -> Any:
        """Make what one of several types expects: a text that names nothing else is text."""
        policies = [part for part in parts if has_policies(part)]
        if isinstance(value, str) and str in parts:
            role = ROLES.get(policies[0], "function") if policies else "function"
            functions = policies or any(typing.get_origin(part) is Callable for part in parts)
            own = callable(self.namespace.get(value)) or ":" in value
            return self._find(path, value, role) if functions and own and value not in BUILT_IN.get(role, {}) else value
        if policies and value is not None:
            return self._nested(path, policies[0], value)
        callables = any(typing.get_origin(part) is Callable for part in parts)
        return self._find(path, value, "function") if callables and isinstance(value, str) else value

    def _validated(self, path: Path, cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
        """Check types and required parameters with pydantic."""
        try:
            pydantic_model(cls).model_validate(values)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            if first["type"] == "missing":
                raise self.error(path, f"parameter {name!r} is missing; {_usage(cls)}") from None
            raise self.error(
                (*path, name), f"{values.get(name)!r} is not valid; expected {_type_name(cls, name)}"
            ) from None
        return values

    def _called(self, path: Path, found: Callable[..., Any], parameters: Any) -> Any:
        if not isinstance(parameters, dict | None):
            raise self.error(path, f"{parameters!r} must be a mapping of parameters")
        try:
            return found(**(parameters or {}))
        except (TypeError, ValueError) as error:
            raise self.error(path, f"cannot be made: {error}") from None

    def training(self, path: Path, values: dict[str, Any]) -> Training:
        """Make the training; optimizer, schedule, loss and fit may be the user's own."""
        resolved = dict(values)
        for key, value in values.items():
            if key == "optimizer" and isinstance(value, list):
                resolved[key] = [self._setting((*path, key, i), one, key) for i, one in enumerate(value)]
            elif key in NAMED:
                resolved[key] = self._setting((*path, key), value, key)
        if resolved.get("batch_selection") is not None:
            resolved["batch_selection"] = self.policy(
                (*path, "batch_selection"), values["batch_selection"], "selection"
            )
        with self.at(path):
            return Training(**self._validated(path, Training, resolved))

    def _setting(self, path: Path, value: Any, key: str) -> Any:
        """Find what ``name`` or, for some keys, ``{name: parameters}`` stands for."""
        cls = SETTINGS.get(key)
        parameters: Any = {}
        if isinstance(value, dict) and cls is not None:
            value, parameters, path = self._named(path, value, key)
        if isinstance(value, str) and value not in NAMED[key]:
            value = self._find(path, value, key)
        if not parameters or cls is None:
            return value
        parameters = dict(self.mapping(path, parameters, field_names(cls)[1:], key))
        if "schedule" in parameters:
            parameters["schedule"] = self._setting((*path, "schedule"), parameters["schedule"], "schedule")
        with self.at(path):
            return cls(**self._validated(path, cls, {"name": value, **parameters}))

    def evaluation(self, path: Path, values: dict[str, Any]) -> Evaluation:
        """Make the evaluation."""
        resolved = dict(values)
        if "windows" in values:
            resolved["windows"] = self.policy((*path, "windows"), values["windows"], "windows")
        for key, example in (("metrics", "[accuracy, roc_auc]"), ("slices", "[label]")):
            if key in values and (not isinstance(values[key], list) or not values[key]):
                raise self.error((*path, key), f"{values[key]!r} is not a list such as {example}")
        if "metrics" in values:
            resolved["metrics"] = [
                self._metric((*path, "metrics", i), metric) for i, metric in enumerate(values["metrics"])
            ]
        with self.at(path):
            return Evaluation(**self._validated(path, Evaluation, resolved))

    def _metric(self, path: Path, value: Any) -> Any:
        is_top = isinstance(value, str) and value.startswith("top_") and value[4:].isdigit()
        return value if is_top else self.policy(path, value, "metrics")


def field_names(cls: Callable[..., Any]) -> list[str]:
    """Parameters of a built-in, in order; of a function that takes a list, none."""
    if not dataclasses.is_dataclass(cls):
        return []
    return [field.name for field in dataclasses.fields(cls) if field.init]


def has_policies(hint: Any) -> bool:
    """Whether a parameter of this type is a policy or a list of policies."""
    if isinstance(hint, typing.Hashable) and hint in ROLES:
        return True
    return typing.get_origin(hint) is not Callable and any(has_policies(part) for part in typing.get_args(hint))


def pydantic_model(cls: type[Any]) -> type[pydantic.BaseModel]:
    """Return what validates the parameters of a dataclass; policies among them are made before."""
    hints = typing.get_type_hints(cls)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default: Any = field.default
        if default is dataclasses.MISSING:
            default = ... if field.default_factory is dataclasses.MISSING else None
        hint = Any if field.name in _OPAQUE or has_policies(hints[field.name]) else hints[field.name]
        fields[field.name] = (hint, default)
    config = pydantic.ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    return pydantic.create_model(cls.__name__, __config__=config, **fields)


def _type_name(cls: type[Any], name: str) -> str:
    """Spell a field's type in words."""
    hint = typing.get_type_hints(cls)[name]
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    words: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    words |= {type(None): "null", pl.Expr: "an expression"}
    spelled = [words.get(option, "a function's name") for option in (options or (hint,))]
    return " or ".join(dict.fromkeys(spelled))


def _usage(cls: type[Any]) -> str:
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    return f"write {{{snake_case(cls.__name__)}: {{{', '.join(f'{name}: ...' for name in required)}}}}}"
