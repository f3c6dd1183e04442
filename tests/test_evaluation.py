"""Metrics against scikit-learn, composites against their definition by brute force, the matrix against a plain loop."""

import datetime as dt
import itertools
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from streams import START, make_frame, make_model, make_pipeline, replayed
from torch import nn

import dynkit as dk
from dynkit import testing
from dynkit.errors import InvalidInput, NotFound, StorageError, TrainingError
from dynkit.evaluation import composite, evaluate, mean_scores, shared, transfer
from dynkit.evaluation.metrics import F1, Accuracy, Mae, Metric, Rmse, RocAuc, Scores, TopK, metric_name, resolve_metric
from dynkit.types import Trained, Window


def scored(metric: Metric, outputs: torch.Tensor, labels: torch.Tensor, split: int) -> float | None:
    """The metric as the matrix computes it: batch by batch."""
    scores = Scores([metric])
    for low in range(0, len(labels), split):
        scores.update(outputs[low : low + split], labels[low : low + split])
    return scores.compute()[metric_name(metric)]


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(20, 300), st.integers(1, 300))
@settings(max_examples=25, deadline=None)
def test_classification_metrics_are_scikit_learns(seed: int, classes: int, n: int, split: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(0, classes, (n,), generator=generator)])
    outputs = torch.randn(len(labels), classes, generator=generator).round(decimals=1)  # ties on purpose
    predicted = outputs.argmax(1)
    probabilities = outputs.double().softmax(1).numpy()
    if classes == 2:
        auc = sk.roc_auc_score(labels, probabilities[:, 1])
        f1 = sk.f1_score(labels, predicted)
    else:
        auc = sk.roc_auc_score(labels, probabilities, multi_class="ovr")
        f1 = sk.f1_score(labels, predicted, average="macro")
    assert scored(Accuracy(), outputs, labels, split) == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-6)
    assert scored(RocAuc(), outputs, labels, split) == pytest.approx(auc, abs=1e-6)
    assert scored(F1(), outputs, labels, split) == pytest.approx(f1, abs=1e-6)


def test_top_k_is_scikit_learns() -> None:
    outputs, labels = torch.randn(500, 7), torch.randint(0, 7, (500,))
    for k in (1, 2, 5):
        expected = sk.top_k_accuracy_score(labels, outputs, k=k, labels=range(7))
        assert scored(TopK(k), outputs, labels, 64) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(300,), (300, 1)])
def test_one_output_is_the_logit_of_class_one(shape: tuple[int, ...]) -> None:
    labels = torch.randint(0, 2, (300,)).bool()
    outputs = torch.randn(shape)
    flat = outputs.reshape(-1)
    assert scored(Accuracy(), outputs, labels, 50) == pytest.approx(sk.accuracy_score(labels, flat > 0))
    assert scored(RocAuc(), outputs, labels, 50) == pytest.approx(sk.roc_auc_score(labels, flat), abs=1e-6)
    assert scored(F1(), outputs, labels, 50) == pytest.approx(sk.f1_score(labels, flat > 0))


def test_regression_metrics_are_scikit_learns() -> None:
    outputs, labels = torch.randn(333, 1), torch.randn(333)
    assert scored(Mae(), outputs, labels, 50) == pytest.approx(sk.mean_absolute_error(labels, outputs))
    assert scored(Rmse(), outputs, labels, 50) == pytest.approx(sk.root_mean_squared_error(labels, outputs))


def test_roc_auc_of_one_class_is_undefined_not_zero() -> None:
    assert scored(RocAuc(), torch.randn(10, 2), torch.zeros(10), 5) is None
    assert scored(RocAuc(), torch.randn(10, 3), torch.tensor([0, 1] * 5), 5) is None


def test_extreme_logits_keep_their_order() -> None:
    outputs = torch.tensor([[0.0, 90.0], [0.0, 95.0], [0.0, -90.0], [0.0, 30.0]])
    labels = torch.tensor([0, 0, 0, 1])
    assert scored(RocAuc(), outputs[2:], labels[2:], 1) == 1.0


