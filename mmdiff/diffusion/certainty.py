"""Certainty forcing: training that makes right predictions sure, so that more tokens are revealed per pass.

The answer is walked block by block: earlier blocks are clean, one is half masked (and, in a second copy, masked where
the first is not), later ones are hidden and not learnt. To the cross-entropy comes the entropy of those predictions
that are right.

Source: dParallel (arXiv 2509.26488), published training code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.diffusion.masking import EPS, independent_mask, mask_probability

__all__ = ["Halves", "halves", "right_entropy"]


@dataclass(frozen=True)
class Halves:
    """Two copies of a batch, one after the other.

    Attributes:
        hidden: Bool [2B, L], positions that hold the mask.
        learnt: Bool [2B, L], those of them that are in the loss.
    """

    hidden: Bool[Tensor, "b L"]
    learnt: Bool[Tensor, "b L"]


def halves(
    answer: Bool[Tensor, "B L"],
    clean_blocks: Int[Tensor, "B"],
    u: Float[Tensor, "B L"],
    *,
    block: int | None = None,
    share: float = 0.5,
    eps: float = EPS,
) -> Halves:
    """Masks of both copies.

    Args:
        answer: Bool [B, L], positions of the answer.
        clean_blocks: Int64 [B], blocks that are given; 0 .. floor(answer length / block).
        u: Float [B, L] uniforms.
        block: Positions of a block, counted within the answer; None: the answer is one block.
        share: t of `mmdiff.diffusion.masking.mask_probability`.
        eps: Its eps.
    """
    rank = answer.cumsum(1) - 1
    number = rank // block if block is not None else torch.zeros_like(rank)
    current = answer & (number == clean_blocks[:, None])
    later = answer & (number > clean_blocks[:, None])
    p = mask_probability(u.new_full((len(u),), share), eps)
    first = independent_mask(p, u, current)
    learnt = torch.cat([first, current & ~first])
    return Halves(learnt | later.repeat(2, 1), learnt)


def right_entropy(
    logits: Float[Tensor, "n V"], labels: Int[Tensor, "n"], temperature: float = 0.5
) -> Float[Tensor, ""]:
    """Mean entropy, at a temperature, of the predictions that are right; 0 if none is.

    Args:
        logits: Float [n, V] at masked positions.
        labels: Int64 [n].
        temperature: The logits are divided by it.
    """
    right = logits.argmax(-1) == labels
    p = (logits[right].float() / temperature).softmax(-1)
    entropy = -(p * (p + 1e-12).log()).sum(-1)
    return entropy.sum() / right.sum().clamp_min(1)
