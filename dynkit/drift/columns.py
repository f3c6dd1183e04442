"""Compare two tables column by column: all columns at once, with the false-discovery rate of all of them in hand.

Missing values are left out of numeric columns and are a category of their own in others. A column counts as drifted
when its p-value stands out among those of all columns and the change is large enough to matter: with a million rows
every change is significant, and few matter.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl
import scipy  # its parts load at first use

from dynkit.errors import InvalidInput, NotFound, did_you_mean

__all__ = [
    "BINS",
    "check_level",
    "chi2",
    "columns",
    "hellinger",
    "js",
    "ks_p_values",
    "psi",
    "quantile_edges",
    "same_columns",
]

Numbers = np.ndarray[tuple[int], np.dtype[Any]]
Found = tuple[float, float]  # effect size and p-value

BINS = 10
_EXPECTED = 5  # fewer in a cell, and the chi-square distribution does not hold
_EPSILON = 1e-4  # share of an empty bin in the PSI
_EFFECT = {"ks": 0.1, "chi2": 0.1, "psi": 0.25, "js": 0.1, "hellinger": 0.1, "wasserstein": 0.1}


def columns(reference: Any, current: Any, test: str = "auto", *, level: float = 0.05) -> pl.DataFrame:
    """Compare each column of two tables.

    Parameters
    ----------
    reference, current : pl.DataFrame, or what makes one
        With the same columns.
    test : str
        ``"auto"`` is ``"ks"`` for numbers, dates and times and ``"chi2"`` for text, categories and booleans. ``"psi"``,
        ``"js"`` and ``"hellinger"`` compare shares of categories, or of ten bins between the reference's quantiles;
        ``"wasserstein"``, for numbers, is the distance in standard deviations of the reference.
    level : float
        Accepted share of false discoveries among the columns called drifted (Benjamini and Hochberg 1995).

    Returns
    -------
    pl.DataFrame
        One row a column, in the order of the table: column, test, score (effect size: 0 is the same), p_value and
        drifted. Drifted needs an adjusted p-value below `level` and a score of at least 0.1 (0.25 for ``"psi"``).
        Score and p_value are null where a column has no values to compare, or each category only a few times.

    Raises
    ------
    InvalidInput
        When the tables have different columns, or one of a type that has no order and no categories.
    NotFound
        When there is no such test.

    Notes
    -----
    P-values are those of the Kolmogorov-Smirnov distance for numbers, dates and times, and of the chi-square statistic
    for other columns, whatever the score: a score alone does not know how many samples it is of.

    Examples
    --------
    >>> import numpy as np, polars as pl
    >>> rng = np.random.default_rng(0)
    >>> old = pl.DataFrame({"a": rng.normal(size=2000), "b": ["x", "y"] * 1000})
    >>> new = old.with_columns(pl.col("a") + 1)
    >>> columns(old, new)["drifted"].to_list()
    [True, False]
    """
    if test != "auto" and test not in _EFFECT:
        raise NotFound(f"no column test {test!r}{did_you_mean(test, ['auto', *_EFFECT])}")
    check_level(level)
    old, new = same_columns(reference, current)
    tasks = [_task(old[name], new[name], test) for name in old.columns]
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dynkit-columns") as threads:
        found = list(threads.map(lambda task: _found(*task), tasks))
    scores = np.array([score for score, _ in found], np.float64)
    p_values = np.array([p_value for _, p_value in found], np.float64)
    effects = np.array([_EFFECT[name] for name, *_ in tasks], np.float64)
    result = pl.DataFrame(
        {
            "column": pl.Series(old.columns, dtype=pl.String),
            "test": pl.Series([name for name, *_ in tasks], dtype=pl.String),
            "score": scores,
            "p_value": p_values,
            "drifted": (_adjusted(p_values) < level) & (scores >= effects),
        }
    )
    return result.with_columns(pl.col("score", "p_value").fill_nan(None))


def check_level(level: float) -> None:
    """Refuse a level that is no probability."""
    if not isinstance(level, int | float) or not 0 < level < 1:
        raise InvalidInput(f"level={level!r} must be between 0 and 1, such as 0.05")


def same_columns(reference: Any, current: Any) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return both tables as frames, with the columns in the order of the first."""
    frames = []
    for name, table in (("reference", reference), ("current", current)):
        try:
            frames.append(table.collect() if isinstance(table, pl.LazyFrame) else pl.DataFrame(table))
        except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
            raise InvalidInput(f"{name} cannot be read as a table: {error}") from None
    old, new = frames
    lone = sorted(set(old.columns) ^ set(new.columns))
    if lone:
        raise InvalidInput(f"column {lone[0]!r} is in one of the tables only; select the columns that both have")
    return old, new.select(old.columns)


