"""Guidance: two readings of the canvas, with and without the condition, combined into one set of logits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.sampling.canvas import Backbone, Canvas

__all__ = ["Cfg", "Guidance", "without_condition"]


@runtime_checkable
class Guidance(Protocol):
    """Replaces the plain forward pass."""

    @property
    def branches(self) -> int:
        """Rows the network sees per row of the canvas."""
        ...

    def logits(self, backbone: Backbone, canvas: Canvas, index: Int[Tensor, "B q"]) -> Float[Tensor, "B q V"]:
        """Logits at ``index``."""
        ...


@dataclass(frozen=True)
class Cfg:
    """Classifier-free guidance: u + scale (c - u), both branches in one pass of 2B rows.

    u reads the same canvas with its droppable slots (the prompt) replaced by the text mask, which needs no training
    (and which training with dropped prompts makes better). ``scale`` 1 is no guidance and costs no second branch.

    Attributes:
        scale: Weight of the condition; published ``cfg_scale`` w is scale - 1.

    Source: SMDM (arXiv 2410.18514), unsupervised guidance; LLaDA's published sampler.
    """

    scale: float

    @property
    def branches(self) -> int:
        """Two, or one without guidance."""
        return 1 if self.scale == 1 else 2

    def logits(self, backbone: Backbone, canvas: Canvas, index: Int[Tensor, "B q"]) -> Float[Tensor, "B q V"]:
        """Guided logits at ``index``."""
        if self.scale == 1:
            return backbone.forward(canvas, index)
        both = canvas.stack(without_condition(canvas, backbone.null_id))
        logits = backbone.forward(both, index.repeat(2, 1))
        conditional, unconditional = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


def without_condition(canvas: Canvas, null_id: int) -> Canvas:
    """The canvas whose droppable slots hold ``null_id``; image features there are dropped too."""
    tokens = canvas.tokens.masked_fill(canvas.droppable, null_id)
    given = None if canvas.given is None else canvas.given & ~canvas.droppable
    return dataclasses.replace(canvas, tokens=tokens, given=given)
