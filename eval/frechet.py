"""Fréchet distance of two Gaussians, in float64 and without a complex matrix root."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError

from .statistics import Statistics

__all__ = ["frechet_distance"]


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """‖μa − μb‖² + tr Σa + tr Σb − 2 tr (Σa Σb)^½ in float64.

    The last trace is the sum of the roots of the eigenvalues of Rᵀ Σb R with Σa = R Rᵀ, which is symmetric: it stays
    real even when the covariances are singular (fewer images than features).

    Source: Heusel et al. 2017, equation 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"features of {len(a.mean)} and {len(b.mean)} numbers: they come from different networks")
    # Of the smaller set, which has the lower rank: zeros of a spectrum come out as roots of rounding.
    few, many = (b, a) if (b.count or a.count or 0) < (a.count or 0) else (a, b)
    root = _root(few.covariance)
    inner = root.T @ many.covariance @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    squared = (a.mean - b.mean).square().sum()
    return float(squared + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def _root(covariance: Float[Tensor, "F F"]) -> Float[Tensor, "F r"]:
    """Any R with R Rᵀ = covariance: the triangular one where it exists, at a fiftieth of the cost."""
    triangle, failed = torch.linalg.cholesky_ex(covariance)
    if not int(failed):
        return triangle
    values, vectors = torch.linalg.eigh(covariance)
    real = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, real] * values[real].sqrt()
