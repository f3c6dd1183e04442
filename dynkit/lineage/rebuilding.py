"""Make a model anew from its origin: with other parents, or without some samples.

What a training needs of its pipeline is above this package; `Recipe` says what is asked of it, and the workspace
brings it along. A result is remembered under the identity of its recipe (code, trigger, parents, samples), so that
work that was interrupted goes on where it stopped, and nothing is trained twice.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cloudpickle
import polars as pl
import sqlalchemy as sa
import torch
from blake3 import blake3

from dynkit.catalog import Catalog, edges, insert_missing, models, origins, recipes, upsert
from dynkit.data import Dataset, Version
from dynkit.errors import Conflict, DynkitError, InvalidInput, NotFound, StorageError
from dynkit.evaluation.matrix import Scored
from dynkit.lineage.operators import merged
from dynkit.lineage.origins import Origin, origins_of
from dynkit.lineage.samples import content, read_selection, without
from dynkit.lineage.storing import put
from dynkit.models import ModelStore
from dynkit.time import IntArray
from dynkit.types import Window

__all__ = [
    "Built",
    "CannotBuildError",
    "Recipe",
    "Workshop",
    "as_group",
    "as_state",
    "call",
    "link",
    "pickled",
    "version_of",
]

State = dict[str, torch.Tensor]
_Training = tuple[Origin, tuple[str, ...], pl.DataFrame]  # with its parents, and samples


class CannotBuildError(Conflict):
    """A recipe that made a model once fails now."""


class Recipe(Protocol):
    """How a run trained and judged its models; see `dynkit.pipeline.recipe`."""

    @property
    def carries(self) -> bool:
        """Whether a training goes on with the optimizer of the one before."""

    def train(
        self, index: int, version: Version, chosen: pl.DataFrame, parent: State | None, carried: Any, /
    ) -> Any: ...

    def judge(
        self, states: dict[str, State], windows: Iterable[Window], version: Version, without: IntArray, /
    ) -> Iterator[tuple[Window, dict[str, Scored]]]: ...

    def module(self) -> torch.nn.Module: ...


@dataclass(frozen=True)
class Built:
    """A model that was made anew.

    Parameters
    ----------
    model : str
    selection : str
        BLAKE3 of the keys, weights and epochs it was trained on; empty when it was not trained.
    samples : int
    seconds : float
    details : dict
        Samples passed and reports of the training.
    """

    model: str
    selection: str
    samples: int
    seconds: float
    details: dict[str, Any]


def link(connection: sa.Connection, kind: str, parents: Iterable[str], child: str, run: str = "") -> None:
    """Add edges, unless they are there; a model is not its own parent."""
    rows = [{"parent": p, "child": child, "kind": kind, "run": run} for p in dict.fromkeys(parents) if p != child]
    insert_missing(connection, edges, rows)


def version_of(dataset: Dataset, number: int) -> Dataset:
    """Return the dataset at this version; when that was erased, at the oldest one after it."""
    try:
        return dataset.at(number)
    except NotFound:
        return dataset.at(min(one.number for one in dataset.versions() if one.number >= number))


def pickled(function: Any, what: str) -> bytes:
    """Pickle a function to be kept.

    Raises
    ------
    InvalidInput
    """
    try:
        return bytes(cloudpickle.dumps(function))
    except Exception as error:
        raise InvalidInput(f"the {what} {function!r:.80} cannot be kept: {error}") from error


def call(code: bytes, parents: Iterable[State]) -> Any:
    """Call the pickled function of an origin."""
    return cloudpickle.loads(code)(*parents)


def as_state(made: Any) -> State:
    """Return the tensors of what a function made."""
    state = made.state_dict() if isinstance(made, torch.nn.Module) else made
    if not isinstance(state, Mapping):
        raise InvalidInput(f"the function that makes a model returned {type(made).__name__}; expected a state dict")
    return dict(state)


def as_group(made: Any) -> dict[str, State]:
    """Return the members of what a function made."""
    if not isinstance(made, Mapping) or not made or not all(isinstance(name, str) for name in made):
        raise InvalidInput("the function of a group must return a mapping of names to modules or state dicts")
    return {name: as_state(one) for name, one in made.items()}


class Workshop:
    """Rebuilds models of one workspace.

    Parameters
    ----------
    catalog : Catalog
    store : ModelStore
    recipe : callable
        Gives the recipe of a run.
    """

    def __init__(self, catalog: Catalog, store: ModelStore, recipe: Callable[[str], Recipe]) -> None:
        self._catalog = catalog
        self._store = store
        self._recipe = recipe
        self._recipes: dict[str, Recipe] = {}
        self._trainings: dict[tuple[str, str], _Training] = {}
        self._optimizers: dict[str, tuple[str, Any]] = {}  # of each run the last model, and the state after it

    def recipe(self, run: str) -> Recipe:
        """Return the recipe of a run, loaded once."""
        if run not in self._recipes:
            self._recipes[run] = self._recipe(run)
        return self._recipes[run]

    def can_build(self, origin: Origin) -> bool:
        """Whether there is a recipe (a training, a function or a merge), and all that it needs to come from."""
        if origin.training is None and origin.how not in ("made", "merged"):
            return False
        with self._catalog.read() as connection:
            there = set(connection.scalars(sa.select(models.c.id).where(models.c.id.in_(origin.parents))))
        return there.issuperset(origin.parents)

    def build(self, origin: Origin, parents: tuple[str, ...], leave_out: IntArray | None = None) -> Built | None:
        """Make the model of an origin with these parents and without these samples, and store it.

        Where it belongs is for the caller to say; what was built once is found again.

        Parameters
        ----------
        origin : Origin
        parents : tuple of str
            In place of those of the origin, in the same order.
        leave_out : (N,) int64 or None
            Keys.

        Returns
        -------
        Built or None
            None when no samples are left.

        Raises
        ------
        CannotBuildError
            Names the model and what its recipe raised.
        """
        try:
            return self._built(origin, parents, leave_out)
        except StorageError:
            raise
        except Exception as error:
            cause = str(error) if isinstance(error, DynkitError) else f"{type(error).__name__}: {error}"
            raise CannotBuildError(f"model {origin.model[:12]} cannot be made anew: {cause}") from error

    def _built(self, origin: Origin, parents: tuple[str, ...], leave_out: IntArray | None) -> Built | None:
        if origin.training is None:
            identity = _identity(origin, parents, "")
            return self._known(identity, "", 0) or self._made(identity, origin, parents)
        frame = read_selection(self._catalog.root, *origin.training)
        if leave_out is not None:
            frame = without(frame, leave_out)
        if not frame.height:
            return None
        selection = content(frame)
        identity = _identity(origin, parents, selection)
        built = self._known(identity, selection, frame["key"].n_unique())
        built = built or self._trained(identity, origin, parents, frame)
        self._trainings[str(origin.run), built.model] = origin, parents, frame
        return built

    def _known(self, identity: str, selection: str, samples: int) -> Built | None:
        with self._catalog.read() as connection:
            row = connection.execute(sa.select(recipes).where(recipes.c.id == identity)).one_or_none()
        return None if row is None else Built(row.model, selection, samples, row.seconds, row.details)

    def _made(self, identity: str, origin: Origin, parents: tuple[str, ...]) -> Built:
        """Merge, or call the function that somebody gave; of a group, all members come out at once."""
        started_s = time.perf_counter()
        states = [self._store.load(parent) for parent in parents]
        if origin.how == "merged":
            group: dict[str | None, State] = {None: merged(origin.recipe, states)}
        else:
            with self._catalog.read() as connection:
                code = connection.scalar(sa.select(origins.c.code).where(origins.c.id == origin.number))
            made = call(bytes(code or b""), states)
            group = dict(as_group(made).items()) if "member" in origin.recipe else {None: as_state(made)}
        member = origin.recipe.get("member")
        if member not in group:
            raise InvalidInput(f"the function of the group does not make {member!r} any more, only {list(group)}")
        seconds = (time.perf_counter() - started_s) / len(group)
        built = {}
        for name, state in group.items():
            other = replace(origin, recipe={**origin.recipe, "member": name})
            key = identity if name == member else _identity(other, parents, "")
            built[name] = self._remember(key, parents, state, Built("", "", 0, seconds, {}))
        return built[member]

    def train(self, origin: Origin, parents: tuple[str, ...], chosen: pl.DataFrame) -> Any:
        """Train as the run did; the outcome is not stored."""
        carried = None
        if parents and self.recipe(str(origin.run)).carries:
            carried = self._optimizer(str(origin.run), parents[0])
        return self._outcome(origin, parents, chosen, carried)

    def _outcome(self, origin: Origin, parents: tuple[str, ...], chosen: pl.DataFrame, carried: Any) -> Any:
        assert origin.run is not None and origin.index is not None
        assert origin.dataset is not None and origin.dataset_version is not None
        version = version_of(Dataset(self._catalog, origin.dataset), origin.dataset_version).open()
        parent = self._store.load(parents[0]) if parents else None
        return self.recipe(origin.run).train(origin.index, version, chosen, parent, carried)

    def _optimizer(self, run: str, model: str) -> Any:
        """State of the optimizer after a model's training in a run; where it is not known, by all trainings before."""
        known, carried = self._optimizers.get(run, ("", None))
        trainings: dict[str, _Training] = {}  # the last one first
        at: str | None = model
        while at is not None and at != known and at not in trainings:
            training = self._training(run, at)
            if training is None:
                break  # the model is not from this run
            trainings[at] = training
            at = next(iter(training[1]), None)
        carried = carried if at is not None and at == known else None
        for origin, parents, chosen in reversed(trainings.values()):
            carried = self._outcome(origin, parents, chosen, carried).carried
        self._optimizers[run] = model, carried
        return carried

    def _training(self, run: str, model: str) -> _Training | None:
        """How a model was trained in a run: here, or by what is recorded of it."""
        if (run, model) in self._trainings:
            return self._trainings[run, model]
        with self._catalog.read() as connection:
            found = [one for one in origins_of(connection, {model}) if one.run == run and one.training is not None]
        for one in sorted(found, key=lambda one: one.number is not None):  # what the run did itself comes first
            assert one.training is not None
            return one, one.parents, read_selection(self._catalog.root, *one.training)
        return None

    def _trained(self, identity: str, origin: Origin, parents: tuple[str, ...], chosen: pl.DataFrame) -> Built:
        started_s = time.perf_counter()
        outcome = self.train(origin, parents, chosen)
        details = {"samples_passed": outcome.passed, "report": outcome.history}
        seconds = time.perf_counter() - started_s
        built = Built("", content(chosen), chosen["key"].n_unique(), seconds, details)
        built = self._remember(identity, parents, outcome.state, built)
        self._optimizers[str(origin.run)] = built.model, outcome.carried
        return built

    def _remember(self, identity: str, parents: tuple[str, ...], state: State, built: Built) -> Built:
        row = {"id": identity, "seconds": built.seconds, "details": built.details}

        def also(connection: sa.Connection, model: str) -> None:
            upsert(connection, recipes, {**row, "model": model})

        return replace(built, model=put(self._store, state, also, parents))


def _identity(origin: Origin, parents: tuple[str, ...], selection: str) -> str:
    """Identity of what is done: code, which trigger, parents in their order, samples."""
    how = "trained" if origin.training is not None else origin.how
    what = [how, origin.digest, origin.index, origin.recipe.get("member"), parents, selection]
    return blake3(json.dumps(what).encode()).hexdigest()
