"""Tests of models: registered once, run where they apply, remembered by model, code and data.

A test is a function of a model's state that returns whether it passes, or a number to compare with `at_least`; None
means that it cannot tell. With a dataset it is called with the state and the dataset at its newest version.
"""

import fnmatch
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import sqlalchemy as sa
import torch

from dynkit.catalog import Catalog, models, names, notes, results, tests, upsert
from dynkit.data import Dataset
from dynkit.errors import InvalidInput, NotFound, did_you_mean
from dynkit.lineage.display import Shown, short
from dynkit.lineage.graph import in_order
from dynkit.lineage.rebuilding import pickled
from dynkit.models import ModelStore
from dynkit.policies import digest

__all__ = [
    "ModelTest",
    "Result",
    "TestReport",
    "as_test",
    "chosen",
    "covering",
    "judged",
    "register",
    "registered",
    "run",
    "verdict",
]

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ModelTest:
    """A test and where it applies: to models given one by one, by a pattern of names, or by a tag; else to all.

    Parameters
    ----------
    name : str
    function : bytes
        Pickled.
    digest : str
        Identity of the function and its limit.
    models : tuple of str or None
    pattern : str or None
    tag : str or None
    dataset : str or None
    at_least : float or None
    """

    name: str
    function: bytes
    digest: str
    models: tuple[str, ...] | None = None
    pattern: str | None = None
    tag: str | None = None
    dataset: str | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class Result:
    """What a test said of a model.

    Parameters
    ----------
    model, test : str
    passed : bool or None
        None: it could not tell, or it is a measurement without a limit.
    value : float or None
    error : str or None
        What the test raised.
    seconds : float
        It took.
    remembered : bool
        From an earlier time.
    """

    model: str
    test: str
    passed: bool | None
    value: float | None
    error: str | None
    seconds: float
    remembered: bool


@dataclass(frozen=True, repr=False)
class TestReport(Shown):
    """Results of tests on models; a sequence."""

    results: tuple[Result, ...]

    __test__ = False

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __getitem__(self, i: int) -> Result:
        return self.results[i]

    @property
    def passed(self) -> bool:
        """Whether no test failed or raised."""
        return not any(one.passed is False or one.error for one in self.results)

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        failed = sum(one.passed is False for one in self.results)
        broken = sum(one.error is not None for one in self.results)
        columns = list(dict.fromkeys(one.test for one in self.results))
        cells: dict[str, dict[str, str]] = {}
        for one in self.results:
            cells.setdefault(one.model, {})[one.test] = _said(one)
        rows = [[short(model), *(said.get(name, "") for name in columns)] for model, said in cells.items()]
        title = f"{len(self.results)} results: {failed} failed, {broken} could not run"
        return title, [one.error for one in self.results if one.error][:3], ("model", *columns), rows


def _said(one: Result) -> str:
    verdict = "error" if one.error else {True: "passed", False: "failed", None: ""}[one.passed]
    return " ".join(filter(None, [verdict, f"{one.value:.4g}" if one.value is not None else ""])) or "cannot tell"


def as_test(function: Callable[..., Any], name: str | None = None, **options: Any) -> ModelTest:
    """Make a test of a function.

    Raises
    ------
    InvalidInput
    """
    if not callable(function):
        raise InvalidInput(f"{function!r} is no test; pass a function of a model's state, or the name of a test")
    least = options.get("at_least")
    if least is not None and not (isinstance(least, int | float) and math.isfinite(least)):
        raise InvalidInput(f"at_least={least!r} must be a number that a result can reach")
    for option in ("pattern", "tag", "dataset"):
        if not isinstance(options.get(option), str | None):
            raise InvalidInput(f"{option}={options[option]!r} must be text")
    code = pickled(function, "test")
    identity = digest([function, options.get("at_least")])
    return ModelTest(name or str(getattr(function, "__name__", "test")), code, identity, **options)


def register(connection: sa.Connection, test: ModelTest) -> None:
    """Keep a test, in place of an earlier one of that name."""
    row = {
        "name": test.name,
        "function": test.function,
        "digest": test.digest,
        "scope": {"models": test.models, "pattern": test.pattern, "tag": test.tag},
        "dataset": test.dataset,
        "at_least": test.at_least,
    }
    upsert(connection, tests, row)


