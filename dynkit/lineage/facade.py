"""A Lineage is what a workspace knows about its models; each method opens the catalog and asks one module."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynkit.catalog import Catalog
from dynkit.data import Dataset, as_keys
from dynkit.errors import InvalidInput, StorageError, check_whole
from dynkit.lineage import (
    adding,
    bisection,
    cascade,
    diff,
    erasure,
    export,
    graph,
    listing,
    merging,
    placing,
    remotes,
    structure,
    testing,
)
from dynkit.lineage.adding import Model
from dynkit.lineage.bisection import Bisection
from dynkit.lineage.blaming import Blame, blamed
from dynkit.lineage.cascade import Cascade
from dynkit.lineage.diff import ModelDiff
from dynkit.lineage.erasure import Affected, Erasure, affected_by
from dynkit.lineage.listing import Card, Log
from dynkit.lineage.merging import Merge
from dynkit.lineage.operators import Operator
from dynkit.lineage.placing import Placement
from dynkit.lineage.rebuilding import Recipe, Workshop
from dynkit.lineage.remotes import Transfer
from dynkit.lineage.testing import ModelTest, TestReport
from dynkit.models import ModelStore, manifest_id, tensor_id
from dynkit.models.records import resolved
from dynkit.models.store import dense_tensors
from dynkit.time import IntArray

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Lineage"]


class Lineage:
    """The graph of a workspace's models; opened as ``ws.lineage``.

    A model is given by its identity, a beginning of it that fits only one, or its name.

    Parameters
    ----------
    catalog : Catalog
    store : ModelStore
    recipe : callable
        Gives the `Recipe` of a run, to train models anew.

    Examples
    --------
    >>> import dynkit as dk, tempfile, torch
    >>> ws = dk.Workspace(tempfile.mkdtemp())
    >>> base = ws.lineage.add({"w": torch.randn(64, 64)}, name="base")
    >>> child = ws.lineage.add(lambda state: {"w": state["w"] + 0.01}, parents=["base"], how="shifted")
    >>> ws.lineage.ancestors(child) == {base}
    True
    >>> ws.lineage.place(ws.models.load(child))[0].model in {base, child}
    True
    """

    def __init__(self, catalog: Catalog, store: ModelStore, recipe: Callable[[str], Recipe]) -> None:
        self._catalog = catalog
        self._store = store
        self._workshop = Workshop(catalog, store, recipe)

    def __repr__(self) -> str:
        return repr(self.log(20))

    def _repr_html_(self) -> str:
        return self.log(20)._repr_html_()

    # ---- the graph ----

    def ancestors(self, model: str) -> set[str]:
        """Models that `model` was made from, directly or through others."""
        return self._reachable(model, up=True)

    def descendants(self, model: str) -> set[str]:
        """Models made from `model`, directly or through others."""
        return self._reachable(model, up=False)

    def _reachable(self, model: str, *, up: bool) -> set[str]:
        with self._catalog.read() as connection:
            found = resolved(connection, model)
            return graph.reachable(connection, [found], up=up) - {found}

    def versions(self, model: str) -> list[str]:
        """Versions of a model, itself included, oldest first."""
        with self._catalog.read() as connection:
            return graph.versions(connection, resolved(connection, model))

    def common_ancestor(self, a: str, b: str) -> str | None:
        """Return the newest model that both come from, if any; one of the two counts."""
        with self._catalog.read() as connection:
            return graph.common_ancestor(connection, resolved(connection, a), resolved(connection, b))

    # ---- what is there ----

    def log(self, limit: int | None = 50) -> Log:
        """List the newest models; None: all."""
        check_whole("limit", 0 if limit is None else limit, 0)
        with self._catalog.read() as connection:
            return listing.log(connection, limit)

    def show(self, model: str) -> Card:
        """Return all that is known of a model: where it comes from, samples, recipe, seed, code, metrics, tests."""
        with self._catalog.read() as connection:
            return listing.card(connection, self._catalog.root, resolved(connection, model))

    def search(
        self, text: str | None = None, *, tag: str | None = None, run: str | None = None, dataset: str | None = None
    ) -> Log:
        """List the models for which all of this holds.

        Parameters
        ----------
        text : str or None
            In a name, a tag or a note, or the beginning of the identity.
        tag : str or None
        run : str or None
            Id or name of the run that trained it.
        dataset : str or None
            That it was trained on.
        """
        with self._catalog.read() as connection:
            return listing.search(connection, text, tag, run, dataset)

    def to_networkx(self) -> "nx.MultiDiGraph[str]":
        """All models as nodes; edges keyed by kind, with the `runs` that made them."""
        with self._catalog.read() as connection:
            return export.to_networkx(connection)

    def save(self, path: str | Path) -> None:
        """Write the graph as GraphML (``.graphml``), JSON (``.json``) or a Mermaid chart (``.mmd``)."""
        try:
            export.save(self.to_networkx(), Path(path))
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error

    # ---- what people add ----

    def add(
        self,
        model: Model | Callable[..., Any],
        *,
        parents: str | Iterable[str] = (),
        version_of: str | None = None,
        how: str = "added",
        name: str | None = None,
        tags: Iterable[str] = (),
        note: str | None = None,
    ) -> str:
        """Store a model that no run trained, and its place in the graph.

        Parameters
        ----------
        model : nn.Module, mapping of name to tensor, path of a safetensors file, or callable
            A function of the parents' states that returns a module or a state: it is called now, and again when a
            parent is updated.
        parents : str or iterable of str
            Models it was made from.
        version_of : str or None
            The model that it is the next version of.
        how : str
            How it was made, for people.
        name : str or None
            It must be free, or a parent's.
        tags : iterable of str
        note : str or None

        Returns
        -------
        str
            Its identity.

        Raises
        ------
        InvalidInput, NotFound, Conflict
        """
        made_from = [self._store.resolve(parent) for parent in _listed(parents)]
        before = [] if version_of is None else [self._store.resolve(version_of)]
        return adding.add(self._store, model, made_from, before=before, how=how, name=name, tags=tags, note=note)

    def add_group(
        self, function: Callable[..., Any], *, parents: str | Iterable[str] = (), how: str = "made together"
    ) -> dict[str, str]:
        """Store models that are made together, such as tasks that share a body; an update makes all of them anew.

        Parameters
        ----------
        function : callable
            Of the parents' states; returns a mapping of any names to modules or states.
        parents : str or iterable of str
        how : str
            How they were made, for people.

        Returns
        -------
        dict
            The names, and the models' identities.
        """
        made_from = [self._store.resolve(parent) for parent in _listed(parents)]
        return adding.add_group(self._store, function, made_from, how=how)

    def name(self, model: str, name: str, *, instead_of: str | None = None) -> None:
        """Give a model a name, or move a name to it.

        Parameters
        ----------
        model, name : str
        instead_of : str or None
            The model that has the name now: it moves only if that is still so. None: the name must be free.

        Raises
        ------
        Conflict
            When somebody else was quicker.
        """
        with self._catalog.write() as connection:
            expected = None if instead_of is None else resolved(connection, instead_of)
            adding.point(connection, name, resolved(connection, model), expected=expected)

    def note(self, model: str, text: str | None = None, *, tags: Iterable[str] = ()) -> None:
        """Write a note or tags on a model."""
        with self._catalog.write() as connection:
            adding.write_notes(connection, resolved(connection, model), tags, text)

    # ---- tests ----

    def register(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        models: str | Iterable[str] | None = None,
        pattern: str | None = None,
        tag: str | None = None,
        dataset: str | None = None,
        at_least: float | None = None,
    ) -> None:
        """Keep a test of models; it applies where one of `models`, `pattern` and `tag` does, without them everywhere.

        Parameters
        ----------
        function : callable
            ``(state) -> bool | number | None``, with a dataset ``(state, dataset)``; None: it cannot tell.
        name : str or None
            None takes the function's. An earlier test of this name is replaced.
        models : str, iterable of str or None
            An empty one: none yet.
        pattern : str or None
            Of names of models, such as ``"sentiment-*"``.
        tag : str or None
        dataset : str or None
            Results are remembered for each of its versions.
        at_least : float or None
            A number passes from here on.
        """
        chosen = None if models is None else tuple(self._store.resolve(model) for model in _listed(models))
        if dataset is not None:
            self._dataset(dataset).open()  # there?
        options = {"pattern": pattern, "tag": tag, "dataset": dataset, "at_least": at_least}
        test = testing.as_test(function, name, models=chosen, **options)
        with self._catalog.write() as connection:
            testing.register(connection, test)

    def test(self, models: str | Iterable[str] | None = None, tests: str | Iterable[str] | None = None) -> TestReport:
        """Run tests; what is known for the same model, code and data is not run again.

        Parameters
        ----------
        models : str, iterable of str or None
            For example ``ws.lineage.descendants(model)``; None: all.
        tests : str, iterable of str or None
            Names of tests, run on all of the models; None: those that apply to each.
        """
        with self._catalog.read() as connection:
            found = None if models is None else {resolved(connection, model) for model in _listed(models)}
            wanted = None if tests is None else _listed(tests)
            pairs = testing.chosen(connection, found, wanted)
        return TestReport(tuple(testing.run(self._catalog, self._store, test, model) for model, test in pairs))

    def bisect(self, test: str | Callable[..., Any], good: str | Iterable[str], bad: str) -> Bisection:
        """Find the first model that fails between good ones and a bad one, with as few tests as git would need.

        Parameters
        ----------
        test : str or callable
            Name of a test, or a function as in `register`. Where it cannot tell, another model is tested.
        good : str or iterable of str
            Models known to pass; an empty list: all that `bad` comes from is suspected.
        bad : str
            A model known to fail.
        """
        chosen = self._test(test)
        with self._catalog.read() as connection:
            passing = {resolved(connection, one) for one in _listed(good)}
            failing = resolved(connection, bad)
            searched = graph.above(connection, {failing, *passing})
        broken: list[str] = []

        def passes(model: str) -> bool | None:
            result = testing.run(self._catalog, self._store, chosen, model)
            if result.error is not None:
                broken.append(result.error)
                return None
            return testing.verdict(result)

        return replace(bisection.bisect(searched, passing, failing, passes), errors=tuple(broken))

    def blame(self, test: str | Callable[..., Any], model: str, *, trainings: int = 20) -> Blame:
        """Find out why a model fails: which parent brought it along, or which samples.

        The model is trained again without its new samples, then without half of those, and so on.

        Parameters
        ----------
        test : str or callable
            As in `bisect`.
        model : str
            That fails, such as the first one that `bisect` found.
        trainings : int
            How often to train at most.
        """
        chosen = self._test(test)
        failing = self._store.resolve(model)
        return blamed(self._catalog, self._store, self._workshop, chosen, failing, trainings)

    def _test(self, test: str | Callable[..., Any]) -> ModelTest:
        if not isinstance(test, str):
            return testing.as_test(test)
        with self._catalog.read() as connection:
            return testing.registered(connection, [test])[0]

    # ---- differences and merges ----

    def diff(self, a: str, b: str, *, modules: tuple[torch.nn.Module, torch.nn.Module] | None = None) -> ModelDiff:
        """Compare two models: tensors, scores and, where their modules are given, structure.

        Parameters
        ----------
        a, b : str
        modules : pair of nn.Module or None
            Of `a` and `b`, for the structure; their weights do not matter.
        """
        with self._catalog.read() as connection:
            first, second = resolved(connection, a), resolved(connection, b)
            scores = diff.scores_of(connection, first, second)
        tensors = diff.diff_tensors(self._store.load(first), self._store.load(second))
        flows = None if modules is None else [structure.flow(module) for module in modules]
        layers = None if flows is None else structure.diff_structure(*flows)
        return ModelDiff(first, second, tensors, scores, layers)

    def merge(
        self,
        a: str,
        b: str,
        *more: str,
        operator: Operator | None = None,
        module: torch.nn.Module | None = None,
        name: str | None = None,
    ) -> Merge:
        """Merge models that come from one; store the result when there is no conflict.

        Parameters
        ----------
        a, b, *more : str
        operator : Mean, TaskArithmetic, Ties or None
            None takes each layer from the side that changed it, if there is no conflict; two models only.
        module : nn.Module or None
            Tells how data flows between layers; None: the run's, if one made the common ancestor, else the layers count
            as a chain.
        name : str or None
            For the merged model.

        Raises
        ------
        Conflict
            When there is no common ancestor.
        """
        models = tuple(self._store.resolve(one) for one in (a, b, *more))
        return merging.merge(self._catalog, self._store, self._workshop, models, operator, module, name)

    # ---- updates ----

    def cascade(
        self,
        old: str,
        new: str,
        *,
        dry_run: bool = True,
        skip: str | Iterable[str] | Callable[[str], bool] = (),
        stop_on_failure: bool = True,
    ) -> Cascade:
        """Make all that comes from a model anew, from its new version; the old models stay, as earlier versions.

        Names move to the new versions that pass the tests of the old ones.

        Parameters
        ----------
        old, new : str
        dry_run : bool
            Only say what would be done, and how long it takes.
        skip : str, iterable of str or callable
            Models not to rebuild; what comes from nothing else stays, too.
        stop_on_failure : bool
            Do not go on from a new version that fails its tests.
        """
        with self._catalog.read() as connection:
            before, after = resolved(connection, old), resolved(connection, new)
            left_out = skip if callable(skip) else {resolved(connection, model) for model in _listed(skip)}
            planned = cascade.plan(connection, self._workshop, before, after, left_out)
        if dry_run:
            return planned
        return cascade.carry_out(self._catalog, self._store, self._workshop, planned, stop_on_failure=stop_on_failure)

    # ---- samples ----

    def affected_by(self, keys: Any, *, dataset: str | None = None) -> Affected:
        """List the models that learned from samples: that were trained on them, or come from one that was.

        Parameters
        ----------
        keys : sequence, array or Series of int
        dataset : str or None
            Needed when the workspace has more than one.
        """
        return affected_by(self._catalog, self._dataset(dataset).name, _checked(keys))

    def erase(self, keys: Any, *, dataset: str | None = None, dry_run: bool = True, drop: bool = False) -> Erasure:
        """Erase samples from a dataset and from all models that learned from them; make those models anew.

        Parameters
        ----------
        keys : sequence, array or Series of int
        dataset : str or None
            Needed when the workspace has more than one.
        dry_run : bool
            Only say what would be done, and how long it takes.
        drop : bool
            Remove affected models that have no recipe, such as those that were brought from elsewhere.

        Returns
        -------
        Erasure
            The plan; or what was done, and that nothing is left.

        Raises
        ------
        Conflict
            When a run on the dataset is going, or models would have to be dropped.
        """
        found = self.affected_by(keys, dataset=dataset)
        self._dataset(dataset).check_given(found.keys)
        planned = erasure.plan(self._catalog, self._workshop, found)
        if dry_run:
            return planned
        opened = self._dataset(dataset)
        return erasure.erase(self._catalog, self._store, self._workshop, opened, planned, drop=drop)

    def _dataset(self, name: str | None) -> Dataset:
        known = Dataset.names(self._catalog)
        if name is None and len(known) != 1:
            raise InvalidInput(
                f"the workspace has {len(known)} datasets; say which: dataset=, one of {', '.join(known)}"
            )
        return Dataset(self._catalog, known[0] if name is None else name)

    # ---- other workspaces ----

    def add_remote(self, name: str, location: str | PathLike[str]) -> None:
        """Remember another workspace to push to and pull from; an earlier one of this name is replaced.

        Parameters
        ----------
        name : str
        location : path or str
            Its directory; or a place in a bucket, such as ``"s3://bucket/prefix"``, where the first push makes it
            (``pip install 'dynkit[s3]'``; keys, region and endpoint from the usual ``AWS_*`` variables).

        Raises
        ------
        InvalidInput, NotFound, StorageError
        """
        remotes.add_remote(self._catalog, name, location)

    def push(self, remote: str = "origin", models: str | Iterable[str] | None = None) -> Transfer:
        """Copy to a remote what it lacks: models with all they come from, and names, where they moved on only here.

        Parameters
        ----------
        remote : str
        models : str, iterable of str or None
            None: all.
        """
        return remotes.push(self._catalog, remote, None if models is None else _listed(models))

    def pull(self, remote: str = "origin", models: str | Iterable[str] | None = None) -> Transfer:
        """Copy from a remote what is not here, as `push` does; its names are kept as ``<remote>/<name>``, too."""
        return remotes.pull(self._catalog, remote, None if models is None else _listed(models))

    # ---- where a model belongs ----

    def place(self, model: Model, limit: int = 5) -> Placement:
        """Find the stored models that a model of unknown origin may come from, the most likely first.

        Parameters
        ----------
        model : nn.Module, mapping of name to tensor, or path of a safetensors file
        limit : int
            Most candidates to return.
        """
        state = dense_tensors(adding.state_of(model)[0])
        placing.catch_up(self._catalog, self._store)
        identity = manifest_id({key: tensor_id(tensor) for key, tensor in state.items()})
        with self._catalog.read() as connection:
            return placing.place(connection, state, limit, identity)


def _listed(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _checked(keys: Any) -> IntArray:
    checked = np.unique(as_keys(keys))
    if not len(checked):
        raise InvalidInput("no keys; give those of the samples, such as dataset.keys()[:10]")
    return checked
