"""Schedules: how many slots are decided in each pass.

A schedule turns a number of masks and a number of steps into counts. Which slots is the selector's business.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion.mask_schedules import GammaName, reveal_probabilities
from mmdiff.errors import ConfigError

__all__ = ["Cosine", "Energy", "Expected", "Independent", "Linear", "Schedule", "Shift", "share_steps"]


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
        idle: With ``published``: a block whose last mask is decided still takes the rest of its passes (LLaDA). False:
            it ends there (LLaDA-V).

    Source: LLaDA (arXiv 2502.09992), published sampler.
    """

    steps: int | None = None
    published: bool = False
    idle: bool = True

    def counts(self, masks: int, steps: int) -> list[int]:
        """floor(n/s), and one more in the first n mod s steps; steps that decide nothing are left out."""
        share, rest = divmod(masks, steps)
        return [n for n in (share + (j < rest) for j in range(steps)) if n or (self.published and self.idle)]


@dataclass(frozen=True)
class Cosine:
    """Few at first, many at the end: after step j of s, floor(n cos(pi/2 (j+1)/s)) masks are kept.

    Attributes:
        steps: Passes of the whole run.
        every_step: Decide at least one slot in every step, as MMaDA; False: as MaskGIT, which keeps at least one mask
            until the last step, so that steps in which nothing changes are left out.
        precision: Of the cosine: MMaDA's is float32, whose floor keeps one mask less at ratios such as 2/3; MAR's
            is float64.

    Source: MaskGIT (arXiv 2202.04200), equation of the cosine schedule; MMaDA (arXiv 2505.15809); MAR (arXiv
        2406.11838), published code's behaviour.
    """

    steps: int
    every_step: bool = True
    precision: Literal["float32", "float64"] = "float32"

    def counts(self, masks: int, steps: int) -> list[int]:
        """Differences of the kept numbers."""
        left, out = masks, []
        for j in range(steps):
            most = left - 1 if self.every_step else left
            keep = max(1, min(most, self._kept(masks, j + 1, steps))) if j + 1 < steps else 0
            out.append(left - keep)
            left = keep
        return [n for n in out if n]

    def _kept(self, masks: int, done: int, steps: int) -> int:
        if self.precision == "float64":
            return math.floor(masks * math.cos(math.pi / 2 * done / steps))
        return _cosine(masks, done / steps)


@dataclass(frozen=True)
class Shift:
    """LaViDa's schedules: a curve on the share of the steps, floored to slots and walked backwards.

    Attributes:
        steps: Passes of the whole run.
        shift: k of the curve k x / (1 + (k-1) x); above 1 few slots come first (LaViDa: 3 for answers, 1/3 for
            infilling), 1 is a straight line. ``"cosine"``: the curve (1 - cos(pi x)) / 2.

    Source: LaViDa (arXiv 2505.16839), published code's behaviour.
    """

    steps: int
    shift: float | Literal["cosine"] = 3.0

    def counts(self, masks: int, steps: int) -> list[int]:
        """Differences of floor(curve * n), each at least 1, reversed."""
        steps = min(steps, masks)
        if not steps:
            return []
        marks = (self._curve(torch.linspace(0, 1, steps + 1)) * masks).int().tolist()
        out = [max(1, after - before) for before, after in itertools.pairwise(marks)]
        excess, i = sum(out) - masks, 0
        while excess > 0:
            if out[i % steps] > 1:
                out[i % steps] -= 1
                excess -= 1
            i += 1
        return out[::-1]

    def _curve(self, x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        if self.shift == "cosine":
            return 1 - (1 + torch.cos(math.pi * x)) / 2
        return self.shift * x / (1 + (self.shift - 1) * x)


@dataclass(frozen=True)
class Expected:
    """As many as the reverse process unmasks on average: m (a(t') - a(t)) / (1 - a(t)) of m masks, rounded.

    The kept fraction is that of the cosine noise schedule, a(t) = 1 - cos(pi/2 (1 - t)); halves round to even, and
    steps that would decide nothing are left out.

    Attributes:
        steps: Passes of the whole run.

    Source: published code of dllm (the reverse process of MDLM, arXiv 2406.07524, in expectation).
    """

    steps: int

    def counts(self, masks: int, steps: int) -> list[int]:
        """Rounded expectations; the last step takes what is left."""
        left, out = masks, []
        for j in range(steps):
            now, then = (1 - math.cos(math.pi / 2 * k / steps) for k in (j, j + 1))
            n = round(left * (then - now) / (1 - now)) if j + 1 < steps else left
            out.append(n)
            left -= n
        return [n for n in out if n]


@dataclass(frozen=True)
class Energy:
    """The energy-minimising family: after the share x of the steps, sin^2(pi/2 I_x(a, b)) of the slots are decided.

    I is the distribution function of Beta(a, b). The pair is chosen by a search on a validation set; few steps gain
    most. (1, 1) gives the squared sine.

    Attributes:
        steps: Passes of the whole run.
        a: First shape, above 0.
        b: Second shape, above 0.

    Source: energy-minimising masked diffusion (arXiv 2509.13866).
    """

    steps: int
    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        if min(self.a, self.b) <= 0:
            raise ConfigError(f"Energy: a {self.a} and b {self.b} must be positive")

    def alpha(self, x: float) -> float:
        """Share of the slots that is decided after the share x of the steps."""
        return math.sin(math.pi / 2 * _beta_distribution(self.a, self.b, x)) ** 2

    def counts(self, masks: int, steps: int) -> list[int]:
        """Differences of the rounded numbers, each at least 1 while masks are left."""
        left, out = masks, []
        for j in range(steps):
            keep = max(0, min(left - 1, round(masks * (1 - self.alpha((j + 1) / steps))))) if j + 1 < steps else 0
            out.append(left - keep)
            left = keep
        return [n for n in out if n]


@dataclass(frozen=True)
class Independent:
    """A schedule of chance: every masked token is revealed with the mask schedule's probability, at least one.

    The counts of a row are drawn before its first pass, from the row's own generator.

    Attributes:
        gamma: Mask schedule.
        steps: Passes at most.

    Source: eMIGM (arXiv 2503.07197), reverse process; a count per image instead of one per batch.
    """

    gamma: GammaName
    steps: int

    def counts(self, masks: int, steps: int, source: rng.Source | None = None) -> list[int]:
        """Tokens per pass: binomial numbers, raised to 1; the last pass takes what is left.

        Raises:
            ConfigError: No generator was given.
        """
        if source is None:
            raise ConfigError("this schedule draws random numbers: give seeds or generators, one per row")
        chances = reveal_probabilities(self.gamma, steps)
        u = rng.uniform(source, (steps, masks), device="cpu")
        left, out = masks, []
        for chance, row in zip(chances, u, strict=True):
            if left:
                out.append(max(1, int((row[:left] < chance).sum())))
                left -= out[-1]
        return out


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


def _beta_distribution(a: float, b: float, x: float) -> float:
    """I_x(a, b), by its continued fraction (DLMF 8.17.22), evaluated from the back."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_distribution(b, a, 1 - x)
    value = 1.0
    for i in range(400, 0, -1):
        m, odd = divmod(i, 2)
        top = -(a + m) * (a + b + m) if odd else m * (b - m)
        value = 1 + top * x / ((a + i - 1) * (a + i)) / value
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) / (a * value)
