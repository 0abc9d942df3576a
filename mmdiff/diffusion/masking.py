"""The forward process: how much is masked at time t, and which positions.

t runs from 0 (nothing masked) to 1 (all masked). Draws come from the caller: uniforms go in, masks come out, so that
recorded draws of a reference run give its masks.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import IGNORE

__all__ = [
    "EPS",
    "at_least_one_mask",
    "complementary_labels",
    "dialogue_causal",
    "dialogue_turns",
    "exact_count_mask",
    "independent_mask",
    "mar_mask",
    "mask_probability",
    "masked_share",
    "permuted_mask",
    "spread_times",
    "stratified_times",
    "uniform_count_mask",
]

EPS = 1e-3
"""Smallest mask probability of LLaDA's training (its guidelines, section on pre-training)."""


def mask_probability(t: Float[Tensor, "B"], eps: float = EPS) -> Float[Tensor, "B"]:
    """The probability p = (1 - eps) t + eps that a position is masked at time t.

    >>> mask_probability(torch.tensor([0.0, 0.5, 1.0])).tolist()
    [0.0010000000474974513, 0.5005000233650208, 1.0]

    Source: LLaDA (arXiv 2502.09992), published training code.
    """
    return (1 - eps) * t + eps


def independent_mask(
    p: Float[Tensor, "B"], u: Float[Tensor, "B L"], maskable: Bool[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Mask each maskable position independently where u < p."""
    return (u < p[:, None]) & maskable


def stratified_times(u: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Low-discrepancy times: one uniform draw shifted through the unit interval, so a batch covers it evenly.

    Args:
        u: Float [B] uniform; only the first entry is used.

    Source: VDM (arXiv 2107.00630), appendix I.1; used by MDLM for masked diffusion.
    """
    return (u[0] + torch.arange(len(u), device=u.device) / len(u)) % 1


def spread_times(u: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Stratified times: every entry is drawn in a stretch of its own, so that n entries cover the interval evenly.

    >>> spread_times(torch.tensor([0.0, 0.5])).tolist()
    [0.0, 0.75]

    Source: RADD and MDLM ("antithetic"), BD3-LM over rows and blocks.
    """
    return (u + torch.arange(u.numel(), device=u.device).view(u.shape)) / u.numel() % 1


def masked_share(u: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Share of image tokens to mask under MaskGIT's cosine schedule, cos(pi/2 u) for uniform u.

    Source: MaskGIT (arXiv 2202.04200), section 3.3.
    """
    return torch.cos(math.pi / 2 * u)


def exact_count_mask(
    share: Float[Tensor, "B"], u: Float[Tensor, "B L"], maskable: Bool[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Mask ceil(share * n) of a row's n maskable positions, at least one: those with the smallest u."""
    n = maskable.sum(1)
    return _smallest(torch.minimum((share * n).ceil().long().clamp_min(1), n), u, maskable)


def permuted_mask(share: Float[Tensor, "B"], order: Int[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
    """Mask round(share * N) positions, at least one: those whose number in a permutation is below the count.

    Source: Show-o and MMaDA, published masking of image tokens (halves round to even).
    """
    count = (order.shape[1] * share).round().clamp_min(1)
    return order < count[:, None]


def at_least_one_mask(p: Float[Tensor, "B"], u: Float[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """Mask each position independently where u <= p, or the one of smallest u where that is nobody.

    Source: LaViDa (arXiv 2505.16839), published training code.
    """
    return u <= torch.maximum(p[:, None], u.amin(1, keepdim=True))


def complementary_labels(
    labels: Int[Tensor, "B L"], masked: Bool[Tensor, "B L"], excluded: Bool[Tensor, "B L"]
) -> Int[Tensor, "b L"]:
    """What is learnt from two copies of a batch: masked positions in the first, all others in the second.

    Args:
        labels: Int64 [B, L], `IGNORE` where nothing is learnt.
        masked: Bool [B, L].
        excluded: Bool [B, L], positions that are learnt in neither copy, such as placeholders of infilling.

    Source: LaViDa, complementary masking.
    """
    learnt = torch.cat([masked & ~excluded, ~masked & ~excluded])
    return labels.repeat(2, 1).masked_fill(~learnt, IGNORE)


def mar_mask(batch: int, tokens: int, source: rng.Source) -> Bool[Tensor, "B N"]:
    """MAR's training mask: ceil(N r) tokens of every row, r from a normal (mean 1, sd 0.25) cut to [0.7, 1].

    One r for the batch, other places in each row, as published.

    Source: MAR (arXiv 2406.11838), published training code.
    """
    normal = torch.distributions.Normal(1.0, 0.25)
    low, high = normal.cdf(torch.tensor([0.7, 1.0])).tolist()
    u = low + (high - low) * rng.uniform(source, (1,))
    count = (tokens * normal.icdf(u).clamp(0.7, 1.0)).ceil().long().expand(batch)
    order = rng.permutation(source, batch, tokens)
    return order < count[:, None]


def uniform_count_mask(
    t: Float[Tensor, "B"], u: Float[Tensor, "B L"], maskable: Bool[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Mask l of a row's n maskable positions, l = 1 .. n with equal probability for uniform t: those with smallest u.

    With weight n / l this is the any-order form of the bound: same expectation as independent masking with weight
    1 / p, and no weight above n.

    Source: LLaDA (arXiv 2502.09992), equation 6; equality in RADD (arXiv 2406.03736).
    """
    n = maskable.sum(1)
    return _smallest(torch.minimum((t * n).long() + 1, n), u, maskable)


def dialogue_turns(labels: Int[Tensor, "B L"], header_id: int, assistant_id: int) -> Int[Tensor, "B L"]:
    """The turn of every position: one more at each message that follows an answer and is none itself.

    Args:
        labels: Int64 [B, L] in which the special tokens of the template are labelled, as LLaDA-V's training has them.
        header_id: The id that starts a message's header.
        assistant_id: The id that follows it in an answer.

    Source: LLaDA-V's published ``conversation_mask``.
    """
    starts = labels == header_id
    answers = starts & (labels.roll(-1, dims=1) == assistant_id)
    answers[:, -1] = False
    grows = torch.zeros_like(labels)
    for row, places in enumerate(starts):
        at = places.nonzero().flatten()
        follows = torch.zeros_like(at, dtype=torch.bool)
        follows[1:] = answers[row, at[:-1]]
        grows[row, at] = (follows & ~answers[row, at]).long()
    return grows.cumsum(1)


def dialogue_causal(turns: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Which key (second axis) a query (first) may see: those of its own and of earlier turns."""
    return turns[:, None, :] <= turns[:, :, None]


def _smallest(count: Int[Tensor, "B"], u: Float[Tensor, "B L"], maskable: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """The ``count`` maskable positions of each row with the smallest u."""
    order = u.masked_fill(~maskable, math.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(u.shape[1], device=u.device).expand_as(order))
    return (rank < count[:, None]) & maskable
