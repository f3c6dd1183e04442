"""How results look: a headline, facts and a table, as text in terminals and static HTML in notebooks."""

import datetime as dt
import html as escaping
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from dynkit import html
from dynkit.data.sources import progress_bar

__all__ = ["Shown", "bytes_text", "cell", "instant", "short", "watched"]

_MOST_ROWS = 60
T = TypeVar("T")


class Shown:
    """Gives a result its text and HTML from `parts`."""

    def parts(self) -> "tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]":
        """Headline, facts, column names and rows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, facts, columns, rows = self.parts()
        lines = [title, *(f"  {fact}" for fact in facts)]
        if rows:
            cells = [[cell(value) for value in row] for row in rows[:_MOST_ROWS]]
            widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
            table = [list(columns), *cells]
            lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, *_more(rows)])

    def _repr_html_(self) -> str:
        title, facts, columns, rows = self.parts()
        lines = "".join(f"<div>{escaping.escape(fact)}</div>" for fact in [*facts, *_more(rows)])
        cells = [[cell(value) for value in row] for row in rows[:_MOST_ROWS]]
        numbers = [
            name for i, name in enumerate(columns) if any(isinstance(row[i], int | float) for row in rows[:_MOST_ROWS])
        ]
        table = html.table(columns, cells, numbers=numbers) if rows else ""
        return f"<div><b>{escaping.escape(title)}</b>{lines}{table}</div>"


def _more(rows: Sequence[Any]) -> list[str]:
    return [f"... and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else []


def watched(items: Sequence[T], what: str) -> Iterator[T]:
    """Go through items with a bar and the time left, where somebody looks."""
    with progress_bar(what, len(items), None) as done:
        for item in items:
            yield item
            done(1)


def cell(value: Any) -> str:
    """Spell one value of a table.

    >>> cell(None), cell(True), cell(0.123456), cell(12000), cell("x")
    ('', 'yes', '0.1235', '12,000', 'x')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def short(model: str | None) -> str:
    """Return the beginning of an identity, as people write it."""
    return "" if model is None else model[:12]


def instant(ns: int) -> str:
    """Spell an instant.

    >>> instant(0)
    '1970-01-01 00:00:00'
    """
    return f"{dt.datetime.fromtimestamp(ns // 10**9, dt.UTC):%Y-%m-%d %H:%M:%S}"


def bytes_text(n: int) -> str:
    """Spell a size.

    >>> bytes_text(900), bytes_text(25_000_000)
    ('900 B', '25.0 MB')
    """
    size = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
