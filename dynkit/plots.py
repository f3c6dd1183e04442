"""Charts as pure functions of frames, drawn without a browser or a network.

A function takes frames as `Run` and `compare` return them and gives a `Figure`: an Altair chart with a static picture
of itself, which shows in a saved, exported or untrusted notebook and offline. Colours are Okabe and Ito's, told apart
by shape too; heat maps use cividis.
"""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl

from dynkit.errors import InvalidInput, StorageError, did_you_mean

__all__ = ["Figure", "composite", "cost", "decisions", "estimates", "matrix"]

_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
_WIDTH = 640
_SHORT_ID = 8
_NUMBER = ".6~g"  # as exact as it is, also where all values are one
_NUMBERS = alt.Axis(format=_NUMBER)
_TIMES = alt.Axis(
    format={
        "year": "%Y",
        "quarter": "%b %Y",
        "month": "%b %Y",
        "week": "%b %d",
        "date": "%b %d",
        "hours": "%b %d %H:%M",
        "minutes": "%H:%M",
        "seconds": "%H:%M:%S",
        "milliseconds": "%H:%M:%S.%L",
    },
    tickCount=8,
    labelOverlap=True,
)
_TIME = (pl.col("window_start") + (pl.col("window_end") - pl.col("window_start")) / 2).alias("time")


