"""Parallel decoding of a grid of image codes, after Meissonic's scheduler.

A code is drawn for every masked place; then the least certain are masked again. How many stay masked depends on the
whole grid, not on what was masked at the start, and at least one does until the last step.

Source: MaskGIT (arXiv 2202.04200), section 3.2; published scheduler of Meissonic (arXiv 2410.08261).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff import rng

__all__ = ["Curve", "paint", "remask", "still_masked", "temperatures"]

Curve = Literal["cosine", "linear"]


def still_masked(
    step: int, steps: int, tokens: int, masked: Int[Tensor, "B"], curve: Curve = "cosine"
) -> Int[Tensor, "B"]:
    """How many codes of each row are masked again after step ``step`` (from 0) of ``steps``; 0 after the last.

    Args:
        step: Number of the step, from 0.
        steps: Steps of the run.
        tokens: Codes of the grid.
        masked: Int64 [B], masked before the step.
        curve: cos(pi r / 2) or 1 - r of the share r of steps done.

    >>> still_masked(0, 4, 16, torch.tensor([16])).tolist()
    [14]
    """
    if step + 1 == steps:
        return torch.zeros_like(masked)
    # In float32, as published: floor turns the last bit into a token.
    ratio = torch.tensor((step + 1) / steps, dtype=torch.float32)
    share = torch.cos(ratio * math.pi * 0.5) if curve == "cosine" else 1 - ratio
    return torch.full_like(masked, int((tokens * share).floor())).minimum(masked - 1).clamp_min(1)


def temperatures(temperature: tuple[float, float] | float, steps: int) -> Float[Tensor, "S"]:
    """Noise of each step: evenly from the first number to the second, or from a single number to 0.01."""
    start, end = temperature if isinstance(temperature, tuple) else (temperature, 0.01)
    return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")


def remask(
    log_p: Float[Tensor, "B N"],
    was_masked: Bool[Tensor, "B N"],
    count: Int[Tensor, "B"],
    noise: Float[Tensor, "B N"],
) -> Bool[Tensor, "B N"]:
    """Which places are masked again: the ``count`` of lowest log p + noise among those that were masked.

    Args:
        log_p: Float [B, N], log-probability of the drawn code.
        was_masked: Bool [B, N], places that were drawn in this step.
        count: Int64 [B], from `still_masked`.
        noise: Float [B, N], Gumbel numbers times the temperature of the step.
    """
    certainty = (log_p + noise).masked_fill(~was_masked, torch.finfo(log_p.dtype).max)
    cut = certainty.sort(dim=1).values.gather(1, count[:, None].clamp_max(certainty.shape[1] - 1))
    return (certainty < cut) & (count > 0)[:, None]


@torch.no_grad()
def paint(
    logits: Callable[[Tensor, float], Tensor],
    codes: Int[Tensor, "B h w"],
    mask_id: int,
    generators: rng.Source,
    *,
    steps: int = 48,
    temperature: tuple[float, float] | float = (2.0, 0.0),
    curve: Curve = "cosine",
) -> Int[Tensor, "B h w"]:
    """Fill the masked places of a grid.

    Args:
        logits: (codes [B, h, w], share of the steps that are left) -> logits [B, K, h, w], guidance included.
        codes: Int64 [B, h, w]; ``mask_id`` where a code is wanted.
        mask_id: The mask.
        generators: One source per row.
        steps: Passes of the network.
        temperature: See `temperatures`.
        curve: See `still_masked`.
    """
    grid = codes.flatten(1)
    for step, heat in enumerate(temperatures(temperature, steps).tolist()):
        masked = grid == mask_id
        scores = logits(grid.view_as(codes), 1 - step / steps).flatten(2).transpose(1, 2).float()
        drawn = (scores + rng.gumbel(generators, scores.shape, device=scores.device)).argmax(-1)
        log_p = scores.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        noise = heat * rng.gumbel(generators, drawn.shape, device=scores.device)
        count = still_masked(step, steps, grid.shape[1], masked.sum(1), curve)
        again = remask(log_p, masked, count, noise)
        grid = torch.where(masked, drawn, grid).masked_fill(again, mask_id)
    return grid.view_as(codes)
