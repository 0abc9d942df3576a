"""What a painter is asked to draw and what it gives back, whatever its family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from mmdiff.sampling.trace import Trace

__all__ = ["Drawing", "Frame", "Job", "words_of"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Images to draw.

    Attributes:
        subjects: Texts or class numbers, one per image.
        known: Tokens or latents of images of which a part stays; None if all is drawn.
        open: Bool [B, N], cells that are drawn.
        about: Pictures that the subjects are instructions about, one per image; None if there are none.
        sources: Where random numbers come from, one per row.
        keep: Whether the steps in between are wanted too.
    """

    subjects: Sequence[Any]
    known: Tensor | None
    open: Bool[Tensor, "B N"]
    sources: Any
    about: Sequence[Any] | None = None
    keep: bool = False


@dataclass(frozen=True)
class Frame:
    """An image on its way.

    Attributes:
        result: Codes or latents.
        masked: Bool [B, N], cells that are not decided yet; None where there is no such thing.
    """

    result: Tensor
    masked: Bool[Tensor, "B N"] | None


@dataclass(frozen=True)
class Drawing:
    """Images in the network's own terms.

    Attributes:
        result: Codes [B, h, w] or latents [B, C, h, w].
        trace: What they cost.
        frames: The steps in between, in order, if they were kept.
    """

    result: Tensor
    trace: Trace
    frames: Sequence[Callable[[], Frame]] = ()


def words_of(parts: Callable[..., Any]) -> frozenset[str]:
    """Generation words that a function makes parts of."""
    return frozenset(inspect.signature(parts).parameters)
