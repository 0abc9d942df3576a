"""Block schedulers: which slots of a row may be decided now.

A scheduler numbers the slots once; a row works on its lowest number that still holds a mask. Rows advance on their
own: one that has finished its block starts the next in the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.sampling.canvas import Canvas

__all__ = ["Blocks", "Fixed", "Whole", "window"]


@runtime_checkable
class Blocks(Protocol):
    """Numbers the slots of a canvas."""

    def assign(self, canvas: Canvas) -> Int[Tensor, "B T"]:
        """Block number of every slot; -1 before the first block (the prompt)."""
        ...


@dataclass(frozen=True)
class Whole:
    """One block: everything may be decided at any time."""

    def assign(self, canvas: Canvas) -> Int[Tensor, "B T"]:
        """Zero everywhere behind the prompt."""
        return _blocks(canvas, canvas.tokens.shape[1])


@dataclass(frozen=True)
class Fixed:
    """Blocks of ``size`` slots, counted from the end of the prompt.

    Source: LLaDA (arXiv 2502.09992), semi-autoregressive sampling.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"block size {self.size}; it must be at least 1")

    def assign(self, canvas: Canvas) -> Int[Tensor, "B T"]:
        """Distance from the end of the prompt, divided by the size."""
        return _blocks(canvas, self.size)


def window(canvas: Canvas, numbers: Int[Tensor, "B T"], current: Int[Tensor, "B"]) -> Bool[Tensor, "B T"]:
    """Undecided slots up to the end of each row's current block."""
    return canvas.undecided & (numbers <= current[:, None])


def _blocks(canvas: Canvas, size: int) -> Int[Tensor, "B T"]:
    slots = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device) - canvas.start
    return slots.div(size, rounding_mode="floor").clamp(min=-1).expand_as(canvas.tokens)
