"""Precision, recall, density and coverage: do generated images lie where real ones do, and the other way round?

A point's ball reaches to its k-th nearest neighbour in its own set. Distances are float64; where a product of matrices
cannot tell a distance from a radius, the pair is computed again from the difference of its vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["Coverage", "PrecisionRecall", "coverage", "precision_recall"]

_BLOCK = 1024
_SPARE = 4
"""Neighbours beyond the k-th whose order a product of matrices may have confused."""
_TIE = 1e-9
"""Relative to the squared lengths; a hundred times the rounding of a float64 product over thousands of numbers."""


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Shares of points inside some ball of the other set.

    Attributes:
        precision: Share of generated points inside some real ball.
        recall: Share of real points inside some generated ball.
    """

    precision: float
    recall: float


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How densely real balls are met.

    Attributes:
        density: Mean number of real balls around a generated point, divided by k; may exceed 1.
        coverage: Share of real balls that hold a generated point.
    """

    density: float
    coverage: float


def precision_recall(
    generated: Float[Tensor, "N F"], real: Float[Tensor, "M F"], *, k: int = 3, strict: bool = False
) -> PrecisionRecall:
    """Improved precision and recall.

    Args:
        generated: Features of the judged images, any float dtype [N, F], N above k.
        real: Features of the reference images [M, F], M above k.
        k: Which neighbour gives the radius; a point is not its own neighbour.
        strict: Whether a point on the surface is outside, as in the package prdc; inside elsewhere.

    Raises:
        ConfigError: Feature lengths differ, or a set is not larger than k.

    Source: Kynkaanniemi et al. 2019, equations 1 and 2.
    """
    a, b = _centred(generated, real, k)
    inside_real, _ = _met(a, b, _squared_radii(b, k), strict=strict)
    inside_generated, _ = _met(b, a, _squared_radii(a, k), strict=strict)
    return PrecisionRecall(
        precision=float((inside_real > 0).double().mean()), recall=float((inside_generated > 0).double().mean())
    )


def coverage(generated: Float[Tensor, "N F"], real: Float[Tensor, "M F"], *, k: int = 5) -> Coverage:
    """Density and coverage; a point on the surface is outside. Arguments as in `precision_recall`.

    Source: Naeem et al. 2020, equations 6 and 7.
    """
    a, b = _centred(generated, real, k)
    balls, met = _met(a, b, _squared_radii(b, k), strict=True)
    return Coverage(density=float(balls.double().mean()) / k, coverage=float(met.double().mean()))


def _centred(generated: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64 around the reference's mean: distances stay, and the products keep their precision."""
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ConfigError(f"features of shapes {tuple(generated.shape)} and {tuple(real.shape)} do not fit")
    if min(len(generated), len(real)) <= k:
        raise ConfigError(f"sets of {len(generated)} and {len(real)} images; neighbour {k} needs at least {k + 1}")
    centre = real.double().mean(dim=0)
    return generated.double() - centre, real.double() - centre


def _squared_radii(points: Float[Tensor, "N F"], k: int) -> Float[Tensor, "N"]:
    lengths = points.square().sum(dim=1)
    wanted = min(k + _SPARE, len(points) - 1)
    out = []
    for start in range(0, len(points), _BLOCK):
        rows = points[start : start + _BLOCK]
        squared = lengths[start : start + _BLOCK, None] + lengths - 2 * rows @ points.T
        squared[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf
        near = squared.topk(wanted, largest=False).indices
        exact = torch.stack([(points[column] - rows).square().sum(dim=1) for column in near.T], dim=1)
        out.append(exact.sort(dim=1).values[:, k - 1])
    return torch.cat(out)


def _met(
    points: Float[Tensor, "N F"], centres: Float[Tensor, "M F"], radii: Float[Tensor, "M"], *, strict: bool
) -> tuple[Tensor, Tensor]:
    """Number of balls around each point, int64 [N]; whether each ball holds a point, bool [M]."""
    balls, met = [], torch.zeros(len(centres), dtype=torch.bool)
    for start in range(0, len(points), _BLOCK):
        inside = _inside(points[start : start + _BLOCK], centres, radii, strict)
        balls.append(inside.sum(dim=1))
        met |= inside.any(dim=0)
    return torch.cat(balls), met


def _inside(rows: Tensor, centres: Tensor, radii: Tensor, strict: bool) -> Bool[Tensor, "N M"]:
    scale = rows.square().sum(dim=1)[:, None] + centres.square().sum(dim=1)
    squared = scale - 2 * rows @ centres.T
    close = ((squared - radii).abs() <= _TIE * scale).nonzero()
    for part in close.split(_BLOCK):
        squared[part[:, 0], part[:, 1]] = (rows[part[:, 0]] - centres[part[:, 1]]).square().sum(dim=1)
    return squared < radii if strict else squared <= radii