def registered(connection: sa.Connection, only: Collection[str] | None = None) -> list[ModelTest]:
    """Return the tests, all or those of these names.

    Raises
    ------
    NotFound
    """
    found = {
        row.name: ModelTest(
            row.name,
            row.function,
            row.digest,
            None if row.scope["models"] is None else tuple(row.scope["models"]),
            row.scope["pattern"],
            row.scope["tag"],
            row.dataset,
            row.at_least,
        )
        for row in connection.execute(sa.select(tests).order_by(tests.c.name))
    }
    for name in only or ():
        if name not in found:
            raise NotFound(f"no test is called {name!r}{did_you_mean(name, found)}")
    return [test for name, test in found.items() if only is None or name in only]


def chosen(
    connection: sa.Connection, some: set[str] | None, wanted: Sequence[str] | None
) -> list[tuple[str, ModelTest]]:
    """Pair models (None: all) with tests of these names (None: those that apply), parents first."""
    if some is None:
        some = set(connection.scalars(sa.select(models.c.id)))
    order = in_order(connection, some)
    if wanted is None:
        return covering(connection, order, registered(connection))
    return [(model, test) for model in order for test in registered(connection, wanted)]


def covering(
    connection: sa.Connection, models: Iterable[str], every: Iterable[ModelTest]
) -> list[tuple[str, ModelTest]]:
    """Pair models with the tests that apply to them."""
    called: dict[str, list[str]] = {}
    for name, model in connection.execute(sa.select(names.c.name, names.c.model)):
        called.setdefault(model, []).append(name)
    tagged = set(map(tuple, connection.execute(sa.select(notes.c.model, notes.c.text).where(notes.c.kind == "tag"))))

    def applies(test: ModelTest, model: str) -> bool:
        if test.models is None and test.pattern is None and test.tag is None:
            return True
        return (
            model in (test.models or ())
            or (test.pattern is not None and any(fnmatch.fnmatchcase(n, test.pattern) for n in called.get(model, ())))
            or (test.tag is not None and (model, test.tag) in tagged)
        )

    every = list(every)
    return [(model, test) for model in models for test in every if applies(test, model)]


def run(catalog: Catalog, store: ModelStore, test: ModelTest, model: str) -> Result:
    """Test a model, unless it is known what comes out."""
    version = 0
    if test.dataset is not None and test.dataset in Dataset.names(catalog):
        version = Dataset(catalog, test.dataset).version
    key = {"model": model, "test": test.name, "digest": test.digest, "dataset_version": version}
    with catalog.read() as connection:
        query = sa.select(results).where(*(results.c[name] == value for name, value in key.items()))
        row = connection.execute(query).one_or_none()
    if row is not None:
        return Result(model, test.name, row.passed, row.value, row.error, row.seconds, remembered=True)
    result = judged(catalog, test, model, store.load(model), version)
    if result.error is None:  # what went wrong may not go wrong again
        said = {"passed": result.passed, "value": result.value, "error": None, "seconds": result.seconds}
        with catalog.write() as connection:
            upsert(connection, results, {**key, **said})
    return result


def judged(catalog: Catalog, test: ModelTest, model: str, state: State, version: int | None = None) -> Result:
    """Call a test with a model's state, and a version (None: the newest) of its dataset; nothing is remembered."""
    started_s = time.perf_counter()
    passed = value = error = None
    try:
        passed, value = _called(catalog, test, state, version)
    except Exception as raised:
        error = f"{test.name}: {type(raised).__name__}: {raised}"
    return Result(model, test.name, passed, value, error, time.perf_counter() - started_s, remembered=False)


def _called(catalog: Catalog, test: ModelTest, state: State, version: int | None) -> tuple[bool | None, float | None]:
    """Whether it passed, and the number that it gave."""
    function = cloudpickle.loads(test.function)
    if test.dataset is None:
        said = function(state)
    else:
        dataset = Dataset(catalog, test.dataset)
        said = function(state, dataset.at(dataset.version if version is None else version))
    if isinstance(said, torch.Tensor) and said.dtype == torch.bool and said.numel() == 1:
        said = said.item()
    if said is None or isinstance(said, bool | np.bool_):
        return None if said is None else bool(said), None
    value = float(said)
    if math.isnan(value):
        return None if test.at_least is None else False, None
    return None if test.at_least is None else value >= test.at_least, value


def verdict(result: Result) -> bool | None:
    """Whether a model passed, where that must be known to go on.

    Raises
    ------
    InvalidInput
        When the test broke, or measures and has no limit.
    """
    if result.error is not None:
        raise InvalidInput(f"the test of model {result.model[:12]} broke: {result.error}")
    if result.passed is None and result.value is not None:
        raise InvalidInput(f"the test {result.test!r} measures; say what passes: register it with at_least=")
    return result.passed
