"""Samplers: which token a slot would take.

Draws come from one source per row, and a row draws only for its own candidates: its numbers do not depend on the rest
of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff import rng
from mmdiff.errors import ConfigError

__all__ = ["Draw", "Greedy", "Gumbel", "Multinomial", "Sampler", "keep_likely"]


class Draw:
    """Uniform numbers for the candidates of a pass.

    Args:
        sources: One source per row, or one tape whose draws are whole [B, q] or [B, q, V] tensors; None = none given.
        counts: Candidates per row; they stand first among the q slots.
        width: q.
        device: Where the numbers go.
    """

    def __init__(
        self,
        sources: rng.Source | None,
        counts: Sequence[int],
        width: int,
        device: torch.device,
    ) -> None:
        self._sources, self._counts, self.width, self._device = sources, counts, width, device

    @property
    def source(self) -> rng.Source:
        """Where the numbers come from.

        Raises:
            ConfigError: No sources were given.
        """
        if self._sources is None:
            raise ConfigError("these options draw random numbers: give seeds or generators, one per row")
        return self._sources

    def __call__(self, *shape: int) -> Float[Tensor, "B q *shape"]:
        """U[0, 1) numbers per candidate; 1/2 at the slots that are no candidates.

        Raises:
            ConfigError: No sources were given.
        """
        return self._draw(rng.uniform, shape)

    def gumbel(self, *shape: int) -> Float[Tensor, "B q *shape"]:
        """Standard Gumbel numbers per candidate; a tape holds the Gumbel numbers. Errors as for uniform ones."""
        return self._draw(rng.gumbel, shape)

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        sources = self.source
        if isinstance(sources, (rng.Tape, torch.Generator)):
            return draw(sources, (len(self._counts), self.width, *shape), device=self._device)
        out = torch.full((len(self._counts), self.width, *shape), 0.5, device=getattr(sources[0], "device", "cpu"))
        for row, (source, count) in enumerate(zip(sources, self._counts, strict=True)):
            if count:
                out[row, :count] = draw(source, (count, *shape))
        return out.to(self._device, non_blocking=True)


@runtime_checkable
class Sampler(Protocol):
    """Chooses a class per slot."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of choices and scores."""
        ...

    def choose(self, logits: Float[Tensor, "B q V"], draw: Draw) -> Int[Tensor, "B q"]:
        """Columns; ``logits`` are of `dtype` and hold -inf where a class may not be chosen."""
        ...


@dataclass(frozen=True)
class Greedy:
    """The most probable class; of equal ones the first."""

    dtype: torch.dtype = torch.float32

    def choose(self, logits: Float[Tensor, "B q V"], draw: Draw) -> Int[Tensor, "B q"]:
        """Argmax; draws nothing."""
        return logits.argmax(-1)


@dataclass(frozen=True)
class Gumbel:
    """A draw at ``temperature`` by the Gumbel-max trick: argmax of logits + temperature * Gumbel.

    One uniform number per class and slot and float64 arithmetic, as LLaDA's published sampler: float32 arithmetic
    visibly lowers the quality of text.

    Attributes:
        temperature: Above 0.
        dtype: Precision of the arithmetic.
    """

    temperature: float
    dtype: torch.dtype = torch.float64

    def choose(self, logits: Float[Tensor, "B q V"], draw: Draw) -> Int[Tensor, "B q"]:
        """Argmax with noise."""
        noise = draw(logits.shape[-1]).to(logits.dtype)
        return (logits - self.temperature * torch.log(-torch.log(noise))).argmax(-1)


@dataclass(frozen=True)
class Multinomial:
    """A draw at ``temperature`` from the likely classes, by inverting the distribution function.

    One uniform number per slot. The distribution is that of `Gumbel` if nothing is cut off.

    Attributes:
        temperature: Above 0.
        top_k: Keep this many most probable classes; None = all.
        top_p: Then keep the smallest set of probability ``top_p``; None = all.
        dtype: Precision of the distribution.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if (self.top_k is not None and self.top_k < 1) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise ConfigError(f"top_k {self.top_k} must be at least 1 and top_p {self.top_p} in (0, 1]")

    def choose(self, logits: Float[Tensor, "B q V"], draw: Draw) -> Int[Tensor, "B q"]:
        """First class whose cumulative probability exceeds the draw."""
        cut = keep_likely(logits / self.temperature, self.top_k, self.top_p)
        cumulative = cut.softmax(-1).double().cumsum(-1)
        target = draw().double()[..., None] * cumulative[..., -1:]
        picked = torch.searchsorted(cumulative, target, right=True)[..., 0]
        # A class of probability 0 has no interval, so only rounding at the very end could leave the support.
        last = (cut > -torch.inf).long().mul(torch.arange(1, cut.shape[-1] + 1, device=cut.device)).amax(-1) - 1
        return torch.minimum(picked, last)


def keep_likely(logits: Float[Tensor, "B q V"], top_k: int | None, top_p: float | None) -> Float[Tensor, "B q V"]:
    """Logits with -inf outside the ``top_k`` largest and outside the nucleus of probability ``top_p``."""
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None and top_p < 1:
        values, places = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        outside = values.cumsum(-1) - values >= top_p
        outside[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, places, outside), -torch.inf)
    return logits
