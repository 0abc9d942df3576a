"""Selectors: which candidates are decided in this pass.

A selector sees the proposal, the candidates and its turn (quota, progress, draws) and returns a subset of the
candidates, at least one in every row that has any. Of equal candidates the lower slot goes first. Rows do not see
each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.samplers import Draw
from mmdiff.sampling.schedules import Linear

__all__ = [
    "Entropy",
    "Factor",
    "Margin",
    "Quota",
    "Random",
    "RandomTopK",
    "Selector",
    "Threshold",
    "TopConfidence",
    "Turn",
    "best",
]


@dataclass(frozen=True)
class Turn:
    """What a selector may know beside the proposal.

    Attributes:
        quota: Int64 [B], how many slots to decide; None without a schedule.
        step: Per row the number of the pass within its block, from 0.
        steps: Per row the passes the schedule has for that block; ``step + 1`` without a schedule.
        draw: Uniform numbers for the candidates.
        undecided: Bool [B, T]; the whole canvas before this pass.
    """

    quota: Int[Tensor, "B"] | None
    step: Sequence[int]
    steps: Sequence[int]
    draw: Draw
    undecided: Bool[Tensor, "B T"]

    @property
    def need(self) -> Int[Tensor, "B"]:
        """The quota, which a counting selector is sure to have."""
        if self.quota is None:
            raise ConfigError("this selector decides a number of slots per pass: give a schedule")
        return self.quota


@runtime_checkable
class Selector(Protocol):
    """Attributes: ``counts``, whether the schedule's quota alone says how many slots are decided."""

    @property
    def counts(self) -> bool:
        """True: exactly min(quota, candidates) per pass. False: the proposal decides."""
        ...

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """The slots to decide now."""
        ...


def best(
    score: Float[Tensor, "B q"], candidates: Bool[Tensor, "B q"], number: Int[Tensor, "B"] | int
) -> Bool[Tensor, "B q"]:
    """The ``number`` candidates of highest score in each row; of equal scores the lower slot."""
    limit = number if isinstance(number, int) else number[:, None]
    return candidates & (_rank(score, candidates) < limit)


@dataclass(frozen=True)
class TopConfidence:
    """The most probable choices first (LLaDA's ``low_confidence`` remasking).

    Attributes:
        published_ties: Break ties of the probability as the published code does: by whatever order ``torch.topk``
            gives over the whole row. Slower; False takes the lower slot.
    """

    published_ties: bool = False
    counts = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the probability of the chosen class."""
        if self.published_ties:
            return _topk_over_rows(proposal, candidates, turn)
        return best(proposal.score, candidates, turn.need)


@dataclass(frozen=True)
class Margin:
    """Largest gap between the two most probable classes first."""

    counts = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the margin of probabilities."""
        return best(proposal.margin, candidates, turn.need)


@dataclass(frozen=True)
class Entropy:
    """Lowest entropy first."""

    counts = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By falling certainty."""
        return best(-proposal.entropy, candidates, turn.need)


@dataclass(frozen=True)
class Random:
    """A random order (LLaDA's ``random`` remasking)."""

    counts = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By one uniform number per candidate."""
        return best(turn.draw(), candidates, turn.need)


@dataclass(frozen=True)
class RandomTopK:
    """Confidence with Gumbel noise: log p + temperature * Gumbel, for image codes.

    Attributes:
        temperature: Weight of the noise at the start.
        anneal: How it falls with the share r of steps done, this one included: ``linear`` T (1 - r) as MaskGIT,
            ``compound`` the running product of (1 - r) as MMaDA, ``constant`` as Lumina-DiMOO.

    Source: MaskGIT (arXiv 2202.04200); MMaDA (arXiv 2505.15809); Lumina-DiMOO (arXiv 2510.06308).
    """

    temperature: float
    anneal: Literal["linear", "compound", "constant"] = "linear"
    counts = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By log-probability with noise."""
        noise = -torch.log(-torch.log(turn.draw().clamp(1e-20, 1 - 1e-7)))
        weights = [self.temperature * self.share(j, s) for j, s in zip(turn.step, turn.steps, strict=True)]
        weight = torch.tensor(weights, dtype=noise.dtype).to(noise.device, non_blocking=True)
        return best(proposal.log_prob + weight[:, None] * noise, candidates, turn.need)

    def share(self, step: int, steps: int) -> float:
        """Share of the noise that is left in step ``step`` of ``steps``."""
        if self.anneal == "constant":
            return 1.0
        first = 0 if self.anneal == "compound" else step
        return math.prod(1 - (j + 1) / steps for j in range(first, step + 1))


@dataclass(frozen=True)
class Threshold:
    """Every choice of probability at least ``confidence``, and always the best one.

    Attributes:
        confidence: Above 1 gives one slot per pass, 0 everything at once.

    Source: Fast-dLLM (arXiv 2505.22618).
    """

    confidence: float = 0.9
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the probability of the chosen class."""
        sure = candidates & (proposal.confidence >= self.confidence)
        return sure | best(proposal.score, candidates, 1)


@dataclass(frozen=True)
class Factor:
    """The n most probable choices, n the largest with (n+1)(1 - c_m) <= ``factor`` for all ranks m up to it.

    If each of n choices has probability 1 - e and (n+1) e <= 1, deciding them together equals deciding them greedily
    one by one. The best one is always taken.

    Attributes:
        factor: Above 0; larger decides more.
        published: As the published code: if the last rank is the only one that fails, it is taken as well.

    Source: Fast-dLLM (arXiv 2505.22618).
    """

    factor: float = 1.0
    published: bool = False
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By falling probability, up to the first rank that fails."""
        rank = _rank(proposal.score, candidates)
        by_rank = rank.argsort(1)
        confidence = proposal.confidence.gather(1, by_rank)
        n = torch.arange(1, rank.shape[1] + 1, device=rank.device)
        passes = (confidence >= 1 - self.factor / (n + 1)).long()
        passes[:, 0] = 1
        number, last = passes.cumprod(1).sum(1), candidates.sum(1) - 1
        if self.published:
            number = torch.where(number >= last, last + 1, number)
        return candidates & (rank < number[:, None])


@dataclass(frozen=True)
class Quota:
    """Shorthand: ``Quota(steps)`` is the linear schedule with the top-confidence selector."""

    steps: int

    @property
    def parts(self) -> tuple[Linear, TopConfidence]:
        """The schedule and the selector it stands for."""
        return Linear(self.steps), TopConfidence()


def _rank(score: Float[Tensor, "B q"], candidates: Bool[Tensor, "B q"]) -> Int[Tensor, "B q"]:
    """0 for the best candidate of a row; slots that are no candidates come last."""
    # A candidate of score -inf or NaN still goes before every slot that is none.
    floor = torch.finfo(score.dtype).min
    key = score.nan_to_num(nan=floor, neginf=floor).masked_fill(~candidates, -torch.inf)
    return key.argsort(dim=1, descending=True, stable=True).argsort(1)


def _topk_over_rows(proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
    key = proposal.confidence.masked_fill(~candidates, -torch.inf)
    rows = key.new_full(turn.undecided.shape, -torch.inf).scatter_(1, proposal.index, key)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    for row, quota, out in zip(rows, turn.need.tolist(), chosen, strict=True):
        out[row.topk(quota).indices] = True
    return candidates & chosen.gather(1, proposal.index)
