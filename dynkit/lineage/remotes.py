"""Share models between workspaces: a remote is the directory of another workspace, or is kept in a bucket.

Only what the other side lacks is copied, parents first, each model with its origin, edges, tags and notes in one
transaction: an interrupted transfer leaves whole models, and the next one goes on. The tensors are checked against
their identities on arrival, and stored there as differences from what is there. Histories that went apart are united as
graphs; a name moves only to a model that comes from the one that it means, else it is reported and stays.

A pull also keeps the names of the other side as ``<remote>/<name>``. Functions that made models travel with them and,
as everywhere, run only when somebody asks to build or test.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch

from dynkit.catalog import (
    FEW,
    Catalog,
    edges,
    insert_missing,
    models,
    names,
    notes,
    origins,
    remotes,
    results,
    tensors,
    tests,
    upsert,
)
from dynkit.errors import Conflict, InvalidInput, NotFound, StorageError, did_you_mean
from dynkit.lineage.buckets import Bucket, OvertakenError, is_url
from dynkit.lineage.display import Shown, bytes_text, short, watched
from dynkit.lineage.graph import KINDS, all_edges, in_order, reachable
from dynkit.lineage.origins import Origin, insert_origin, origins_of
from dynkit.lineage.storing import put
from dynkit.models import ModelStore
from dynkit.models.records import resolved
from dynkit.models.writing import key_of

__all__ = ["Transfer", "add_remote", "check_clone", "pull", "push"]


@dataclass(frozen=True, repr=False)
class Transfer(Shown):
    """What a push or pull did.

    Parameters
    ----------
    source, target : str
        Directory or URL.
    models : tuple of str
        That were copied.
    known : int
        Models that were there already.
    size_bytes : int
        Of the tensors that were not there.
    edges : int
        New ones.
    names : dict
        Name to (model before, model after) of those that moved.
    rejected : dict
        Name to (model there, model here) of those that went apart.
    """

    source: str
    target: str
    models: tuple[str, ...]
    known: int
    size_bytes: int
    edges: int
    names: dict[str, tuple[str | None, str]]
    rejected: dict[str, tuple[str, str]]

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        facts = [f"from {self.source}", f"to {self.target}", f"{self.known} were there, {self.edges} new edges"]
        if self.rejected:
            facts.append("names that went apart stay; merge the two models and give the result the name")
        rows = [
            *(("moved", name, short(old), short(new)) for name, (old, new) in self.names.items()),
            *(("apart", name, short(old), short(new)) for name, (old, new) in self.rejected.items()),
        ]
        title = f"{len(self.models)} models, {bytes_text(self.size_bytes)} of tensors"
        return title, facts, ("", "name", "there", "offered"), rows


def add_remote(catalog: Catalog, name: str, location: str | PathLike[str]) -> None:
    """Remember a workspace by a name.

    Raises
    ------
    InvalidInput, NotFound, StorageError
    """
    if not isinstance(name, str) or not name or "/" in name:
        raise InvalidInput(f"remote name {name!r} must be text without '/', such as 'origin'")
    url = _url(location)
    with catalog.write() as connection:
        upsert(connection, remotes, {"name": name, "url": url})


def check_clone(source: str | PathLike[str], path: str | PathLike[str]) -> None:
    """Make sure that there is a workspace, and at `path` none, or one that began as a clone of it.

    Raises
    ------
    NotFound, StorageError, Conflict
    """
    if is_url(source):
        Bucket(str(source)).check()
    url = _url(source)
    try:
        there = Catalog.existing(path)
    except NotFound:
        return
    with there.read() as connection:
        origin = connection.scalar(sa.select(remotes.c.url).where(remotes.c.name == "origin"))
    if origin != url:
        raise Conflict(f"there is a workspace at {there.root} already; pull from {source} there, or clone elsewhere")


def _url(location: str | PathLike[str]) -> str:
    return Bucket(str(location)).url if is_url(location) else str(Catalog.existing(location).root)


def push(catalog: Catalog, remote: str, wanted: Iterable[str] | None) -> Transfer:
    """Copy models to a remote."""
    location = _location(catalog, remote)
    if not is_url(location):
        return _transfer(catalog, Catalog.existing(location), _Job(wanted))
    bucket, job = Bucket(location), _Job(None if wanted is None else list(wanted))
    while True:
        with bucket.opened(_cache(catalog), create=True) as target:
            saved = len(job.copied)

            def save(target: Catalog = target) -> None:
                nonlocal saved
                if bucket.save(target):
                    saved = len(job.copied)

            try:
                done = _transfer(catalog, target, job, save)
                bucket.save(target, last=True)
            except OvertakenError:
                del job.copied[saved:]
                continue
            bucket.tidy(target)
            return dataclasses.replace(done, target=location)


def pull(catalog: Catalog, remote: str, wanted: Iterable[str] | None) -> Transfer:
    """Copy models from a remote; its names are kept behind the remote's, too."""
    location = _location(catalog, remote)
    job = _Job(wanted, prefix=remote)
    if not is_url(location):
        return _transfer(Catalog.existing(location), catalog, job)
    with Bucket(location).opened(_cache(catalog)) as source:
        return dataclasses.replace(_transfer(source, catalog, job), source=location)


