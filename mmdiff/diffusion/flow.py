"""Rectified flow: straight paths from data (sigma 0) to noise (sigma 1), how training picks sigma, and step schedules.

x_sigma = (1 - sigma) x0 + sigma noise; the network predicts the velocity noise - x0. Draws come from the caller. The
loops that integrate a velocity are `mmdiff.sampling.flow`.

Source: rectified flow (arXiv 2209.03003); SD3 (arXiv 2403.03206), section 3.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "cosmap_weight",
    "drop",
    "dynamic_shift",
    "guide",
    "logit_normal",
    "mode",
    "noised",
    "per_sample_loss",
    "resolution_shift",
    "schedule",
    "shifted",
    "sigma_sqrt_weight",
    "velocity",
]

TRAIN_STEPS = 1000
"""Times are sigma times this, in every published network."""


def logit_normal(normal: Float[Tensor, "B"], mean: float = 0.0, std: float = 1.0) -> Float[Tensor, "B"]:
    """Sigma = sigmoid(mean + std n) for standard normal n: most training where prediction is hardest.

    >>> logit_normal(torch.zeros(1)).tolist()
    [0.5]

    Source: SD3, equation 19; the default of its training.
    """
    return torch.sigmoid(mean + std * normal)


def mode(u: Float[Tensor, "B"], scale: float = 1.29) -> Float[Tensor, "B"]:
    """Sigma = 1 - u - scale (cos^2(pi u / 2) - 1 + u) for uniform u.

    Source: SD3, equation 20.
    """
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def cosmap_weight(sigma: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Loss weight 2 / (pi (1 - 2 sigma + 2 sigma^2)).

    Source: SD3, equation 21, as a weight on uniform times.
    """
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def sigma_sqrt_weight(sigma: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Loss weight sigma^-2.

    Source: published training code of SD3 in diffusers.
    """
    return sigma**-2.0


def shifted(sigma: Float[Tensor, "*S"], factor: float) -> Float[Tensor, "*S"]:
    """More noise for larger images: factor sigma / (1 + (factor - 1) sigma).

    >>> shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist()
    [0.0, 0.75, 1.0]

    Source: SD3, equation 23.
    """
    return factor * sigma / (1 + (factor - 1) * sigma)


def resolution_shift(tokens: int, base_tokens: int) -> float:
    """The factor that gives an image of ``tokens`` the noise that one of ``base_tokens`` has.

    >>> resolution_shift(4096, 1024)
    2.0
    """
    return math.sqrt(tokens / base_tokens)


def dynamic_shift(tokens: int) -> float:
    """The factor exp(mu), mu linear in the number of tokens from 0.5 at 256 to 1.15 at 4096.

    Source: published code of Flux and of diffusers' dynamic shifting.
    """
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def noised(x0: Float[Tensor, "B *C"], noise: Float[Tensor, "B *C"], sigma: Float[Tensor, "B"]) -> Float[Tensor, "B *C"]:
    """(1 - sigma) x0 + sigma noise, one sigma per row."""
    sigma = _rows(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity(x0: Float[Tensor, "B *C"], noise: Float[Tensor, "B *C"]) -> Float[Tensor, "B *C"]:
    """What the network should predict at every sigma: noise - x0."""
    return noise - x0


def per_sample_loss(predicted: Float[Tensor, "B *C"], target: Float[Tensor, "B *C"]) -> Float[Tensor, "B"]:
    """Mean squared error of each row, in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def drop(
    condition: Float[Tensor, "B *C"], u: Float[Tensor, "B"], share: float, empty: Float[Tensor, "*C"]
) -> Float[Tensor, "B *C"]:
    """Replace the condition of rows with u < ``share`` by ``empty``, so that guidance has an unconditional branch."""
    return torch.where(_rows(u < share, condition), empty.to(condition.dtype), condition)


def guide(
    conditional: Float[Tensor, "B C h w"],
    unconditional: Float[Tensor, "B C h w"],
    guidance: float,
    *,
    channels: int | None = None,
) -> Float[Tensor, "B C h w"]:
    """Away from the unconditional prediction: u + guidance (c - u); 1 = none.

    Args:
        conditional: Float [B, C, h, w].
        unconditional: Float [B, C, h, w].
        guidance: Strength.
        channels: Guide only the first so many channels and keep the conditional rest (DiT published 3 of its 4).
    """
    mixed = torch.lerp(unconditional, conditional, guidance)
    return mixed if channels is None else torch.cat((mixed[:, :channels], conditional[:, channels:]), dim=1)


def schedule(steps: int, shift: float = 1.0, *, train_steps: int = TRAIN_STEPS) -> Float[Tensor, "S"]:
    """Sigmas of a run: ``steps`` of them from 1 down to the smallest of training, then 0; float32 [steps + 1].

    The smallest sigma is shifted twice, as in diffusers and in Stability's sampler: the grid ends at the shifted
    1 / train_steps and is shifted as a whole.

    >>> print(*(round(s, 6) for s in schedule(4, 3.0).tolist()))
    1.0 0.857692 0.602151 0.008929 0.0
    """
    last = shifted(torch.tensor(1 / train_steps, dtype=torch.float64), shift)
    grid = torch.linspace(1.0, last.item(), steps, dtype=torch.float64, device="cpu")
    return torch.cat((shifted(grid, shift), grid.new_zeros(1))).float()


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))
