"""Greedy algorithms on rows of numbers: farthest first, submodular maximisation, matching pursuit.

None of them keeps a matrix of all pairs of rows. They run on the device of their rows.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch

__all__ = [
    "OPTIMIZERS",
    "Facilities",
    "GraphCut",
    "LogDeterminant",
    "SetFunction",
    "cosine_vectors",
    "farthest_first",
    "matching_pursuit",
    "maximize",
    "nonnegative_ridge",
]

_BLOCK = 16  # centres whose distances are computed in one product
_PIECE_PAIRS = 1 << 18  # pairs of rows looked at in one piece, which stays in the processor's cache
_LOOK = 8  # rows at the first look of lazy greedy
_EPSILON = 0.1  # of stochastic greedy
_NEWTON_STEPS = 100


def farthest_first(x: torch.Tensor, n: int, first: int) -> torch.Tensor:
    """Choose rows, each the farthest from those before it: a 2-approximation of k-center (Gonzalez 1985).

    The next centres are mostly among the rows that are farthest now. So the distances to several of these are computed
    in one product, and the rows are chosen one by one while the farthest is among them; then follows another product.
    The result is that of one product for each.

    Parameters
    ----------
    x : (N, D) float
    n : int
        At most N.
    first : int
        The first row.

    Returns
    -------
    (n,) int64
        Rows in the order of choice; equally far ones in their order.
    """
    left, right = _square_factors(x - x[first])  # small numbers keep their digits
    nearest = left[:, -1].clone()  # squared distance to the nearest centre
    nearest[first] = -torch.inf
    centres, width = [first], _BLOCK
    while len(centres) < n:
        row = int(nearest.argmax())
        candidates = [row, *(other for other in nearest.topk(min(width, len(x))).indices.tolist() if other != row)]
        squares = dict(zip(candidates, left[candidates] @ right, strict=True))
        found = len(centres)
        while row in squares and len(centres) < n:
            torch.minimum(nearest, squares.pop(row), out=nearest)
            nearest[row] = -torch.inf
            centres.append(row)
            row = int(nearest.argmax())
        width = min(2 * (len(centres) - found), _BLOCK)  # as many as were of use, and a chance for more
    return torch.tensor(centres)


class SetFunction(Protocol):
    """A submodular function of a growing set of rows."""

    rows: int
    at_hand: bool  # whether all gains are known all the time, so that looking at fewer rows saves nothing

    def gains(self, rows: torch.Tensor, /) -> torch.Tensor:
        """By how much each of these rows (M,) would raise the function."""

    def add(self, row: int, /) -> None:
        """Put a row into the set."""


def maximize(function: SetFunction, n: int, optimizer: str, rng: torch.Generator) -> torch.Tensor:
    """Add n rows to a set, each the one that raises a submodular function most.

    Parameters
    ----------
    function : SetFunction
    n : int
        At most its number of rows.
    optimizer : str
        ``"naive"`` looks at all rows for every choice (Nemhauser et al. 1978). ``"lazy"`` makes the same choices and
        looks only at rows whose gain at an earlier look, which bounds that of now, is large enough (Minoux 1978).
        ``"stochastic"`` looks at a sample of ``N / n * ln(1 / 0.1)`` rows (Mirzasoleiman et al. 2015, algorithm 1).
    rng : torch.Generator

    Returns
    -------
    (n,) int64
        In the order of choice; of equal gains the first row.
    """
    return torch.tensor(OPTIMIZERS[optimizer](function, n, rng))


def _naive(function: SetFunction, n: int, rng: torch.Generator) -> list[int]:
    left, chosen = torch.arange(function.rows), list[int]()
    for _ in range(n):
        best = int(function.gains(left).argmax())
        chosen.append(int(left[best]))
        function.add(chosen[-1])
        left = torch.cat([left[:best], left[best + 1 :]])
    return chosen


def _lazy(function: SetFunction, n: int, rng: torch.Generator) -> list[int]:
    if function.at_hand:
        return _naive(function, n, rng)
    bounds, chosen = function.gains(torch.arange(function.rows)).cpu(), list[int]()
    for _ in range(n):
        stale = bounds.clone()  # of rows not looked at in this step; -inf for the others
        best, gain, width = -1, -math.inf, _LOOK
        while True:
            top = int(stale.argmax())
            if stale[top] < gain or (stale[top] == gain and top > best):
                break
            look = torch.cat([stale.topk(min(width, len(stale))).indices, torch.tensor([top])])
            look = torch.unique(look[stale[look] > -torch.inf])
            gains = function.gains(look).cpu()
            bounds[look], stale[look] = gains, -torch.inf
            found = int(gains.argmax())
            if (float(gains[found]), -int(look[found])) > (gain, -best):
                best, gain = int(look[found]), float(gains[found])
            width *= 2
        bounds[best] = -torch.inf
        chosen.append(best)
        function.add(best)
    return chosen


def _stochastic(function: SetFunction, n: int, rng: torch.Generator) -> list[int]:
    left, chosen = torch.arange(function.rows), list[int]()
    size = math.ceil(function.rows / n * math.log(1 / _EPSILON))
    for _ in range(n):
        look = torch.randperm(len(left), generator=rng)[:size].sort().values
        best = int(look[function.gains(left[look]).argmax()])
        chosen.append(int(left[best]))
        function.add(chosen[-1])
        left = torch.cat([left[:best], left[best + 1 :]])
    return chosen


OPTIMIZERS: dict[str, Callable[[SetFunction, int, torch.Generator], list[int]]] = {
    "naive": _naive,
    "lazy": _lazy,
    "stochastic": _stochastic,
}


def cosine_vectors(x: torch.Tensor) -> torch.Tensor:
    """Vectors (N, D + 1) whose products are the similarities 1/2 + 1/2 cos of rows (N, D); of a zero row, 1/2."""
    unit = torch.nn.functional.normalize(x, dim=1)
    return torch.cat([unit, torch.ones_like(unit[:, :1])], 1).mul_(math.sqrt(0.5))


class Facilities:
    """Facility location: ``sum_j max(0, f - min_{a in A} c_aj)``, what it saves that a row of the set is near to each.

    Parameters
    ----------
    left, right : (N, D), (D, N)
        The costs c are their product.
    far : float or tensor
        The cost f of a row that is near to none.
    root : bool
        Whether costs are the square roots of the product.
    """

    at_hand = False

    def __init__(self, left: torch.Tensor, right: torch.Tensor, *, far: "float | torch.Tensor", root: bool) -> None:
        self.rows = len(left)
        self._left, self._right, self._root = left, right.contiguous(), root
        self._nearest = left.new_ones(self.rows) * far  # cost of each row
        self._piece = left.new_empty(max(1, _PIECE_PAIRS // self.rows), self.rows)
        self.served_by: torch.Tensor = torch.full((self.rows,), -1)  # the row of the set that is nearest to each

    @classmethod
    def by_product(cls, vectors: torch.Tensor) -> "Facilities":
        """Make ``sum_j max_{a in A} s_aj`` of products s of vectors (N, D), none negative."""
        return cls(-vectors, vectors.T, far=0.0, root=False)

    @classmethod
    def by_distance(cls, x: torch.Tensor) -> "Facilities":
        """Make ``sum_j f - min_{a in A} d_aj`` of distances d of rows (N, D), with a bound f of all of them."""
        left, right = _square_factors(x - x.mean(0))
        return cls(left, right, far=2 * (x - x.mean(0)).square().sum(1).max().sqrt(), root=True)

    def gains(self, rows: torch.Tensor) -> torch.Tensor:
        """See `SetFunction`."""
        saved = [
            torch.sub(self._nearest, self._costs(some), out=self._piece[: len(some)]).clamp_min_(0).sum(1)
            for some in torch.split(rows, len(self._piece))
        ]
        return torch.cat(saved)

    def add(self, row: int) -> None:
        """See `SetFunction`."""
        costs = self._costs(torch.tensor([row]))[0]
        self.served_by[(costs < self._nearest).cpu() | (self.served_by < 0)] = row  # the first serves the farthest, too
        self._nearest = torch.minimum(costs, self._nearest)

    def _costs(self, rows: torch.Tensor) -> torch.Tensor:
        costs = torch.mm(self._left[rows], self._right, out=self._piece[: len(rows)])
        return costs.clamp_min_(0).sqrt_() if self._root else costs


def _square_factors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (N, D + 2), (D + 2, N) whose product are the squared distances of rows (N, D)."""
    norms, ones = x.square().sum(1, keepdim=True), torch.ones_like(x[:, :1])
    return torch.cat([-2 * x, ones, norms], 1), torch.cat([x, norms, ones], 1).T


