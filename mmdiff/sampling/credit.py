"""Credit: confidence that builds up while a slot keeps choosing the same token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.selectors import Selector, Turn
from mmdiff.sampling.thresholds import Threshold

__all__ = ["Credit"]


@dataclass(frozen=True)
class Credit:
    """Adds alpha log(1 + C) to the logits before ``selector`` sees them.

    C is zero at the start of a block. In every pass it is multiplied by ``beta``, and at every open slot the most
    probable class gains (its probability)^gamma. Correct but hesitant choices come sooner, and flips are damped.

    Attributes:
        selector: What decides.
        alpha: Weight of the credit; 0 = none.
        gamma: Exponent of the probability.
        beta: What is left of the credit in the next pass.

    Source: CreditDecoding (arXiv 2510.06133).
    """

    selector: Selector = field(default_factory=Threshold)
    alpha: float = 0.7
    gamma: float = 0.2
    beta: float = 0.8

    @property
    def counts(self) -> bool:
        """As the selector."""
        return self.selector.counts

    def start(self, rows: int, slots: int) -> _Accrued:
        """The selector of one run."""
        return _Accrued(self, rows, slots)

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """As the selector, on the logits of the pass."""
        return self.selector.select(proposal, candidates, turn)


class _Accrued:
    """Credit of a run: what each slot chose in the passes of its block, and what that is worth now.

    C has one entry per class, but only the classes that were chosen have any: they alone are kept.
    """

    def __init__(self, rule: Credit, rows: int, slots: int) -> None:
        self._rule = rule
        self._chosen = torch.zeros(rows, slots, 0, dtype=torch.long)
        self._worth = torch.zeros(rows, slots, 0)

    @property
    def counts(self) -> bool:
        return self._rule.counts

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        return self._rule.select(proposal, candidates, turn)

    def transform(
        self, logits: Float[Tensor, "B q V"], index: Int[Tensor, "B q"], candidates: Bool[Tensor, "B q"], turn: Turn
    ) -> None:
        """Book this pass, then add the credit to the logits, in place."""
        rows = torch.tensor(turn.rows, device=logits.device)
        self._room(max(turn.step) + 1, logits.device)
        begun = torch.tensor([s > 0 for s in turn.step], device=logits.device)
        chosen, worth = self._chosen[rows], self._worth[rows] * (self._rule.beta * begun)[:, None, None]
        top, choice = logits.max(-1)
        probability = (top - logits.logsumexp(-1)).exp().float()
        place = torch.tensor(turn.step, device=logits.device)[:, None, None].expand(*index.shape, 1)
        here = index[..., None].expand(-1, -1, chosen.shape[-1])
        seen, value = chosen.gather(1, here), worth.gather(1, here)
        seen.scatter_(2, place, choice[..., None])
        value.scatter_(2, place, (probability**self._rule.gamma * candidates)[..., None])
        self._chosen[rows], self._worth[rows] = chosen.scatter(1, here, seen), worth.scatter(1, here, value)
        credit = ((seen[..., :, None] == seen[..., None, :]) * value[..., None, :]).sum(-1)
        gain = self._rule.alpha * credit.log1p().to(logits.dtype)
        logits.scatter_(-1, seen, logits.gather(-1, seen) + gain)

    def _room(self, passes: int, device: torch.device) -> None:
        """Make room for the choices of ``passes`` passes."""
        more = passes - self._chosen.shape[-1]
        if more > 0:
            pad = (0, more)
            self._chosen = torch.nn.functional.pad(self._chosen.to(device), pad)
            self._worth = torch.nn.functional.pad(self._worth.to(device), pad)
