"""Drift tests, side by side with the loops that people write and the tools that they use.

A peer that is not installed is left out. Evidently (with pandas below 3) and alibi-detect need versions that dynkit's own
tools refuse: install each in an environment of its own and name its Python in EVIDENTLY_PYTHON and ALIBI_PYTHON.
"""

import os
import subprocess

import numpy as np
import polars as pl
import pytest
import torch
from racing import in_own_environment, raced
from scipy import stats

import dynkit as dk

PATIENCE_S = 600  # with a peer


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


def test_a_reference_prepared_once() -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(n, 64)).astype(np.float32)) for n in (5_000, 1_000))
    for metric in ("mmd", "energy", "psi", "coverage"):
        reference, plain = dk.drift.prepared(metric, x), dk.drift.resolve(metric)
        reference.score(y)
        show(
            f"{metric} of 1 000 x 64 against a reference of 5 000",
            raced({"dynkit": lambda kept=reference: kept.score(y), "both sides anew": lambda plain=plain: plain(x, y)}),
        )


@pytest.mark.parametrize("name", ["KSWIN", "ADWIN", "PageHinkley", "DDM", "EDDM", "HDDM_A", "HDDM_W"])
def test_stream_detectors(name: str) -> None:
    river = pytest.importorskip("river.drift")
    binary = pytest.importorskip("river.drift.binary")
    rng = np.random.default_rng(0)
    ours, theirs = getattr(dk.drift, name), getattr(river, name, None) or getattr(binary, name.replace("_", ""))
    of_errors = hasattr(binary, theirs.__name__)
    values = (rng.random((10_000, 100)) < 0.2).astype(float) if of_errors else rng.normal(size=(10_000, 100))
    one = values[:, 0].copy()

    def by_river() -> None:
        detector = theirs(seed=0) if name == "KSWIN" else theirs()
        for value in one.tolist():
            detector.update(value)

    seconds = raced({"dynkit": lambda: ours().update(one), "river": by_river}, 1 if name == "KSWIN" else 5)
    show(f"{name}, 10 000 values of one stream", seconds)
    hundred = raced({"dynkit": lambda: ours().update(values)}, 1)["dynkit"]
    show(f"{name}, of 100 streams", {"dynkit": hundred, "river, extrapolated from one": 100 * seconds["river"]})


ALIBI = """
import sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
from alibi_detect.cd import MMDDrift
rows, columns, permutations = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
x, y = (rng.normal(size=(rows, columns)).astype(np.float32) for _ in range(2))
seconds = []
for n in (1, permutations):
    detector = MMDDrift(x, backend="pytorch", n_permutations=n, device="cpu")
    begin = time.perf_counter()
    detector.predict(y)
    seconds.append(time.perf_counter() - begin)
print(seconds[0] + (seconds[1] - seconds[0]) * 199 / (permutations - 1))
"""


@pytest.mark.timeout(0)
@pytest.mark.skipif("ALIBI_PYTHON" not in os.environ, reason="needs an environment with alibi-detect")
def test_mmd_with_permutations_against_alibi() -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(5_000, 512)).astype(np.float32)) for _ in range(2))
    seconds = raced({"dynkit": lambda: dk.drift.test(x, y)}, 3)
    peer = _of_peer("ALIBI_PYTHON", ALIBI, 5_000, 512, 5)  # 5 of 200 permutations are run
    show("MMD of 2 x 5 000 x 512, 200 permutations (alibi-detect from 5)", {**seconds, "alibi-detect": peer})


def _of_peer(variable: str, script: str, *arguments: int) -> float:
    """Seconds that a script prints in a peer's own environment."""
    own = in_own_environment(variable, script, *arguments)
    done = subprocess.run(**own, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


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


@pytest.mark.timeout(0)
@pytest.mark.skipif("EVIDENTLY_PYTHON" not in os.environ, reason="needs an environment with Evidently")
def test_all_columns_against_evidently() -> None:
    rng = np.random.default_rng(0)
    for rows, n in ((100_000, 20), (100_000, 100), (300_000, 100), (1_000_000, 100), (3_000_000, 100)):
        old, new = (pl.DataFrame({f"c{i}": rng.standard_normal(rows) for i in range(n)}) for _ in range(2))
        seconds = raced({"dynkit": lambda old=old, new=new: dk.drift.columns(old, new)}, 3)
        try:
            peer = _of_peer("EVIDENTLY_PYTHON", EVIDENTLY, rows, n)
        except subprocess.TimeoutExpired:  # what is larger is extrapolated from the last size
            print(f"\n{n} columns of {rows:,} rows: dynkit {seconds['dynkit']:.3f} s, Evidently above {PATIENCE_S} s")
            break
        show(f"{n} columns of {rows:,} rows", {**seconds, "Evidently, DataDriftPreset": peer})
