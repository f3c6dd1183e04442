"""Selections without a model, and selections of selections: what they pick, by brute force and hand-worked tables."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import make_frame, make_model, make_pipeline, replayed
from test_docs import DOCS, blocks_of

import dynkit as dk
from dynkit import selection, testing
from dynkit.errors import InvalidInput, SpecError
from dynkit.pipeline import build
from dynkit.policies import describe, digest
from dynkit.selection.budget import proportional
from dynkit.types import Selection, Trained

STREAM = testing.stream(600)


def view_of(pool: pl.DataFrame, ends: list[int], *, epochs: int = 1, model: bool = False) -> testing.StreamView:
    """The view at the trigger after the whole pool; earlier ones saw the first `ends` samples."""
    trained = [Trained(i, end, 0, str(i), end, 0.0) for i, end in enumerate(ends)]
    view = testing.StreamView(past=pool, trained=trained, epochs=epochs)
    view.samples_since_trigger = pool.height - (ends[-1] if ends else 0)
    view.model = view.fit(pool["key"], seed=0) if model else None
    return view


def picked(policy: Selection, pool: pl.DataFrame, ends: list[int], seed: int = 0, **options: Any) -> pl.DataFrame:
    chosen = policy(pool, view_of(pool, ends, **options), np.random.default_rng(seed))
    return chosen if isinstance(chosen, pl.DataFrame) else pl.DataFrame({"key": chosen})


def keys_of(policy: Selection, pool: pl.DataFrame, ends: list[int], seed: int = 0, **options: Any) -> list[int]:
    return picked(policy, pool, ends, seed, **options)["key"].to_list()


EVERY: list[Selection] = [
    selection.New(),
    selection.New(triggers=2, then=selection.Random(n=10)),
    selection.All(),
    selection.Random(fraction=0.3),
    selection.RandomWithoutReuse(fraction=0.3),
    selection.Recent(n=50),
    selection.Freshness(0.3),
    selection.Freshness(n=50),
    selection.Reservoir(n=50),
    selection.ClassBalanced(fraction=0.2),
    selection.TriggerBalanced(n=50),
    selection.Where("label = 1", then=selection.Random(n=9)),
    selection.Replay(old=selection.Random(n=20)),
    selection.Replay(old=selection.Loss(n=20), new=selection.Random(fraction=0.5)),
    selection.Schedule([(0, selection.All()), (3, selection.Random(n=7))]),
    selection.RS2(fraction=0.1),
    selection.RS2(n=30, replacement=True),
    selection.Loss(fraction=0.3),
    selection.Loss(n=30, balance=True),
    selection.GradNorm(fraction=0.3),
    selection.Margin(n=30),
    selection.LeastConfidence(n=30, balance=True),
    selection.Entropy(n=30),
    selection.RhoLoss(fraction=0.2),
    selection.RhoLoss(n=30, twin=True, balance=True),
    selection.Replay(old=selection.RS2(n=20)),
    selection.KCenter(n=30),
    selection.KCenter(fraction=0.05, balance=True),
    selection.Craig(n=30),
    selection.GradMatch(n=30),
    selection.FacilityLocation(n=30, optimizer="naive"),
    selection.FacilityLocation(n=30, balance=True),
    selection.GraphCut(n=30),
    selection.LogDeterminant(n=30, optimizer="stochastic"),
]


@pytest.mark.parametrize("policy", EVERY, ids=repr)
def test_every_selection_passes_the_public_check(policy: Selection) -> None:
    testing.check_selection(policy, testing.stream(1000))


@given(st.data(), st.integers(2, 60), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_selection_is_a_subset_within_its_budget_and_the_same_for_a_seed(data: Any, rows: int, seed: int) -> None:
    pool = STREAM.sample(rows, seed=seed % 1000).sort("key")
    n = data.draw(st.integers(1, 70))
    kinds = [
        selection.Random, selection.RandomWithoutReuse, selection.Recent, selection.Reservoir, selection.ClassBalanced,
        selection.TriggerBalanced, selection.RS2, selection.Loss, selection.GradNorm, selection.Margin, selection.Entropy,
        selection.LeastConfidence, selection.RhoLoss, selection.KCenter, selection.Craig, selection.GradMatch,
        selection.FacilityLocation, selection.GraphCut, selection.LogDeterminant,
    ]  # fmt: skip
    policy = data.draw(st.sampled_from(kinds))(n=n)
    ends = [rows // 2] if rows > 1 else []
    model = data.draw(st.booleans())
    first = picked(copy.deepcopy(policy), pool, ends, seed, model=model)
    assert first.equals(picked(copy.deepcopy(policy), pool, ends, seed, model=model))
    assert first["key"].n_unique() == first.height
    assert set(first["key"]) <= set(pool["key"])
    assert 1 <= first.height <= min(n, rows)
    if not isinstance(policy, selection.GradMatch | selection.RhoLoss):
        assert first.height == min(n, rows)


def test_no_sample_is_used_twice_before_all_were_used_once() -> None:
    policy, used = selection.RandomWithoutReuse(n=70), Counter[int]()
    for seed in range(20):
        keys = keys_of(policy, STREAM, [], seed)
        assert len(set(keys)) == 70
        used.update(keys)
        counts = [used[key] for key in STREAM["key"]]
        assert max(counts) - min(counts) <= 1


def test_samples_that_arrive_join_the_round_that_has_begun() -> None:
    policy = selection.RandomWithoutReuse(n=50)
    first = {*keys_of(policy, STREAM.head(100), [], 1), *keys_of(policy, STREAM.head(150), [100], 2)}
    second = keys_of(policy, STREAM.head(150), [], 3)
    assert first | set(second) == set(STREAM.head(150)["key"])


@pytest.mark.parametrize(
    ("fresh", "n", "seen", "expected"),
    [
        (0.5, None, [100, 150], [(100, 0), (50, 50)]),  # at first everything is fresh; then as many old ones as new
        (0.25, None, [100, 150], [(100, 0), (33, 100)]),  # all 100 old ones are three quarters of 133
        (0.5, None, [100, 500, 500], [(100, 0), (100, 100), (200, 200)]),
        (0.8, 100, [100, 400], [(100, 0), (80, 20)]),
        (0.5, 11, [100, 100, 100], [(11, 0), (6, 5), (6, 5)]),
        (0.01, 3, [100, 103], [(3, 0), (1, 2)]),
        (0.5, None, [100, 100], [(100, 0), (0, 100)]),  # nothing is fresh any more
    ],
)
def test_freshness_keeps_its_share(
    fresh: float, n: int | None, seen: list[int], expected: list[tuple[int, int]]
) -> None:
    policy, used = selection.Freshness(fresh, n), set[int]()
    for rows, (new, old) in zip(seen, expected, strict=True):
        keys = set(keys_of(policy, STREAM.head(rows), []))
        assert (len(keys - used), len(keys & used)) == (new, old)
        used |= keys


def test_a_reservoir_gives_up_samples_for_new_ones_only() -> None:
    policy, before = selection.Reservoir(n=40), set[int]()
    replaced = 0
    for seen in range(50, 601, 50):
        now = set(keys_of(policy, STREAM.head(seen), [], seed=seen))
        assert len(now) == 40
        assert all(key >= seen - 50 for key in now - before)
        replaced += len(now - before)
        before = now
    expected = 40 + sum(40 / i for i in range(51, 601))  # of algorithm R
    assert abs(replaced - expected) < 4 * expected**0.5


def test_a_reservoir_is_a_uniform_sample() -> None:
    pool, counts = STREAM.head(20), np.zeros(20)
    for seed in range(3000):
        counts[keys_of(selection.Reservoir(n=5), pool, [], seed)] += 1
    assert np.abs(counts / 3000 - 0.25).max() < 4 * (0.25 * 0.75 / 3000) ** 0.5


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 120), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_trigger_balanced_fills_triggers_like_water(sizes: list[int], n: int, seed: int) -> None:
    ends = np.cumsum(sizes).tolist()
    keys = keys_of(selection.TriggerBalanced(n=n), STREAM.head(ends[-1]), ends[:-1], seed)
    taken = np.bincount(np.searchsorted(ends, keys, side="right"), minlength=len(sizes))
    level = taken.max()
    assert len(keys) == min(n, sum(sizes))
    for size, count in zip(sizes, taken, strict=True):
        assert count in {size, level, level - 1} and count >= min(size, level - 1)


def test_new_goes_back_by_triggers() -> None:
    pool = STREAM.head(100)
    assert keys_of(selection.New(), pool, [30, 60, 90]) == list(range(90, 100))
    assert keys_of(selection.New(triggers=2), pool, [30, 60, 90]) == list(range(60, 100))
    assert keys_of(selection.New(triggers=9), pool, [30, 60, 90]) == list(range(100))
    assert keys_of(selection.New(2, then=selection.Recent(n=3)), pool, [30, 60, 90]) == [97, 98, 99]


@pytest.mark.parametrize(
    "expression", ["label = 1 AND \"group\" = 'a'", (pl.col("label") == 1) & (pl.col("group") == "a")]
)
def test_where_narrows_the_pool_and_what_is_new(expression: Any) -> None:
    expected = STREAM.filter(pl.col("label") == 1, pl.col("group") == "a")["key"]
    assert keys_of(selection.Where(expression), STREAM, [300]) == expected.to_list()
    new = expected.filter(expected >= 300).to_list()
    assert keys_of(selection.Where(expression, then=selection.New()), STREAM, [300]) == new
    assert keys_of(selection.New(then=selection.Where(expression)), STREAM, [300]) == new


def test_replay_joins_new_samples_with_some_of_the_old() -> None:
    pool = STREAM.head(100)
    policy = selection.Replay(old=selection.Random(n=10))
    keys = keys_of(policy, pool, [80])
    assert len(keys) == 30 and keys[10:] == list(range(80, 100)) and max(keys[:10]) < 80
    assert keys_of(policy, pool, []) == list(range(100))  # at the first trigger nothing is old
    assert keys_of(selection.Replay(old=selection.New(), new=selection.New()), pool, [80]) == list(range(80, 100))


def test_replay_gives_weight_one_to_samples_without_a_weight() -> None:
    chosen = picked(selection.Replay(old=selection.Loss(n=10)), STREAM.head(100), [80], model=True)
    assert chosen.columns == ["key", "weight", "score"]
    assert (chosen["weight"][10:] == 1).all() and chosen["weight"][:10].n_unique() > 5


def test_replay_uses_samples_without_an_epoch_in_every_one() -> None:
    chosen = picked(selection.Replay(old=selection.RS2(n=5)), STREAM.head(100), [80], epochs=3)
    for part in chosen.partition_by("epoch"):
        assert part.filter(pl.col("key") >= 80)["key"].to_list() == list(range(80, 100))
        assert part.height == 25 and part["key"].n_unique() == 25
    assert chosen["epoch"].unique().sort().to_list() == [0, 1, 2]


def test_a_schedule_switches_at_its_triggers() -> None:
    policy = selection.Schedule([(0, selection.All()), (2, selection.Recent(n=1)), (3, selection.Recent(n=2))])
    sizes = [len(keys_of(policy, STREAM, list(range(10, 10 * i + 1, 10)))) for i in range(5)]
    assert sizes == [600, 600, 1, 2, 2]


def test_rs2_deals_the_pool_out_to_epochs() -> None:
    chosen = picked(selection.RS2(n=30), STREAM.head(100), [], epochs=5)
    rounds = [part["key"].to_list() for part in chosen.partition_by("epoch", maintain_order=True)]
    assert [len(set(keys)) for keys in rounds] == [30] * 5
    assert len({key for keys in rounds[:3] for key in keys}) == 90  # three of 30 from one shuffle, then another
    assert all(keys == sorted(keys) for keys in rounds)
    shared = [len(set(rounds[0]) & set(keys)) for keys in rounds[3:]]
    assert shared != [30, 0] and shared != [0, 30]


def test_rs2_with_replacement_draws_every_epoch_on_its_own() -> None:
    counts, together = np.zeros(10), 0
    for seed in range(2000):
        chosen = picked(selection.RS2(n=3, replacement=True), STREAM.head(10), [], seed, epochs=2)
        first, second = (part["key"].to_list() for part in chosen.partition_by("epoch", maintain_order=True))
        counts[first] += 1
        counts[second] += 1
        together += len(set(first) & set(second))
    assert np.abs(counts / 2000 - 0.6).max() < 0.05
    assert abs(together / 2000 - 0.9) < 0.07  # 3 * 3 / 10


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_classes_share_a_budget_at_one_ratio(groups: list[int], data: Any) -> None:
    budget = data.draw(st.integers(1, len(groups)))
    shares = list(proportional(np.array(groups), budget))
    assert sum(share for _, share in shares) == budget
    for rows, share in shares:
        assert len({groups[row] for row in rows}) == 1
        assert abs(share - budget * len(rows) / len(groups)) < 1 and share <= len(rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: selection.Freshness(1.5), "fresh=1.5"),
        (lambda: selection.Freshness(n=0), "n=0"),
        (lambda: selection.New(0), "triggers=0"),
        (lambda: selection.New(then=selection.All), "is a class; pass an instance"),  # type: ignore[arg-type]
        (lambda: selection.Where("label ="), "neither a Polars expression nor SQL"),
        (lambda: selection.Where(3), "neither a Polars expression nor SQL"),  # type: ignore[arg-type]
        (lambda: selection.Schedule([(1, selection.All())]), "the first at 0"),
        (lambda: selection.Schedule([(0, selection.All()), (0, selection.All())]), "increasing triggers"),
        (lambda: selection.Schedule([selection.All()]), "pairs of a trigger and a selection"),  # type: ignore[list-item]
        (lambda: selection.RhoLoss(n=3, holdout=1), "holdout=1"),
        (lambda: selection.Craig(n=3, optimizer="greedy"), "optimizer='greedy' is not known"),  # type: ignore[arg-type]
        (lambda: keys_of(selection.Where("place = 'x'"), STREAM, []), "cannot be evaluated"),
        (lambda: keys_of(selection.Where("label + 1"), STREAM, []), "not a condition"),
    ],
)
def test_wrong_parameters_are_named(make: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_expressions_are_part_of_the_record_and_of_the_identity() -> None:
    one, two = (selection.Where(pl.col("label") == label) for label in (1, 2))
    assert describe(one)["where"]["expression"] == '[(col("label")) == (dyn int: 1)]'
    assert digest(one) == digest(selection.Where(pl.col("label") == 1)) != digest(two)


def test_what_a_selection_remembers_is_not_part_of_its_identity_before_a_run() -> None:
    fresh = selection.Reservoir(n=3)
    used = copy.deepcopy(fresh)
    keys_of(used, STREAM, [])
    assert describe(fresh) == describe(used) and fresh == used


# ---- in real runs ----


def test_the_view_tells_which_trigger_saw_a_sample_first(ws: dk.Workspace) -> None:
    dataset = ws.ingest("stream", make_frame(), timestamp="when", label="late")
    dataset.split("exam", fraction=0.3, holdout=True)
    found: list[tuple[list[int], list[int]]] = []

    def spying(pool: pl.DataFrame, run: Any, rng: np.random.Generator) -> pl.Series:
        found.append((run.arrived(pool["key"]).tolist(), (pool["key"] // 500).to_list()))
        return pool["key"]

    replayed(make_pipeline(dataset, selection=spying))
    assert len(found) == 6 and all(len(ours) < 3000 for ours, _ in found)
    assert all(ours == theirs for ours, theirs in found)


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("{where: {expression: 'label = 1', then: {random: {n: 50}}}}", [50] * 6),
        ("{replay: {old: {reservoir: {n: 40}}, new: {loss: {fraction: 0.1}}}}", [50] + [90] * 5),
        ("{schedule: [[0, all], [2, {k_center: {n: 30}}], [4, {rho_loss: {n: 20}}]]}", [500, 1000, 30, 30, 20, 20]),
        ("{new: {then: {craig: {fraction: 0.1}}}}", [50] * 6),
        ("{new: {then: {log_determinant: {n: 20, optimizer: naive}}}}", [20] * 6),
        ("{random_without_reuse: 0.5}", [250, 500, 750, 1000, 1250, 1500]),
    ],
)
def test_composed_selections_run_from_yaml(
    ws: dk.Workspace, dataset: dk.Dataset, text: str, samples: list[int]
) -> None:
    spec = (
        f"dataset: stream\nmodel: make_model\ntrigger: {{amount: 500}}\nselection: {text}\n"
        "training: {batch_size: 64, lr: 1e-2}\nevaluation: {windows: {tumbling: 3d}, metrics: [accuracy]}\n"
    )
    run = replayed(build(spec, ws.catalog, name="test", namespace={"make_model": make_model}))
    assert [event.data["samples"] for event in run.events() if event.kind == "selected"] == samples


def test_a_mistake_inside_a_nested_selection_is_told_with_its_place(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    text = "dataset: stream\nmodel: m\ntrigger: {amount: 5}\nselection:\n  where:\n    expression: a > 1\n    then: {random: {fraction: 3}}\n"
    with pytest.raises(SpecError, match=r"line 7: selection.where.then.random.fraction: fraction=3 must be in"):
        build(text, ws.catalog, name="test", namespace={"m": make_model})


def test_rs2_trains_each_epoch_on_its_own_samples(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    passes: list[list[list[float]]] = []

    def fit(model: Any, batches: Any, context: Any) -> None:
        passes.extend(np.concatenate([batch["x"] for batch in batches]).tolist() for _ in range(3))

    policy, training = selection.RS2(n=100), dk.Training(epochs=3, batch_size=64, fit=fit, device="cpu")
    run = replayed(make_pipeline(dataset, selection=policy, training=training, trigger=dk.triggers.Amount(1500)))
    chosen = run.selection(1)
    for epoch, part in enumerate(chosen.partition_by("epoch", maintain_order=True)):
        stored = dataset.open().gather(part["key"].to_numpy().astype(np.int64))["x"].tolist()
        assert sorted(passes[3 + epoch]) == sorted(stored)


def test_the_same_seed_selects_the_same_samples_in_another_run(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    policy = selection.Schedule([(0, selection.Reservoir(n=100)), (2, selection.GradNorm(n=100))])
    runs = [replayed(make_pipeline(dataset, name=name, selection=policy)) for name in ("one", "two")]
    first, second = ([run.selection(i) for i in range(6)] for run in runs)
    assert all(a.equals(b) for a, b in zip(first, second, strict=True))
    assert first[3].columns == ["key", "weight", "score"] and first[3]["weight"].n_unique() > 50


@pytest.mark.parametrize("events", [6, 14])
def test_what_a_selection_remembers_survives_an_interruption(
    ws: dk.Workspace, dataset: dk.Dataset, events: int
) -> None:
    remembering = selection.Replay(old=selection.Reservoir(n=100), new=selection.RandomWithoutReuse(n=50))
    policy = selection.Schedule([(0, remembering), (3, selection.Freshness(0.4, n=200))])
    undisturbed = replayed(make_pipeline(dataset, selection=policy))
    stream = make_pipeline(dataset, selection=policy).replay()
    for _ in range(events):
        event = next(stream)
    stream.close()
    run = ws.run(event.run)
    assert run.resume().wait(120) == "finished", run.error
    assert all(run.selection(i).equals(undisturbed.selection(i)) for i in range(6))


def test_the_guide_of_selections_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    composing, running, own = blocks_of("choose-samples.md")
    exec(composing, names)
    body, last = running.strip().rsplit("\n", 1)
    exec(body, names)
    chosen = eval(last, names)
    assert chosen.height == 500 and (chosen["key"] >= 2000).all()
    assert chosen["weight"].n_unique() > 400
    exec(own, names)
    pool = STREAM.with_columns(length=pl.col("key") % 97)
    assert picked(names["longest"], pool, [300])["weight"].max() == pytest.approx(9.6)


def test_the_guide_names_every_selection() -> None:
    guide = (DOCS / "guides" / "choose-samples.md").read_text()
    assert [name for name in selection.__all__ if f"{name}" not in guide] == []
