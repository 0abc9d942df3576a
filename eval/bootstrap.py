"""How sure a number is: percentile bootstrap over items or over groups of items, vectorised.

A statistic here is a function of item values and *weights* (how often each item was drawn): ``(values [N], weights
[R, N]) -> [R]``. So a thousand resamples are one matrix product, and items that belong together (variants of one
concept) can be drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.rng import generator

__all__ = ["Interval", "Statistic", "bootstrap", "macro_mean", "mean", "paired", "rate"]

Statistic = Callable[[Tensor, Tensor], Tensor]
"""Values float64 [N] or [N, K] and weights float64 [R, N] -> one number per resample, [R]."""

_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number with one-sided bounds.

    Attributes:
        value: The statistic of all items, each once.
        lower: Bound that the true value lies above with probability ``level``.
        upper: Bound that it lies below with probability ``level``; both together hold with ``2 level - 1``.
        level: Such as 0.95.
        n: Number of items.
        groups: Number of groups that were drawn; equals ``n`` where items are drawn one by one.
    """

    value: float
    lower: float
    upper: float
    level: float
    n: int
    groups: int


def mean(values: Float[Tensor, "N"], weights: Float[Tensor, "R N"]) -> Float[Tensor, "R"]:
    """Weighted mean."""
    return weights @ values / weights.sum(dim=1)


def macro_mean(labels: Sequence[Hashable]) -> Statistic:
    """The mean over classes of each class's mean: a statistic for `bootstrap`.

    A resample that misses a class averages the classes it has.

    Args:
        labels: Class of each item.
    """
    members = _membership(labels)

    def statistic(values: Tensor, weights: Tensor) -> Tensor:
        count = weights @ members
        per_class = (weights * values) @ members / count.clamp_min(1e-300)
        return per_class.sum(dim=1) / (count > 0).sum(dim=1)

    return statistic


def bootstrap(
    values: Sequence[float] | np.ndarray | Tensor,
    statistic: Statistic = mean,
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic.

    Args:
        values: One number (or row of numbers) per item, [N] or [N, K].
        statistic: What to compute, see `Statistic`.
        groups: Key of the group of each item, such as its concept; whole groups are drawn. None draws items.
        draws: Number of resamples.
        level: Confidence of each bound, one-sided.
        seed: Seed of the local generator.

    Raises:
        ConfigError: No items, a level outside 0.5...1, or as many groups as items are not given.
    """
    items = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    n = len(items)
    if not n:
        raise ConfigError("bootstrap of no items; at least 1 is needed")
    if not 0.5 < level < 1:
        raise ConfigError(f"level {level}; a bound needs one between 0.5 and 1, such as 0.95")
    if groups is not None and len(groups) != n:
        raise ConfigError(f"{len(groups)} group keys for {n} items")
    group_of = _codes(groups) if groups is not None else torch.arange(n)
    number = int(group_of.max()) + 1
    draw = generator(seed, "bootstrap")
    rows = max(1, _CHUNK // max(n, number))
    results = []
    for start in range(0, draws, rows):
        counts = _counts(min(rows, draws - start), number, draw)
        results.append(statistic(items, counts[:, group_of]))
    spread = torch.cat(results)
    bounds = torch.quantile(spread, torch.tensor([1 - level, level], dtype=torch.float64))
    value = statistic(items, torch.ones(1, n, dtype=torch.float64))
    return Interval(
        value=float(value[0]), lower=float(bounds[0]), upper=float(bounds[1]), level=level, n=n, groups=number
    )


def paired(
    a: Sequence[float] | np.ndarray | Tensor,
    b: Sequence[float] | np.ndarray | Tensor,
    statistic: Statistic = mean,
    **options: Any,
) -> Interval:
    """Bootstrap of statistic(a) - statistic(b) over the same items in the same resamples.

    Args:
        a: Values of one model, [N].
        b: Values of the other on the same items, [N].
        statistic: Statistic of each.
        **options: As in `bootstrap`.

    Raises:
        ConfigError: Different numbers of items.
    """
    if len(a) != len(b):
        raise ConfigError(f"paired bootstrap of {len(a)} and {len(b)} items; both must be scores of the same items")
    both = torch.stack([torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (a, b)], dim=1)

    def difference(values: Tensor, weights: Tensor) -> Tensor:
        return statistic(values[:, 0], weights) - statistic(values[:, 1], weights)

    return bootstrap(both, difference, **options)


def rate(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """A proportion with Wilson's one-sided score bounds: not degenerate at 0 of n or n of n, where a bootstrap is.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ConfigError(f"{successes} successes of {n}")
    z = float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(value=p, lower=max(0.0, centre - half), upper=min(1.0, centre + half), level=level, n=n, groups=n)


def _counts(rows: int, number: int, draw: torch.Generator) -> Tensor:
    """How often each of ``number`` groups is drawn in each of ``rows`` resamples, float64 [rows, number]."""
    picks = torch.randint(number, (rows, number), generator=draw)
    picks += torch.arange(rows)[:, None] * number
    return torch.bincount(picks.flatten(), minlength=rows * number).view(rows, number).double()


def _codes(keys: Sequence[Hashable]) -> Tensor:
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(k, len(known)) for k in keys])


def _membership(labels: Sequence[Hashable]) -> Tensor:
    codes = _codes(labels)
    return torch.nn.functional.one_hot(codes, int(codes.max()) + 1).double()
