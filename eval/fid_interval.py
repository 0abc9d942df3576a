"""How far a Fréchet distance moves with other images from the same model, by resampling those that are there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.rng import generator

from .collect import Collected
from .frechet import frechet_distance
from .rows import Rows, blocks
from .statistics import Statistics

__all__ = ["DistanceInterval", "interval"]


@dataclass(frozen=True, kw_only=True)
class DistanceInterval:
    """Spread of a Fréchet distance at its own number of images.

    A resample repeats images, which raises the distance as having fewer images does. So the spread of the resamples
    around their own mean is what is reported, moved to the measured value; it says nothing about the bias of FID at N.

    Attributes:
        lower: Lower end.
        upper: Upper end.
        level: Share of resamples between them.
        std: Standard deviation of the resamples.
        draws: Number of resamples.
    """

    lower: float
    upper: float
    level: float
    std: float
    draws: int


def interval(
    features: Rows | None, reference: Collected, *, draws: int = 200, level: float = 0.95, seed: int = 0
) -> DistanceInterval:
    """Resample the judged images, and the reference images where they are known.

    Raises:
        ConfigError: The judged images are known by their statistics only.
    """
    if features is None:
        raise ConfigError("an interval needs the judged images, and only their statistics are known")
    draw = generator(seed, "fid-interval")
    values = []
    for _ in range(draws):
        one = _resampled(features, draw)
        two = reference.statistics if reference.features is None else _resampled(reference.features, draw)
        values.append(frechet_distance(one, two))
    own = reference.statistics
    every = torch.tensor(values, dtype=torch.float64)
    moved = every - every.mean() + frechet_distance(Statistics.of(features), own)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(moved, tails).tolist()
    return DistanceInterval(lower=low, upper=high, level=level, std=float(every.std()), draws=draws)


def _resampled(features: Rows, draw: torch.Generator) -> Statistics:
    count = len(features)
    picks = torch.randint(count, (count,), generator=draw)
    times = torch.bincount(picks, minlength=count)
    return _weighted(features, times)


def _weighted(features: Rows, times: Int[Tensor, "N"]) -> Statistics:
    """Statistics with row i counted ``times[i]`` times; float64, in blocks."""
    weights, total = times.double(), float(times.sum())
    mean = torch.zeros(features.shape[1], dtype=torch.float64)
    for start, rows in blocks(features):
        mean += weights[start : start + len(rows)] @ rows / total
    scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for start, rows in blocks(features):
        centred = rows - mean
        scatter.addmm_((centred * weights[start : start + len(rows), None]).T, centred)
    return Statistics(mean=mean, covariance=scatter / (total - 1), count=int(total))
