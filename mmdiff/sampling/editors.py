"""Editors: what a pass changes in slots that were decided before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.selectors import best
from mmdiff.sampling.thresholds import best_of_runs

__all__ = ["T2T", "Edit", "Editor", "Remask"]


@dataclass(frozen=True)
class Edit:
    """What becomes of the slots of a pass.

    Attributes:
        write: Bool [B, q]; slots that take the proposed token, open or decided.
        reopen: Bool [B, q]; decided slots that become masks again. Disjoint from ``write``.
    """

    write: Bool[Tensor, "B q"]
    reopen: Bool[Tensor, "B q"]


@runtime_checkable
class Editor(Protocol):
    """Has the last word over the decided slots of the current block. Frozen slots are never shown to it.

    Attributes:
        patience: Passes that a block may take after its last mask was decided: it ends with the first of them that
            changes nothing, and after one more than this in any case. 0: it ends with its last mask.
    """

    @property
    def patience(self) -> int:
        """As above."""
        ...

    def edit(
        self,
        proposal: Proposal,
        tokens: Int[Tensor, "B q"],
        candidates: Bool[Tensor, "B q"],
        decided: Bool[Tensor, "B q"],
        commit: Bool[Tensor, "B q"],
        slots: int,
    ) -> Edit:
        """Change what the selector decided.

        Args:
            proposal: For open and decided slots.
            tokens: What the slots hold.
            candidates: Open slots.
            decided: Slots of the block that were decided in earlier passes.
            commit: What the selector decided.
            slots: T.
        """
        ...


@dataclass(frozen=True)
class T2T:
    """Overwrite a decided slot when another token has a probability above ``confidence``.

    Attributes:
        confidence: The comparison is strict.
        patience: As in `Editor`; a block takes one pass more than its masks need, to see that nothing changes.

    Source: LLaDA2.1 (arXiv 2602.08676), token-to-token editing.
    """

    confidence: float = 0.9
    patience: int = 16

    def edit(
        self,
        proposal: Proposal,
        tokens: Int[Tensor, "B q"],
        candidates: Bool[Tensor, "B q"],
        decided: Bool[Tensor, "B q"],
        commit: Bool[Tensor, "B q"],
        slots: int,
    ) -> Edit:
        """Keep what the selector decided, and overwrite."""
        better = decided & (proposal.tokens != tokens) & (proposal.confidence > self.confidence)
        return Edit(commit | better, torch.zeros_like(commit))


@dataclass(frozen=True)
class Remask:
    """Decided slots of low probability count as open again, and compete with the others for their place.

    In every run of adjacent open slots the best choice is taken if its probability is above ``low``, and so is every
    choice above ``confidence``, and the row's best; then the next best, until one more is taken than counted as open
    again. Of the slots that counted as open again, those that were not taken become masks. What the selector decided
    is left out of account.

    Source: dInfer (arXiv 2510.08666), hierarchical decoding with re-masking.
    """

    remask: float = 0.4
    low: float = 0.4
    confidence: float = 0.9
    patience: int = 0

    def edit(
        self,
        proposal: Proposal,
        tokens: Int[Tensor, "B q"],
        candidates: Bool[Tensor, "B q"],
        decided: Bool[Tensor, "B q"],
        commit: Bool[Tensor, "B q"],
        slots: int,
    ) -> Edit:
        """Decide anew."""
        doubtful = decided & (proposal.confidence < self.remask)
        # A block without masks is finished: nothing is doubted any more.
        doubtful &= candidates.any(1, keepdim=True)
        open_ = candidates | doubtful
        taken = best_of_runs(proposal, open_, slots) & (proposal.confidence > self.low)
        taken = taken | open_ & (proposal.confidence > self.confidence) | best(proposal.score, open_, 1)
        # The accepted ones first, so that the number needed is made up from the rest.
        short = (doubtful.sum(1) + 1 - taken.sum(1)).clamp(min=0)
        taken = taken | best(proposal.score, open_ & ~taken, short)
        return Edit(taken, doubtful & ~taken)
