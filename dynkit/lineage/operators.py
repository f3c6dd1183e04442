"""Operators that merge the weights of models.

An operator is a frozen dataclass called with the state of the common ancestor and those of the models; it works on
floating-point tensors, in float32 or better, and takes all others from the first model. Its name and parameters are
the recipe of the merge, so an update of a parent can be carried through it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from dynkit.errors import InvalidInput, did_you_mean
from dynkit.policies import describe, snake_case

__all__ = ["OPERATORS", "Layers", "Mean", "Operator", "TaskArithmetic", "Ties", "merged"]

State = Mapping[str, torch.Tensor]


class Operator(Protocol):
    """Merges models (at least one) that come from `base`."""

    def __call__(self, base: State, models: Sequence[State], /) -> dict[str, torch.Tensor]: ...


@dataclasses.dataclass(frozen=True)
class Mean:
    """Weighted mean of the models' weights, w = sum_k a_k w_k / sum_k a_k.

    Parameters
    ----------
    weights : tuple of float or None
        One for each model; None: all alike.

    References
    ----------
    B. McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017,
    algorithm 1; M. Wortsman et al., "Model soups", ICML 2022.
    """

    weights: tuple[float, ...] | None = None

    def __call__(self, base: State, models: Sequence[State]) -> dict[str, torch.Tensor]:
        """Merge."""
        weights = self.weights or (1.0,) * len(models)
        numbers = all(isinstance(weight, int | float) for weight in weights)
        if not numbers or len(weights) != len(models) or not sum(weights):
            raise InvalidInput(f"weights={weights} must be one number for each of {len(models)} models, sum not 0")
        return _each(
            [],
            models,
            lambda name, tensors: (
                sum((w * t for w, t in zip(weights, tensors, strict=True)), start=torch.tensor(0.0)) / sum(weights)
            ),
        )


@dataclasses.dataclass(frozen=True)
class TaskArithmetic:
    """Add what each model learned to the common ancestor: w = w_0 + scale * sum_k (w_k - w_0).

    Parameters
    ----------
    scale : float

    References
    ----------
    G. Ilharco et al., "Editing models with task arithmetic", ICLR 2023, section 2.
    """

    scale: float = 1.0

    def __call__(self, base: State, models: Sequence[State]) -> dict[str, torch.Tensor]:
        """Merge."""

        def change(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
            start = _wide(base[name])
            return start + self.scale * sum((t - start for t in tensors), start=torch.zeros_like(start))

        return _each([base], models, change)


@dataclasses.dataclass(frozen=True)
class Ties:
    """Task arithmetic without interference: trim small changes, elect a sign for each weight, average those that agree.

    Parameters
    ----------
    density : float
        Share of each tensor's changes to keep, the largest ones, in (0, 1].
    scale : float

    References
    ----------
    P. Yadav et al., "TIES-Merging: resolving interference when merging models", NeurIPS 2023, algorithm 1. There the
    share is of all weights together; here it is of each tensor, so that a large layer does not silence a small one.
    """

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InvalidInput(f"density={self.density!r} must be in (0, 1]")

    def __call__(self, base: State, models: Sequence[State]) -> dict[str, torch.Tensor]:
        """Merge."""

        def change(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
            start = _wide(base[name])
            trimmed = torch.stack([_largest(tensor - start, self.density) for tensor in tensors])
            elected = torch.sign(trimmed.sum(0))
            agreeing = torch.where(torch.sign(trimmed) == elected, trimmed, 0.0)
            count = (agreeing != 0).sum(0).clamp_min(1)
            return start + self.scale * agreeing.sum(0) / count

        return _each([base], models, change)


def _largest(change: torch.Tensor, density: float) -> torch.Tensor:
    """Keep this share of the values, the largest in magnitude; set the others to 0."""
    keep = max(1, round(density * change.numel()))
    if keep >= change.numel():
        return change
    kept = change.abs().flatten().topk(keep).indices
    mask = torch.zeros(change.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.reshape(change.shape), change, 0.0)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Take every tensor from the one model that changed it; where none did, from the common ancestor.

    Also tensors that one of the models added or removed. Two models that changed the same tensor, but not alike, are a
    conflict.
    """

    def __call__(self, base: State, models: Sequence[State]) -> dict[str, torch.Tensor]:
        """Merge."""
        result: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys([*base, *(name for model in models for name in model)]):
            changed = [model.get(name) for model in models if not same(base.get(name), model.get(name))]
            if any(not same(changed[0], other) for other in changed[1:]):
                raise InvalidInput(f"tensor {name!r} was changed by several of the models; merge with an operator")
            value = changed[0] if changed else base.get(name)
            if value is not None:
                result[name] = value
        return result


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are the same bits, or both are missing."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a is b or torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))) or not a.numel()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor  # torch promotes no bytes


def _each(bases: Sequence[State], models: Sequence[State], change: Any) -> dict[str, torch.Tensor]:
    """Apply `change` to every floating-point tensor of models of one structure, which the bases have, too."""
    first = models[0]
    for other in (*bases, *models[1:]):
        if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in other.items()}:
            raise InvalidInput("the models have tensors of different names or shapes; merge those of one structure")
    return {
        name: change(name, [_wide(model[name]) for model in models]).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


OPERATORS: dict[str, type[Any]] = {snake_case(one.__name__): one for one in (Mean, TaskArithmetic, Ties, Layers)}


def recipe_of(operator: Any) -> dict[str, Any]:
    """Record of an operator: ``{"ties": {"density": 0.2, "scale": 1.0}}``."""
    if type(operator) not in OPERATORS.values():
        raise InvalidInput(
            f"operator={operator!r} is not one of {', '.join(one.__name__ for one in OPERATORS.values())}"
        )
    described: dict[str, Any] = describe(operator)
    return described


def merged(recipe: Mapping[str, Any], states: Sequence[State]) -> dict[str, torch.Tensor]:
    """Merge by a recorded operator; the first state is that of the common ancestor, unless it is a mean."""
    (name, parameters), *_ = recipe.items()
    if name not in OPERATORS:
        raise InvalidInput(f"merge operator {name!r} is not known{did_you_mean(name, OPERATORS)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    base, models = ({}, states) if name == "mean" else (states[0], states[1:])
    return dict(OPERATORS[name](**values)(base, models))
