"""Mask schedules of image-token models: gamma(t), the share that is masked at time t, and what follows from it.

In training: the mask of a batch. In sampling: the probability that a masked token is revealed in a step.

Source: eMIGM (arXiv 2503.07197), table 1; published code's behaviour where it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion.masking import EPS, mask_probability

__all__ = [
    "GAMMAS",
    "Gamma",
    "GammaName",
    "independent_masks",
    "reveal_probabilities",
    "sampling_times",
    "shared_mask",
]

_RATE = 5.0
"""How sharp the exp and log schedules are."""

_SCALE = math.exp(_RATE) - 1

GammaName = Literal["linear", "cosine", "poly-0.5", "exp", "log"]
"""Published names of the schedules."""


@dataclass(frozen=True)
class Gamma:
    """A mask schedule.

    Attributes:
        share: gamma(t): probability that a token is masked at time t.
        weight: gamma'(t) / gamma(t): weight under which the loss bounds the negative log-likelihood.
    """

    share: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]


GAMMAS: dict[str, Gamma] = {
    "linear": Gamma(lambda t: t, lambda t: 1 / t),
    "cosine": Gamma(
        lambda t: torch.cos(math.pi / 2 * (1 - t)), lambda t: math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))
    ),
    "poly-0.5": Gamma(torch.sqrt, lambda t: 0.5 / t),
    "exp": Gamma(
        lambda t: 1 - torch.exp(-_RATE * t), lambda t: _RATE * torch.exp(-_RATE * t) / (1 - torch.exp(-_RATE * t))
    ),
    "log": Gamma(
        lambda t: torch.log(1 + _SCALE * t) / _RATE, lambda t: _SCALE / ((1 + _SCALE * t) * torch.log(1 + _SCALE * t))
    ),
}
"""Schedules by their published names; published eMIGM models use ``exp``."""


def sampling_times(steps: int, eps: float = 1e-5) -> Float[Tensor, "S"]:
    """Times of a run of ``steps``: from 1 down to ``eps``, ``steps`` + 1 of them, float32."""
    return torch.linspace(1, eps, steps + 1)


def reveal_probabilities(name: str, steps: int) -> Float[Tensor, "S"]:
    """Per step the probability that a token which is still masked is revealed; 1 in the last.

    >>> reveal_probabilities("linear", 4).mul(100).round().int().tolist()
    [25, 33, 50, 100]
    """
    share = GAMMAS[name].share(sampling_times(steps))
    out = 1 - share[1:] / share[:-1]
    out[-1] = 1
    return out


def shared_mask(
    name: str, batch: int, tokens: int, source: rng.Source, *, t_min: float = 0.0
) -> tuple[Bool[Tensor, "B N"], Float[Tensor, "B N"]]:
    """The published training mask: one time and one count for the whole batch, other places in each row.

    The time is clamped below (not drawn from above ``t_min``: a share of ``t_min`` of the batches sits exactly
    there); a draw of fewer than two masked tokens is thrown away together with its time.

    Args:
        name: Schedule.
        batch: B.
        tokens: N.
        source: One generator for the batch; or a tape: time and uniforms per attempt, then permutations [B, N].
        t_min: Smallest time.

    Returns:
        (True = masked, the time p in (0, 1] that weights the loss; equal in all entries).

    Source: published code of eMIGM (arXiv 2503.07197).
    """
    while True:
        p = mask_probability(rng.uniform(source, (1,)).clamp_min(t_min), EPS)
        row = rng.uniform(source, (tokens,)) < GAMMAS[name].share(p)
        if int(row.sum()) >= min(2, tokens):
            break
    return row[rng.shuffles(source, batch, tokens)], p.expand(batch, tokens).clone()


def independent_masks(
    name: str, batch: int, tokens: int, source: rng.Source, *, t_min: float = 0.0
) -> tuple[Bool[Tensor, "B N"], Float[Tensor, "B N"]]:
    """A time and a mask of its own for every row, at least one masked token in each.

    The times of a batch are spread evenly (`mmdiff.diffusion.masking.stratified_times`) before they are clamped.

    Args:
        name: Schedule.
        batch: B.
        tokens: N.
        source: One generator for the batch.
        t_min: Smallest time.

    Returns:
        As `shared_mask`.
    """
    t = (rng.uniform(source, (1,)) + torch.arange(batch) / batch) % 1
    p = mask_probability(t.clamp_min(t_min), EPS)[:, None]
    u = rng.uniform(source, (batch, tokens))
    # The token of smallest u is the one that would be masked next: masking it always costs nothing but a rare bias.
    return (u < GAMMAS[name].share(p)) | (u == u.amin(1, keepdim=True)), p.expand(batch, tokens).clone()
