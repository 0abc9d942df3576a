"""Schedules: how many slots are decided in each pass.

A schedule turns a number of masks and a number of steps into counts. Which slots is the selector's business.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from mmdiff.errors import ConfigError

__all__ = ["Cosine", "Linear", "Schedule", "Shift", "share_steps"]


@runtime_checkable
class Schedule(Protocol):
    """How many slots per pass."""

    @property
    def steps(self) -> int | None:
        """Passes of the whole run, all blocks together; None = as many as there are slots."""
        ...

    def counts(self, masks: int, steps: int) -> list[int]:
        """Slots to decide in each pass: numbers that sum to ``masks``, at most ``steps`` of them."""
        ...


@dataclass(frozen=True)
class Linear:
    """The same number in every step; the remainder goes to the first steps.

    Attributes:
        steps: Passes of the whole run; None = one slot per pass.
        published: As the published loop does: every block takes exactly its passes, idle ones too; the mask class may
            be chosen, which leaves the slot open and uses its turn up; mask ids inside the prompt are open in every
            block. So masks may be left at the end. False: only slots laid out for it are open, all get decided.

    Source: LLaDA (arXiv 2502.09992), published sampler.
    """

    steps: int | None = None
    published: bool = False

    def counts(self, masks: int, steps: int) -> list[int]:
        """floor(n/s), and one more in the first n mod s steps; steps that decide nothing are left out."""
        share, rest = divmod(masks, steps)
        return [n for n in (share + (j < rest) for j in range(steps)) if n or self.published]


@dataclass(frozen=True)
class Cosine:
    """Few at first, many at the end: after step j of s, floor(n cos(pi/2 (j+1)/s)) masks are kept.

    Source: MaskGIT (arXiv 2202.04200), equation of the cosine schedule; at least one slot per step as in MMaDA.
    """

    steps: int

    def counts(self, masks: int, steps: int) -> list[int]:
        """Differences of the kept numbers."""
        left, out = masks, []
        for j in range(steps):
            keep = max(1, min(left - 1, _cosine(masks, (j + 1) / steps))) if j + 1 < steps else 0
            out.append(left - keep)
            left = keep
        return [n for n in out if n]


@dataclass(frozen=True)
class Shift:
    """LaViDa's shifted schedule: the curve k x / (1 + (k-1) x) on the share of the steps, walked backwards.

    Attributes:
        steps: Passes of the whole run.
        shift: k; above 1 few slots come first (LaViDa: 3 for answers, 1/3 for infilling).

    Source: LaViDa (arXiv 2505.16839), published code's behaviour.
    """

    steps: int
    shift: float = 3.0

    def counts(self, masks: int, steps: int) -> list[int]:
        """Differences of floor(curve * n), each at least 1, reversed."""
        steps = min(steps, masks)
        if not steps:
            return []
        x = torch.linspace(0, 1, steps + 1)
        marks = (self.shift * x / (1 + (self.shift - 1) * x) * masks).int().tolist()
        out = [max(1, after - before) for before, after in itertools.pairwise(marks)]
        excess, i = sum(out) - masks, 0
        while excess > 0:
            if out[i % steps] > 1:
                out[i % steps] -= 1
                excess -= 1
            i += 1
        return out[::-1]


def share_steps(steps: int, blocks: int) -> list[int]:
    """Steps of each block: an even split, the remainder to the first blocks.

    Raises:
        ConfigError: Fewer steps than blocks.
    """
    if steps < blocks:
        raise ConfigError(
            f"{steps} steps for {blocks} blocks; every block needs one: raise num_inference_steps or block_length"
        )
    share, rest = divmod(steps, blocks)
    return [share + (k < rest) for k in range(blocks)]


def _cosine(masks: int, ratio: float) -> int:
    # float32, as published: at ratios such as 2/3 the floor gives one slot less than exact arithmetic.
    return int((masks * torch.cos(torch.tensor(ratio, dtype=torch.float32) * math.pi / 2)).floor())
