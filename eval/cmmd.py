"""CMMD: squared maximum mean discrepancy of unit vectors under a Gaussian kernel, times 1,000."""

from __future__ import annotations

from torch.nn.functional import normalize

from mmdiff.errors import ConfigError

from .rows import Rows, blocks

__all__ = ["cmmd"]


def cmmd(a: Rows, b: Rows, *, sigma: float = 10.0) -> float:
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
    return 1000 * (_mean(a, a, sigma) + _mean(b, b, sigma) - 2 * _mean(a, b, sigma))


def _mean(x: Rows, y: Rows, sigma: float) -> float:
    total = 0.0
    for _, rows in blocks(x):
        one = normalize(rows, dim=1)
        for _, others in blocks(y):
            # Unit vectors: the squared distance is 2 - 2 cos.
            total += float(((one @ normalize(others, dim=1).T - 1) / sigma**2).exp().sum())
    return total / (len(x) * len(y))
