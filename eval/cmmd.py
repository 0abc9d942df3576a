"""CMMD: squared maximum mean discrepancy of unit vectors under a Gaussian kernel, times 1,000."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["cmmd"]

_BLOCK = 2048


def cmmd(a: Float[Tensor, "N F"], b: Float[Tensor, "M F"], *, sigma: float = 10.0) -> float:
    """The biased estimate (an image is its own neighbour), from all pairs in float64.

    Args:
        a: Features of one set, any float dtype [N, F]; rows are brought to unit length.
        b: Features of the other set [M, F].
        sigma: Width of the kernel.

    Raises:
        ConfigError: Feature lengths differ, or a set is empty.

    Source: Jayasumana et al. 2024, section 4, in the published code's units.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ConfigError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}; both must be [images, length]")
    x, y = (torch.nn.functional.normalize(z.double(), dim=1) for z in (a, b))
    return 1000 * (_mean(x, x, sigma) + _mean(y, y, sigma) - 2 * _mean(x, y, sigma))


def _mean(x: Tensor, y: Tensor, sigma: float) -> float:
    total = 0.0
    for rows in x.split(_BLOCK):
        # Unit vectors: the squared distance is 2 - 2 cos.
        total += float(((rows @ y.T - 1) / sigma**2).exp().sum())
    return total / (len(x) * len(y))
