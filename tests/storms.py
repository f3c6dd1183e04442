"""Processes that put, remove, collect and repack models until they are killed.

``python storms.py ROOT`` reads lines ``PROCESSES SECONDS`` (and ``removes``): it forks so many children, lets them work for so long, kills
them and says how they ended. Forking spares the children the seconds that imports take.
"""

import contextlib
import os
import signal
import sys
import time
from functools import partial

import numpy as np
from forks import begun


def work(root: str, removes: bool, started: int) -> None:
    """Change the store at random."""
    import torch

    import dynkit as dk
    from dynkit.errors import NotFound

    torch.set_num_threads(1)
    rng = np.random.default_rng()
    store = dk.Workspace(root).models
    models = list(store)
    os.write(started, b"!")
    while True:
        models = list(store)
        kind = rng.choice(["put", "child", "child", "child", "same", "remove", "gc", "repack"])
        with contextlib.suppress(NotFound):  # another process has removed it
            if kind == "put" or not models:
                store.put({f"t{i}": torch.from_numpy(rng.standard_normal((40, 40))).float() for i in range(4)})
            elif kind in ("child", "same"):
                parent = models[rng.integers(len(models))]
                state = store.load(parent)
                name = list(state)[rng.integers(len(state))]
                state[name] = state[name] + (1e-4 if kind == "child" else 0.0) * torch.randn(state[name].shape)
                store.put(state, [parent])
            elif kind == "gc":
                store.gc(garbage=0)
            elif kind == "repack" and len(models) < 40:
                store.repack()
            elif kind == "remove" and removes and len(models) > 4:
                store.remove(models[rng.integers(len(models))])


def main() -> None:
    import torch  # noqa: F401  # what takes long, once

    import dynkit.models
    import dynkit.workspace  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        count, seconds, *removes = line.split()
        children = [begun(partial(work, sys.argv[1], bool(removes))) for _ in range(int(count))]
        time.sleep(float(seconds))
        ends = []
        for child in children:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            ends.append(str(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else "exit")
        print(*ends, flush=True)


if __name__ == "__main__":
    main()