class GraphCut:
    """Graph cut: ``sum_{j in V, a in A} s_ja - sum_{a, b in A} s_ab`` of products of vectors (N, D)."""

    at_hand = True

    def __init__(self, vectors: torch.Tensor) -> None:
        self.rows = len(vectors)
        self._vectors = vectors
        self._gains = vectors @ vectors.sum(0) - vectors.square().sum(1)

    def gains(self, rows: torch.Tensor) -> torch.Tensor:
        """See `SetFunction`."""
        return self._gains[rows]

    def add(self, row: int) -> None:
        """See `SetFunction`."""
        self._gains.sub_(self._vectors @ self._vectors[row], alpha=2)


class LogDeterminant:
    """Log-determinant: ``log det(I + S_A)`` of products S of vectors (N, D).

    By the determinant lemma the gain of v is ``log(1 + v M v)`` with ``M = (I + sum_{a in A} v_a v_a)^-1``, which is
    updated by the formula of Sherman and Morrison.
    """

    at_hand = True

    def __init__(self, vectors: torch.Tensor) -> None:
        self.rows = len(vectors)
        self._vectors = vectors.double()
        self._inverse = torch.eye(vectors.shape[1], dtype=torch.float64, device=vectors.device)
        self._quadratic = self._vectors.square().sum(1)  # v M v

    def gains(self, rows: torch.Tensor) -> torch.Tensor:
        """See `SetFunction`."""
        return self._quadratic[rows].log1p()

    def add(self, row: int) -> None:
        """See `SetFunction`."""
        turned = self._inverse @ self._vectors[row]
        scale = 1 + self._quadratic[row]
        self._inverse -= torch.outer(turned, turned) / scale
        self._quadratic -= (self._vectors @ turned).square() / scale


