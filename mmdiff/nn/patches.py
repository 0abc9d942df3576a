"""Squares of a grid as tokens and back, row by row.

In a token of `patch` the channel varies fastest, in one of `unfold` slowest.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fold", "patch", "unfold", "unpatch"]


def patch(image: Float[Tensor, "B C h w"], size: int) -> Float[Tensor, "B N P"]:
    """Tokens of the squares of ``size`` x ``size``; `unpatch` is the way back."""
    grid = image.unflatten(2, (-1, size)).unflatten(4, (-1, size))
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatch(tokens: Float[Tensor, "B N P"], rows: int, patch: int) -> Float[Tensor, "B C h w"]:
    """Patch tokens into an image with ``rows`` rows of patches of ``patch`` x ``patch``."""
    grid = tokens.unflatten(1, (rows, -1)).unflatten(-1, (patch, patch, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def unfold(image: Float[Tensor, "B C h w"], size: int) -> Float[Tensor, "B N P"]:
    """Tokens of the squares of ``size`` x ``size``: channel, row, column (MAR's order); `fold` is the way back."""
    return F.unfold(image, size, stride=size).transpose(1, 2)


def fold(tokens: Float[Tensor, "B N P"], side: int, size: int) -> Float[Tensor, "B C h w"]:
    """Tokens into an image of ``side`` x ``side``."""
    return F.fold(tokens.transpose(1, 2), (side, side), size, stride=size)
