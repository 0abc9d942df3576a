"""Kernel inception distance: unbiased squared MMD, by default with the cubic polynomial kernel (x·y/F + 1)³.

Unlike FID it has no bias that grows when there are few images, so it is the number to trust at small N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdiff.errors import ConfigError

from .rows import Rows, blocks

__all__ = ["KERNELS", "Kid", "kid", "kid_subsets"]

_GROUPS = 10


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    return (-torch.cdist(x, y).square() / (2 * 10.0**2)).exp()


KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cubic": _cubic, "gaussian": _gaussian}
"""Name -> kernel of rows [N, F] and [M, F], float64 [N, M]; ``gaussian`` has width 10."""


@dataclass(frozen=True, kw_only=True)
class Kid:
    """A kernel distance and how far it may be off.

    Attributes:
        mean: The estimate; about 0 for two samples of one distribution, and may be negative.
        std: `kid`: standard error; `kid_subsets`: standard deviation over the subsets. None with fewer than 20 images.
    """

    mean: float
    std: float | None


def kid(a: Rows, b: Rows) -> Kid:
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
    sums = _GroupSums(a, b, groups, _cubic)
    mean = sums.estimate(None)
    if groups == 1:
        return Kid(mean=mean, std=None)
    left_out = torch.tensor([sums.estimate(g) for g in range(groups)], dtype=torch.float64)
    variance = (groups - 1) / groups * float((left_out - left_out.mean()).square().sum())
    return Kid(mean=mean, std=math.sqrt(variance))


def kid_subsets(
    a: Rows,
    b: Rows,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    kernel: str = "cubic",
    second_first: bool = False,
) -> Kid:
    """Mean and population standard deviation over random subsets, drawn as the published tools draw them.

    Args:
        a: Features of one set [N, F].
        b: Features of the other set [M, F].
        subsets: Number of subsets.
        subset_size: Images of each set per subset, at most N and M.
        seed: Seed of the protocol's own generator; nothing global is touched.
        kernel: One of `KERNELS`.
        second_first: Draw the rows of ``b`` before those of ``a``, as clean-fid does (with numpy's global generator,
            so its seed is whatever the caller set).

    Raises:
        ConfigError: A set is smaller than a subset, or feature lengths differ.

    Source: behaviour of torch-fidelity 0.4.0 and clean-fid 0.1.35 (computed here in float64).
    """
    _check(a, b)
    if subset_size > min(len(a), len(b)):
        raise ConfigError(f"subsets of {subset_size} from sets of {len(a)} and {len(b)} images; use --protocol full")
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        first, second = (b, a) if second_first else (a, b)
        one = first[torch.from_numpy(draw.choice(len(first), subset_size, replace=False))]
        two = second[torch.from_numpy(draw.choice(len(second), subset_size, replace=False))]
        values.append(_GroupSums(one, two, 1, KERNELS[kernel]).estimate(None))
    every = torch.tensor(values, dtype=torch.float64)
    return Kid(mean=float(every.mean()), std=float(every.std(correction=0)))


class _GroupSums:
    """Kernel sums between groups of rows, so that leaving a group out costs nothing."""

    def __init__(self, a: Rows, b: Rows, groups: int, kernel: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.groups = groups
        self.kernel = kernel
        self.counts = [torch.tensor([len(range(g, len(x), groups)) for g in range(groups)]).double() for x in (a, b)]
        self.within = [self._sums(x, x, same=True) for x in (a, b)]
        self.across = self._sums(a, b, same=False)

    def _sums(self, x: Rows, y: Rows, *, same: bool) -> Tensor:
        out = torch.zeros(self.groups, self.groups, dtype=torch.float64)
        for i, rows in blocks(x):
            of_rows = torch.arange(i, i + len(rows)) % self.groups
            for j, columns in blocks(y):
                kernel = self.kernel(rows, columns)
                if same and i == j:  # an image is not its own neighbour: that is what makes the estimate unbiased
                    kernel.fill_diagonal_(0)
                of_columns = torch.arange(j, j + len(columns)) % self.groups
                by_group = torch.zeros(len(rows), self.groups, dtype=torch.float64).index_add_(1, of_columns, kernel)
                out.index_add_(0, of_rows, by_group)
        return out

    def estimate(self, left_out: int | None) -> float:
        keep = torch.ones(self.groups, dtype=torch.float64)
        if left_out is not None:
            keep[left_out] = 0
        n, m = (float(count @ keep) for count in self.counts)
        aa, bb = (float(keep @ sums @ keep) for sums in self.within)
        return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * float(keep @ self.across @ keep) / (n * m)


def _check(a: Rows, b: Rows) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ConfigError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}; both must be [images, same length]"
        )
    if min(len(a), len(b)) < 2:
        raise ConfigError(f"KID of {len(a)} and {len(b)} images; each set needs at least 2")