def matching_pursuit(gradients: torch.Tensor, n: int, ridge: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Find few rows and weights w, none negative, whose weighted sum comes near the sum b of all rows.

    Orthogonal matching pursuit (Killamsetty et al. 2021, algorithm 2): each row chosen is the one most along the
    residual of the ridge regression of b on those before it. The residual is ``ridge (ridge I + G'G)^-1 b``, G the rows
    chosen, and its inverse is updated by the formula of Sherman and Morrison. The weights minimise
    ``|G'w - b|^2 + ridge |w|^2`` over w >= 0.

    Parameters
    ----------
    gradients : (N, C) float
    n : int
        Most rows, at most N.
    ridge : float

    Returns
    -------
    rows : (M,) int64
        At most n: those of positive weight.
    weights : (M,) float64
    """
    g = gradients.double()
    total = g.sum(0)
    inverse = torch.eye(g.shape[1], dtype=g.dtype, device=g.device) / ridge
    chosen = torch.zeros(len(g), dtype=torch.bool, device=g.device)
    for _ in range(n):
        along = (g @ (inverse @ total)).masked_fill_(chosen, -torch.inf)
        row = int(along.argmax())
        if along[row] <= 0:
            break  # no row left points towards what is missing
        chosen[row] = True
        turned = inverse @ g[row]
        inverse -= torch.outer(turned, turned) / (1 + g[row] @ turned)
    rows = chosen.nonzero()[:, 0]
    weights = nonnegative_ridge(g[rows], total, ridge)
    return rows[weights > 0], weights[weights > 0]


def nonnegative_ridge(g: torch.Tensor, b: torch.Tensor, ridge: float) -> torch.Tensor:
    """Minimise ``|G'w - b|^2 + ridge |w|^2`` over weights w >= 0, by Newton's method on its dual of C numbers.

    At the minimum ``w = max(0, G r) / ridge`` with the residual r, which minimises the convex function
    ``|r|^2 / 2 - b r + |max(0, G r)|^2 / (2 ridge)``.

    Parameters
    ----------
    g : (N, C) float64
    b : (C,) float64
    ridge : float

    Returns
    -------
    (N,) float64
    """
    identity = torch.eye(len(b), dtype=b.dtype, device=b.device)

    def value(r: torch.Tensor) -> torch.Tensor:
        return r.square().sum() / 2 - b @ r + (g @ r).clamp_min(0).square().sum() / (2 * ridge)

    r = b.clone()
    for _ in range(_NEWTON_STEPS):
        along = g @ r
        slope = r - b + g.T @ along.clamp_min(0) / ridge
        if slope.norm() <= 1e-12 * b.norm():
            break
        active = g[along > 0]
        step = torch.linalg.solve(identity + active.T @ active / ridge, slope)
        size = 1.0
        while value(r - size * step) > value(r) - 1e-4 * size * (slope @ step) and size > 1e-9:
            size /= 2
        r = r - size * step
    weights: torch.Tensor = (g @ r).clamp_min(0) / ridge
    return weights
