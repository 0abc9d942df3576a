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

_NEVER = torch.iinfo(torch.int64).max


@runtime_checkable
class Blocks(Protocol):
    """Numbers the slots of a canvas."""

    def assign(self, canvas: Canvas) -> Int[Tensor, "B T"]:
        """Block number of every slot, non-negative where the slot may ever be generated."""
        ...


@dataclass(frozen=True)
class Whole:
    """One block: everything may be decided at any time."""

    def assign(self, canvas: Canvas) -> Int[Tensor, "B T"]:
        """Zero everywhere."""
        return torch.zeros_like(canvas.tokens)


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
        slots = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device) - canvas.start
        return slots.clamp(min=0).div(self.size, rounding_mode="floor").expand_as(canvas.tokens)


def window(canvas: Canvas, block: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Undecided slots of each row's current block; nothing where a row is complete."""
    current = block.masked_fill(~canvas.undecided, _NEVER).amin(1, keepdim=True)
    return canvas.undecided & (block == current)
