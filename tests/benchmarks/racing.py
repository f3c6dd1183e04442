"""Time contestants in turn."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROUNDS = 5
BUSY_S = 0.05


def raced(contestants: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, interleaved; each round begins with another one.

    Before each the process is busy for a moment, as one that trains is: for some milliseconds after a sleep, a system
    may run all threads of a process on one core, whatever the contestant before it slept for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()  # warms caches of all kinds
    names = list(contestants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            busy = time.perf_counter() + BUSY_S
            while time.perf_counter() < busy:
                pass
            begin = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(some)) for name, some in seconds.items()}


def in_own_environment(variable: str, script: str, *arguments: object) -> dict[str, Any]:
    """What `subprocess` needs to run a script by the Python that an environment variable names."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"DO_NOT_TRACK": "1"}
    return {"args": [os.environ[variable], "-c", script, *map(str, arguments)], "env": environment, "text": True}
