"""Constraints: classes that a slot may not take, or only last.

The class range of a slot is part of the canvas (`Canvas.low`, `Canvas.high`); the mask class is never chosen and
needs no constraint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.sampling.canvas import Canvas

__all__ = ["Constraint", "exclude_", "restrict_range", "without"]


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

    def restrict(self, logits: Float[Tensor, "B q V"], offset: int) -> None:
        """Change the logits before the choice, in place."""
        exclude_(logits, self.forbid, offset)

    def rescore(self, logits: Float[Tensor, "B q V"], offset: int) -> None:
        """Change the logits after the choice, in place: they are those of its confidence."""
        exclude_(logits, self.postpone, offset)


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


def exclude_(logits: Float[Tensor, "B q V"], ids: tuple[int, ...], offset: int) -> None:
    """Put -inf at the classes of ``ids``, in place (ids outside the classes are skipped)."""
    columns = _columns(logits, ids, offset)
    if columns is not None:
        logits.index_fill_(-1, columns, -torch.inf)


@contextmanager
def without(logits: Float[Tensor, "B q V"], ids: tuple[int, ...], offset: int) -> Iterator[None]:
    """The logits with -inf at the classes of ``ids``, while the block runs."""
    columns = _columns(logits, ids, offset)
    if columns is None:
        yield
        return
    held = logits.index_select(-1, columns)
    logits.index_fill_(-1, columns, -torch.inf)
    yield
    logits.index_copy_(-1, columns, held)


def _columns(logits: Tensor, ids: tuple[int, ...], offset: int) -> Int[Tensor, "n"] | None:
    columns = [i - offset for i in ids if 0 <= i - offset < logits.shape[-1]]
    return torch.tensor(columns).to(logits.device, non_blocking=True) if columns else None
