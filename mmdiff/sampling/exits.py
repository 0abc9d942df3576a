"""Exit rules: when a row stops before all its slots were decided one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.sampling.canvas import Canvas

__all__ = ["Eos", "Exit"]


@runtime_checkable
class Exit(Protocol):
    """Looks at rows that have just finished a block."""

    def fill(self, canvas: Canvas, finished: Bool[Tensor, "B"], step: int) -> None:
        """Decide the rest of the rows that end now; ``step`` goes into `Canvas.order`."""
        ...


@dataclass(frozen=True)
class Eos:
    """After a finished block holds one of ``ids``, everything to the right of the first becomes ``ids[0]``.

    Source: published behaviour common to LLaDA's successors (early stop).
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ConfigError("Eos needs at least one id; give the tokenizer's end of text")

    def fill(self, canvas: Canvas, finished: Bool[Tensor, "B"], step: int) -> None:
        """In place; slots left of the end are not touched."""
        ends = torch.isin(canvas.tokens, torch.tensor(self.ids, device=canvas.tokens.device)) & (canvas.order >= 0)
        after = ends.cumsum(1) > 0
        rest = canvas.undecided & after & finished[:, None]
        canvas.tokens.masked_fill_(rest, self.ids[0])
        canvas.order.masked_fill_(rest, step)
        canvas.undecided &= ~rest
