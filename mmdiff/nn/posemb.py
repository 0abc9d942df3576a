"""Position and time tables without parameters: 2-D sine-cosine positions and the sinusoid of a time step."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["grid_rows", "sincos_2d", "sinusoid"]


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


def grid_rows(rows: int, columns: int, side: int, *, interpolate: bool = False) -> Int[Tensor, "N"]:
    """Which rows of a learned table of side x side positions the cells of a smaller grid use, row-major.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
        side: Side of the table.
        interpolate: Spread the grid over the whole table; otherwise it lies in the table's first corner.

    Source: LLaDA-o's published position ids; bounds and places in float32 steps, as published.
    """
    if not interpolate:
        return (torch.arange(rows)[:, None] * side + torch.arange(columns)).flatten()
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    row, column = (torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), bounds, right=True) for n in (rows, columns))
    return (row[:, None] * side + column).flatten()


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
