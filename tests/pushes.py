"""Pushes that are killed.

``python pushes.py ROOT`` reads lines with seconds: it forks a child that pushes the workspace, kills it after so long unless it is
done, and says how it ended and after how many seconds. Forking spares the children the seconds that imports take.
"""

import os
import signal
import sys
import time
from functools import partial

from forks import begun


def _push(root: str, started: int) -> None:
    import dynkit as dk

    lineage = dk.Workspace(root).lineage
    os.write(started, b"!")
    lineage.push()
    os._exit(0)


def main() -> None:
    import torch  # noqa: F401  # what takes long, once

    import dynkit.workspace  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        child = begun(partial(_push, sys.argv[1]))
        start_s, ended = time.monotonic(), 0
        while not ended and time.monotonic() < start_s + float(line):
            time.sleep(min(0.001, float(line)))
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), time.monotonic() - start_s, flush=True)


if __name__ == "__main__":
    main()
