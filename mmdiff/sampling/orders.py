"""Orders of image tokens: which slots are decided in a pass when no confidence is asked.

These selectors are *blind*: they decide before the network has run, so that it computes only what is needed.

Source: eMIGM (arXiv 2503.07197) and MAR (arXiv 2406.11838), published samplers; Halton scheduler (arXiv 2503.17076).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion.mask_schedules import GammaName, reveal_probabilities
from mmdiff.errors import ConfigError
from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.selectors import Turn, best

__all__ = ["Ordered", "SharedReveal", "halton_order", "halton_ranks", "permuted"]


@dataclass(frozen=True)
class Ordered:
    """A fixed order per row: of the candidates, the slots with the smallest rank come first.

    Attributes:
        rank: Int64 [B or 1, T]; rank of every slot of the canvas.
    """

    rank: Int[Tensor, "#B T"]
    counts = True
    blind = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By rank."""
        rank = self.rank[list(turn.rows)] if len(self.rank) > 1 else self.rank.expand(len(turn.rows), -1)
        return best(-rank.to(proposal.index.device).gather(1, proposal.index).double(), candidates, turn.need)


@dataclass(frozen=True)
class SharedReveal:
    """The published reveal of eMIGM: all rows reveal the same number, drawn from the first row's uniforms.

    A reference for replays: rows are not independent, and one source serves the whole batch. Per pass it draws N
    uniforms, B - 1 permutations without effect, then for each further row a permutation of its known and one of its
    masked tokens; if nobody reveals anything, one integer per row with more than one masked token.

    Attributes:
        gamma: Mask schedule.
        steps: Passes at most.
        front: Slots before the image.

    Source: published code of eMIGM (arXiv 2503.07197).
    """

    gamma: GammaName
    steps: int
    front: int = 1
    counts = False
    blind = True
    joint = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """The tokens to reveal; all that are left in the last pass."""
        step, source = turn.step[0], turn.draw.source
        masked = turn.masks[:, self.front :].cpu()
        u = self._uniforms(masked, source)
        chosen = masked & (u < reveal_probabilities(self.gamma, self.steps)[step])
        if step + 1 == self.steps:
            chosen = masked
        elif not chosen.any():
            for row, mine in enumerate(masked):
                places = mine.nonzero()[:, 0]
                chosen[row, places[rng.integer(source, len(places)) if len(places) > 1 else 0]] = True
        image = (proposal.index - self.front).clamp_min(0)
        return candidates & chosen.to(candidates.device).gather(1, image)

    def _uniforms(self, masked: Bool[Tensor, "B T"], source: rng.Source) -> Float[Tensor, "B T"]:
        b, slots = masked.shape
        first = rng.uniform(source, (slots,), device="cpu")
        for _ in range(b - 1):
            rng.shuffles(source, 1, slots)
        u = first.expand(b, slots).clone()
        for row in range(1, b):
            for which in (~masked, masked):
                places, given = which[row].nonzero()[:, 0], first[which[0]]
                u[row, places[rng.shuffles(source, 1, len(places))[0].cpu()]] = given
        return u


def permuted(source: rng.Source, rows: int, tokens: int, *, start: int = 0) -> Ordered:
    """MAR's order: a random permutation per row, of which the first entries stay masked longest.

    Args:
        source: One generator per row, or a tape of permutations [B, N].
        rows: B.
        tokens: N.
        start: Slots of the canvas before the image.
    """
    order = rng.shuffles(source, rows, tokens).cpu()
    place = torch.empty_like(order).scatter_(1, order, torch.arange(tokens).expand_as(order))
    return Ordered(torch.nn.functional.pad(tokens - 1 - place, (start, 0)))


@cache
def halton_order(side: int) -> Int[Tensor, "N"]:
    """Cells of a square grid in Halton order, as row-major numbers: consecutive cells lie far apart.

    The first occurrence of each cell among the points 1 .. 10,000 of bases 2 and 3 counts.

    Raises:
        ConfigError: A grid too large for that many points.

    Source: Halton scheduler for MaskGIT (arXiv 2503.17076), published code.
    """
    seen: dict[int, None] = {}
    for i in range(1, 10_001):
        seen.setdefault(int(side * _radical_inverse(i, 2)) * side + int(side * _radical_inverse(i, 3)))
    if len(seen) < side * side:
        raise ConfigError(f"the Halton order visits {len(seen)} of the {side * side} cells of a {side} x {side} grid")
    return torch.tensor(list(seen))


def halton_ranks(side: int, rolls: Sequence[int] = (0,), *, start: int = 0) -> Int[Tensor, "B T"]:
    """Rank of every slot of a canvas in Halton order.

    Args:
        side: Tokens per side.
        rolls: Per row, how far the order is rolled.
        start: Slots of the canvas before the image.
    """
    order = torch.stack([halton_order(side).roll(n) for n in rolls])
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(side * side).expand_as(order))
    return torch.nn.functional.pad(rank, (start, 0))


def _radical_inverse(i: int, base: int) -> float:
    """The digits of i behind the point, reversed; in this order of operations, since cells end at such numbers."""
    value, unit = 0.0, 1.0
    while i > 0:
        unit /= base
        i, digit = divmod(i, base)
        value += unit * digit
    return value
