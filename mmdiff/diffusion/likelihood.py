"""Monte-Carlo estimates of log p(answer | condition) of a masked-diffusion model.

The network comes as a callable; the draws come from the caller, so that recorded masks of a reference run can be fed
in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmdiff import rng

__all__ = ["log_likelihood", "masked_counts", "masked_loss", "stratified_masks"]

Logits = Callable[[Bool[Tensor, "b L"]], Float[Tensor, "b L V"]]
"""Logits at the L answer slots when the slots of the mask are masked."""


def masked_counts(first: int, length: int, batch: int) -> Int[Tensor, "b"]:
    """Numbers of masked tokens in a batch, spread evenly over 1 .. length from ``first`` on, cyclically.

    >>> masked_counts(3, 8, 4).tolist()
    [3, 5, 7, 1]

    Source: LLaDA (arXiv 2502.09992), published likelihood code (rounds half to even).
    """
    steps = torch.linspace(first, first + (batch - 1) * length / batch, batch, dtype=torch.float64).round().long()
    return (steps - 1) % length + 1


def stratified_masks(length: int, samples: int, batch: int, source: rng.Source) -> list[Bool[Tensor, "b L"]]:
    """Masks of an estimate: per batch one random start for the counts, per row a random subset of that size.

    Args:
        length: L, tokens of the answer.
        samples: Masks in all.
        batch: Masks per batch.
        source: Where the draws come from.
    """
    out = []
    for start in range(0, samples, batch):
        rows = min(batch, samples - start)
        first = 1 + int(rng.uniform(source, (1,)).item() * length)
        rank = rng.permutation(source, rows, length, device="cpu").argsort(dim=1)
        out.append(rank < masked_counts(first, length, rows)[:, None])
    return out


def masked_loss(
    logits: Float[Tensor, "b L V"], answer: Int[Tensor, "L"], masked: Bool[Tensor, "b L"]
) -> Float[Tensor, "b"]:
    """(L / l) times the cross-entropy summed over the l masked tokens, per row, in nats.

    Source: LLaDA (arXiv 2502.09992), equation 6.
    """
    b, length = masked.shape
    losses = F.cross_entropy(logits.float().flatten(0, 1), answer.repeat(b), reduction="none").view(b, length)
    return (losses * masked).sum(1) * length / masked.sum(1)


def log_likelihood(logits: Logits, answer: Int[Tensor, "L"], masks: list[Bool[Tensor, "_ L"]]) -> float:
    """Estimate of log p(answer | condition), summed over the answer's tokens, in nats.

    Args:
        logits: The network.
        answer: Int64 [L].
        masks: Batches of masks, such as `stratified_masks` gives.
    """
    total, rows = 0.0, 0
    for masked in masks:
        masked = masked.to(answer.device)
        total += float(masked_loss(logits(masked), answer, masked).double().sum())
        rows += len(masked)
    return -total / rows
