"""RHO-LOSS: samples that are worth learning, learnable and not yet learnt."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from dynkit.errors import InvalidInput
from dynkit.selection.budget import Balanced, check_finite
from dynkit.selection.sampling import Random
from dynkit.types import RunView

__all__ = ["RhoLoss"]


@dataclass(frozen=True)
class RhoLoss(Balanced):
    """Samples with the largest reducible loss (Mindermann et al. 2022, equation 3).

    The reducible loss is a sample's loss under the newest model less its irreducible loss: that under a model of the
    same kind which has learnt from other samples only, trained as the pipeline trains. Noise is hard for both models,
    what is learnt is easy for both; only what can still be learnt is left. Without a model, at the first trigger, a
    uniform sample of the same size is drawn.

    Parameters
    ----------
    fraction : float or None
        Share of the pool in (0, 1]; at least one sample is kept.
    n : int or None
        Number of samples; all that can be chosen while they are fewer. Exactly one of the two is given.
    balance : bool
        Take from every class at the same ratio.
    holdout : float
        Share of the pool, drawn anew at each trigger, that trains the other model and is not chosen itself; in (0, 1).
    twin : bool
        Hold nothing out: two models, each trained on one half of the pool, each judging the other half.
    """

    holdout: float = 0.1
    twin: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.holdout, int | float) and 0 < self.holdout < 1):
            raise InvalidInput(f"holdout={self.holdout!r} must be a share in (0, 1)")

    def __call__(self, pool: pl.DataFrame, run: RunView, rng: np.random.Generator) -> "pl.DataFrame | pl.Series":
        """Keys of the chosen samples in replay order, with their reducible losses."""
        if run.model is None or pool.height < 2:
            return Random(self.fraction, self.n)(pool, run, rng)
        held = round(pool.height * (0.5 if self.twin else self.holdout))
        order = rng.permutation(pool.height)
        held_out, others = (np.sort(rows) for rows in np.split(order, [min(max(1, held), pool.height - 1)]))
        rounds = [(held_out, others), (others, held_out)] if self.twin else [(held_out, others)]
        irreducible = torch.zeros(pool.height)
        for learnt, judged in rounds:
            irreducible[judged] = _loss_after(pool["key"][learnt], pool["key"][judged], run, rng)
        rows = np.sort(np.concatenate([judged for _, judged in rounds]))
        candidates = pool[rows]
        reducible = run.score("loss", candidates["key"]) - irreducible[rows]
        check_finite(reducible, "reducible loss")
        budget = min(self._of(pool.height), len(rows))
        return self._chosen(
            candidates, budget, lambda places, n, _: (reducible[places].topk(n).indices, None), rng, reducible
        )


def _loss_after(learnt: pl.Series, judged: pl.Series, run: RunView, rng: np.random.Generator) -> torch.Tensor:
    """Loss of some samples under a fresh model that has learnt from others (N,)."""
    model = run.fit(learnt, seed=int(rng.integers(2**31)))
    return run.score("loss", judged, model=model)
