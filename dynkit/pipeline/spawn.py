"""Start the worker process of a run, and note how it ended if it could not say so itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import sqlalchemy as sa

from dynkit import catalog as tables
from dynkit.catalog import Catalog
from dynkit.errors import StorageError
from dynkit.pipeline.owner import insert_event
from dynkit.pipeline.process import ACTIVE, identity

__all__ = ["log_tail", "spawn"]

# A process that waits for its threads by spinning starves another on the same cores: two trainings of two threads on
# two cores took a hundred times as long. After a few microseconds they sleep instead (read by GNU OpenMP).
_SHARING = {"GOMP_SPINCOUNT": "10000"}
# Every step of a training asks for the memory that the step before gave back. glibc returns much of it to the system in
# between, and pays for each page again: a tenth to a fifth of the time of a step on the CPU. It is kept instead.
_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(4 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_LOG_TAIL_LINES = 30


def spawn(catalog: Catalog, run: str) -> threading.Thread:
    """Start the worker of a run whose row says that this process owns it.

    Returns
    -------
    threading.Thread
        Waits for the worker; once it has ended, so has the run's row.

    Raises
    ------
    StorageError
        When it cannot be started; the run has failed then.
    """
    folder = catalog.root / "runs" / run
    try:
        with (folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dynkit.pipeline.worker", str(catalog.root), run],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the notebook's interrupt and restart are not for the worker
                env={**_SHARING, **_MEMORY, **os.environ, "PYTHONUNBUFFERED": "1"},
            )
    except OSError as error:
        message = f"the worker process cannot be started: {error}"
        _note_end(catalog, run, os.getpid(), "failed", message, message)
        raise StorageError(message) from error
    try:
        owner = identity(process.pid)
    except psutil.NoSuchProcess:  # it ended at once; the thread says how
        owner = {"pid": process.pid}
    with catalog.write() as connection:
        connection.execute(sa.update(tables.runs).where(tables.runs.c.id == run).values(**owner))
    thread = threading.Thread(target=_await_end, args=(catalog, run, process), name=f"dynkit-{run}", daemon=True)
    thread.start()
    return thread


def _await_end(catalog: Catalog, run: str, process: "subprocess.Popen[bytes]") -> None:
    code = process.wait()
    if code >= 0:
        status, what = "failed", f"the worker process exited with code {code}"
    elif -code in _CRASHES:
        status, what = "failed", f"the worker process crashed with signal {-code}"
    else:
        status, what = "interrupted", f"the worker process was ended by signal {-code}"
    hint = "run.resume() continues it (signal 9 can mean: out of memory). " if status == "interrupted" else ""
    tail = log_tail(catalog.root / "runs" / run)
    _note_end(catalog, run, process.pid, status, what, f"{what}; {hint}its log ends:\n{tail}")


def _note_end(catalog: Catalog, run: str, pid: int, status: str, reason: str, error: str) -> None:
    """Commit the end of a run that `pid` owned and did not end itself."""
    runs, events = tables.runs, tables.events
    with catalog.write() as connection:
        owned = connection.execute(sa.select(runs.c.status, runs.c.pid).where(runs.c.id == run)).one()
        if owned.status not in ACTIVE or owned.pid != pid:
            return
        newest = sa.select(events.c.kind).where(events.c.run == run).order_by(events.c.seq.desc()).limit(1)
        last = connection.scalar(newest)
        after = f" after '{last}'" if last else ""
        values = {"status": status, "error": error.replace(reason, reason + after, 1), "request": None}
        ended = sa.update(runs).where(runs.c.id == run).values(**values, ended_ns=time.time_ns())
        connection.execute(ended)
        insert_event(connection, run, status, {"error": reason + after})


def log_tail(folder: Path) -> str:
    """Return the last lines of what a run's worker printed and logged."""
    try:
        lines = (folder / "worker.log").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-_LOG_TAIL_LINES:])
