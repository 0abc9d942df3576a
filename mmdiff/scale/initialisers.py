"""Initialisers that know widths: what a draw with the usual name has to be so that the base's scale carries over.

Source: Tensor Programs V (arXiv 2203.03466), table 3, carried over to Xavier and Kaiming as its published package does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

import torch
from torch import Tensor

from mmdiff.scale.rows import Row

__all__ = ["FAN_IN", "Constant", "Initialiser", "Kaiming", "Normal", "Recipe", "Xavier", "chosen", "draw_"]


class Initialiser(Protocol):
    """How a parameter is drawn."""

    @property
    def uniform(self) -> bool:
        """Uniform instead of normal."""
        ...

    def std(self, row: Row) -> float:
        """Standard deviation at the row's size."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every entry the same.

    Attributes:
        value: The entry.
    """

    value: float = 0.0
    uniform = False

    def std(self, row: Row) -> float:
        """0."""
        return 0.0


@dataclass(frozen=True)
class Normal:
    """Standard deviation ``sigma`` at the base.

    Attributes:
        sigma: Standard deviation.
        uniform: Draw U(-sqrt(3) sigma, sqrt(3) sigma) instead.
    """

    sigma: float
    uniform: bool = False

    def std(self, row: Row) -> float:
        """Sigma, over the root of the fan-in ratio where both dimensions grow."""
        return self.sigma * _by_width(row) * row.fold


@dataclass(frozen=True)
class Xavier:
    """gain sqrt(2 / (fan_in + fan_out)) at the base.

    Attributes:
        gain: Factor.
        uniform: Uniform instead of normal.
    """

    gain: float = 1.0
    uniform: bool = True

    def std(self, row: Row) -> float:
        """The base's value, over the root of the fan-in ratio where both dimensions grow."""
        fan_in, fan_out = _fans(row)
        plain = self.gain * math.sqrt(2 / (fan_in + fan_out))
        now, then = sum(row.shape[:2]), sum(b or n for b, n in zip(row.base[:2], row.shape[:2], strict=True))
        # The ratio leaves out the receptive field, as the published package does.
        return plain * math.sqrt(now / then) * _by_width(row) * row.fold


@dataclass(frozen=True)
class Kaiming:
    """gain / sqrt(fan).

    Attributes:
        fan: Which one.
        gain: Factor; 1/sqrt(3) with ``uniform`` is PyTorch's default for linear layers.
        uniform: Uniform instead of normal.
    """

    fan: Literal["in", "out"] = "in"
    gain: float = 1.0
    uniform: bool = False

    def std(self, row: Row) -> float:
        """The base's value where one dimension grows; where both do, the fan-in already falls as it should."""
        fan_in, fan_out = _fans(row)
        plain = self.gain / math.sqrt(fan_in if self.fan == "in" else fan_out)
        axis = _fan_in(row) if self.fan == "in" else 1 - _fan_in(row)
        if len(row.growing) == 2:
            correction = 1.0 if self.fan == "in" else math.sqrt(row.ratio(axis) / row.fan_in_ratio)
        else:
            correction = math.sqrt(row.ratio(axis))
        return plain * correction * row.fold


Recipe = Mapping[str, Initialiser]
"""Role, or name or pattern with ``*`` -> initialiser; the last one that fits decides."""

FAN_IN: Recipe = {
    "input": Kaiming(),
    "hidden": Kaiming(),
    "output": Constant(),
    "*.bias": Constant(),
    "*embedding*.weight": Normal(1.0),
}
"""N(0, 1/fan_in) matrices, N(0, 1) embeddings, zero biases and readouts: muP for diffusion transformers."""


def chosen(recipe: Recipe, row: Row) -> Initialiser | None:
    """The initialiser of a parameter; None if none fits."""
    fitting = [i for pattern, i in recipe.items() if pattern == row.role or fnmatchcase(row.name, pattern)]
    return fitting[-1] if fitting else None


def draw_(tensor: Tensor, initialiser: Initialiser, row: Row, generator: torch.Generator) -> None:
    """Fill a parameter."""
    with torch.no_grad():
        if isinstance(initialiser, Constant):
            tensor.fill_(initialiser.value * row.fold)
        elif initialiser.uniform:
            bound = math.sqrt(3) * initialiser.std(row)
            tensor.uniform_(-bound, bound, generator=generator)
        else:
            tensor.normal_(0.0, initialiser.std(row), generator=generator)


def _by_width(row: Row) -> float:
    return row.width_ratio**-0.5 if len(row.growing) == 2 else 1.0


def _fan_in(row: Row) -> int:
    return 1 if row.fan_in_axis is None else row.fan_in_axis


def _fans(row: Row) -> tuple[int, int]:
    field = math.prod(row.shape[2:])
    axis = _fan_in(row)
    return row.shape[axis] * field, row.shape[1 - axis] * field
