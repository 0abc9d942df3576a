"""Block diffusion: a time per block, masks whose share stays within an interval, and the weights of its loss.

The network reads [noised | clean] under `mmdiff.nn.masks.block_diffusion`; the loss is read from the noised half.

Source: BD3-LM (arXiv 2503.09573), published training code.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion.mask_schedules import Gamma
from mmdiff.diffusion.masking import EPS, spread_times

__all__ = ["block_times", "clipped_mask", "weights"]

Interval = tuple[float, float]
"""Smallest and largest time; and share of a block, except where a bound is `EPS` or 1."""

_ROUNDS = 1000
"""Redraws after which a block keeps the mask that it has."""


def block_times(u: Float[Tensor, "B n"], interval: Interval) -> Float[Tensor, "B n"]:
    """One time per block, spread evenly over rows and blocks, within the interval."""
    low, high = interval
    return spread_times(u) * (high - low) + low


def clipped_mask(
    p: Float[Tensor, "B n"], length: int, block: int, interval: Interval, source: rng.Source
) -> Bool[Tensor, "B L"]:
    """Independent masks; blocks whose masked share is outside the interval are drawn again.

    Args:
        p: Float [B, n], mask probability of each block.
        length: L; the last block may be shorter than the others.
        block: Slots of a block.
        interval: Bounds of the share.
        source: Uniforms [B, L], once and once more per round.
    """
    rows, device = len(p), p.device
    spread = p.repeat_interleave(block, dim=1)[:, :length]
    masked = rng.uniform(source, (rows, length), device=device) <= spread
    for _ in range(_ROUNDS):
        bad = _outside(masked, block, interval).repeat_interleave(block, dim=1)[:, :length]
        if not bool(bad.any()):
            break
        masked = torch.where(bad, rng.uniform(source, (rows, length), device=device) < spread, masked)
    return masked


def weights(noise: Gamma, t: Float[Tensor, "*B"], interval: Interval) -> Float[Tensor, "*B"]:
    """Weight of the bound at each time; 1 for intervals above one half, which no longer bound anything."""
    return torch.ones_like(t) if interval[0] > 0.5 else noise.weight(t)


def _outside(masked: Bool[Tensor, "B L"], block: int, interval: Interval) -> Bool[Tensor, "B n"]:
    low, high = interval
    length = masked.shape[1]
    blocks = -(-length // block)
    padded = torch.nn.functional.pad(masked.float(), (0, blocks * block - length)).unflatten(1, (blocks, block))
    size = torch.full((blocks,), block, device=masked.device)
    size[-1] = length - (blocks - 1) * block
    share = padded.sum(-1) / size
    # A short block may have no count within the interval: it keeps its first mask.
    possible = torch.floor(high * size) >= torch.ceil(low * size)
    below = (share < low) & (low > EPS)
    above = (share > high) & (high < 1)
    return (below | above) & possible
