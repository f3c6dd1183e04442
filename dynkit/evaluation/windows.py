"""Windows: in which time intervals models are judged."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from dynkit.errors import InvalidInput
from dynkit.time import boundaries, check_duration, to_ns
from dynkit.types import RunView, Window

__all__ = ["BetweenTriggers", "Tumbling"]

_MAX_WINDOWS = 100_000


@dataclass(frozen=True)
class Tumbling:
    """Adjacent windows of equal length over the whole stream; the last one ends with the last sample.

    Parameters
    ----------
    every : str
        Duration such as ``"30d"`` or, by the calendar, ``"1mo"``.
    start : str or None
        Start of the first window; None means the first sample's time.
    """

    every: str
    start: str | None = None

    def __post_init__(self) -> None:
        check_duration(self.every, "every")
        if self.start is not None:
            to_ns(self.start)

    def __call__(self, run: RunView) -> Iterator[Window]:
        """All windows, in time order."""
        start_ns = run.start_ns if self.start is None else to_ns(self.start)
        end_ns = run.now_ns + 1
        edges = boundaries(start_ns, end_ns, self.every)
        if len(edges) > _MAX_WINDOWS:
            raise InvalidInput(f"Tumbling({self.every!r}) makes {len(edges) - 1} windows; use a longer duration")
        for low, high in pairwise(edges.tolist()):
            yield Window(low, min(high, end_ns))


@dataclass(frozen=True)
class BetweenTriggers:
    """One window from the start to the first trigger, one between each two, and one from the last to the end.

    Each is the time in which one model was in use (none in the first), so a time-weighted composite is what a
    user of the models would have seen.
    """

    def __call__(self, run: RunView) -> Iterator[Window]:
        """All windows, in time order; those without any time in them are left out."""
        edges = [run.start_ns, *(trained.last_ns + 1 for trained in run.trained), run.now_ns + 1]
        for low, high in pairwise(edges):
            if low < high:
                yield Window(low, high)
