"""YAML text to plain values that know their lines.

Read as YAML 1.2 means it: ``on`` and ``no`` are strings, ``1e-3`` is a number, a date stays text; a key given twice is
an error instead of a silent loss.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from dynkit.errors import SpecError

__all__ = ["Document", "parse"]

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed text.

    Parameters
    ----------
    value : Any
        Dicts, lists, strings, numbers, booleans, None.
    lines : dict
        Line (from 1) of each value by its path.
    """

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def error(self, path: Path, message: str) -> SpecError:
        """Make the error for the value at `path`; for a missing one, the line of what should hold it."""
        known = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines or n == 0)
        return SpecError(message, ".".join(map(str, path)), self.lines.get(known))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise SpecError(f"key {key!r} must be text", line=key_node.start_mark.line + 1)
        if key in seen:
            raise SpecError(f"key {key!r} is given twice; keep one", line=key_node.start_mark.line + 1)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Document:
    """Parse one YAML document.

    Raises
    ------
    SpecError
        When it is not YAML, with the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None)
        lines: dict[Path, int] = {}
        _collect(node, (), lines)
        return Document(loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise SpecError(f"not valid YAML: {error.problem or error.context}", line=line) from None
    except RecursionError:
        raise SpecError("an anchor of the YAML contains itself, or its values lie too deep in each other") from None
    except SpecError:
        raise
    except (yaml.YAMLError, ValueError, AttributeError) as error:  # the latter of values that are not of their tag
        raise SpecError(f"not valid YAML: {error}".splitlines()[0]) from None
    finally:
        if loader is not None:
            loader.dispose()


def _collect(node: yaml.Node, path: Path, lines: dict[Path, int]) -> None:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise SpecError("a key must be text; for the value of a notebook's variable write $name", line=line)
            _collect(value, (*path, key.value), lines)
            lines[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _collect(value, (*path, i), lines)
