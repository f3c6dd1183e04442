"""Find out why a model fails: because of a parent, of samples, or of how it was made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynkit.catalog import Catalog
from dynkit.data import as_keys
from dynkit.errors import InvalidInput
from dynkit.lineage import testing
from dynkit.lineage.display import Shown, short
from dynkit.lineage.graph import reachable
from dynkit.lineage.origins import Origin, origins_of
from dynkit.lineage.rebuilding import Workshop
from dynkit.lineage.samples import read_selection, without
from dynkit.lineage.testing import ModelTest
from dynkit.models import ModelStore
from dynkit.time import IntArray

__all__ = ["Blame", "blamed"]


@dataclass(frozen=True, repr=False)
class Blame(Shown):
    """What made a model fail.

    Parameters
    ----------
    model : str
    parents : tuple of (str, bool or None)
        What it was made from, with whether these pass the test: one that fails brought the failure along.
    new : (N,) int64
        Keys of the samples that it was trained on and nothing that it comes from was.
    samples : (M,) int64
        Of these, the smallest found part without which the model, trained again, passes; empty when it fails without
        any of them.
    trainings : int
        How often it was trained again to find out.
    """

    model: str
    parents: tuple[tuple[str, bool | None], ...]
    new: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    samples: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    trainings: int = 0

    @property
    def upstream(self) -> tuple[str, ...]:
        """Parents that fail, too."""
        return tuple(model for model, passed in self.parents if passed is False)

    def parts(self) -> tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[Any]]]:
        """See `Shown`."""
        if self.upstream:
            why = f"it comes from {', '.join(map(short, self.upstream))}, which fails, too"
        elif len(self.samples):
            why = f"without {len(self.samples):,} of its {len(self.new):,} new samples it passes"
        elif self.trainings:
            why = f"it also fails without its {len(self.new):,} new samples: look at the recipe"
        else:
            why = "nothing that it comes from fails; it was not trained again"
        facts = [why, f"trained again {self.trainings} times"]
        rows = [("sample", int(key)) for key in self.samples[:20]]
        return f"model {short(self.model)} fails", facts, ("kind", "key"), rows


def blamed(
    catalog: Catalog, store: ModelStore, workshop: Workshop, test: ModelTest, model: str, trainings: int
) -> Blame:
    """Look for the cause; see `Lineage.blame`."""
    if testing.verdict(testing.run(catalog, store, test, model)) is not False:
        raise InvalidInput(f"model {model[:12]} does not fail the test {test.name!r}; nothing is to blame")
    with catalog.read() as connection:
        own = origins_of(connection, {model})
        earlier = origins_of(connection, reachable(connection, [model], up=True) - {model})
    above = dict.fromkeys(parent for origin in own for parent in origin.parents)
    parents = tuple((parent, testing.run(catalog, store, test, parent).passed) for parent in above)
    origin = next((one for one in own if one.training is not None), None)
    if origin is None or origin.training is None or any(passed is False for _, passed in parents):
        return Blame(model, parents)
    new = _new_samples(catalog, origin, earlier)
    frame = read_selection(catalog.root, *origin.training)

    def passes_without(keys: IntArray) -> bool | None:
        left = without(frame, keys)
        if not left.height:
            return True  # there would be no such model
        outcome = workshop.train(origin, origin.parents, left)
        return testing.verdict(testing.judged(catalog, test, model, outcome.state))

    samples, asked = narrow(new, passes_without, trainings)
    return Blame(model, parents, new, samples, asked)


def _new_samples(catalog: Catalog, origin: Origin, earlier: Sequence[Origin]) -> IntArray:
    """Return samples of a training that none of the models before it was trained on."""
    assert origin.training is not None
    new = np.sort(as_keys(read_selection(catalog.root, *origin.training)))
    for training in {one.training for one in earlier if one.training and one.dataset == origin.dataset}:
        new = np.setdiff1d(new, as_keys(read_selection(catalog.root, *training)), assume_unique=True)
    return new


def narrow(suspects: IntArray, passes_without: Callable[[IntArray], bool | None], most: int) -> tuple[IntArray, int]:
    """Find a small part of the samples without which a model passes, by halves; with how often it was asked.

    Parameters
    ----------
    suspects : (N,) int64
    passes_without : callable
        Trains without these samples and tests.
    most : int
        Trainings at most.
    """
    asked = 1
    if not len(suspects) or most < 1:
        return suspects[:0], 0
    if not passes_without(suspects):
        return suspects[:0], asked
    while len(suspects) > 1:
        for half in np.array_split(suspects, 2):
            if asked == most:
                return suspects, asked
            asked += 1
            if passes_without(half):
                suspects = half
                break
        else:
            break
    return suspects, asked
