"""How each model came to be: by a trigger of a run, or by what somebody added, made, merged or rebuilt.

A trigger's origin is its row in `triggers`, its run's declaration and its stored selection; the others are rows of
`origins`. Equal models trained twice are one model with two origins.
"""

import json
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import networkx as nx
import sqlalchemy as sa

from dynkit.catalog import FEW, origins, runs, triggers
from dynkit.lineage.graph import acyclic

__all__ = ["Origin", "environment_of", "facts", "insert_origin", "origins_of", "parents_first"]

_PACKAGES = ("dynkit", "torch", "numpy", "polars")


@dataclass(frozen=True)
class Origin:
    """One way in which a model came to be.

    Parameters
    ----------
    model : str
    how : str
        ``"trained"`` by a run; ``"added"``, ``"made"`` by a function, ``"merged"`` or ``"rebuilt"`` by somebody.
    parents : tuple of str
        Models it was trained or made from, in order.
    run, index : str and int, or None
        Whose trigger's recipe and samples it has.
    dataset, dataset_version : str and int, or None
        Where the samples were read.
    samples : int
        Number of samples selected, validation included.
    selection : str
        BLAKE3 of their keys and weights.
    recipe : dict
        The pipeline as declared, or operator and parameters.
    seed : int or None
    digest : str
        Identity of the code and parameters.
    seconds : float
        Spent training or making it.
    created_ns : int
        When the run, or this, began.
    number : int or None
        Its row in `origins`.
    """

    model: str
    how: str
    parents: tuple[str, ...] = ()
    run: str | None = None
    index: int | None = None
    dataset: str | None = None
    dataset_version: int | None = None
    samples: int = 0
    selection: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    digest: str = ""
    seconds: float = 0.0
    created_ns: int = 0
    number: int | None = None

    @property
    def training(self) -> tuple[str, int] | None:
        """The trigger (run, index) whose samples it has, if any."""
        return None if self.run is None or self.index is None else (self.run, self.index)

    def __str__(self) -> str:
        if self.training is not None:
            what = f"{self.how} by run {self.run} at trigger {self.index}"
            where = f"{self.samples:,} samples of {self.dataset} version {self.dataset_version}, seed {self.seed}"
            return f"{what} on {where}"
        return f"{self.how}: {self.recipe.get('how', json.dumps(self.recipe))}"


def origins_of(
    connection: sa.Connection, models: Collection[str] | None = None, *, dataset: str | None = None
) -> list[Origin]:
    """Origins in the order of time: of these models, or on this dataset, or all.

    Parameters
    ----------
    connection : Connection
    models : collection of str or None
    dataset : str or None
    """
    of_run = (runs.c.dataset, runs.c.pipeline, runs.c.digest, runs.c.created_ns)
    trained = sa.select(triggers, *of_run).join(runs, runs.c.id == triggers.c.run)
    again: sa.Select[Any] = sa.select(
        origins,
        *(triggers.c[name] for name in ("dataset_version", "samples", "selection")),
        *(runs.c[name].label(f"run_{name}") for name in ("dataset", "pipeline", "digest")),
    ).select_from(
        origins.outerjoin(
            triggers, sa.and_(triggers.c.run == origins.c.run, triggers.c["index"] == origins.c["index"])
        ).outerjoin(runs, runs.c.id == origins.c.run)
    )
    if dataset is not None:
        trained, again = trained.where(runs.c.dataset == dataset), again.where(runs.c.dataset == dataset)
    if models is not None and len(models) <= FEW:
        trained = trained.where(triggers.c.model.in_(models))
        again = again.where(origins.c.model.in_(models))
    found = [
        *map(_of_trigger, connection.execute(trained)),
        *map(_of_row, connection.execute(again)),
    ]
    if models is not None:
        found = [origin for origin in found if origin.model in models]
    return sorted(found, key=lambda one: (one.created_ns, one.run or "", one.index or 0, one.number or 0))


def parents_first(found: Sequence[Origin]) -> list[Origin]:
    """Sort origins so that those of its parents come before each one, whatever clocks they were made by.

    Where trainings came back to a model that was there before, the order of time, as given, says what was first.
    """
    makes: dict[str, list[int]] = {}
    for i, one in enumerate(found):
        makes.setdefault(one.model, []).append(i)
    pairs = ((i, j) for j, one in enumerate(found) for parent in one.parents for i in makes.get(parent, ()))
    graph = acyclic(pairs, {i: i for i in range(len(found))})
    graph.add_nodes_from(range(len(found)))
    return [found[i] for i in nx.lexicographical_topological_sort(graph)]


def _of_trigger(row: Any) -> Origin:
    return Origin(
        model=row.model,
        how="trained",
        parents=() if row.parent is None else (row.parent,),
        run=row.run,
        index=row._mapping["index"],
        dataset=row.dataset,
        dataset_version=row.dataset_version,
        samples=row.samples,
        selection=row.selection,
        recipe=row.pipeline,
        seed=row.pipeline.get("seed"),
        digest=row.digest,
        seconds=row.train_s,
        created_ns=row.created_ns,
    )


def _of_row(row: Any) -> Origin:
    known = row._mapping
    return Origin(
        model=row.model,
        how=row.how,
        parents=tuple(row.parents),
        run=row.run,
        index=known["index"],
        dataset=row.run_dataset,
        dataset_version=row.dataset_version,
        samples=row.samples or 0,
        selection=row.selection or "",
        recipe=row.run_pipeline or row.recipe,
        seed=(row.run_pipeline or {}).get("seed"),
        digest=row.run_digest or row.digest,
        seconds=row.seconds,
        created_ns=row.created_ns,
        number=row.id,
    )


def insert_origin(connection: sa.Connection, origin: Origin, code: bytes | None = None) -> None:
    """Write an origin that is no trigger's."""
    row = {
        "model": origin.model,
        "how": origin.how,
        "parents": list(origin.parents),
        "recipe": {} if origin.run else origin.recipe,
        "code": code,
        "digest": origin.digest,
        "run": origin.run,
        "index": origin.index,
        "environment": facts(),
        "seconds": origin.seconds,
        "created_ns": origin.created_ns,
    }
    connection.execute(sa.insert(origins), row)


@cache
def facts() -> dict[str, Any]:
    """Return what a result may depend on besides code and data: versions and platform."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages}


def environment_of(connection: sa.Connection, root: Path, origin: Origin) -> dict[str, Any]:
    """Return the `facts` at the time of an origin; empty when they were not kept."""
    if origin.number is not None:
        query = sa.select(origins.c.environment).where(origins.c.id == origin.number)
        return dict(connection.scalar(query) or {})
    try:
        kept = json.loads((root / "runs" / str(origin.run) / "environment.json").read_text())
    except OSError:
        return {}
    return {name: kept[name] for name in ("python", "platform", "packages", "torch_threads") if name in kept}