def test_a_metric_of_ones_own_sees_the_whole_window() -> None:
    def largest(outputs: torch.Tensor, labels: torch.Tensor) -> float:
        return float(outputs.max()) + len(labels)

    outputs = torch.arange(20.0).reshape(10, 2)
    assert scored(largest, outputs, torch.zeros(10), 3) == 29.0
    assert Scores([largest, Accuracy()])._metrics[0] is largest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resolve_metric("acuracy"), "did you mean 'accuracy'"),
        (lambda: TopK(0), "k=0"),
        (lambda: F1("mean"), "average='mean'"),
        (lambda: dk.Evaluation(metrics="accuracy"), "must be a list"),
        (lambda: dk.Evaluation(metrics=[]), "must be a list"),
        (lambda: dk.Evaluation(metrics=["accuracy", "accuracy"]), "different names"),
        (lambda: dk.Evaluation(windows=3), "windows=3 is not callable"),
        (lambda: dk.windows.Tumbling("3 weeks"), "is not a duration"),
    ],
)
def test_wrong_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()  # type: ignore[operator]


def test_a_metric_that_does_not_fit_the_outputs_says_so() -> None:
    with pytest.raises(TrainingError, match="top_5 needs outputs"):
        scored(TopK(5), torch.randn(4, 3), torch.zeros(4), 2)
    for metric in (Accuracy(), TopK(1), F1(), RocAuc()):
        with pytest.raises(TrainingError, match=r"cannot judge labels such as 3.7: choose metrics=\['mae', 'rmse'\]"):
            metric(torch.zeros(3, 3 if metric == TopK(1) else 1), torch.tensor([0.0, 3.7, 1.0]))
    with pytest.raises(TrainingError, match="one output per sample"):
        scored(Mae(), torch.randn(4, 3), torch.zeros(4), 2)


DAY_NS = 86_400 * 10**9


