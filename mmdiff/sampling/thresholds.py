"""Selectors that decide as many slots as the network is sure of, at least one.

They differ in what makes a slot sure: its own probability or entropy, its rank, or its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.selectors import Turn, best, rank

__all__ = [
    "EntropyBound",
    "EntropyThreshold",
    "Factor",
    "Hierarchy",
    "LocalLeap",
    "Threshold",
    "ThresholdOrQuota",
    "best_of_runs",
    "on_canvas",
]


@dataclass(frozen=True)
class Threshold:
    """Every choice of probability at least ``confidence``, and always the best one.

    Attributes:
        confidence: Above 1 gives one slot per pass, 0 everything at once.
        slack: Also take choices whose probability is less than this below the best one's (dInfer: 1e-5, so that ties
            go together).

    Source: Fast-dLLM (arXiv 2505.22618).
    """

    confidence: float = 0.9
    slack: float = 0.0
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the probability of the chosen class."""
        bound: Tensor | float = self.confidence
        if self.slack:
            top = proposal.confidence.masked_fill(~candidates, 0).amax(1, keepdim=True)
            bound = (top - self.slack).clamp(max=self.confidence)
        return candidates & (proposal.confidence >= bound) | best(proposal.score, candidates, 1)


@dataclass(frozen=True)
class Factor:
    """The n most probable choices, n the largest with (n+1)(1 - c_m) <= ``factor`` for all ranks m up to it.

    If each of n choices has probability 1 - e and (n+1) e <= 1, deciding them together equals deciding them greedily
    one by one. The best one is always taken.

    Attributes:
        factor: Above 0; larger decides more.
        published: As published code does, which takes the last rank as well if it is the only one that fails. Which
            is the last: of the candidates (Fast-dLLM), or of all masks on the canvas, those of later blocks and behind
            a stop sequence included (LLaDA-V).

    Source: Fast-dLLM (arXiv 2505.22618).
    """

    factor: float = 1.0
    published: Literal["fast_dllm", "llada_v"] | None = None
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By falling probability, up to the first rank that fails."""
        order = rank(proposal.score, candidates)
        by_rank = order.argsort(1)
        confidence = proposal.confidence.gather(1, by_rank)
        n = torch.arange(1, order.shape[1] + 1, device=order.device)
        passes = (confidence >= 1 - self.factor / (n + 1)).long()
        passes[:, 0] = 1
        number = (passes.cumprod(1) * candidates.gather(1, order.argsort(1))).sum(1)
        if self.published:
            last = (turn.masks if self.published == "llada_v" else candidates).sum(1) - 1
            number = torch.where(number >= last, last + 1, number)
        return candidates & (order < number[:, None])


@dataclass(frozen=True)
class EntropyThreshold:
    """Every choice whose distribution has an entropy below ``entropy``, and always the one of lowest entropy.

    Source: dParallel (arXiv 2509.26488), for networks trained to be certain.
    """

    entropy: float = 0.5
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the entropy of the distribution."""
        return candidates & (proposal.entropy < self.entropy) | best(-proposal.entropy, candidates, 1)


@dataclass(frozen=True)
class EntropyBound:
    """Slots by rising entropy H, as long as the sum of H minus the largest H stays within ``bound``.

    That bounds what is lost by deciding them together instead of one after the other.

    Source: EB-Sampler (arXiv 2505.24857).
    """

    bound: float = 0.1
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the entropies taken together."""
        order = rank(-proposal.entropy, candidates)
        entropy = proposal.entropy.masked_fill(~candidates, torch.inf).gather(1, order.argsort(1))
        # Sorted, so the largest is the last.
        fits = entropy.cumsum(1) - entropy <= self.bound
        fits[:, 0] = True
        return candidates & fits.gather(1, order)


@dataclass(frozen=True)
class LocalLeap:
    """Choices of probability at least ``confidence`` are anchors; near an anchor ``relaxed`` is enough.

    Without an anchor only the best choice is taken.

    Attributes:
        confidence: Probability of an anchor.
        radius: Slots around an anchor.
        relaxed: Probability that is enough there.

    Source: LocalLeap (arXiv 2510.07081).
    """

    confidence: float = 0.9
    radius: int = 4
    relaxed: float = 0.75
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the probability of the chosen class and of its neighbours'."""
        anchors = candidates & (proposal.confidence >= self.confidence)
        row = on_canvas(anchors.float(), proposal.index, turn.masks.shape[1], 0.0)
        near = F.max_pool1d(row[:, None], 2 * self.radius + 1, 1, self.radius)[:, 0].gather(1, proposal.index) > 0
        sure = anchors | candidates & near & (proposal.confidence >= self.relaxed)
        return sure | best(proposal.score, candidates, 1)


@dataclass(frozen=True)
class Hierarchy:
    """The best choice of every run of adjacent open slots, which splits the runs; sure ones; and always the best one.

    Attributes:
        confidence: Choices of a larger probability are sure; None: none is.
        low: The best of a run is taken if its probability is larger than this; None: always, so that a block of n
            slots takes at most n passes however unsure the network is, and usually about log2 n.

    Source: dInfer (arXiv 2510.08666), hierarchical decoding.
    """

    confidence: float | None = 0.9
    low: float | None = 0.4
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the probability of the chosen class among its neighbours'."""
        taken = best_of_runs(proposal, candidates, turn.masks.shape[1])
        if self.low is not None:
            taken = taken & (proposal.confidence > self.low)
        if self.confidence is not None:
            taken = taken | candidates & (proposal.confidence > self.confidence)
        return taken | best(proposal.score, candidates, 1)


@dataclass(frozen=True)
class ThresholdOrQuota:
    """Every choice of probability above ``confidence`` if these are at least the quota, else the quota's best.

    It needs a schedule.

    Source: LLaDA2.0 (arXiv 2512.15745), published sampler; the comparison is strict.
    """

    confidence: float = 0.95
    counts = False

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By the probability of the chosen class, or by rank."""
        sure = candidates & (proposal.confidence > self.confidence)
        enough = sure.sum(1) >= turn.need
        return torch.where(enough[:, None], sure, best(proposal.score, candidates, turn.need))


def on_canvas(
    values: Shaped[Tensor, "B q"], index: Int[Tensor, "B q"], slots: int, fill: float
) -> Shaped[Tensor, "B T"]:
    """Values of the slots ``index`` laid out on rows of T slots."""
    return values.new_full((len(values), slots), fill).scatter_(1, index, values)


def best_of_runs(proposal: Proposal, members: Bool[Tensor, "B q"], slots: int) -> Bool[Tensor, "B q"]:
    """In every run of adjacent members, the one of highest score; of equal ones the lower slot."""
    score = proposal.score.clamp(torch.finfo(proposal.score.dtype).min).masked_fill(~members, -torch.inf)
    row = on_canvas(score, proposal.index, slots, -torch.inf)
    member = row > -torch.inf
    starts = member & ~F.pad(member, (1, 0))[:, :-1]
    run = starts.long().cumsum(1) * member
    top = row.new_full((len(row), slots + 1), -torch.inf).scatter_reduce(1, run, row, "amax")
    tied = member & (row == top.gather(1, run))
    # Of the tied slots of a run the first: the count of tied slots since the run began is 1 there.
    count = tied.long().cumsum(1)
    before = torch.where(starts, count - tied.long(), 0).cummax(1).values
    return (tied & (count - before == 1)).gather(1, proposal.index) & members