def ks_p_values(distances: Numbers, n: int, m: int) -> Numbers:
    """Probability of Kolmogorov-Smirnov distances as large between n and m samples.

    Asymptotic; never below that of the largest distance, which few samples have by chance: ``2 / binomial(n + m, n)``.
    """
    p_values: Numbers = scipy.stats.kstwo.sf(distances, max(1, np.round(n * m / (n + m))))
    ways = scipy.special.gammaln(n + m + 1) - scipy.special.gammaln(n + 1) - scipy.special.gammaln(m + 1)
    least = float(np.exp(max(np.log(2) - ways, -700.0)))
    return np.clip(p_values, min(1.0, least), 1)


def _task(old: pl.Series, new: pl.Series, test: str) -> tuple[str, pl.Series, pl.Series]:
    """Choose the test of a column; return it with what it compares."""
    old, new = _comparable(old, new)
    ordered = _ordered(old)
    if not ordered and (old.dtype.is_nested() or old.dtype in (pl.Object, pl.Binary)):
        raise InvalidInput(f"column {old.name!r} is {old.dtype}; leave it out, or compare it by drift.test")
    if test in ("ks", "wasserstein") and not ordered:
        raise InvalidInput(f"column {old.name!r} is {old.dtype}: {test!r} needs numbers; 'auto' takes any column")
    return ("ks" if ordered else "chi2") if test == "auto" else test, old, new


def _ordered(column: pl.Series) -> bool:
    return column.dtype.is_numeric() or column.dtype.is_temporal()


def _found(test: str, old: pl.Series, new: pl.Series) -> Found:
    """Score a column, and say how likely its change is by chance."""
    if _ordered(old):
        x, y = _values(old), _values(new)
        if not len(x) or not len(y):
            return np.nan, np.nan
        distance, p_value = _ks(x, y)
        if test == "ks":
            return distance, p_value
        if not (np.isfinite(x[[0, -1]]).all() and np.isfinite(y[[0, -1]]).all()):
            raise InvalidInput(f"column {old.name!r} has infinite values; {test!r} needs finite ones, 'ks' takes any")
        if test == "wasserstein":
            return _wasserstein(x, y), p_value
        counts = _bins(x, y)
        return (chi2(*counts)[0] if test == "chi2" else float(_SCORES[test](*counts))), p_value
    counts = _categories(old, new)
    if not counts[0].sum() or not counts[1].sum():
        return np.nan, np.nan
    effect, p_value = chi2(*counts)
    return (effect if test == "chi2" else float(_SCORES[test](*counts))), p_value


