"""A Pipeline as declared: what to train on, when, on which samples, how, and how to judge it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from dynkit.catalog import Catalog
from dynkit.data import Dataset, check_name
from dynkit.errors import InvalidInput, check_whole, did_you_mean
from dynkit.evaluation.settings import Evaluation
from dynkit.pipeline.owner import Owner, new_id, new_run
from dynkit.pipeline.payload import pack
from dynkit.pipeline.run import Run
from dynkit.pipeline.started import note
from dynkit.policies import as_model, as_selection, as_trigger, describe, digest
from dynkit.training.settings import Training
from dynkit.types import Event, Model, Selection, Trigger

__all__ = ["Pipeline"]

_MAX_SLICES = 1000  # of a column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Dataset, model, trigger, selection, training and evaluation under one name.

    Parameters
    ----------
    name : str
    dataset : Dataset or str
        A name is looked up in the default workspace. A run stays on the version of its start.
    model : callable or nn.Module
        A function (or class) without arguments that makes a fresh model; of a module, each training gets a copy.
    trigger : callable
        When to train: `dynkit.triggers` or a function ``(new, run) -> bool | positions``.
    selection : callable
        On which samples: `dynkit.selection` or a function ``(pool, run, rng) -> keys | frame(key, weight)``.
    training : Training
    evaluation : Evaluation
    seed : int
        Everything random draws from it: same seed, same result.

    Examples
    --------
    >>> import dynkit as dk
    >>> dk.Pipeline(name="bad name", dataset="d", model=None, trigger=None, selection=None)
    Traceback (most recent call last):
      ...
    dynkit.errors.InvalidInput: pipeline name 'bad name': use letters, digits, '.', '_' and '-', ...
    """

    name: str
    dataset: Dataset
    model: Model
    trigger: Trigger
    selection: Selection
    training: Training = dataclasses.field(default_factory=Training)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    seed: int = 0

    def __post_init__(self) -> None:
        check_name(self.name, "pipeline")
        given: Any = self.dataset
        dataset = Dataset(Catalog(), given) if isinstance(given, str) else given
        if not isinstance(dataset, Dataset):
            raise InvalidInput(f"dataset={dataset!r} is not a dataset; pass ws.dataset(name) or a name")
        if dataset.schema["label"] is None:
            raise InvalidInput(f"dataset {dataset.name!r} has no labels; ingest it with label=...")
        for name, kind in (("training", Training), ("evaluation", Evaluation)):
            if not isinstance(getattr(self, name), kind):
                raise InvalidInput(f"{name}={getattr(self, name)!r} must be dk.{kind.__name__}(...)")
        _check_slices(dataset, self.evaluation.slices)
        check_whole("seed", self.seed, 0)
        object.__setattr__(self, "dataset", dataset)
        object.__setattr__(self, "model", as_model(self.model))
        object.__setattr__(self, "trigger", as_trigger(self.trigger))
        object.__setattr__(self, "selection", as_selection(self.selection))

    def replay(self, *, live: bool = False, reuse: bool = False) -> Iterator[Event]:
        """Run here and now; each iteration does the next step and yields its event.

        Leaving the iteration early interrupts the run; ``ws.run(event.run).resume()`` continues it in the background.

        Parameters
        ----------
        live, reuse : bool
            See `start`.

        Yields
        ------
        Event
            See `dynkit.pipeline.replay`.
        """
        from dynkit.pipeline.replay import replay

        pipeline, run = self._register(live=live, reuse=reuse)
        yield from replay(lambda _: pipeline, Owner(self.dataset.catalog, run))

    def start(self, *, live: bool = False, reuse: bool = False) -> Run:
        """Run in a process of its own that owns the device; return the handle at once.

        Parameters
        ----------
        live : bool
            Go on with every version that is committed: samples are seen in the order of their arrival, and training
            happens as they come. `Run.finish` ends it with the evaluation.
        reuse : bool
            Where a run of this workspace has trained the same model on the same samples from the same parent with the
            same settings and seed, take what came out; where one is at it, wait for it. Not with `carry_optimizer`.
        """
        _, run = self._register(live=live, reuse=reuse)
        return Run(self.dataset.catalog, run)._spawn()

    def digest(self) -> str:
        """Identity of the pipeline and its dataset version: equal pipelines give equal results."""
        return digest([getattr(self, field.name) for field in dataclasses.fields(self)])

    def describe(self) -> dict[str, Any]:
        """Return the declaration as JSON values."""
        parts = {name: describe(getattr(self, name)) for name in ("model", "trigger", "selection", "seed")}
        return {"dataset": self.dataset.name, **parts, **describe(self.training), **describe(self.evaluation)}

    def _register(self, *, live: bool, reuse: bool) -> tuple["Pipeline", str]:
        """Make the run in the catalog; return the pipeline at the dataset's present version, and the run's id."""
        pipeline = dataclasses.replace(self, dataset=self.dataset.at(self.dataset.version))
        if reuse and self.training.carry_optimizer:
            raise InvalidInput("reuse=True keeps no optimizer for carry_optimizer=True; use one of them")
        catalog = self.dataset.catalog
        run = new_id()
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "dataset"}
        pack(self.name, parts).write(catalog.root / "runs" / run)  # first: what cannot travel is refused without a row
        new_run(
            catalog,
            run,
            name=self.name,
            digest=digest([pipeline.digest(), run]) if live else pipeline.digest(),  # no other run equals a live one
            dataset=self.dataset.name,
            version=pipeline.dataset.version,
            description={**self.describe(), **({"live": True} if live else {}), **({"reuse": True} if reuse else {})},
        )
        note(Run(catalog, run))
        return pipeline, run


def _check_slices(dataset: Dataset, columns: Sequence[str]) -> None:
    """Refuse columns that are not there or have no values to tell samples apart by, before anything is trained."""
    known = ["label", *dataset.schema["columns"]]
    for column in columns:
        if column not in known:
            raise InvalidInput(f"slices has {column!r}, no column of {dataset.name!r}{did_you_mean(column, known)}")
        values = dataset.open().columns([column])[column]
        if values.dtype.is_float() or values.dtype.is_nested():
            raise InvalidInput(f"slices has {column!r} of {values.dtype}; expected texts, whole numbers or booleans")
        if (n := values.n_unique()) > _MAX_SLICES:
            raise InvalidInput(f"slices has {column!r} of {n} values; at most {_MAX_SLICES} can be judged apart")