@given(st.integers(1, 400), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_tumbling_windows_cover_the_stream_once(days: int, seed: int) -> None:
    end = int(np.random.default_rng(seed).integers(1, 300 * DAY_NS))
    windows = list(dk.windows.Tumbling(f"{days}d")(testing.StreamView(now_ns=end)))
    assert windows[0].start_ns == 0
    assert windows[-1].end_ns == end + 1
    assert all(a.end_ns == b.start_ns for a, b in pairwise(windows))
    assert all(window.end_ns - window.start_ns == days * DAY_NS for window in windows[:-1])


def test_windows_between_triggers_are_the_time_each_model_served() -> None:
    trained = [Trained(i, 0, last, f"m{i}", 1, 0.0) for i, last in enumerate([10, 20, 40])]
    view = testing.StreamView(start_ns=5, now_ns=60, trained=trained)
    windows = list(dk.windows.BetweenTriggers()(view))
    assert [(w.start_ns, w.end_ns) for w in windows] == [(5, 11), (11, 21), (21, 41), (41, 61)]
    view.now_ns = 40
    assert [(w.start_ns, w.end_ns) for w in dk.windows.BetweenTriggers()(view)] == [(5, 11), (11, 21), (21, 41)]


def matrix_of(anchors: list[int], models: list[str]) -> pl.DataFrame:
    rows = [(a, a + 5, a, m, "acc", float(a * 100 + i)) for i, m in enumerate(models) for a in anchors]
    names = ["window_start", "window_end", "window_anchor", "model", "metric", "value"]
    times = ["window_start", "window_end", "window_anchor"]
    frame = pl.DataFrame(rows, schema=names, orient="row")
    return frame.with_columns(pl.from_epoch(pl.col(times), time_unit="ns").dt.replace_time_zone("UTC"))


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.lists(st.integers(0, 60), min_size=1, max_size=8, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_composites_are_their_definition(last: list[int], anchors: list[int]) -> None:
    last.sort()
    trained = [Trained(i, 0, ns, f"m{i}", 1, 0.0) for i, ns in enumerate(last)]
    matrix = matrix_of(anchors, [one.model for one in trained])
    active: dict[int, int] = {}
    follower: dict[int, int] = {}
    for a in anchors:
        before = [j for j in range(len(last)) if last[j] < a]
        if before:
            active[a] = max(before)
        after = [j for j in range(len(last)) if not before or j > max(before)]
        follower[a] = min(after) if after else len(last) - 1
    for kind, expected in (("active", active), ("trained", follower)):
        curve = composite(matrix, trained, kind)  # type: ignore[arg-type]
        found = dict(zip(curve["window_anchor"].dt.epoch("ns"), curve["model"], strict=True))
        assert found == {a: f"m{j}" for a, j in expected.items()}


def test_two_triggers_with_one_model_give_one_row_a_window() -> None:
    trained = [Trained(0, 0, 5, "m", 1, 0.0), Trained(1, 0, 15, "m", 1, 0.0)]
    assert composite(matrix_of([0, 10, 20], ["m"]), trained, "active").height == 2


def test_means_are_plain_and_weighted_by_time_and_skip_what_is_undefined() -> None:
    hours = [dt.datetime(2020, 1, 1, h, tzinfo=dt.UTC) for h in (0, 1, 4, 9)]
    curve = pl.DataFrame({"window_start": hours[:3], "window_end": hours[1:], "metric": "m", "value": [1.0, 2.0, None]})
    assert mean_scores(curve).row(0) == ("m", 1.5, pytest.approx((1 * 1 + 2 * 3) / 4), 2)


def test_curves_are_cut_to_where_all_have_a_model() -> None:
    a, b = (composite(matrix_of([0, 10, 20], ["x"]), [Trained(0, 0, last, "x", 1, 0.0)]) for last in (5, 15))
    assert [curve.height for curve in shared([a, b])] == [1, 1]
    assert [curve.height for curve in shared([a, b.clear()])] == [2, 0]


def test_curves_are_cut_to_where_all_have_an_end() -> None:
    trained = [Trained(0, 0, -1, "x", 1, 0.0)]
    short, long = (composite(matrix_of(anchors, ["x"]), trained) for anchors in ([0, 10], [0, 10, 20, 30]))
    assert [curve.height for curve in shared([short, long])] == [2, 2]


def test_the_matrix_is_what_a_plain_loop_finds(dataset: dk.Dataset) -> None:
    models = {name: make_model() for name in ("m0", "m1", "m2")}
    windows = [Window(int(w), int(w) + 5 * DAY_NS) for w in dataset.table()["timestamp"].dt.epoch("ns")[[0, 500, 2500]]]
    windows.append(Window(0, 1))  # before all samples
    found = list(
        evaluate(
            make_model(),
            {name: model.state_dict() for name, model in models.items()},
            windows,
            dataset.open(),
            dataset.table(),
            [Accuracy()],
            device=torch.device("cpu"),
            batch_size=100,
        )
    )
    frame = make_frame()
    for window, scored_in in found[:-1]:
        samples, scores = scored_in[""]
        inside = frame.filter(pl.col("when").dt.epoch("ns").is_between(window.start_ns, window.end_ns, closed="left"))
        x = torch.tensor(inside.select("a", "b", "c").to_numpy(), dtype=torch.float32)
        assert samples == inside.height
        for name, model in models.items():
            right = (model.eval()(x).argmax(1).numpy() == inside["late"].to_numpy()).mean()
            assert scores[name]["accuracy"] == pytest.approx(right)
    assert found[-1][1] == {"": (0, {})}


def test_every_window_is_read_once_for_all_models(dataset: dk.Dataset) -> None:
    version = dataset.open()
    read: list[int] = []
    gather = version.gather_stored

    def counted(keys: np.ndarray, *more: object) -> object:
        read.extend(keys.tolist())
        return gather(keys, *more)  # type: ignore[arg-type]

    version.gather_stored = counted  # type: ignore[assignment,method-assign]
    windows = dk.windows.Tumbling("2d")(
        testing.StreamView(
            start_ns=int(dataset.table()["timestamp"].dt.epoch("ns")[0]),
            now_ns=int(dataset.table()["timestamp"].dt.epoch("ns")[-1]),
        )
    )
    states = {f"m{i}": make_model().state_dict() for i in range(4)}
    options = {"device": torch.device("cpu"), "batch_size": 50}
    list(evaluate(make_model(), states, windows, version, version.table, [Accuracy()], **options))  # type: ignore[arg-type]
    assert sorted(read) == list(range(3000))


def test_comparison_is_a_frame_with_a_picture(dataset: dk.Dataset) -> None:
    runs = [replayed(make_pipeline(dataset, name=name)) for name in ("one", "two")]
    comparison = dk.compare(runs)
    assert comparison["name"].to_list() == ["one", "one", "two", "two"]
    assert comparison.filter(pl.col("name") == "one")["mean"].to_list() == runs[0].scores()["mean"].to_list()
    assert (comparison["trainings"] == 6).all()
    assert comparison["samples_trained"].unique().to_list() == [sum(one.samples for one in runs[0].trained)]
    assert comparison.chart.to_dict()["title"]["text"].startswith("accuracy of the composite")
    assert "data:image/svg+xml;base64," in comparison._repr_html_()
    with pytest.raises(InvalidInput, match="nothing to compare"):
        dk.compare([])


def test_all_curves_of_a_picture_are_of_one_metric() -> None:
    times = pl.datetime_range(START, START + dt.timedelta(days=4), "1d", time_zone="UTC", time_unit="ns", eager=True)
    one = pl.DataFrame({"window_start": times[:-1], "window_end": times[1:], "value": [0.1, 0.2, 0.3, 0.4]})
    other = one.with_columns(pl.col("value") + 0.5, metric=pl.lit("roc_auc"))
    both = pl.concat([one.with_columns(metric=pl.lit("accuracy")), other])

    def drawn(figure: dk.plots.Figure) -> dict[str, set[float]]:
        (values,) = figure.chart.to_dict()["datasets"].values()
        return {name: {row["value"] for row in values if row["pipeline"] == name} for name in ("a", "b")}

    chosen = dk.plots.composite({"a": both, "b": other})
    assert chosen.title.startswith("roc_auc") and drawn(chosen) == {
        "a": {0.6, 0.7, 0.8, 0.9},
        "b": {0.6, 0.7, 0.8, 0.9},
    }
    accuracy = dk.plots.composite({"a": both, "b": other}, "accuracy")
    assert drawn(accuracy) == {"a": {0.1, 0.2, 0.3, 0.4}, "b": set()}
    with pytest.raises(InvalidInput, match="did you mean 'accuracy'"):
        dk.plots.composite({"a": both, "b": other}, "acuracy")


def test_axes_say_what_is_there(tmp_path: Path) -> None:
    """One window of a score that has decimals, and weeks within months."""
    times = pl.datetime_range(START, START + dt.timedelta(weeks=14), "1w", time_zone="UTC", time_unit="ns", eager=True)
    weeks = pl.DataFrame({"window_start": times[:-1], "window_end": times[1:], "metric": "accuracy", "value": 0.85})
    svg = dk.plots.composite({"a": weeks.head(1)}).svg()
    assert ">0.85<" in svg
    labels = re.findall(r">([A-Z][a-z]{2} \d\d(?:\d\d)?)<", dk.plots.composite({"a": weeks}).svg())
    assert len(labels) == len(set(labels)) > 5
    with pytest.raises(StorageError, match="cannot write"):
        dk.plots.composite({"a": weeks}).save(tmp_path / "none" / "x.svg")


def test_pictures_need_no_network_and_are_svg(dataset: dk.Dataset) -> None:
    run = replayed(make_pipeline(dataset))
    comparison = dk.compare([run])
    for figure in (
        dk.plots.matrix(run.matrix()),
        comparison.plot("roc_auc"),
        dk.plots.cost(comparison.frame, by="train_s"),
    ):
        svg = figure.svg()
        assert svg.startswith("<svg")
        assert "http" not in svg.replace("http://www.w3.org/", "")
    with pytest.raises(InvalidInput, match="did you mean 'accuracy'"):
        dk.plots.matrix(run.matrix(), "acuracy")
    with pytest.raises(InvalidInput, match="no scores"):
        dk.plots.matrix(run.matrix().clear())


def test_a_regression_runs_through(ws: dk.Workspace) -> None:
    frame = make_frame().with_columns(late=pl.col("a") * 2 + pl.col("b"))
    dataset = ws.ingest("numbers", frame, timestamp="when", label="late")
    run = replayed(
        make_pipeline(
            dataset,
            model=lambda: nn.Linear(3, 1),
            training=dk.Training(epochs=20, batch_size=32, lr=0.03, loss="mse"),
            evaluation=dk.Evaluation(windows=dk.windows.BetweenTriggers(), metrics=["rmse", "mae"]),
        )
    )
    assert run.composite()["value"].max() < 0.1
    assert run.composite()["metric"].unique(maintain_order=True).to_list() == ["rmse", "mae"]


# ---- forgetting and transfer ----


def table_of(values: list[list[float | None]], starts: list[int], metric: str = "accuracy") -> pl.DataFrame:
    """Scores of models m0, m1, ... (rows) in windows that begin at these instants (columns)."""
    rows = [(s, s + 5, f"m{i}", metric, v) for i, row in enumerate(values) for s, v in zip(starts, row, strict=True)]
    frame = pl.DataFrame(rows, schema=["window_start", "window_end", "model", "metric", "value"], orient="row")
    times = pl.from_epoch(pl.col("window_start", "window_end"), time_unit="ns").dt.replace_time_zone("UTC")
    return frame.with_columns(times, pl.col("value").cast(pl.Float64))


def triggers_at(last: list[int]) -> list[Trained]:
    return [Trained(i, 0, ns, f"m{i}", 1, 0.0) for i, ns in enumerate(last)]


def test_transfer_is_that_of_the_papers_where_each_window_is_a_task() -> None:
    scores = [[0.9, 0.3, 0.2], [0.6, 0.8, 0.4], [0.5, 0.9, 0.7]]
    found = transfer(table_of(scores, [0, 10, 20]), triggers_at([4, 14, 24]), baseline={"accuracy": 0.1})
    assert found["index"].to_list() == [0, 1, 2]
    assert found["model"].to_list() == ["m0", "m1", "m2"]
    # by hand, R[i, j] the score on task j after task i
    assert found["backward"].to_list() == [None, pytest.approx(0.6 - 0.9), pytest.approx((0.5 - 0.9 + 0.9 - 0.8) / 2)]
    assert found["forgetting"].to_list() == [None, pytest.approx(0.9 - 0.6), pytest.approx((0.9 - 0.5 + 0.8 - 0.9) / 2)]
    assert found["forward"].to_list() == [None, pytest.approx(0.3 - 0.1), pytest.approx((0.3 - 0.1 + 0.4 - 0.1) / 2)]


def test_forward_transfer_without_a_baseline_is_over_the_first_model() -> None:
    scores = [[0.9, 0.3, 0.2, 0.1], [0.6, 0.8, 0.4, 0.5], [0.5, 0.9, 0.7, 0.6], [0.5, 0.9, 0.7, 0.9]]
    found = transfer(table_of(scores, [0, 10, 20, 30]), triggers_at([4, 14, 24, 34]))
    expected = [None, None, 0.4 - 0.2, (0.4 - 0.2 + 0.6 - 0.1) / 2]
    assert found["forward"].to_list() == [None if e is None else pytest.approx(e) for e in expected]


def test_windows_that_no_training_reached_do_not_count_and_several_may_be_learned_at_once() -> None:
    # windows 0 and 10 are learned by model 0, none by 1 (it adds nothing new), 20 by model 2, 30 by none
    scores = [[0.5, 0.7, 0.1, 0.1], [0.6, 0.6, 0.2, 0.1], [0.7, 0.2, 0.9, 0.1]]
    found = transfer(table_of(scores, [0, 10, 20, 30]), triggers_at([12, 14, 22]), baseline={"accuracy": 0.0})
    assert found["backward"].to_list() == [None, pytest.approx((0.1 - 0.1) / 2), pytest.approx((0.2 - 0.5) / 2)]
    assert found["forgetting"].to_list() == [None, pytest.approx((-0.1 + 0.1) / 2), pytest.approx((-0.1 + 0.5) / 2)]
    assert found["forward"].to_list() == [None, None, pytest.approx(0.2)]


def test_of_errors_less_is_a_gain_and_undefined_scores_are_passed_over() -> None:
    frame = table_of([[1.0, None], [3.0, 2.0], [4.0, 1.0]], [0, 10], "rmse")
    found = transfer(frame, triggers_at([4, 14, 24]), baseline={"rmse": 9.0})
    assert found["backward"].to_list() == [None, -2.0, pytest.approx((-3.0 + 1.0) / 2)]
    assert found["forgetting"].to_list() == [None, 2.0, pytest.approx((3.0 - 1.0) / 2)]
    assert found["forward"].to_list() == [None, None, None]
    assert transfer(frame, triggers_at([4, 14, 24]), errors=())["backward"].to_list()[1] == 2.0


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_transfer_is_its_definition(models: int, windows: int, seed: int, with_baseline: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = [
        [None if rng.random() < 0.1 else round(float(v), 3) for v in row] for row in rng.random((models, windows))
    ]
    starts = sorted(rng.choice(60, windows, replace=False).tolist())
    last = sorted(rng.integers(0, 60, models).tolist())
    found = transfer(
        table_of(scores, starts), triggers_at(last), baseline={"accuracy": 0.25} if with_baseline else None
    )

    def mean(values: list[float | None]) -> object:
        known = [v for v in values if v is not None]
        return pytest.approx(sum(known) / len(known)) if known else None

    def minus(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a - b

    learned = {w: min((j for j in range(models) if last[j] >= s), default=None) for w, s in enumerate(starts)}
    for k in range(models):
        old = [w for w, j in learned.items() if j is not None and j < k]
        best = {w: max((scores[j][w] for j in range(k) if scores[j][w] is not None), default=None) for w in old}  # type: ignore[type-var]
        ahead = [w for w, j in learned.items() if j is not None and (1 if with_baseline else 2) <= j <= k]
        row = found.row(k, named=True)
        assert row["backward"] == mean([minus(scores[k][w], scores[learned[w]][w]) for w in old])
        assert row["forgetting"] == mean([minus(best[w], scores[k][w]) for w in old])
        base = {w: 0.25 if with_baseline else scores[0][w] for w in ahead}
        assert row["forward"] == mean([minus(scores[learned[w] - 1][w], base[w]) for w in ahead])


def test_transfer_of_nothing_is_empty_and_a_baseline_must_be_of_a_metric() -> None:
    assert transfer(table_of([], []), []).height == 0
    assert transfer(table_of([[0.5]], [0]), []).height == 0
    with pytest.raises(InvalidInput, match="did you mean 'accuracy'"):
        transfer(table_of([[0.5]], [0]), triggers_at([1]), baseline={"acuracy": 0.5})


def test_one_model_of_two_triggers_has_a_row_for_each() -> None:
    trained = [Trained(0, 0, 4, "m0", 1, 0.0), Trained(1, 0, 14, "m0", 1, 0.0)]
    found = transfer(table_of([[0.5, 0.25]], [0, 10]), trained, baseline={"accuracy": 0.0})
    assert found["backward"].to_list() == [None, 0.0]
    assert found["forward"].to_list() == [None, 0.25]


# ---- slices ----


def sliced(ws: dk.Workspace, **changes: object) -> dk.Run:
    places = np.array(["hall", "yard", None], dtype=object)[np.random.default_rng(5).integers(0, 3, 3000)]
    frame = make_frame().with_columns(place=pl.Series(places.tolist(), dtype=pl.String))
    dataset = ws.ingest("placed", frame, timestamp="when", label="late", features=["a", "b", "c"])
    evaluation = dk.Evaluation(
        windows=dk.windows.Tumbling("3d"), metrics=["accuracy", "roc_auc"], slices=["place", "label"], batch_size=100
    )
    return replayed(make_pipeline(dataset, **{"evaluation": evaluation, **changes}))


def test_slices_are_what_a_plain_loop_finds(ws: dk.Workspace) -> None:
    run = sliced(ws)
    dataset = ws.dataset("placed")
    table, values = dataset.table(), dataset.read(dataset.keys())
    names = [f"place={place}" for place in ("hall", "yard", "null")] + ["label=0", "label=1"]
    assert sorted(run.slices()["slice"].unique()) == sorted(names)
    for index, name in itertools.product((0, 4), names):
        column, _, value = name.partition("=")
        model = make_model().eval()
        model.load_state_dict(ws.models.load(run.trained[index].model))
        scores = run.matrix(name).filter(model=run.trained[index].model, metric="accuracy")
        scores = scores.with_columns(
            start=pl.col("window_start").dt.epoch("ns"), end=pl.col("window_end").dt.epoch("ns")
        )
        assert scores.height == 7
        for row in scores.iter_rows(named=True):
            inside = table["timestamp"].dt.epoch("ns").is_between(row["start"], row["end"], closed="left")
            inside &= table[column].cast(pl.String).fill_null("null") == value
            x, y = values["x"][inside.to_numpy()], values["label"][inside.to_numpy()]
            assert row["value"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    assert run.matrix("label=1").filter(metric="roc_auc")["value"].null_count() == 6 * 7
    assert "roc_auc" not in run.slices().filter(slice="label=1")["metric"].to_list()


def test_slices_leave_all_else_as_it_was(ws: dk.Workspace) -> None:
    run = sliced(ws)
    plain = replayed(
        make_pipeline(
            ws.dataset("placed"),
            evaluation=dk.Evaluation(windows=dk.windows.Tumbling("3d"), metrics=["accuracy", "roc_auc"]),
        )
    )
    for read in (dk.Run.matrix, dk.Run.composite, dk.Run.scores, dk.Run.transfer):
        assert read(run).equals(read(plain))
    assert dk.compare([run]).frame["windows"].to_list() == dk.compare([plain]).frame["windows"].to_list()
    a, b = (one.model for one in run.trained[:2])
    assert ws.lineage.show(a).metrics.filter(run=run.id)["windows"].unique().to_list() == [7]
    difference = dict(ws.lineage.diff(a, b).scores.select("name", "difference").iter_rows())
    means = run.matrix().group_by("model", "metric").agg(pl.col("value").mean())
    expected = {
        row["metric"]: row["b"] - row["a"]
        for row in means.pivot("model", index="metric", values="value").select("metric", a=a, b=b).to_dicts()
    }
    assert difference == pytest.approx(expected)
    assert dk.plots.matrix(run.matrix("place=hall")).svg().startswith("<svg")
    assert plain.slices().height == 0
    parts = run.slices().filter(pl.col("slice").str.starts_with("place"), metric="accuracy")
    windows = run.composite().filter(metric="accuracy")["window_start"]
    table = ws.dataset("placed").table()
    assert parts["samples"].sum() == (table["timestamp"] >= windows.min()).sum()


def test_wrong_slices_are_named(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    run = sliced(ws)
    with pytest.raises(NotFound, match="no slice 'place=hal'; did you mean 'place=hall'"):
        run.matrix("place=hal")
    with pytest.raises(NotFound, match=r"no slice 'place=hall'; name its column in Evaluation\(slices="):
        replayed(make_pipeline(dataset)).composite(slice="place=hall")
    for slices, message in (
        (["plaec"], "no column of 'placed'; did you mean 'place'"),
        (["number"], "of Float64; expected texts"),
        (["id"], "'id' of 3000 values; at most 1000"),
    ):
        frame = make_frame().with_columns(place=pl.lit("here"), number=pl.col("a") * 2, id=pl.int_range(3000))
        other = ws.ingest(f"other{len(message)}", frame, timestamp="when", label="late", features=["a", "b", "c"])
        with pytest.raises(InvalidInput, match=message.replace("'placed'", "'other[0-9]+'")):
            make_pipeline(other, evaluation=dk.Evaluation(slices=slices))
    with pytest.raises(InvalidInput, match="slices='place' must be a list"):
        dk.Evaluation(slices="place")


def test_a_run_interrupted_between_windows_ends_with_the_same_slices(ws: dk.Workspace) -> None:
    whole = sliced(ws)
    dataset = ws.dataset("placed")
    evaluation = dk.Evaluation(windows=dk.windows.Tumbling("3d"), slices=["place"], batch_size=100)
    evaluated = 0
    for event in make_pipeline(dataset, evaluation=evaluation).replay():
        evaluated += event.kind == "evaluated"
        if evaluated == 2:
            break
    run = ws.run(event.run)
    assert run.resume().wait(60) == "finished"
    expected = whole.slices().filter(pl.col("slice").str.starts_with("place"), metric="accuracy")
    assert run.slices().equals(expected)