def _location(catalog: Catalog, name: str) -> str:
    with catalog.read() as connection:
        known = {row.name: row.url for row in connection.execute(sa.select(remotes))}
    if name not in known:
        raise NotFound(f"no remote {name!r}{did_you_mean(name, known)}; ws.lineage.add_remote(name, path) adds one")
    return str(known[name])


def _cache(catalog: Catalog) -> Path:
    return catalog.root / "cache" / "remotes"


@dataclass(frozen=True)
class _Copy:
    """A model that was copied, bytes of its tensors that were not there, and its edges."""

    model: str
    size_bytes: int
    edges: int


@dataclass(frozen=True)
class _Job:
    """What to copy (None: all), where to keep the source's names (None: nowhere), and what was copied until now."""

    wanted: Iterable[str] | None
    prefix: str | None = None
    copied: list[_Copy] = field(default_factory=list)


def _transfer(source: Catalog, target: Catalog, job: _Job, save: Callable[[], None] = lambda: None) -> Transfer:
    """Copy models with all they come from, and unite the graphs; after each model, `save`."""
    if source.where == target.where:
        raise Conflict(f"{source.root} is this workspace itself")
    here, there = ModelStore(source), ModelStore(target)
    with source.read() as connection:
        every = set(connection.scalars(sa.select(models.c.id)))
        if job.wanted is not None:
            given = {resolved(connection, model) for model in job.wanted}
            every = given | reachable(connection, given, up=True, kinds=KINDS)
        order = in_order(connection, every)
        parents: dict[str, list[str]] = {model: [] for model in order}
        for parent, child in all_edges(connection, ("derived",), within=every):
            parents[child].append(parent)
    with target.read() as connection:
        known = every & set(connection.scalars(sa.select(models.c.id)))
        stored = set(connection.scalars(sa.select(tensors.c.key)))
    for model in watched([model for model in order if model not in known], "copy models"):
        state, manifest = here.load(model), here.manifest(model)
        keys = {key_of(bytes.fromhex(identity)): name for name, identity in manifest.items()}
        size_bytes = sum(state[keys[key]].nbytes for key in keys.keys() - stored)
        stored |= keys.keys()
        n_edges = _copy(
            there,
            model,
            state,
            here.metadata(model),
            _facts(source, {model}),
            [p for p in parents[model] if p in known],
        )
        known.add(model)
        job.copied.append(_Copy(model, size_bytes, n_edges))
        save()
    facts = _facts(source, every)
    with target.write() as connection:
        n_edges = _write(connection, facts)
        _copy_tests(connection, source)
        moved, apart = _move_names(connection, facts.names, job.prefix)
    copied = job.copied
    return Transfer(
        str(source.root),
        str(target.root),
        tuple(one.model for one in copied),
        len(every) - len(copied),
        sum(one.size_bytes for one in copied),
        n_edges + sum(one.edges for one in copied),
        moved,
        apart,
    )


def _copy(
    store: ModelStore,
    model: str,
    state: dict[str, torch.Tensor],
    metadata: dict[str, Any],
    facts: "_Facts",
    parents: Sequence[str],
) -> int:
    """Store a model with what belongs to it; return the number of its edges."""
    written: list[int] = []

    def also(connection: sa.Connection, arrived: str) -> None:
        if arrived != model:
            raise StorageError(
                f"model {model[:12]} arrived as {arrived[:12]}; run ws.models.fsck(deep=True) where it is"
            )
        values = {"created_ns": facts.ages[model]}
        connection.execute(sa.update(models).where(models.c.id == model).values(**values))
        written.append(_write(connection, facts))

    put(store, state, also, parents, metadata=metadata)
    return written[-1]


