"""Small models that learn a stream in seconds on a CPU."""

import torch
from torch import nn

__all__ = ["convnet", "mlp"]


class _Scaled(nn.Module):
    """Bytes as numbers in [0, 1]; other numbers as they are; float32 in the shape that the next layer takes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 255 if x.dtype == torch.uint8 else 1
        return (x.float() / scale).reshape(len(x), *self._shape)


def mlp(features: int, outputs: int) -> nn.Module:
    """Standardise `features` numbers, then two hidden layers of 64.

    Parameters
    ----------
    features : int
    outputs : int
        Number of classes, or 1 for a number.
    """
    return nn.Sequential(
        _Scaled((features,)),
        nn.BatchNorm1d(features),
        nn.Linear(features, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, outputs),
    )


def convnet(channels: int, height: int, width: int, outputs: int) -> nn.Module:
    """Halve an image of ``(channels, height, width)`` by each of two convolutions, then a hidden layer of 64."""
    return nn.Sequential(
        _Scaled((channels, height, width)),
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * -(-height // 4) * -(-width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, outputs),
    )
