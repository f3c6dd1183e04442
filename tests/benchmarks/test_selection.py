"""Selections, side by side with the loops that people write and the tools that they use.

apricot is run in an environment of its own: install apricot-select and scikit-learn there, and name its Python in the
variable APRICOT_PYTHON.
"""

import os
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from racing import raced

from dynkit import selection, testing
from dynkit.selection import greedy


def show(title: str, seconds: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, some in seconds.items():
        print(f"  {name:<52}{some:>10.3f} s   {some / seconds['dynkit']:>8.1f}x")


def k_center_loop(x: torch.Tensor, n: int) -> list[int]:
    """One product for each centre."""
    norms, chosen = x.square().sum(1), [0]
    nearest = torch.full((len(x),), torch.inf)
    while len(chosen) < n:
        square = norms + norms[chosen[-1]] - 2 * (x @ x[chosen[-1]])
        torch.minimum(nearest, square, out=nearest)
        chosen.append(int(nearest.argmax()))
    return chosen


@pytest.mark.parametrize("clusters", [1, 100])
def test_k_center_of_a_million(clusters: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(clusters, 64, generator=generator)
    x = torch.randn(1_000_000, 64, generator=generator) + centres[torch.arange(1_000_000) % clusters]
    once = raced({"dynkit": lambda: greedy.farthest_first(x, 1000, 0)}, 1)
    loop = raced({"few": lambda: k_center_loop(x, 2), "more": lambda: k_center_loop(x, 42)}, 3)
    of_all = loop["few"] + (loop["more"] - loop["few"]) * 998 / 40
    title = f"1 000 centres of 1 000 000 x 64, {clusters} clusters (the loop from 42 centres)"
    show(title, {"dynkit": once["dynkit"], "one product for each centre": of_all})


def facility_loop(x: np.ndarray[Any, Any], n: int) -> list[int]:
    """All similarities, and all gains for each choice."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = 0.5 + 0.5 * unit @ unit.T
    nearest, chosen = np.zeros(len(x), x.dtype), list[int]()
    for _ in range(n):
        gains = np.maximum(s - nearest, 0).sum(1)
        chosen.append(int(gains.argmax()))
        nearest = np.maximum(nearest, s[chosen[-1]])
    return chosen


def test_facility_location() -> None:
    x = np.random.default_rng(0).standard_normal((5_000, 10), np.float32)
    vectors = greedy.cosine_vectors(torch.from_numpy(x))

    def ours(optimizer: str) -> torch.Tensor:
        function = greedy.Facilities.by_product(vectors)
        return greedy.maximize(function, 100, optimizer, torch.Generator().manual_seed(0))

    peers: dict[str, Callable[[], Any]] = {
        "dynkit": lambda: ours("lazy"),
        "dynkit, stochastic": lambda: ours("stochastic"),
        "a loop over all similarities": lambda: facility_loop(x, 100),
    }
    show("facility location, 100 of 5 000 x 10", raced(peers, 3))


APRICOT = """
import time
import numpy as np
from apricot import FacilityLocationSelection
x = np.random.default_rng(0).standard_normal((5_000, 10), np.float32)
def chosen(rows, n):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = 0.5 + 0.5 * unit @ unit.T
    return FacilityLocationSelection(n, metric="precomputed", optimizer="lazy").fit(similarity).ranking
chosen(x[:200], 5)
begin = time.perf_counter()
ranking = chosen(x, 100)
print(time.perf_counter() - begin, *ranking)
"""


@pytest.mark.skipif("APRICOT_PYTHON" not in os.environ, reason="needs an environment with apricot")
def test_facility_location_against_apricot() -> None:
    x = np.random.default_rng(0).standard_normal((5_000, 10), np.float32)

    def ours() -> torch.Tensor:
        function = greedy.Facilities.by_product(greedy.cosine_vectors(torch.from_numpy(x)))
        return greedy.maximize(function, 100, "lazy", torch.Generator())

    seconds = raced({"dynkit": ours}, 3)
    done = subprocess.run([os.environ["APRICOT_PYTHON"], "-c", APRICOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peer, *ranking = done.stdout.split()
    same = sum(int(a) == b for a, b in zip(ranking, ours().tolist(), strict=True))
    show(f"facility location, 100 of 5 000 x 10; {same} choices alike", {**seconds, "apricot, lazy": float(peer)})


def test_coresets_of_many_gradients() -> None:
    g = torch.randn(20_000, 10, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    for policy in (
        selection.Craig(n=200, balance=False),
        selection.Craig(n=200, balance=False, optimizer="stochastic"),
        selection.FacilityLocation(n=200),
        selection.GraphCut(n=200),
        selection.LogDeterminant(n=200),
        selection.GradMatch(n=200),
    ):
        show(f"{policy}, of 20 000 x 10", raced({"dynkit": lambda policy=policy: policy._choose(g, 200, rng)}, 1))


def test_draws_by_loss() -> None:
    scores = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    p = (scores.double() / scores.double().sum()).numpy()
    policy, rng, ours = selection.Loss(fraction=0.5), np.random.default_rng(0), torch.Generator().manual_seed(0)
    peers = {
        "dynkit": lambda: policy.choose(scores, ours),
        "numpy choice with p": lambda: rng.choice(len(p), 500_000, replace=False, p=p),
    }
    show("half of 1 000 000 samples, by their losses", raced(peers, 3))


def test_selections_of_a_large_pool() -> None:
    rows = 3_000_000
    rng = np.random.default_rng(0)
    pool = pl.DataFrame({"key": np.arange(rows), "label": rng.integers(0, 100, rows)})
    view = testing.StreamView(past=pool, samples_since_trigger=rows // 10)
    for policy in (
        selection.Random(n=100_000),
        selection.Reservoir(n=100_000),
        selection.RandomWithoutReuse(n=100_000),
        selection.Freshness(n=100_000),
        selection.ClassBalanced(n=100_000),
        selection.Where("label < 10", then=selection.Random(n=100_000)),
        selection.Replay(old=selection.Random(n=100_000)),
    ):
        seconds = raced({"dynkit": lambda policy=policy: policy(pool, view, np.random.default_rng(0))}, 3)
        show(f"{policy}, of {rows:,} samples", seconds)
