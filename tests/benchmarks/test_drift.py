"""Drift tests, side by side with the loops that people write and the tools that they use.

A peer that is not installed is left out. Evidently needs versions that dynkit's own tools refuse: install it in an
environment of its own and name its Python in the variable EVIDENTLY_PYTHON.
"""

import os
import subprocess

import numpy as np
import polars as pl
import pytest
import torch
from racing import raced
from scipy import stats

import dynkit as dk


def show(title: str, seconds: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, some in seconds.items():
        print(f"  {name:<44}{some:>10.3f} s   {some / seconds['dynkit']:>8.1f}x")


def test_mmd_with_permutations() -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(5_000, 512)).astype(np.float32)) for _ in range(2))

    def loop(permutations: int) -> float:
        """All pairs once, then indexed anew for each permutation."""
        pooled = torch.cat([x, y])
        square = torch.cdist(pooled, pooled).square()
        kernel = torch.exp(-square / square[:2000, :2000].median()).fill_diagonal_(0)
        generator = torch.Generator().manual_seed(0)

        def mmd(order: torch.Tensor) -> float:
            k = kernel[order][:, order]
            n, m = len(x), len(y)
            within = k[:n, :n].sum() / (n * (n - 1)) + k[n:, n:].sum() / (m * (m - 1))
            return float(within - 2 * k[:n, n:].mean())

        score = mmd(torch.arange(len(pooled)))
        null = [mmd(torch.randperm(len(pooled), generator=generator)) for _ in range(permutations)]
        return sum(value >= score for value in null) / 200

    few = raced({"dynkit": lambda: dk.drift.test(x, y), "none": lambda: loop(0), "two": lambda: loop(2)}, 3)
    of_all = few["none"] + (few["two"] - few["none"]) * 100
    title = "MMD of 2 x 5 000 x 512, 200 permutations (the loop from two)"
    show(title, {"dynkit": few["dynkit"], "a loop over permutations": of_all})


def test_mmd_of_a_million() -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.standard_normal((1_000_000, 64), np.float32)) for _ in range(2))
    show(
        "MMD of 2 x 1 000 000 x 64, random features, 200 permutations",
        raced({"dynkit": lambda: dk.drift.test(x, y)}, 3),
    )


@pytest.mark.parametrize("rows", [100_000, 3_000_000])
def test_all_columns(rows: int) -> None:
    rng = np.random.default_rng(0)
    n = 100 if rows == 3_000_000 else 50
    old, new = (pl.DataFrame({f"c{i}": rng.standard_normal(rows, np.float32) for i in range(n)}) for _ in range(2))
    peers = {"dynkit": lambda: dk.drift.columns(old, new)}
    if rows == 100_000:
        peers["scipy.stats.ks_2samp, column by column"] = lambda: [
            stats.ks_2samp(old[name].to_numpy(), new[name].to_numpy(), method="asymp") for name in old.columns
        ]
    show(f"{n} columns of {rows:,} rows against as many", raced(peers, 3 if rows == 100_000 else 1))


EVIDENTLY = """
import sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np, pandas as pd
from evidently import Report
from evidently.presets import DataDriftPreset
rows, columns = int(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
old, new = (pd.DataFrame({f"c{i}": rng.standard_normal(rows) for i in range(columns)}) for _ in range(2))
begin = time.perf_counter()
Report([DataDriftPreset()]).run(new, old)
print(time.perf_counter() - begin)
"""


@pytest.mark.skipif("EVIDENTLY_PYTHON" not in os.environ, reason="needs an environment with Evidently")
def test_all_columns_against_evidently() -> None:
    python = os.environ["EVIDENTLY_PYTHON"]
    rng = np.random.default_rng(0)
    for rows, n in ((100_000, 20), (300_000, 20)):
        old, new = (pl.DataFrame({f"c{i}": rng.standard_normal(rows) for i in range(n)}) for _ in range(2))
        seconds = raced({"dynkit": lambda old=old, new=new: dk.drift.columns(old, new)}, 3)
        environment = {**os.environ, "DO_NOT_TRACK": "1"}
        done = subprocess.run(
            [python, "-c", EVIDENTLY, str(rows), str(n)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        show(f"{n} columns of {rows:,} rows", {**seconds, "Evidently, DataDriftPreset": float(done.stdout.split()[-1])})
