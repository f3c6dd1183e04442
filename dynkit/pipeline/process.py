"""The process that owns a run, and whether it is still there."""

import socket
import time
from typing import Any

import psutil

__all__ = ["ACTIVE", "identity", "is_alive", "true_status"]

ACTIVE = ("running", "paused")
_FRESH_S = 3.0
_SILENCE_S = 60.0  # without a heartbeat, an owner on another host counts as gone


def identity(pid: int | None = None) -> dict[str, Any]:
    """Columns that identify a process in the catalog: host, pid and start time (a pid is used again)."""
    process = psutil.Process(pid)
    return {"host": socket.gethostname(), "pid": process.pid, "process_started": process.create_time()}


def is_alive(row: Any) -> bool:
    """Whether the process of a row of `runs` exists."""
    silent_s = (time.time_ns() - row.heartbeat_ns) / 1e9
    if row.host != socket.gethostname():
        return bool(silent_s < _SILENCE_S)
    try:
        process = psutil.Process(row.pid)
        # A correction of the clock moves start times, but not the heart of a process that is there.
        same = abs(process.create_time() - row.process_started) < 1.0 or abs(silent_s) < _FRESH_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def true_status(row: Any) -> str:
    """Status of a row of `runs`; one whose owner is gone without a word is ``"interrupted"``."""
    return "interrupted" if row.status in ACTIVE and not is_alive(row) else str(row.status)