@dataclass(frozen=True)
class Figure:
    """An Altair chart that shows as a static picture wherever it is displayed.

    Parameters
    ----------
    chart : altair.TopLevelMixin
        The chart, for interactive use or changes of your own.
    title : str
        What it shows, in words; the picture's alternative text.
    """

    chart: Any
    title: str

    def svg(self) -> str:
        """Return the picture as SVG text."""
        out = io.StringIO()
        self.chart.save(out, format="svg")
        return out.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture; the suffix (.svg, .png, .pdf, .html, .json) says how."""
        suffix = Path(path).suffix.lstrip(".")
        if suffix not in {"svg", "png", "pdf", "html", "json"}:
            raise InvalidInput(f"{Path(path).name!r}: use the suffix .svg, .png, .pdf, .html or .json")
        try:
            self.chart.save(str(path), format=suffix, **({"inline": True} if suffix == "html" else {}))
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error

    def to_html(self) -> str:
        """Return the picture as an HTML figure that needs nothing from outside."""
        source = base64.b64encode(self.svg().encode()).decode()
        title = html.escape(self.title)
        return (
            f'<figure style="margin:0.5em 0"><img alt="{title}" style="max-width:100%;background:#fff" '
            f'src="data:image/svg+xml;base64,{source}"></figure>'
        )

    def __repr__(self) -> str:
        return f"Figure({self.title!r})"

    def _repr_html_(self) -> str:
        return self.to_html()


def matrix(frame: pl.DataFrame, metric: str | None = None) -> Figure:
    """Heat map of models x windows.

    Parameters
    ----------
    frame : pl.DataFrame
        As `Run.matrix`: window_start, window_end, model, metric, value; models in the order they were trained.
    metric : str or None
        Which one; None takes the first.
    """
    chosen, frame = _one_metric(frame, metric)
    models = frame["model"].unique(maintain_order=True).to_list()
    names = {model: f"{i + 1}: {model[:_SHORT_ID]}" for i, model in enumerate(models)}
    base = alt.Chart(_rows(frame.with_columns(pl.col("model").replace(names))), width=_WIDTH, height=alt.Step(22))
    title = f"{chosen} of each model (rows, in order of training) in each window"
    chart = base.mark_rect(stroke="#fff", strokeWidth=0.5).encode(
        x=alt.X(
            "window_start:T",
            title="window",
            scale=alt.Scale(type="utc"),
            axis=_TIMES,
        ),
        x2="window_end:T",
        y=alt.Y("model:N", title=None, sort=list(names.values())),
        color=alt.Color(
            "value:Q",
            title=chosen,
            scale=alt.Scale(scheme="cividis", zero=False),
            legend=alt.Legend(format=_NUMBER),
        ),
        tooltip=["model:N", "window_start:T", "window_end:T", alt.Tooltip("value:Q", format=".4f")],
    )
    return Figure(_styled(chart, title), title)


def composite(curves: Mapping[str, pl.DataFrame], metric: str | None = None, *, height: int = 280) -> Figure:
    """Line per pipeline: the score of its composite model in each window.

    Parameters
    ----------
    curves : mapping of name to frame
        Frames as `Run.composite` returns them.
    metric : str or None
        Which one, of the curves that have it; None takes the first that all have, else the first.
    height : int
        Pixels.
    """
    drawn = {name: curve for name, curve in curves.items() if curve.height}
    if not drawn:
        raise InvalidInput("no curve has a window; the runs trained no model that answers for one")
    if metric is None:
        of_all = set.intersection(*(set(curve["metric"]) for curve in drawn.values()))
        first = next(iter(drawn.values()))["metric"].unique(maintain_order=True).to_list()
        metric = next((name for name in first if name in of_all), first[0])
    chosen, every = _one_metric(
        pl.concat([curve.select(_TIME, "value", "metric", pipeline=pl.lit(name)) for name, curve in drawn.items()]),
        metric,
    )
    frame = every.drop("metric")
    names = frame["pipeline"].unique(maintain_order=True).to_list()
    colour = alt.Color("pipeline:N", sort=names, scale=alt.Scale(domain=names, range=_COLOURS), title=None)
    encoding: dict[str, Any] = {
        "x": alt.X(
            "time:T",
            title="middle of the window",
            scale=alt.Scale(type="utc"),
            axis=_TIMES,
        ),
        "y": alt.Y("value:Q", title=chosen, scale=alt.Scale(zero=False), axis=_NUMBERS),
        "color": colour,
        "tooltip": ["pipeline:N", "time:T", alt.Tooltip("value:Q", format=".4f")],
    }
    base = alt.Chart(_rows(frame), width=_WIDTH, height=height).encode(**encoding)
    points = base.mark_point(filled=True, size=45).encode(
        shape=alt.Shape("pipeline:N", sort=names, scale=alt.Scale(domain=names), title=None)
    )
    title = f"{chosen} of the composite model over time"
    return Figure(_styled(base.mark_line(strokeWidth=2) + points, title, names), title)


def cost(frame: pl.DataFrame, metric: str | None = None, *, by: str = "samples_trained") -> Figure:
    """Scatter of cost against score, a point per run.

    Parameters
    ----------
    frame : pl.DataFrame
        As ``compare(runs).frame``.
    metric : str or None
        Which one; None takes the first.
    by : str
        Column that is the cost: ``"samples_trained"``, ``"train_s"`` or ``"trainings"``.
    """
    chosen, frame = _one_metric(frame, metric)
    units = {
        "samples_trained": "samples trained on, all epochs",
        "train_s": "seconds of training",
        "trainings": "trainings",
    }
    if by not in units:
        raise InvalidInput(f"by={by!r} is not a cost{did_you_mean(by, units)}")
    names = frame["name"].to_list()
    base = alt.Chart(_rows(frame), width=_WIDTH, height=280).encode(
        x=alt.X(f"{by}:Q", title=units[by], axis=alt.Axis(format=",.8~r")),
        y=alt.Y("mean:Q", title=f"mean {chosen}", scale=alt.Scale(zero=False, padding=20), axis=_NUMBERS),
    )
    colour = alt.Color("name:N", sort=names, scale=alt.Scale(domain=names, range=_COLOURS), title=None)
    points = base.mark_point(filled=True, size=90).encode(
        color=colour,
        shape=alt.Shape("name:N", sort=names, scale=alt.Scale(domain=names), title=None),
        tooltip=["name:N", f"{by}:Q", alt.Tooltip("mean:Q", format=".4f")],
    )
    title = f"cost ({units[by]}) against mean {chosen}"
    return Figure(_styled(points, title, names), title)


def decisions(frame: pl.DataFrame) -> Figure:
    """Scores that triggers saw over time, the thresholds they were compared with, and where they fired.

    Parameters
    ----------
    frame : pl.DataFrame
        As `Run.decisions`. Of several triggers each has a chart of its own; where p-values decided, they are drawn.
    """
    seen = frame.filter(pl.col("score").is_not_null())
    if not seen.height:
        raise InvalidInput("no trigger has compared anything yet; triggers that only count have no scores")
    charts = []
    who = [name for name in ("voter", "trigger", "metric") if name in seen.columns]
    for key, some in seen.group_by(who, maintain_order=True):
        trigger = " ".join(str(part) for part in key if part is not None)
        what = "score"
        if "p_value" in some.columns and some["p_value"].null_count() == 0:
            what, some = "p-value", some.with_columns(score="p_value")
        data = _rows(some.select("timestamp", "score", "threshold", "fired"))
        base = alt.Chart(data, width=_WIDTH, height=180).encode(
            x=alt.X("timestamp:T", title=None, scale=alt.Scale(type="utc"), axis=_TIMES),
            tooltip=["timestamp:T", alt.Tooltip("score:Q", format=".4g"), alt.Tooltip("threshold:Q", format=".4g")],
        )
        line = base.mark_line(color=_COLOURS[0]).encode(
            y=alt.Y("score:Q", title=f"{trigger}: {what}", scale=alt.Scale(zero=False), axis=_NUMBERS)
        )
        limit = base.mark_line(color="#666", strokeDash=[4, 3], interpolate="step-before").encode(y="threshold:Q")
        fired = base.transform_filter("datum.fired").mark_point(
            filled=True, size=70, shape="triangle-up", color=_COLOURS[3], opacity=1
        )
        charts.append(line + limit + fired.encode(y="score:Q"))
    title = "scores that triggers saw, their thresholds (dashed), and where they fired (triangles)"
    return Figure(_styled(alt.vconcat(*charts), title), title)


def estimates(frame: pl.DataFrame, curve: pl.DataFrame | None = None) -> Figure:
    """Accuracy that was estimated without labels, with its 95 % band, beside the true one where labels have come.

    Parameters
    ----------
    frame : pl.DataFrame
        As `Run.decisions` of a run with a trigger ``Performance(labels="estimated")``.
    curve : pl.DataFrame or None
        As `Run.composite`: what the model in use really scored in each window.
    """
    if "low" not in frame.columns or not (seen := frame.filter(pl.col("low").is_not_null())).height:
        raise InvalidInput('no trigger has estimated anything; it needs a Performance(labels="estimated")')
    told = seen.select(pl.col("timestamp").alias("time"), "low", "high", value="score", accuracy=pl.lit("estimated"))
    parts, names = [told], ["estimated"]
    if curve is not None:
        true = _one_metric(curve, "accuracy")[1].select(_TIME, "value", accuracy=pl.lit("true"))
        parts, names = [told, true], ["estimated", "true"]
    data = pl.concat(parts, how="diagonal_relaxed")
    x = alt.X("time:T", title=None, scale=alt.Scale(type="utc"), axis=_TIMES)
    base = alt.Chart(_rows(data), width=_WIDTH, height=240).encode(x=x)
    band = base.transform_filter("datum.low != null").mark_area(opacity=0.2, color=_COLOURS[0])
    lines = base.mark_line(strokeWidth=2, point=True).encode(
        y=alt.Y("value:Q", title="accuracy", scale=alt.Scale(zero=False), axis=_NUMBERS),
        color=alt.Color("accuracy:N", sort=names, scale=alt.Scale(domain=names, range=_COLOURS), title=None),
        tooltip=["accuracy:N", "time:T", alt.Tooltip("value:Q", format=".3f"), "low:Q", "high:Q"],
    )
    title = "accuracy estimated without labels, with its 95 % band" + (
        ", and the true one" if curve is not None else ""
    )
    return Figure(_styled(band.encode(y="low:Q", y2="high:Q") + lines, title), title)


def _one_metric(frame: pl.DataFrame, metric: str | None) -> tuple[str, pl.DataFrame]:
    names = frame["metric"].unique(maintain_order=True).to_list()
    if not names:
        raise InvalidInput("there are no scores to draw; the run has no evaluated window yet")
    chosen = names[0] if metric is None else metric
    if chosen not in names:
        raise InvalidInput(f"metric {chosen!r} is not in the frame{did_you_mean(chosen, names)}")
    return chosen, frame.filter(pl.col("metric") == chosen)


def _rows(frame: pl.DataFrame) -> Any:
    """Inline data, times as ISO 8601 text in UTC; Altair's own row limit is for data that is not aggregated yet."""
    times = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.Datetime)]
    text = frame.with_columns(pl.col(times).dt.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"))
    return alt.InlineData(values=text.to_dicts())


def _styled(chart: Any, title: str, names: Sequence[str] = ()) -> Any:
    longest = max(map(len, names), default=0)
    columns = max(1, min(4, _WIDTH // (40 + 7 * longest)))  # of the legend, so that it is no wider than the chart
    return (
        chart.properties(title=alt.Title(title, anchor="start", fontSize=13), background="#ffffff", padding=12)
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=11,
            titleFontSize=11,
            gridColor="#e6e6e6",
            labelColor="#333",
            titleColor="#333",
            titlePadding=10,
        )
        .configure_legend(labelFontSize=11, titleFontSize=11, orient="bottom", columns=columns, labelLimit=_WIDTH)
    )
