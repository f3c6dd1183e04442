"""Children that are forked from a process that has imported everything, to be killed at work."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType


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


@contextmanager
def running(script: ModuleType, *arguments: object) -> Iterator[Callable[[str], str]]:
    """Run a script that forks as its lines of input say; give what writes it a line and returns its answer."""
    command = [sys.executable, str(script.__file__), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        lines_in, lines_out = process.stdin, process.stdout
        assert lines_out.readline() == "ready\n"

        def told(line: str) -> str:
            print(line, file=lines_in, flush=True)
            return lines_out.readline().strip()

        yield told
        lines_in.close()
