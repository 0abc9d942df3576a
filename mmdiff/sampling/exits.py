"""Exit rules: when a row stops before all its slots were decided one by one.

A rule has no state: what it found is noted in `Canvas.end`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.sampling.canvas import Canvas

__all__ = ["Eos", "Exit", "Stop"]


@runtime_checkable
class Exit(Protocol):
    """Closes slots.

    Attributes:
        every_pass: Whether it looks after every pass, or only when a row has finished a block.
    """

    @property
    def every_pass(self) -> bool:
        """As above."""
        ...

    def fill(self, canvas: Canvas, finished: Bool[Tensor, "B"], step: int) -> None:
        """Close slots that need not be decided any more, in place; ``step`` goes into `Canvas.order`."""
        ...


@dataclass(frozen=True)
class Eos:
    """After a finished block holds one of ``ids``, everything to the right of the first becomes ``ids[0]``.

    Source: published behaviour common to LLaDA's successors (early stop).
    """

    ids: tuple[int, ...]
    every_pass = False

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


@dataclass(frozen=True)
class Stop:
    """As soon as one of ``sequences`` stands in the answer, only slots before it are still decided.

    Slots behind it stay as they are, for the network to see, until the row is complete; then they hold ``filler``.

    Attributes:
        sequences: Ids that end an answer when they stand next to each other, none of them given by the prompt or a
            scaffold.
        filler: Id of the slots from the end on.
        published: Search as LLaDA-V's published code does: the sequences are tried in their order, each at its first
            place, until an end is known; once it is, only the first sequence is searched, and counts if it stands
            further left. False: whichever stands first.

    Source: LLaDA-V (arXiv 2505.16933), published code's stopping criteria.
    """

    sequences: tuple[tuple[int, ...], ...]
    filler: int
    published: bool = False
    every_pass = True

    def __post_init__(self) -> None:
        if not self.sequences or not all(self.sequences):
            raise ConfigError("Stop needs at least one sequence of at least one id")

    def fill(self, canvas: Canvas, finished: Bool[Tensor, "B"], step: int) -> None:
        """In place; sets `Canvas.end`."""
        slots = canvas.tokens.shape[1]
        never = torch.full((len(canvas),), slots, device=canvas.tokens.device)
        end = never if canvas.end is None else canvas.end
        for sequence in self.sequences:
            found = _first(canvas, sequence)
            end = (
                torch.where(end < slots, end, found)
                if self.published and sequence != self.sequences[0]
                else (torch.minimum(end, found))
            )
        canvas.end = end
        behind = (torch.arange(slots, device=end.device) >= end[:, None]) & ~canvas.frozen
        canvas.undecided &= ~behind
        canvas.tokens.masked_fill_(behind & ~canvas.undecided.any(1, keepdim=True), self.filler)


def _first(canvas: Canvas, sequence: tuple[int, ...]) -> Int[Tensor, "B"]:
    """First slot of ``sequence`` among the generated slots of each row; T where it does not stand."""
    slots = canvas.tokens.shape[1]
    wanted = torch.tensor(sequence, device=canvas.tokens.device)
    if len(sequence) > slots:
        return torch.full((len(canvas),), slots, device=wanted.device)
    ids = canvas.tokens.masked_fill(canvas.frozen | canvas.undecided, -1)
    found = (ids.unfold(1, len(sequence), 1) == wanted).all(-1)
    place = torch.arange(found.shape[1], device=wanted.device).expand_as(found)
    return place.masked_fill(~found, slots).amin(1)
