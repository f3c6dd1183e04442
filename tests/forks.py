"""Children that are forked from a process that has imported everything, to be killed at work."""

import os
import traceback
from collections.abc import Callable


def begun(work: Callable[[int], None]) -> int:
    """Fork a child; return its number once it has written to the descriptor that `work` is given."""
    waiting, started = os.pipe()
    child = os.fork()
    if not child:
        try:
            work(started)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(started)
    os.read(waiting, 1)
    os.close(waiting)
    return child
