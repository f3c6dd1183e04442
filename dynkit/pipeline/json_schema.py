"""JSON Schema of pipelines written as YAML, from the same dataclasses that build them."""

import dataclasses
import types
import typing
from typing import Any

from dynkit.evaluation.settings import Evaluation
from dynkit.pipeline.spec import BUILT_IN, NAMED, REQUIRED, ROLES, SETTINGS, has_policies, pydantic_model
from dynkit.training.settings import OPTIMIZERS, Training

__all__ = ["schema"]

_WORDS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_REFERENCES = {
    "trigger": {"$ref": "#/properties/trigger"},
    "selection": {"$ref": "#/properties/selection"},
    **{role: {"$ref": f"#/$defs/{role}"} for role in ("criterion", "drift_metric", "metrics")},
}


def schema() -> dict[str, Any]:
    """JSON Schema of a pipeline written as YAML, for editors: ``dynkit schema > dynkit.schema.json``."""
    reference = {"type": "string", "description": "a notebook's name or package.module:name"}

    def parameters(cls: Any) -> dict[str, Any]:
        if not isinstance(cls, type):
            return {"type": "array", "items": _REFERENCES["trigger"], "minItems": 1}
        made = pydantic_model(cls)
        described = {name: _json_type(cls, name) for name in made.model_fields}
        required = [name for name, field in made.model_fields.items() if field.is_required()]
        return {
            "type": "object",
            "description": (cls.__doc__ or "").splitlines()[0],
            "properties": described,
            "required": required,
            "additionalProperties": False,
        }

    def policy(role: str) -> dict[str, Any]:
        built_in = [
            {
                "type": "object",
                "properties": {name: {"anyOf": [parameters(cls), {"type": ["string", "number", "array", "null"]}]}},
                "required": [name],
                "additionalProperties": False,
            }
            for name, cls in BUILT_IN[role].items()
        ]
        names = list(BUILT_IN[role])
        own = {"type": "object", "minProperties": 1, "maxProperties": 1, "propertyNames": {"not": {"enum": names}}}
        return {"anyOf": [{"enum": names}, *built_in, reference, own]}

    def named(key: str, known: tuple[str, ...]) -> dict[str, Any]:
        options = [{"enum": list(known)}, reference, {"type": "null"}]
        if key in SETTINGS:
            settings = parameters(SETTINGS[key])
            del settings["properties"]["name"]
            options.append({"type": "object", "additionalProperties": settings, "maxProperties": 1})
        return {"anyOf": options}

    training, judging = parameters(Training), parameters(Evaluation)
    for key, known in NAMED.items():
        training["properties"][key] = named(key, known)
    training["properties"]["optimizer"]["anyOf"].append({"type": "array", "items": named("optimizer", OPTIMIZERS)})
    training["properties"]["batch_selection"] = policy("selection")
    judging["properties"]["windows"] = policy("windows")
    judging["properties"]["slices"] = {"type": "array", "items": {"type": "string"}}
    judging["properties"]["metrics"] = {"type": "array", "items": policy("metrics"), "minItems": 1}
    properties = {
        "name": {"type": "string"},
        "dataset": {"type": "string"},
        "model": policy("model"),
        "trigger": policy("trigger"),
        "selection": policy("selection"),
        "training": training,
        "evaluation": judging,
        "seed": {"type": "integer", "minimum": 0},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dynkit pipeline",
        "type": "object",
        "properties": properties,
        "required": list(REQUIRED),
        "additionalProperties": False,
        "$defs": {role: policy(role) for role in ("criterion", "drift_metric", "metrics")},
    }


def _json_type(cls: type[Any], name: str) -> dict[str, Any]:
    """JSON Schema of one parameter; what only code can give (functions) is described as a name."""
    found = _json_hint(typing.get_type_hints(cls)[name])
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    if isinstance(default, bool | int | float | str):
        found = {**found, "default": default}
    return found


def _json_hint(hint: Any) -> dict[str, Any]:
    if hint in ROLES:
        return _REFERENCES[ROLES[hint]]
    parts, kind = typing.get_args(hint), typing.get_origin(hint)
    if kind is typing.Literal:
        return {"enum": list(parts)}
    if not has_policies(hint):
        kinds = list(dict.fromkeys(_WORDS.get(part, "string") for part in (parts or (hint,))))
        return {"type": kinds[0] if len(kinds) == 1 else kinds}
    if kind in (typing.Union, types.UnionType):
        return {"anyOf": [_json_hint(part) for part in parts]}
    return {"type": "array"}
