"""HTML of results: plain tags with inline styles, which survive the sanitiser of an untrusted notebook.

Colours come from JupyterLab's theme where there is one, and stay readable in light and dark elsewhere.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["card", "duration", "table"]

_STATUS_COLOUR = {
    "running": "#0072B2",
    "paused": "#E69F00",
    "finished": "#009E73",
    "failed": "#D55E00",
    "cancelled": "#808080",
    "interrupted": "#CC79A7",
}
_MUTED = "color:var(--jp-ui-font-color1,inherit);opacity:0.75"


def duration(seconds: float | None) -> str:
    """Spell a duration the way a clock does.

    >>> duration(5.2), duration(75), duration(7300), duration(None)
    ('5 s', '1:15 min', '2:01 h', '')
    """
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def card(title: str, status: str, progress: Mapping[str, Any], facts: Sequence[str], body: str = "") -> str:
    """Draw a run: name and status, a progress bar while it is going, facts, and what else there is to show."""
    colour = _STATUS_COLOUR.get(status, "#808080")
    badge = (
        f'<span style="border:1px solid {colour};border-left:8px solid {colour};border-radius:3px;padding:0 6px">'
        f"{html.escape(status)}</span>"
    )
    bar = ""
    if status in ("running", "paused"):
        fraction = progress["fraction"]
        bar = (
            f'<div><progress max="1" value="{fraction:.3f}" style="width:24em" aria-label="progress"></progress> '
            f"{fraction:.0%} {html.escape(_doing(progress))}</div>"
        )
    lines = "".join(f"<div>{html.escape(fact)}</div>" for fact in facts)
    return (
        f'<div style="font-family:var(--jp-ui-font-family,sans-serif);font-size:13px;line-height:1.5">'
        f"<div><b>{html.escape(title)}</b> {badge}</div>{bar}"
        f'<div style="{_MUTED}">{lines}</div>{body}</div>'
    )


def _doing(progress: Mapping[str, Any]) -> str:
    """Say in a few words what a run is at."""
    phase = str(progress["phase"])
    if phase == "training":
        phase = f"training model {progress['trigger'] + 1}"
    elif phase == "evaluating":
        phase = f"evaluating window {progress['window']} of {progress['windows']}"
    remaining = progress.get("eta_s")
    return phase + (f", about {duration(remaining)} left" if remaining is not None else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[str] = ()) -> str:
    """Draw a table; columns named in `numbers` are aligned right."""
    align = ["right" if column in numbers else "left" for column in columns]
    cell = '<{0} style="text-align:{1};padding:2px 10px">{2}</{0}>'
    head = "".join(cell.format("th", a, html.escape(column)) for a, column in zip(align, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(cell.format("td", a, html.escape(str(v))) for a, v in zip(align, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<table style="font-size:12px"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
