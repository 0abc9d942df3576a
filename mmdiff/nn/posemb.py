"""Position and time tables without parameters: 2-D sine-cosine positions and the sinusoid of a time step."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["sincos_2d", "sinusoid"]


def sincos_2d(width: int, rows: int, columns: int, *, scale: float = 1.0) -> Float[Tensor, "N D"]:
    """Sine-cosine table of a grid, row-major, float32.

    The first half of the channels encodes the column, the second half the row; within a half the sines come first.

    Args:
        width: D, a multiple of 4.
        rows: Rows of the grid.
        columns: Columns of the grid.
        scale: Positions are divided by this.

    Source: published code of MAE and DiT (arXiv 2212.09748).
    """
    waves = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (_waves(torch.arange(n, dtype=torch.float64) / scale, waves) for n in (rows, columns))
    table = torch.cat((column.expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)), dim=-1)
    return table.flatten(0, 1).float()


def sinusoid(t: Float[Tensor, "*B"], dim: int = 256) -> Float[Tensor, "*B dim"]:
    """[cos(t f), sin(t f)] with dim/2 frequencies f from 1 down to nearly 1/10000, in float32.

    Args:
        t: Any real numbers.
        dim: Channels, even.

    Source: published code of DiT: the cosines come first, and the exponent is divided by dim/2.
    """
    half = dim // 2
    waves = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[..., None] * waves
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _waves(positions: Tensor, waves: Tensor) -> Tensor:
    angles = positions[:, None] * waves
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
