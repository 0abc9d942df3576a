"""Precision, recall, density and coverage: do generated images lie where real ones do, and the other way round?

A point's ball reaches to its k-th nearest neighbour in its own set. Distances are float64; where a product of matrices
cannot tell a distance from a radius, the pair is computed again from the difference of its vectors. Both sets are read
block by block (`eval.rows`), so memory does not grow with them, but for two numbers per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.errors import ConfigError

from .rows import BLOCK, Rows, blocks

__all__ = ["Coverage", "PrecisionRecall", "coverage", "nearest", "precision_recall"]

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


def precision_recall(generated: Rows, real: Rows, *, k: int = 3, strict: bool = False) -> PrecisionRecall:
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


def coverage(generated: Rows, real: Rows, *, k: int = 5) -> Coverage:
    """Density and coverage; a point on the surface is outside. Arguments as in `precision_recall`.

    Source: Naeem et al. 2020, equations 6 and 7.
    """
    a, b = _centred(generated, real, k)
    balls, met = _met(a, b, _squared_radii(b, k), strict=True)
    return Coverage(density=float(balls.double().mean()) / k, coverage=float(met.double().mean()))


def nearest(
    rows: Float[Tensor, "n F"],
    others: Iterable[tuple[int, Float[Tensor, "m F"]]],
    k: int,
    *,
    distance: Callable[[Tensor, Tensor], Tensor] = torch.cdist,
    own: int | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Distances and places of the nearest of many others, which come block by block.

    Args:
        rows: Float64 [n, F].
        others: Blocks with the place of their first row, as `eval.rows.blocks` gives them.
        k: How many; fewer where there are not as many.
        distance: Rows and a block -> [n, m].
        own: Place of the first of ``rows`` where they are a block of the others, and none is its own neighbour.
    """
    best = torch.zeros(len(rows), 0, dtype=torch.float64)
    places = torch.zeros(len(rows), 0, dtype=torch.long)
    for first, block in others:
        found = distance(rows, block)
        if first == own:
            found.fill_diagonal_(torch.inf)
        best = torch.cat([best, found], dim=1)
        places = torch.cat([places, torch.arange(first, first + len(block)).expand(len(rows), -1)], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), largest=False)
        places = places.gather(1, kept)
    return best, places


@dataclass(frozen=True)
class _Points:
    """A set around a centre that it shares with the other: distances stay, and the products keep their precision."""

    rows: Rows
    centre: Float[Tensor, "F"]

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "n F"]]]:
        return ((start, block - self.centre) for start, block in blocks(self.rows))

    def at(self, places: Int[Tensor, "n"]) -> Float[Tensor, "n F"]:
        return self.rows[places].double() - self.centre


def _centred(generated: Rows, real: Rows, k: int) -> tuple[_Points, _Points]:
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ConfigError(f"features of shapes {tuple(generated.shape)} and {tuple(real.shape)} do not fit")
    if min(len(generated), len(real)) <= k:
        raise ConfigError(f"sets of {len(generated)} and {len(real)} images; neighbour {k} needs at least {k + 1}")
    total = torch.zeros(real.shape[1], dtype=torch.float64)
    for _, block in blocks(real):
        total += block.sum(dim=0)
    return _Points(generated, total / len(real)), _Points(real, total / len(real))


def _squared_radii(points: _Points, k: int) -> Float[Tensor, "N"]:
    wanted = min(k + _SPARE, len(points.rows) - 1)
    out = []
    for start, rows in points.blocks():
        # Blocks start at the same places in both loops: a point is not its own neighbour.
        _, near = nearest(rows, points.blocks(), wanted, distance=_squared, own=start)
        exact = torch.stack([(points.at(column) - rows).square().sum(dim=1) for column in near.T], dim=1)
        out.append(exact.sort(dim=1).values[:, k - 1])
    return torch.cat(out)


def _met(
    points: _Points, centres: _Points, radii: Float[Tensor, "M"], *, strict: bool
) -> tuple[Int[Tensor, "N"], Bool[Tensor, "M"]]:
    """Number of balls around each point; whether each ball holds a point."""
    balls = torch.zeros(len(points.rows), dtype=torch.long)
    met = torch.zeros(len(centres.rows), dtype=torch.bool)
    for start, rows in points.blocks():
        for first, block in centres.blocks():
            inside = _inside(rows, block, radii[first : first + len(block)], strict)
            balls[start : start + len(rows)] += inside.sum(dim=1)
            met[first : first + len(block)] |= inside.any(dim=0)
    return balls, met


def _inside(
    rows: Float[Tensor, "n F"], centres: Float[Tensor, "m F"], radii: Float[Tensor, "m"], strict: bool
) -> Bool[Tensor, "n m"]:
    scale = _lengths(rows, centres)
    squared = scale - 2 * rows @ centres.T
    close = ((squared - radii).abs() <= _TIE * scale).nonzero()
    for part in close.split(BLOCK):
        squared[part[:, 0], part[:, 1]] = (rows[part[:, 0]] - centres[part[:, 1]]).square().sum(dim=1)
    return squared < radii if strict else squared <= radii


def _squared(rows: Float[Tensor, "n F"], others: Float[Tensor, "m F"]) -> Float[Tensor, "n m"]:
    """Squared distances by a product of matrices; short ones are rounded."""
    return _lengths(rows, others) - 2 * rows @ others.T


def _lengths(rows: Float[Tensor, "n F"], others: Float[Tensor, "m F"]) -> Float[Tensor, "n m"]:
    return rows.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
