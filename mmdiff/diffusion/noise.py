"""Noise of the likelihood bounds: the share p(t) that is masked at time t and the weight p'(t) / p(t) of the bound.

The bound does not depend on the schedule in expectation, only in variance: t is reparametrised. The total noise is
sigma = -log(1 - p), so that sigma' / (exp(sigma) - 1) is the same weight. The schedules of image tokens are in
`mmdiff.diffusion.mask_schedules`; times come from `mmdiff.diffusion.masking`.

Source: RADD (arXiv 2406.03736), MDLM (arXiv 2406.07524) and BD3-LM (arXiv 2503.09573), published code's behaviour.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.diffusion.mask_schedules import Gamma
from mmdiff.diffusion.masking import EPS

__all__ = [
    "NOISES",
    "NoiseName",
    "constant_weight",
    "cosine",
    "cosine_squared",
    "equal_weight_times",
    "geometric",
    "log_odds",
    "logarithmic",
    "loglinear",
    "power",
    "rate",
    "sigma",
    "uncentred_cosine",
]

NoiseName = Literal["loglinear", "geometric", "cosine", "cosine-squared", "square", "square-root", "log"]
"""Schedules that a recipe can name."""


def loglinear(eps: float = EPS) -> Gamma:
    """Share (1 - eps) t: the weight is 1 / t."""
    return Gamma(lambda t: (1 - eps) * t, lambda t: 1 / t)


def geometric(low: float = 1e-3, high: float = 1.0) -> Gamma:
    """Total noise from ``low`` to ``high`` in equal ratios; with high = 1 at most 63 % is masked."""
    growth = math.log(high / low)

    def noise(t: Tensor) -> Tensor:
        return low * torch.exp(growth * t)

    return Gamma(lambda t: -torch.expm1(-noise(t)), lambda t: growth * noise(t) / torch.expm1(noise(t)))


def cosine(eps: float = EPS) -> Gamma:
    """Share (1 - eps) (1 - cos(pi t / 2))."""
    return Gamma(
        lambda t: (1 - eps) * 2 * torch.sin(math.pi / 4 * t) ** 2,
        lambda t: math.pi / 2 / torch.tan(math.pi / 4 * t),
    )


def cosine_squared(eps: float = EPS) -> Gamma:
    """Share (1 - eps) (1 - cos^2(pi t / 2))."""
    return Gamma(lambda t: (1 - eps) * torch.sin(math.pi / 2 * t) ** 2, lambda t: math.pi / torch.tan(math.pi / 2 * t))


def uncentred_cosine(eps: float = EPS) -> Gamma:
    """Share 1 - (1 - eps) cos(pi t / 2), never below eps; the weight's denominator is eps larger, as published.

    Source: BD3-LM's published schedule ``cosine``.
    """

    def share(t: Tensor) -> Tensor:
        return 1 - (1 - eps) * torch.cos(math.pi / 2 * t)

    return Gamma(share, lambda t: math.pi / 2 * (1 - eps) * torch.sin(math.pi / 2 * t) / (share(t) + eps))


def power(exponent: float, floor: float = EPS) -> Gamma:
    """Share t^exponent, at least ``floor``; there the weight is that of the floor."""

    def share(t: Tensor) -> Tensor:
        return (t**exponent).clamp_min(floor)

    return Gamma(share, lambda t: exponent * t ** (exponent - 1) / share(t))


def logarithmic() -> Gamma:
    """Share log2(1 + t)."""
    return Gamma(lambda t: torch.log1p(t) / math.log(2), lambda t: 1 / (torch.log1p(t) * (1 + t)))


NOISES: dict[str, Gamma] = {
    "loglinear": loglinear(),
    "geometric": geometric(),
    "cosine": cosine(),
    "cosine-squared": cosine_squared(),
    "square": power(2.0),
    "square-root": power(0.5),
    "log": logarithmic(),
}
"""Schedules by name, with their published constants."""


def sigma(noise: Gamma, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Total noise -log(1 - p(t)); infinite where everything is masked."""
    return -torch.log1p(-noise.share(t))


def rate(noise: Gamma, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Its derivative sigma'(t) = p'(t) / (1 - p(t))."""
    share = noise.share(t)
    return noise.weight(t) * share / (1 - share)


def log_odds(noise: Gamma, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Log of the odds that a token is masked, log(p / (1 - p)) = log(exp(sigma) - 1)."""
    share = noise.share(t)
    return share.log() - torch.log1p(-share)


def constant_weight(u: Float[Tensor, "*B"], low: float = EPS) -> tuple[Float[Tensor, "*B"], float]:
    """Masked shares that need no weight: log p is spread evenly, so that p'(u) / p(u) is a constant.

    Args:
        u: Float uniform; 0 gives the largest share.
        low: Smallest total noise; the largest is -log of it, as that of `loglinear` with this eps.

    Returns:
        (share p of every row, the weight).

    Source: MDLM, change of variables; the published weight leaves out the log of the largest share.
    """
    first, last = _log_shares(low)
    return torch.exp(first + u * (last - first)), -first


def equal_weight_times(u: Float[Tensor, "*B"], eps: float = EPS) -> Float[Tensor, "*B"]:
    """Times of `loglinear` under which its shares are those of `constant_weight`: importance sampling of t.

    Source: MDLM, importance sampling, published code's behaviour (u = 1 gives the largest time).
    """
    first, last = _log_shares(eps)
    return torch.exp(u * last + (1 - u) * first) / (1 - eps)


def _log_shares(low: float) -> tuple[float, float]:
    """Log of the masked shares at the smallest and at the largest total noise."""
    return math.log(-math.expm1(-low)), math.log(1 - low)
