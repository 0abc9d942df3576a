"""Solvers of the per-token diffusion head: from conditions to continuous tokens.

Source: eMIGM (arXiv 2503.07197) for DPM-Solver++; MAR (arXiv 2406.11838) for the respaced DDPM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion.gaussian import Process
from mmdiff.diffusion.solver import Evaluation, plan
from mmdiff.errors import ConfigError

__all__ = ["Conditions", "Ddpm", "DpmSolver", "Noise", "TokenSolver"]


class Noise:
    """Normal numbers for the tokens of a pass, which stand one row of the batch after the other.

    Args:
        source: One source per row, or one for the whole batch.
        counts: Tokens per row.
        channels: C.
        device: Where the numbers go.
    """

    def __init__(self, source: rng.Source, counts: Sequence[int], channels: int, device: torch.device) -> None:
        self._source, self._counts, self._channels, self._device = source, counts, channels, device

    def __call__(self) -> Float[Tensor, "M C"]:
        """A fresh number per token and channel."""
        if isinstance(self._source, (torch.Generator, rng.Tape)):
            return rng.normal(self._source, (sum(self._counts), self._channels), device=self._device)
        pairs = zip(self._source, self._counts, strict=True)
        return torch.cat([rng.normal(s, (n, self._channels)) for s, n in pairs]).to(self._device)


@dataclass(frozen=True)
class Conditions:
    """What the head is told of the tokens of a pass.

    Attributes:
        given: Float [M, D]; conditions.
        null: Float [M, D]; conditions without the class; None = no guidance.
        scale: Float [M, 1]; weight of the guidance, 1 = none.
    """

    given: Float[Tensor, "M D"]
    null: Float[Tensor, "M D"] | None = None
    scale: Float[Tensor, "M 1"] | None = None

    def embedded(self, head: Any) -> Float[Tensor, "n W"]:
        """Both, one below the other, as the head uses them in every evaluation."""
        return head.cond_embed(self.given if self.null is None else torch.cat((self.given, self.null)))

    def output(
        self, head: Any, x: Float[Tensor, "M C"], time: Float[Tensor, "1 W"], cond: Float[Tensor, "n W"]
    ) -> tuple[Float[Tensor, "M C"], Float[Tensor, "M C"]]:
        """(guided noise, position of the log-variance), float32."""
        if self.null is None:
            return head.denoise(x, time, cond).float().chunk(2, dim=1)
        with_class, without = head.denoise(x.repeat(2, 1), time, cond).float().chunk(2)
        (noise, position), unconditional = with_class.chunk(2, dim=1), without[:, : x.shape[1]]
        return unconditional + self.scale * (noise - unconditional), position


@runtime_checkable
class TokenSolver(Protocol):
    """Draws tokens from the head."""

    def tokens(self, head: Any, conditions: Conditions, noise: Callable[[], Tensor]) -> Float[Tensor, "M C"]:
        """One token per condition."""
        ...


@dataclass(frozen=True)
class DpmSolver:
    """DPM-Solver++, singlestep, order 3: the published evaluation of eMIGM; draws only the start.

    Attributes:
        steps: Evaluations of the head per token.
    """

    steps: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"head_steps {self.steps} must be at least 1")

    @cached_property
    def plan(self) -> tuple[Evaluation, ...]:
        """Labels and coefficients, made once."""
        return plan(Process.cosine().betas, self.steps)

    def tokens(self, head: Any, conditions: Conditions, noise: Callable[[], Tensor]) -> Float[Tensor, "M C"]:
        """One token per condition."""
        cond = conditions.embedded(head)
        times = head.time_embed(torch.tensor([e.label for e in self.plan], device=cond.device))
        x = y = first = noise()
        for e, time in zip(self.plan, times, strict=True):
            estimate, _ = conditions.output(head, y, time[None], cond)
            clean = (y - e.sigma * estimate) / e.alpha
            if e.opens:
                x, first = y, clean
                y = e.carry * x + e.first * first
            else:
                y = e.carry * x + e.first * first + e.change * (clean - first)
        return y


@dataclass(frozen=True)
class Ddpm:
    """Ancestral sampling over evenly kept steps of the training process, with the learnt variance.

    Attributes:
        steps: Evaluations of the head per token.
        temperature: Factor of the noise added per step (not of the start).
    """

    steps: int = 100
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature {self.temperature} must not be negative")

    @cached_property
    def process(self) -> Process:
        """The kept steps."""
        return Process.cosine().respaced(self.steps)

    def tokens(self, head: Any, conditions: Conditions, noise: Callable[[], Tensor]) -> Float[Tensor, "M C"]:
        """One token per condition."""
        cond = conditions.embedded(head)
        times = head.time_embed(self.process.steps.to(cond.device).float())
        x = noise()
        for step in reversed(range(len(self.process))):
            estimate, position = conditions.output(head, x, times[step][None], cond)
            fresh = noise() * self.temperature if step else torch.zeros_like(x)
            x = self.process.previous(x, step, estimate, position, fresh)
        return x
