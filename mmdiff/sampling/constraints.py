"""Constraints: classes that a slot may not take, or only last.

The class range of a slot is part of the canvas (`Canvas.low`, `Canvas.high`); the mask class is never chosen and
needs no constraint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.sampling.canvas import Canvas

__all__ = ["Constraint", "exclude", "restrict_range"]


@dataclass(frozen=True)
class Constraint:
    """Ids that are excluded.

    Attributes:
        forbid: Ids whose logit is -inf before anything is chosen or scored (LLaDA's ``logits_eos_inf``; LLaDA-V
            forbids end of text, start of text and the header ids).
        postpone: Ids that may be chosen but have confidence 0, so that they are decided last (LLaDA's
            ``confidence_eos_eot_inf``).
    """

    forbid: tuple[int, ...] = ()
    postpone: tuple[int, ...] = ()

    def restrict(self, logits: Float[Tensor, "B q V"], offset: int) -> Float[Tensor, "B q V"]:
        """Logits before the choice."""
        return exclude(logits, self.forbid, offset)

    def rescore(self, logits: Float[Tensor, "B q V"], offset: int) -> Float[Tensor, "B q V"]:
        """Logits after the choice, for its confidence."""
        return exclude(logits, self.postpone, offset)


def restrict_range(
    logits: Float[Tensor, "B q V"], canvas: Canvas, index: Int[Tensor, "B q"], offset: int
) -> Float[Tensor, "B q V"]:
    """Logits with -inf outside the class range of each slot."""
    if canvas.low is None and canvas.high is None:
        return logits
    ids = torch.arange(logits.shape[-1], device=logits.device) + offset
    for bound, outside in ((canvas.low, torch.lt), (canvas.high, torch.ge)):
        if bound is not None:
            limit = bound.expand_as(canvas.tokens).gather(1, index)[..., None]
            logits = logits.masked_fill(outside(ids, limit), -torch.inf)
    return logits


def exclude(logits: Float[Tensor, "B q V"], ids: tuple[int, ...], offset: int) -> Float[Tensor, "B q V"]:
    """Logits with -inf at the classes of ``ids`` (ids outside the classes are skipped)."""
    columns = [i - offset for i in ids if 0 <= i - offset < logits.shape[-1]]
    if not columns:
        return logits
    return logits.index_fill(-1, torch.tensor(columns, device=logits.device), -torch.inf)
