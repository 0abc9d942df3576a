"""Monte-Carlo estimates of log p(answer | condition) of a masked-diffusion model.

The network comes as a callable; the draws come from the caller, so that recorded masks of a reference run can be fed
in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmdiff import rng

__all__ = ["Revealed", "confidence_score", "log_likelihood", "masked_counts", "masked_loss", "stratified_masks"]

Logits = Callable[[Bool[Tensor, "b L"]], Float[Tensor, "b L V"]]
"""Logits at the L answer slots when the slots of the mask are masked."""


def masked_counts(first: int, length: int, batch: int) -> Int[Tensor, "b"]:
    """Numbers of masked tokens in a batch, spread evenly over 1 .. length from ``first`` on, cyclically.

    >>> masked_counts(3, 8, 4).tolist()
    [3, 5, 7, 1]

    Source: LLaDA (arXiv 2502.09992), published likelihood code (rounds half to even).
    """
    last = first + (batch - 1) * (length / batch)
    steps = torch.linspace(first, last, batch, dtype=torch.float32).round().long()  # float32 as published
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


@dataclass(frozen=True)
class Revealed:
    """An answer revealed token by token.

    Attributes:
        losses: Float32 [L]; cross-entropy of each token when it was revealed, in that order, in nats.
        order: Int64 [L]; places of the tokens, in that order.
    """

    losses: Float[Tensor, "L"]
    order: Int[Tensor, "L"]


def confidence_score(logits: Logits, answer: Int[Tensor, "L"]) -> Revealed:
    """Reveal the true tokens of an answer one by one, always the one of smallest cross-entropy; L passes.

    Minus the sum of the losses is a score without draws; it is no estimate of log p, but favours the easiest order.

    Args:
        logits: The network.
        answer: Int64 [L].

    Source: iLLaDA's published evaluation code.
    """
    masked = torch.ones(1, len(answer), dtype=torch.bool, device=answer.device)
    losses, order = [], []
    for _ in range(len(answer)):
        entropy = F.cross_entropy(logits(masked)[0].float(), answer, reduction="none")
        place = entropy.masked_fill(~masked[0], torch.inf).argmin()
        losses.append(entropy[place])
        order.append(place)
        masked[0, place] = False
    return Revealed(torch.stack(losses), torch.stack(order))


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
