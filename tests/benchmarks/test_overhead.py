"""What the loop costs: the quickstart's monthly pipeline against the same work written by hand on tensors in RAM.

``make bench`` prints the table. The peer does the same trainings (same seeds, batches and optimizer) and the same
evaluations (same windows and metrics); it keeps no catalog, stores no model, records no event and cannot be resumed.
Both run in this process, in turn; ratios are of medians.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import binary_auroc

import dynkit as dk
from dynkit.time import boundaries, to_ns

ROUNDS = 5
NOTEBOOK = Path(__file__).parents[2] / "notebooks/01_quickstart.ipynb"
EPOCHS, BATCH, LR, SEED, START = 2, 512, 2e-3, 1, "2013-01-01T05:00"


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Variables of the quickstart's cells up to the ingest."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNKIT_WORKSPACE", str(tmp_path_factory.mktemp("ws")))
        cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
        for source in cells:
            if source.startswith("%%pipeline"):
                break
            exec(source.replace("%load_ext dynkit", ""), names)
    return names


def by_hand(
    x_NF: torch.Tensor, y_N: torch.Tensor, time_ns: np.ndarray, make_model: Any, *, fused: bool | None
) -> list[float]:
    """Monthly retraining on all samples so far, all models scored in all months."""
    edges = boundaries(to_ns(START), int(time_ns[-1]) + 1, "1mo")
    ends = np.searchsorted(time_ns, edges[1:-1])
    models = []
    for index, end in enumerate(ends.tolist()):
        seed = int(np.random.SeedSequence([SEED, index]).generate_state(1)[0])
        torch.manual_seed(seed)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=fused)
        model.train()
        for epoch in range(EPOCHS):
            order = torch.randperm(end, generator=torch.Generator().manual_seed(seed + epoch))
            for rows in order.split(BATCH):
                if len(rows) == 1:  # the model's batch norm refuses a single sample
                    continue
                loss = functional.cross_entropy(model(x_NF[rows]), y_N[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        models.append(model.eval())
    scores = []
    cuts = np.searchsorted(time_ns, edges).tolist()
    with torch.inference_mode():
        for low, high in pairwise(cuts):
            for model in models:
                outputs = torch.cat([model(part) for part in x_NF[low:high].split(8192)])
                accuracy = MulticlassAccuracy(num_classes=2, average="micro")
                scores.append(float(binary_auroc(outputs.double().softmax(1)[:, 1], y_N[low:high])))
                scores.append(float(accuracy(outputs.argmax(1), y_N[low:high])))
    return scores


@pytest.mark.parametrize("threads", [1, 2])
def test_monthly_replay_against_a_hand_written_loop(flights: dict[str, Any], threads: int) -> None:
    torch.set_num_threads(threads)
    stream, make_model = flights["stream"], flights["make_model"]
    pipeline = dk.Pipeline(
        name="monthly",
        dataset=stream,
        model=make_model,
        trigger=dk.triggers.Time("1mo", start=START),
        selection=dk.selection.All(),
        training=dk.Training(epochs=EPOCHS, batch_size=BATCH, lr=LR, device="cpu"),
        evaluation=dk.Evaluation(windows=dk.windows.Tumbling("1mo", start=START), metrics=["roc_auc", "accuracy"]),
        seed=SEED,
    )
    samples = stream.read(stream.table()["key"])
    x_NF, y_N = samples["x"], samples["label"].long()
    time_ns = stream.table()["timestamp"].to_physical().to_numpy()
    seconds: dict[str, list[float]] = {"dynkit": [], "by hand": [], "by hand, fused": []}

    def timed(name: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - began)
        return result

    for _ in range(ROUNDS + 1):  # the first warms up
        *_, last = timed("dynkit", lambda: list(pipeline.replay()))
        timed("by hand", lambda: by_hand(x_NF, y_N, time_ns, make_model, fused=None))
        scores = timed("by hand, fused", lambda: by_hand(x_NF, y_N, time_ns, make_model, fused=True))
    run = dk.Workspace(stream.catalog.root).run(last.run)
    matrix = run.matrix().sort("window_start", maintain_order=True)
    by_model = matrix.filter(pl.col("metric") == "roc_auc")["value"]
    assert np.mean(by_model.to_numpy()) == pytest.approx(np.mean(scores[::2]), abs=0.01)  # the same work was done

    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"\n{torch.get_num_threads()} threads, {len(x_NF)} samples, {len(run.trained)} trainings, median of {ROUNDS}")
    print(f"{'':16} {'seconds':>8} {'dynkit / it':>12}")
    for name, value in medians.items():
        print(f"{name:16} {value:8.2f} {medians['dynkit'] / value:12.2f}")
