"""What is known of models, for people: `Log` lists them, `Card` shows one with everything."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa

from dynkit.catalog import FEW, edges, evaluations, models, names, notes, origins, results, runs, tests, triggers
from dynkit.lineage.display import Shown, cell, instant, short
from dynkit.lineage.graph import reachable, versions
from dynkit.lineage.origins import Origin, environment_of, origins_of
from dynkit.lineage.samples import read_selection

__all__ = ["Card", "Entry", "Log", "card", "log", "search"]


@dataclass(frozen=True)
class Entry:
    """A line of the log."""

    model: str
    created_ns: int
    names: tuple[str, ...]
    tags: tuple[str, ...]
    parents: tuple[str, ...]
    origin: str


@dataclass(frozen=True, repr=False)
class Log(Shown):
    """Models, newest first; a sequence of entries."""

    entries: tuple[Entry, ...]
    total: int

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __getitem__(self, i: int) -> Entry:
        return self.entries[i]

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        columns = ("model", "stored (UTC)", "names", "tags", "parents", "origin")
        rows = [
            (
                short(one.model),
                instant(one.created_ns),
                ", ".join(one.names),
                ", ".join(one.tags),
                " ".join(map(short, one.parents)),
                one.origin,
            )
            for one in self.entries
        ]
        title = f"{self.total:,} models" if len(rows) == self.total else f"{len(rows):,} of {self.total:,} models"
        return title, [], columns, rows


def log(connection: sa.Connection, limit: int | None, only: Collection[str] | None = None) -> Log:
    """List the newest models, all or some."""
    total = connection.scalar(sa.select(sa.func.count()).select_from(models)) if only is None else len(only)
    query = sa.select(models.c.id, models.c.created_ns).order_by(models.c.created_ns.desc(), models.c.id)
    if only is not None and len(only) <= FEW:
        query = query.where(models.c.id.in_(only))
    elif only is None and limit is not None:
        query = query.limit(limit)
    found = [tuple(row) for row in connection.execute(query) if only is None or row.id in only]
    if limit is not None:
        found = found[:limit]
    chosen = {model for model, _ in found}

    def lists(key: Any, value: Any, *conditions: Any) -> dict[str, list[str]]:
        chosen_only = (key.in_(chosen),) if len(chosen) <= FEW else ()
        lists: dict[str, list[str]] = {}
        for model, text in connection.execute(sa.select(key, value).where(*chosen_only, *conditions).distinct()):
            lists.setdefault(model, []).append(text)
        return lists

    called = lists(names.c.model, names.c.name)
    tagged = lists(notes.c.model, notes.c.text, notes.c.kind == "tag")
    parents = lists(edges.c.child, edges.c.parent, edges.c.kind == "derived")
    trained = lists(triggers.c.model, triggers.c.run + " #" + sa.cast(triggers.c["index"], sa.String))
    made = lists(origins.c.model, origins.c.how)
    entries = (
        Entry(
            model,
            created_ns,
            tuple(sorted(called.get(model, ()))),
            tuple(sorted(tagged.get(model, ()))),
            tuple(parents.get(model, ())),
            ", ".join([*(f"run {one}" for one in trained.get(model, ())), *made.get(model, ())]),
        )
        for model, created_ns in found
    )
    return Log(tuple(entries), total or 0)


def search(connection: sa.Connection, text: str | None, tag: str | None, run: str | None, dataset: str | None) -> Log:
    """List the models for which all that is given holds; `text` is in a name, a tag, a note or begins the identity."""
    chosen: list[Any] = []
    if text is not None:
        chosen.append(
            sa.union(
                sa.select(models.c.id).where(models.c.id.istartswith(text, autoescape=True)),
                sa.select(names.c.model).where(names.c.name.icontains(text, autoescape=True)),
                sa.select(notes.c.model).where(notes.c.text.icontains(text, autoescape=True)),
            )
        )
    if tag is not None:
        chosen.append(sa.select(notes.c.model).where(notes.c.kind == "tag", notes.c.text == tag))
    trained, again = (sa.select(one.c.model).join(runs, runs.c.id == one.c.run) for one in (triggers, origins))
    if run is not None:
        chosen.append(trained.where(sa.or_(runs.c.id == run, runs.c.name == run)))
    if dataset is not None:
        chosen.append(sa.union(trained.where(runs.c.dataset == dataset), again.where(runs.c.dataset == dataset)))
    query = sa.select(models.c.id).where(*(models.c.id.in_(one) for one in chosen))
    return log(connection, None, set(connection.scalars(query)))


@dataclass(frozen=True, repr=False)
class Card(Shown):
    """All that is known of one model.

    Parameters
    ----------
    model : str
    created_ns : int
    names, tags, notes : tuple of str
    parents, children : tuple of str
        By `derived` edges.
    versions : tuple of str
        Its versions, itself included, oldest first.
    ancestors, descendants : int
        How many.
    origins : tuple of Origin
        How it came to be: dataset version, recipe, seed, digest of the code.
    environment : dict
        Versions and platform at the first origin.
    metrics : pl.DataFrame
        run, metric, mean over windows, windows.
    tests : pl.DataFrame
        test, passed, value, dataset_version.
    """

    model: str
    created_ns: int
    names: tuple[str, ...]
    tags: tuple[str, ...]
    notes: tuple[str, ...]
    parents: tuple[str, ...]
    children: tuple[str, ...]
    versions: tuple[str, ...]
    ancestors: int
    descendants: int
    origins: tuple[Origin, ...]
    environment: dict[str, Any]
    metrics: pl.DataFrame
    tests: pl.DataFrame
    root: Path

    def samples(self) -> pl.DataFrame:
        """Keys and weights that it was trained on, of all its origins: run, index, key, weight."""
        frames = []
        for origin in self.origins:
            if origin.training is not None:
                frame = read_selection(self.root, *origin.training)
                weight = pl.col("weight").cast(pl.Float64) if "weight" in frame.columns else pl.lit(1.0)
                index = pl.lit(origin.index, pl.Int64).alias("index")
                frames.append(frame.select(pl.lit(origin.run).alias("run"), index, "key", weight.alias("weight")))
        schema = {"run": pl.String, "index": pl.Int64, "key": pl.Int64, "weight": pl.Float64}
        return pl.concat(frames) if frames else pl.DataFrame(schema=schema)

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        place = self.versions.index(self.model) + 1
        facts = [
            f"stored {instant(self.created_ns)} UTC, version {place} of {len(self.versions)}",
            f"{len(self.parents)} parents, {self.ancestors} ancestors, {self.descendants} descendants",
            *(str(origin) for origin in self.origins),
            *(f"note: {note}" for note in self.notes),
            *(f"{name}: {cell(value)}" for name, value in self.environment.items() if name == "platform"),
        ]
        if self.tags:
            facts.insert(0, "tags: " + ", ".join(self.tags))
        rows = [
            *(
                ("metric", row["metric"], f"run {row['run']}", row["mean"])
                for row in self.metrics.iter_rows(named=True)
            ),
            *(("test", row["test"], _verdict(row["passed"]), row["value"]) for row in self.tests.iter_rows(named=True)),
        ]
        title = f"model {self.model[:12]}" + (f" ({', '.join(self.names)})" if self.names else "")
        return title, facts, ("kind", "name", "of", "value"), rows


def _verdict(passed: bool | None) -> str:
    return {True: "passed", False: "failed", None: "not tested"}[passed]


def card(connection: sa.Connection, root: Path, model: str) -> Card:
    """Collect all that is known of a model."""

    def column(query: Any) -> tuple[str, ...]:
        return tuple(dict.fromkeys(connection.scalars(query)))

    derived = edges.c.kind == "derived"
    found = origins_of(connection, {model})
    mean = sa.func.avg(evaluations.c.value), sa.func.count(evaluations.c.value)
    metrics = (
        sa.select(evaluations.c.run, evaluations.c.metric, *mean)
        .where(evaluations.c.model == model, evaluations.c.slice == "")
        .group_by(evaluations.c.run, evaluations.c.metric)
        .order_by(evaluations.c.run, sa.func.min(evaluations.c.metric_index))
    )
    tested = sa.select(results.c.test, results.c.passed, results.c.value, results.c.dataset_version)
    tested = tested.outerjoin(tests, tests.c.name == results.c.test)
    tested = tested.where(sa.or_(tests.c.digest.is_(None), tests.c.digest == results.c.digest))  # of the code now
    by_metric = {"run": pl.String, "metric": pl.String, "mean": pl.Float64, "windows": pl.Int64}
    by_test = {"test": pl.String, "passed": pl.Boolean, "value": pl.Float64, "dataset_version": pl.Int64}
    return Card(
        model=model,
        created_ns=connection.scalar(sa.select(models.c.created_ns).where(models.c.id == model)) or 0,
        names=column(sa.select(names.c.name).where(names.c.model == model).order_by(names.c.name)),
        tags=column(_texts(model, "tag")),
        notes=column(_texts(model, "note")),
        parents=column(sa.select(edges.c.parent).where(edges.c.child == model, derived).order_by(edges.c.parent)),
        children=column(sa.select(edges.c.child).where(edges.c.parent == model, derived).order_by(edges.c.child)),
        versions=tuple(versions(connection, model)),
        ancestors=len(reachable(connection, [model], up=True) - {model}),
        descendants=len(reachable(connection, [model], up=False) - {model}),
        origins=tuple(found),
        environment=environment_of(connection, root, found[0]) if found else {},
        metrics=_frame(connection.execute(metrics), by_metric),
        tests=_frame(connection.execute(tested.where(results.c.model == model)), by_test),
        root=root,
    )


def _texts(model: str, kind: str) -> Any:
    return sa.select(notes.c.text).where(notes.c.model == model, notes.c.kind == kind).order_by(notes.c.created_ns)


def _frame(rows: Any, schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([tuple(row) for row in rows], schema=schema, orient="row")