def _comparable(old: pl.Series, new: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return both columns in one unit."""
    if old.dtype == pl.Null or new.dtype == pl.Null:
        wanted = new.dtype if old.dtype == pl.Null else old.dtype
        old, new = old.cast(wanted), new.cast(wanted)
    for kinds, common in (((pl.Date, pl.Datetime), pl.Datetime("ns")), ((pl.Duration,), pl.Duration("ns"))):
        if old.dtype in kinds and new.dtype in kinds:
            return old.cast(common), new.cast(common)
    kinds_of = [(part.dtype.is_numeric(), part.dtype.is_temporal() and part.dtype.base_type()) for part in (old, new)]
    if kinds_of[0] != kinds_of[1]:
        raise InvalidInput(f"column {old.name!r} is {old.dtype} in reference and {new.dtype} in current; cast one")
    wide = (pl.Decimal, pl.Int128)
    if old.dtype in wide or new.dtype in wide:
        return old.cast(pl.Float64), new.cast(pl.Float64)
    return old, new


def _values(column: pl.Series) -> Numbers:
    """Return the values of an ordered column, sorted, without missing ones."""
    numbers = column.to_physical().drop_nulls().to_numpy()
    if numbers.dtype.kind == "f":
        numbers = numbers[~np.isnan(numbers)]
    return np.sort(numbers)


def _ks(x: Numbers, y: Numbers) -> Found:
    """Kolmogorov-Smirnov distance of sorted values."""
    n, m = len(x), len(y)
    # F - G is largest at a value of x, G - F at one of y; of equal values the last one counts and is the largest.
    above = np.arange(1, n + 1) / n - np.searchsorted(y, x, side="right") / m
    below = np.arange(1, m + 1) / m - np.searchsorted(x, y, side="right") / n
    distance = float(max(above.max(), below.max()))
    return distance, float(ks_p_values(np.array([distance]), n, m)[0])


def _wasserstein(x: Numbers, y: Numbers) -> float:
    """Wasserstein-1 distance of sorted values, in standard deviations of the reference."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    places = np.concatenate([x, y])
    places.sort(kind="stable")  # two sorted runs are merged
    below = [np.searchsorted(part, places[:-1], side="right") / len(part) for part in (x, y)]
    return float(np.abs(below[0] - below[1]) @ np.diff(places)) / (float(x.std()) or 1.0)


def _bins(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Count sorted values between the quantiles of the first."""
    edges = quantile_edges(x)
    counts = [np.diff(np.searchsorted(part, edges, side="right"), prepend=0, append=len(part)) for part in (x, y)]
    return counts[0], counts[1]


def quantile_edges(x: Numbers) -> Numbers:
    """Upper edges of bins between the quantiles of sorted values; the last bin has none."""
    quantiles = np.quantile(x, np.arange(1, BINS) / BINS)
    if x.dtype.kind == "f":  # what is next to a value differs from one precision to another
        quantiles = quantiles.astype(x.dtype)
    edges, times = np.unique(quantiles, return_counts=True)
    often = edges[(times > 1) | (edges == x[0])]  # a value this frequent has a bin of its own
    return np.unique(np.concatenate([edges, np.nextafter(often, -np.inf)]))


def _categories(old: pl.Series, new: pl.Series) -> tuple[Numbers, Numbers]:
    """Count categories; null is one."""
    counts = [
        part.cast(pl.String).rename("value").to_frame().group_by("value").agg(pl.len().alias(side))
        for part, side in ((old, "old"), (new, "new"))
    ]
    both = counts[0].join(counts[1], on="value", how="full", nulls_equal=True, coalesce=True).sort("value")
    return both["old"].fill_null(0).to_numpy().astype(np.int64), both["new"].fill_null(0).to_numpy().astype(np.int64)


def chi2(old: Numbers, new: Numbers) -> Found:
    """Cramer's V and the p-value of the chi-square test; rare categories are counted as one."""
    smaller = min(old.sum(), new.sum()) / (old.sum() + new.sum())
    rare = (old + new) * smaller < _EXPECTED
    table = np.stack([old, new])
    if rare.any():
        table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], axis=1)
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2:
        return (np.nan, np.nan) if rare.all() and len(old) > 1 else (0.0, 1.0)
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    square = float(((table - expected) ** 2 / expected).sum())
    return float((square / table.sum()) ** 0.5), float(scipy.stats.chi2.sf(square, table.shape[1] - 1))


def psi(old: Any, new: Any) -> Any:
    """Return the population stability index of counts (..., B)."""
    p, q = (np.maximum(side / side.sum(-1, keepdims=True), _EPSILON) for side in (old, new))
    return ((q - p) * np.log(q / p)).sum(-1)


def js(old: Any, new: Any) -> Any:
    """Jensen-Shannon distance to the base 2 of counts (..., B), from 0 to 1."""
    p, q = (side / side.sum(-1, keepdims=True) for side in (old, new))
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(side > 0, side * np.log2(side / middle), 0).sum(-1) for side in (p, q)]
    return np.maximum(0.0, (parts[0] + parts[1]) / 2) ** 0.5


def hellinger(old: Any, new: Any) -> Any:
    """Hellinger distance of counts (..., B), from 0 to 1."""
    p, q = (np.sqrt(side / side.sum(-1, keepdims=True)) for side in (old, new))
    return np.sqrt(((p - q) ** 2).sum(-1) / 2)


_SCORES: dict[str, Callable[[Any, Any], Any]] = {"psi": psi, "js": js, "hellinger": hellinger}


def _adjusted(p_values: Numbers) -> Numbers:
    """Adjust p-values so that a level is a false-discovery rate; NaN stays NaN."""
    adjusted = np.full_like(p_values, np.nan)
    there = ~np.isnan(p_values)
    if there.any():
        adjusted[there] = scipy.stats.false_discovery_control(p_values[there])
    return adjusted
