"""Squares of a grid as tokens and back: row, then column of the patch; in a token row, column, channel."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["patch", "unpatch"]


def patch(image: Float[Tensor, "B C h w"], size: int) -> Float[Tensor, "B N P"]:
    """Tokens of the squares of ``size`` x ``size``; `unpatch` is the way back."""
    grid = image.unflatten(2, (-1, size)).unflatten(4, (-1, size))
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatch(tokens: Float[Tensor, "B N P"], rows: int, patch: int) -> Float[Tensor, "B C h w"]:
    """Patch tokens into an image with ``rows`` rows of patches of ``patch`` x ``patch``."""
    grid = tokens.unflatten(1, (rows, -1)).unflatten(-1, (patch, patch, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
