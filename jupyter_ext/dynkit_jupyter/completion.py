"""Completion inside ``%%pipeline`` cells, through IPython's matcher API: any front end that asks the kernel has it.

The cursor's place in the YAML is found from indentation and open braces alone, because what is being typed is not
valid YAML yet. What fits there comes from the same tables that validate the text.
"""

import re
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.getipython import get_ipython

from dynkit.errors import DynkitError
from dynkit.evaluation.settings import Evaluation
from dynkit.pipeline.spec import BUILT_IN, KEYS, NAMED, field_names
from dynkit.training.settings import Training
from dynkit_jupyter.magics import pipeline_parser, workspace_of

__all__ = ["candidates", "matcher", "place"]

_MAGIC = "%%pipeline"
_TOKEN = re.compile(r"[\w$.:-]*$")
_KEY = re.compile(r"^(\s*)(?:- )?([\w.:-]+):(\s|$)")


def _complete(context: CompletionContext) -> SimpleMatcherResult:
    """Complete options on the first line of a ``%%pipeline`` cell, keys and values below it."""
    if not context.full_text.startswith(_MAGIC):
        return {"completions": []}
    lines = context.full_text.split("\n")[: context.cursor_line + 1]
    lines[-1] = lines[-1][: context.cursor_position]
    token = _match(_TOKEN, lines[-1])
    shell = get_ipython()
    found = candidates(lines, token, shell.user_ns if shell is not None else {})
    completions = [SimpleCompletion(text, type="dynkit") for text in found if text.startswith(token)]
    return {"completions": completions, "suppress": True, "matched_fragment": token}


matcher = context_matcher(identifier="dynkit")(_complete)


def candidates(lines: list[str], token: str, namespace: dict[str, Any]) -> list[str]:
    """List what may stand at the end of `lines`, the last of which ends with `token`."""
    if len(lines) == 1:
        options = pipeline_parser()._option_string_actions
        return sorted(option for option in options if option.startswith("--"))
    if token.startswith("$"):
        return sorted(f"${name}" for name in namespace if not name.startswith("_"))
    path, wants_key = place(lines[1:], token)
    own = sorted(name for name, value in namespace.items() if callable(value) and not name.startswith("_"))
    if wants_key and path and path[0] in ("trigger", "selection", "evaluation") and len(path) >= 2:
        role = path[1] if path[0] == "evaluation" else path[0]
        depth = 3 if path[0] == "evaluation" else 2
        if len(path) == depth and path[-1] in BUILT_IN.get(role, {}):
            return [f"{name}:" for name in field_names(BUILT_IN[role][path[-1]])]
    match path:
        case ():
            return [f"{key}:" for key in KEYS]
        case ("training",):
            return [f"{name}:" for name in field_names(Training)]
        case ("evaluation",):
            return [f"{name}:" for name in field_names(Evaluation)]
        case ("training", key) if key in NAMED:
            return [*NAMED[key], *own]
        case ("dataset",):
            try:
                return workspace_of(namespace).datasets()
            except DynkitError:
                return []
        case ("model",):
            return own
        case ("trigger" | "selection" as role,) | ("evaluation", "windows" | "metrics" as role):
            return [*(f"{name}:" if wants_key else name for name in BUILT_IN[role]), *own]
    return []


def place(lines: list[str], token: str) -> tuple[tuple[str, ...], bool]:
    """Find the path of the mapping or value at the end of `lines`, and whether a key is expected there."""
    *before, last = lines
    last = last[: len(last) - len(token)]
    opened = _KEY.match(last)
    indent = len(last) - len(last.lstrip()) if opened is None else len(opened[1])
    path: list[str] = []
    for line in reversed(before):
        parent = _KEY.match(line)
        if parent and len(parent[1]) < indent:
            path.insert(0, parent[2])
            indent = len(parent[1])
    wants_key = True
    if opened is not None:
        path.append(opened[2])
        last, wants_key = last[opened.end() :], False
    opened_at: list[tuple[str, int]] = []  # open brackets, and how long the path was there
    for mark in re.findall(r"[\w.:-]+:\s|[{}\[\],]", last):
        if mark in "{[":
            opened_at.append((mark, len(path)))
            wants_key = mark == "{"
        elif mark in "}]":
            path = path[: opened_at.pop()[1]] if opened_at else path
        elif mark == "," and opened_at:
            path = path[: opened_at[-1][1]]
            wants_key = opened_at[-1][0] == "{"
        elif mark != ",":
            path.append(mark.strip()[:-1])
            wants_key = False
    return tuple(path), wants_key and "- " not in last


def _match(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[0] if found else ""