@dataclass(frozen=True)
class _Facts:
    """What belongs to some models besides tensors."""

    ages: dict[str, int]
    edges: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    origins: list[tuple[Origin, bytes | None]]
    results: list[dict[str, Any]]
    names: dict[str, str]


def _facts(catalog: Catalog, some: set[str]) -> _Facts:
    with catalog.read() as connection:

        def rows(table: sa.Table, column: Any, *conditions: Any) -> list[dict[str, Any]]:
            query = sa.select(table).where(*conditions)
            if len(some) == 1:
                query = query.where(column.in_(some))
            return [row._asdict() for row in connection.execute(query) if row._asdict()[column.name] in some]

        others = tuple(f"{remote}/" for remote in connection.scalars(sa.select(remotes.c.name)))  # names that they gave
        codes = {row["id"]: row["code"] for row in rows(origins, origins.c.model)}
        return _Facts(
            {row["id"]: row["created_ns"] for row in rows(models, models.c.id)},
            rows(edges, edges.c.child),
            rows(notes, notes.c.model),
            [(one, codes.get(one.number)) for one in origins_of(connection, some)],
            rows(results, results.c.model, results.c.dataset_version == 0),  # versions of datasets differ elsewhere
            {row["name"]: row["model"] for row in rows(names, names.c.model) if not row["name"].startswith(others)},
        )


def _write(connection: sa.Connection, facts: _Facts) -> int:
    """Add what is not there; return the number of new edges."""
    ends = {row[end] for row in facts.edges for end in ("parent", "child")}
    some = models.c.id.in_(ends) if len(ends) <= FEW else sa.true()
    there = set(connection.scalars(sa.select(models.c.id).where(some)))
    new = insert_missing(connection, edges, [row for row in facts.edges if {row["parent"], row["child"]} <= there])
    insert_missing(connection, notes, facts.notes)
    insert_missing(connection, results, facts.results)
    known = {_key(form) for one in origins_of(connection, set(facts.ages)) for form in (one, _told(one))}
    for one, code in facts.origins:
        told = _told(one)
        if _key(one) not in known and _key(told) not in known:
            insert_origin(connection, told, code)
            known.add(_key(told))
    return new


def _told(origin: Origin) -> Origin:
    """Return an origin as another workspace keeps it: a run stays where it is, what it was is told."""
    if origin.training is None:
        return origin
    day = time.strftime("%Y-%m-%d", time.gmtime(origin.created_ns / 1e9))
    recipe = {"how": f"{origin} on {day}", "pipeline": origin.recipe, "seed": origin.seed}
    return dataclasses.replace(origin, how="pulled", run=None, index=None, recipe=recipe)


def _key(origin: Origin) -> tuple[Any, ...]:
    return origin.model, origin.how, origin.parents, origin.training, origin.digest, json.dumps(origin.recipe)


def _copy_tests(connection: sa.Connection, source: Catalog) -> None:
    """Take over tests whose names are free."""
    with source.read() as other:
        rows = [row._asdict() for row in other.execute(sa.select(tests))]
    insert_missing(connection, tests, rows)


def _move_names(
    connection: sa.Connection, offered: dict[str, str], prefix: str | None
) -> tuple[dict[str, tuple[str | None, str]], dict[str, tuple[str, str]]]:
    """Compare and swap, in the transaction: a free name is taken, one that means an ancestor moves."""
    moved: dict[str, tuple[str | None, str]] = {}
    apart: dict[str, tuple[str, str]] = {}
    holders = {row.name: row.model for row in connection.execute(sa.select(names))}

    def give(name: str, model: str) -> None:
        row = {"name": name, "model": model, "changed_ns": time.time_ns()}
        upsert(connection, names, row)

    for name, model in offered.items():
        if prefix is not None and holders.get(f"{prefix}/{name}") != model:
            give(f"{prefix}/{name}", model)
        holder = holders.get(name)
        if holder == model:
            continue
        if holder is None or holder in reachable(connection, [model], up=True, kinds=KINDS):
            give(name, model)
            moved[name] = holder, model
        elif model not in reachable(connection, [holder], up=True, kinds=KINDS):
            apart[name] = holder, model
    return moved, apart
