"""Selectors: which candidates are decided in this pass.

A selector sees the proposal, the candidates and its turn (quota, progress, draws) and returns a subset of the
candidates, at least one in every row that has any. Of equal candidates the lower slot goes first. Rows do not see
each other. Here are the rules that decide a given number of slots; those that decide by how sure the network is are in
`mmdiff.sampling.thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.samplers import Draw
from mmdiff.sampling.schedules import Linear

__all__ = [
    "CertaintyDensity",
    "Entropy",
    "Margin",
    "Quota",
    "Random",
    "RandomTopK",
    "Selector",
    "TopConfidence",
    "Turn",
    "best",
    "certainty_density",
    "rank",
]


@dataclass(frozen=True)
class Turn:
    """What a selector may know beside the proposal.

    Attributes:
        rows: Per row its place in the batch.
        quota: Int64 [B], how many slots to decide; None without a schedule.
        step: Per row the number of the pass within its block, from 0.
        steps: Per row the passes the schedule has for that block; ``step + 1`` without a schedule.
        draw: Uniform numbers for the candidates.
        masks: Bool [B, T]; slots of the canvas that hold the mask before this pass, open now or not.
    """

    rows: Sequence[int]
    quota: Int[Tensor, "B"] | None
    step: Sequence[int]
    steps: Sequence[int]
    draw: Draw
    masks: Bool[Tensor, "B T"]

    @classmethod
    def of(cls, rows: Sequence[Any], draw: Draw, masks: Bool[Tensor, "B T"], *, scheduled: bool) -> Turn:
        """The turn of rows of a `mmdiff.sampling.ledger.Ledger`."""
        quota = torch.tensor([r.quota for r in rows]).to(masks.device, non_blocking=True) if scheduled else None
        steps = [r.steps if scheduled else r.step + 1 for r in rows]
        return cls([r.number for r in rows], quota, [r.step for r in rows], steps, draw, masks)

    @property
    def need(self) -> Int[Tensor, "B"]:
        """The quota, which a counting selector is sure to have."""
        if self.quota is None:
            raise ConfigError("this selector decides a number of slots per pass: give a schedule")
        return self.quota


@runtime_checkable
class Selector(Protocol):
    """Decides which.

    A selector that learns from pass to pass also has ``start(rows, slots)``, which gives the selector of one run, and
    ``transform(logits, index, candidates, turn)``, which changes the logits in place before a token is chosen. One with
    ``blind = True`` does not look at the proposal and can decide before the network runs.

    Attributes:
        counts: Whether the schedule's quota alone says how many slots are decided.
    """

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
    return candidates & (rank(score, candidates) < limit)


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
    blind = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By one uniform number per candidate."""
        return best(turn.draw(), candidates, turn.need)


@dataclass(frozen=True)
class RandomTopK:
    """Confidence with Gumbel noise: log p + temperature * Gumbel, for image codes.

    Attributes:
        temperature: Weight of the noise at the start.
        anneal: How it falls with the share r of steps done, this one included: ``linear`` T (1 - r) as MaskGIT,
            ``compound`` the running product of (1 - r) as MMaDA, ``constant`` as Lumina-DiMOO; ``before`` T (1 - r)
            with r the share of the other steps that are done, as MaskGIT's PyTorch reproduction.
        passes: Steps in all; None: as many as the schedule needs, which may be fewer than were asked for.

    Source: MaskGIT (arXiv 2202.04200); MMaDA (arXiv 2505.15809); Lumina-DiMOO (arXiv 2510.06308).
    """

    temperature: float
    anneal: Literal["linear", "compound", "constant", "before"] = "linear"
    passes: int | None = None
    counts = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By log-probability with noise."""
        return best(self.score(proposal, turn), candidates, turn.need)

    def score(self, proposal: Proposal, turn: Turn) -> Float[Tensor, "B q"]:
        """Log-probability with noise."""
        noise = turn.draw.gumbel()
        steps = turn.steps if self.passes is None else [self.passes] * len(turn.steps)
        weights = [self.temperature * self.share(j, s) for j, s in zip(turn.step, steps, strict=True)]
        weight = torch.tensor(weights, dtype=noise.dtype).to(noise.device, non_blocking=True)
        return proposal.log_prob + weight[:, None] * noise

    def share(self, step: int, steps: int) -> float:
        """Share of the noise that is left in step ``step`` of ``steps``."""
        if self.anneal == "constant":
            return 1.0
        if self.anneal == "before":
            return 1 - step / max(1, steps - 1)
        first = 0 if self.anneal == "compound" else step
        return math.prod(1 - (j + 1) / steps for j in range(first, step + 1))


@dataclass(frozen=True)
class CertaintyDensity:
    """Confidence times the share of decided slots around: slots beside what is known go first.

    It keeps whole-canvas decoding from deciding the tail before the text in front of it.

    Attributes:
        sigma: Standard deviation of the neighbourhood, slots.

    Source: d2Cache (arXiv 2509.23094), certainty prior.
    """

    sigma: float = 10.0
    counts = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By probability times density."""
        density = certainty_density(~turn.masks, self.sigma).gather(1, proposal.index)
        return best(proposal.confidence * density, candidates, turn.need)


def certainty_density(decided: Bool[Tensor, "B T"], sigma: float) -> Float[Tensor, "B T"]:
    """Gaussian-weighted share of decided slots around each slot.

    Outside, everything on the left counts as decided, and everything on the right as the last slot is.
    """
    length = decided.shape[1]
    line = torch.cat((torch.ones_like(decided), decided, decided[:, -1:].expand_as(decided)), 1).float()
    j = torch.arange(-3 * length, 3 * length, device=decided.device)
    weight = torch.exp(-j.float().square() / (2 * sigma**2))
    slots = torch.arange(length, device=decided.device) + length
    distance = torch.arange(3 * length, device=decided.device)[:, None] - slots
    return line @ weight[distance + 3 * length] / weight.sum()


@dataclass(frozen=True)
class Quota:
    """Shorthand: ``Quota(steps)`` is the linear schedule with the top-confidence selector."""

    steps: int

    @property
    def parts(self) -> tuple[Linear, TopConfidence]:
        """The schedule and the selector it stands for."""
        return Linear(self.steps), TopConfidence()


def rank(score: Float[Tensor, "B q"], candidates: Bool[Tensor, "B q"]) -> Int[Tensor, "B q"]:
    """Place of each slot by falling score: 0 for the row's best candidate; slots that are none come last."""
    # A candidate of score -inf or NaN still goes before every slot that is none.
    floor = torch.finfo(score.dtype).min
    key = score.nan_to_num(nan=floor, neginf=floor).masked_fill(~candidates, -torch.inf)
    return key.argsort(dim=1, descending=True, stable=True).argsort(1)


def _topk_over_rows(proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
    key = proposal.confidence.masked_fill(~candidates, -torch.inf)
    rows = key.new_full(turn.masks.shape, -torch.inf).scatter_(1, proposal.index, key)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    for row, quota, out in zip(rows, turn.need.tolist(), chosen, strict=True):
        out[row.topk(quota).indices] = True
    return candidates & chosen.gather(1, proposal.index)
