"""A dataset changed by operations that follow from its version alone, and a plain dictionary that they change, too.

``python crashes.py ROOT`` forks a child for every line it reads, lets it change the dataset for so many seconds, and
kills it. Forking spares the children the seconds that imports take.
"""

import os
import signal
import sys
import time
from functools import partial

import numpy as np
from forks import begun

State = dict[int, tuple[float, int | None, int]]  # key: value of x, label, timestamp
FIELDS = {"x": ("float32", (4,)), "t": ("int32", (None,))}


def operation(version: int, state: State, next_key: int) -> tuple[str, tuple]:
    """What makes version + 1."""
    rng = np.random.default_rng(version)
    keys = np.array(sorted(state), dtype=np.int64)
    kind = rng.choice(["append", "append", "append", "delete", "label", "compact"]) if len(keys) > 20 else "append"
    if kind == "append":
        n = int(rng.integers(1, 40))
        labels = rng.integers(0, 5, n) if rng.random() < 0.7 else None
        return "append", (version * 1000.0 + np.arange(n), labels, rng.integers(0, 10**6, n))
    some = np.sort(rng.choice(keys, size=min(5, len(keys)), replace=False))
    if kind == "delete":
        return "delete", (some,)
    if kind == "label":
        return "label", (some, rng.integers(5, 9, len(some)))
    return "compact", ()


def applied(state: State, next_key: int, kind: str, arguments: tuple) -> tuple[State, int]:
    """What an operation makes of the dictionary."""
    state = dict(state)
    if kind == "append":
        values, labels, times = arguments
        for i, row in enumerate(np.argsort(times, kind="stable")):
            state[next_key + i] = (float(values[row]), None if labels is None else int(labels[row]), int(times[row]))
        next_key += len(values)
    elif kind == "delete":
        for key in arguments[0].tolist():
            del state[key]
    elif kind == "label":
        for key, label in zip(*(argument.tolist() for argument in arguments), strict=True):
            state[key] = (state[key][0], label, state[key][2])
    return state, next_key


def perform(dataset, kind: str, arguments: tuple) -> None:  # type: ignore[no-untyped-def]
    """The same on the dataset."""
    if kind == "append":
        values, labels, times = arguments
        columns = {"x": np.repeat(values[:, None], 4, axis=1).astype(np.float32), "timestamp": times}
        columns["t"] = [np.full(int(value) % 7, int(value), np.int32) for value in values]
        dataset.append(**columns, **({} if labels is None else {"label": labels}))
    else:
        getattr(dataset, kind)(*arguments)


def check(dataset, state: State) -> None:  # type: ignore[no-untyped-def]
    """The dataset is the dictionary."""
    keys = sorted(state, key=lambda key: (state[key][2], key))
    assert dataset.keys().tolist() == keys
    assert len(dataset) == len(keys)
    assert dataset.table()["label"].to_list() == [state[key][1] for key in keys]
    order = np.random.default_rng(0).permutation(np.array(keys, dtype=np.int64))
    samples = dataset.read(order)
    assert samples["x"][:, 3].tolist() == [state[key][0] for key in order.tolist()]
    assert samples["label"].tolist() == [-100 if state[key][1] is None else state[key][1] for key in order.tolist()]
    lengths = samples["t"].offsets().diff().tolist()
    assert lengths == [int(state[key][0]) % 7 for key in order.tolist()]
    wanted = [int(state[key][0]) for key in order.tolist() for _ in range(int(state[key][0]) % 7)]
    assert samples["t"].values().tolist() == wanted


def _change(root: str, started: int) -> None:
    import dynkit as dk

    dataset = dk.Workspace(root).dataset("d")
    dataset.table()
    os.write(started, b"!")
    while True:
        opened = dataset.open()
        state = dict.fromkeys(opened.keys().tolist(), (0.0, None, 0))
        perform(dataset, *operation(opened.number, state, opened.manifest["next_key"]))


def main() -> None:
    import dynkit.data  # noqa: F401  # what takes long, once

    print("ready", flush=True)
    for line in sys.stdin:
        child = begun(partial(_change, sys.argv[1]))
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "exit", flush=True)


if __name__ == "__main__":
    main()
