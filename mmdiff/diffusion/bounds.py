"""One bound on -log p(x), in the forms in which it is published.

All are equal in expectation: time and independent masks (t-DCE, MDLM), a uniform share (lambda-DCE), a uniform count
(k-DCE, which is the average over all orders of any-order autoregression), and the score-entropy form (t-DSE). They
differ in variance. What a form costs is one number per row: the weight of the summed cross-entropy.

Source: RADD (arXiv 2406.03736); MDLM (arXiv 2406.07524); SMDM (arXiv 2410.18514).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmdiff.diffusion.mask_schedules import Gamma
from mmdiff.diffusion.noise import log_odds, rate

__all__ = [
    "any_order",
    "count_weight",
    "drop_mask",
    "masked_sum",
    "step_times",
    "subs",
    "t_dce",
    "t_dse",
    "without",
]

_NEVER = -1e6
"""What is added to a logit that must not win; finite, so that 0 times it is 0."""


def drop_mask(logits: Float[Tensor, "*B V"], mask_id: int) -> Float[Tensor, "*B V"]:
    """Log-probabilities over all tokens but the mask, whose column keeps its logit.

    Source: RADD's output rule.
    """
    raw = logits.float() if logits.dtype.itemsize < 4 else logits
    alone = torch.arange(raw.shape[-1], device=raw.device) == mask_id
    return torch.where(alone, raw, without(raw, mask_id).log_softmax(-1))


def without(logits: Float[Tensor, "*B V"], mask_id: int) -> Float[Tensor, "*B V"]:
    """Logits under which the mask is never predicted."""
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == mask_id, -torch.inf)


def subs(logits: Float[Tensor, "B L V"], ids: Int[Tensor, "B L"], mask_id: int) -> Float[Tensor, "B L V"]:
    """Log-probabilities under which the mask is never predicted and tokens that are known stay.

    Args:
        logits: Float [B, L, V].
        ids: Int64 [B, L], what the network was given.
        mask_id: The mask.

    Source: MDLM, the SUBS parametrisation.
    """
    column = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    out = (logits + _NEVER * column).log_softmax(-1)
    known = torch.full_like(out, _NEVER).scatter_(-1, ids[..., None], 0.0)
    return torch.where((ids == mask_id)[..., None], out, known)


def masked_sum(
    entropy: Float[Tensor, "B L"], masked: Bool[Tensor, "B L"], weight: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Weight times the cross-entropy summed over masked positions: every form of the bound but the score entropy.

    The weight is 1 / lambda for lambda-DCE, `count_weight` for k-DCE, p'(t) / p(t) for MDLM, 1 / t for SMDM and LLaDA.
    """
    return weight * torch.where(masked, entropy, 0).sum(1)


def count_weight(masked: Bool[Tensor, "B L"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "B"]:
    """L / k of k-DCE, k being the number of masked positions; 0 where there are none."""
    k = masked.sum(1).to(dtype)
    return torch.where(k > 0, masked.shape[1] / k.clamp_min(1), 0.0)


def t_dce(
    entropy: Float[Tensor, "B L"], masked: Bool[Tensor, "B L"], noise: Gamma, t: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Denoising cross-entropy at time t, with the term that makes it equal the score entropy.

    That term does not depend on the network; without it this is MDLM's loss.
    """
    return masked_sum(entropy + log_odds(noise, t)[:, None], masked, noise.weight(t))


def t_dse(
    log_probs: Float[Tensor, "B L V"],
    ids: Int[Tensor, "B L"],
    masked: Bool[Tensor, "B L"],
    noise: Gamma,
    t: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """Denoising score entropy; the scores are the probabilities divided by the odds of being masked.

    Args:
        log_probs: Float [B, L, V] over the real tokens alone (the mask's column left out).
        ids: Int64 [B, L], the true tokens.
        masked: Bool [B, L].
        noise: Schedule.
        t: Float [B].

    Source: SEDD (arXiv 2310.16834), as RADD writes it.
    """
    odds = log_odds(noise, t)[:, None]
    score = log_probs - odds[..., None]
    right = score.gather(-1, ids[..., None])[..., 0]
    terms = score.exp().sum(-1) + torch.exp(-odds) * (-odds - 1 - right)
    return masked_sum(terms, masked, rate(noise, t))


def step_times(u: Float[Tensor, "B"], steps: int) -> Float[Tensor, "B"]:
    """Times of a process of ``steps`` steps: 1/T, 2/T .. 1.

    The weight of the bound is then 1 / t exactly, in the first step too.

    Source: MDLM, discrete time; its published expression is 0/0 in the first step, of which this is the limit.
    """
    return ((u * steps).long() + 1).to(u.dtype) / steps


def any_order(
    logits: Callable[[Int[Tensor, "B L"]], Float[Tensor, "B L V"]],
    ids: Int[Tensor, "B L"],
    order: Int[Tensor, "L"],
    mask_id: int,
) -> Float[Tensor, "B"]:
    """-log p of tokens revealed one after the other in a given order, the later ones masked; L passes.

    Args:
        logits: Maps ids [B, L] with masks in place to logits.
        ids: Int64 [B, L], the true tokens.
        order: Int64 [L], a permutation: which place is revealed when.
        mask_id: The mask; it is never predicted.
    """
    state = torch.full_like(ids, mask_id)
    total: Tensor | None = None
    for place in order.tolist():
        step = F.nll_loss(drop_mask(logits(state)[:, place], mask_id), ids[:, place], reduction="none")
        total = step if total is None else total + step
        state[:, place] = ids[:, place]
    return torch.zeros(len(ids), device=ids.device) if total is None else total
