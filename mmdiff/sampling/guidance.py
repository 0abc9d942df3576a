"""Guidance: several readings of the canvas, with and without the condition, combined into one set of logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.sampling.canvas import Canvas

__all__ = ["Cfg", "Guidance", "without_condition"]


@runtime_checkable
class Guidance(Protocol):
    """Replaces the plain reading by several branches, which go through the network together."""

    def branches(self, canvas: Canvas, null_id: int) -> list[Canvas]:
        """The canvases to read, always as many; each has its own rows of the store."""
        ...

    def combine(self, logits: Sequence[Float[Tensor, "B q V"]]) -> Float[Tensor, "B q V"]:
        """One set of logits from those of the branches."""
        ...


@dataclass(frozen=True)
class Cfg:
    """Classifier-free guidance: u + scale (c - u), both branches in one pass of 2B rows.

    u reads the same canvas with its droppable slots (the prompt) replaced by the text mask, which needs no training
    (and which training with dropped prompts makes better). ``scale`` 1 is no guidance and costs no second branch.

    Attributes:
        scale: Weight of the condition, one for all rows or one per row; published ``cfg_scale`` w is scale - 1.

    Source: SMDM (arXiv 2410.18514), unsupervised guidance; LLaDA's published sampler.
    """

    scale: float | Float[Tensor, "B 1 1"]

    def branches(self, canvas: Canvas, null_id: int) -> list[Canvas]:
        """With and without the condition."""
        return (
            [canvas]
            if isinstance(self.scale, float | int) and self.scale == 1
            else [canvas, without_condition(canvas, null_id)]
        )

    def combine(self, logits: Sequence[Float[Tensor, "B q V"]]) -> Float[Tensor, "B q V"]:
        """Guided logits, in float32 at least."""
        if len(logits) == 1:
            return logits[0]
        conditional, unconditional = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits)
        return unconditional + self.scale * (conditional - unconditional)


def without_condition(canvas: Canvas, null_id: int) -> Canvas:
    """The canvas without its condition.

    Droppable slots hold ``null_id``, or what the canvas says stands there then, which may be a shorter or longer text;
    image features there are dropped too.
    """
    given = None if canvas.given is None else canvas.given & ~canvas.droppable
    if canvas.null is None or canvas.null_valid is None:
        tokens = canvas.tokens.masked_fill(canvas.droppable, null_id)
        return dataclasses.replace(canvas, tokens=tokens, given=given)
    tokens = torch.where(canvas.droppable, canvas.null, canvas.tokens)
    valid = torch.where(canvas.droppable, canvas.null_valid, canvas.valid)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    return dataclasses.replace(canvas, tokens=tokens, valid=valid, positions=positions, given=given)
