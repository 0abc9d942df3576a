"""Kernel inception distance: unbiased squared MMD with the cubic polynomial kernel (x·y/F + 1)³.

Unlike FID it has no bias that grows when there are few images, so it is the number to trust at small N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["Kid", "kid", "kid_subsets"]

_GROUPS = 10
_BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class Kid:
    """A kernel distance and how far it may be off.

    Attributes:
        mean: The estimate; about 0 for two samples of one distribution, and may be negative.
        std: `kid`: standard error; `kid_subsets`: standard deviation over the subsets. None with fewer than 20 images.
    """

    mean: float
    std: float | None


def kid(a: Float[Tensor, "N F"], b: Float[Tensor, "M F"]) -> Kid:
    """The unbiased estimate from all pairs, with a standard error by a jackknife over ten interleaved groups.

    Args:
        a: Features of one set, any float dtype [N, F], N at least 2.
        b: Features of the other set [M, F].

    Raises:
        ConfigError: Feature lengths differ, or a set has fewer than two images.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs", equation 4.
    """
    _check(a, b)
    groups = min(_GROUPS, len(a) // 2, len(b) // 2)
    if groups < _GROUPS:
        groups = 1
    sums = _GroupSums(a.double(), b.double(), groups)
    mean = sums.estimate(None)
    if groups == 1:
        return Kid(mean=mean, std=None)
    left_out = torch.tensor([sums.estimate(g) for g in range(groups)], dtype=torch.float64)
    variance = (groups - 1) / groups * float((left_out - left_out.mean()).square().sum())
    return Kid(mean=mean, std=math.sqrt(variance))


def kid_subsets(
    a: Float[Tensor, "N F"], b: Float[Tensor, "M F"], *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Kid:
    """Mean and population standard deviation over random subsets, drawn as torch-fidelity draws them.

    Args:
        a: Features of one set [N, F].
        b: Features of the other set [M, F].
        subsets: Number of subsets.
        subset_size: Images of each set per subset, at most N and M.
        seed: Seed of the protocol's own generator; nothing global is touched.

    Raises:
        ConfigError: A set is smaller than a subset, or feature lengths differ.

    Source: behaviour of torch-fidelity 0.4.0 (computed here in float64).
    """
    _check(a, b)
    if subset_size > min(len(a), len(b)):
        raise ConfigError(f"subsets of {subset_size} from sets of {len(a)} and {len(b)} images; use --protocol full")
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows_a = torch.from_numpy(draw.choice(len(a), subset_size, replace=False))
        rows_b = torch.from_numpy(draw.choice(len(b), subset_size, replace=False))
        values.append(_GroupSums(a[rows_a].double(), b[rows_b].double(), 1).estimate(None))
    every = torch.tensor(values, dtype=torch.float64)
    return Kid(mean=float(every.mean()), std=float(every.std(correction=0)))


class _GroupSums:
    """Kernel sums between groups of rows, so that leaving a group out costs nothing."""

    def __init__(self, a: Tensor, b: Tensor, groups: int) -> None:
        self.groups = groups
        self.counts = [torch.tensor([len(x[g::groups]) for g in range(groups)], dtype=torch.float64) for x in (a, b)]
        self.within = [self._sums(x, x, same=True) for x in (a, b)]
        self.across = self._sums(a, b, same=False)

    def _sums(self, x: Tensor, y: Tensor, *, same: bool) -> Tensor:
        out = torch.zeros(self.groups, self.groups, dtype=torch.float64)
        of_y = torch.arange(len(y)) % self.groups
        for start in range(0, len(x), _BLOCK):
            rows = x[start : start + _BLOCK]
            kernel = (rows @ y.T / x.shape[1] + 1) ** 3
            if same:  # an image is not its own neighbour: that is what makes the estimate unbiased
                kernel[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 0
            by_group = torch.zeros(len(rows), self.groups, dtype=torch.float64).index_add_(1, of_y, kernel)
            out.index_add_(0, (torch.arange(len(rows)) + start) % self.groups, by_group)
        return out

    def estimate(self, left_out: int | None) -> float:
        keep = torch.ones(self.groups, dtype=torch.float64)
        if left_out is not None:
            keep[left_out] = 0
        n, m = (float(count @ keep) for count in self.counts)
        aa, bb = (float(keep @ sums @ keep) for sums in self.within)
        return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * float(keep @ self.across @ keep) / (n * m)


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ConfigError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}; both must be [images, same length]"
        )
    if min(len(a), len(b)) < 2:
        raise ConfigError(f"KID of {len(a)} and {len(b)} images; each set needs at least 2")
