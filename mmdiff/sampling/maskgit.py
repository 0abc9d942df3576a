"""Discrete image tokens of class-conditional networks in the decoding loop: backbone, published schedules and quirks.

Source: MaskGIT (arXiv 2202.04200), its PyTorch reproduction (arXiv 2310.14400) and Halton-MaskGIT (arXiv 2503.17076),
published code's behaviour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.sampling.canvas import Canvas
from mmdiff.sampling.editors import Edit
from mmdiff.sampling.guidance import Cfg
from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.samplers import Draw
from mmdiff.sampling.selectors import RandomTopK, Selector, Turn, best

__all__ = [
    "ClassCodeBackbone",
    "ConfidentRedraw",
    "Cumulative",
    "HaltonCounts",
    "MaskRatio",
    "PublishedDraw",
    "RampedCfg",
    "Redraw",
    "Rounded",
    "Tempered",
    "class_canvas",
    "halton_multipliers",
]

Mode = Literal["arccos", "cosine", "linear", "root", "square"]

_RISING: dict[str, Callable[[Tensor], Tensor]] = {
    "arccos": lambda r: 1 - torch.arccos(r) / (math.pi / 2),
    "cosine": lambda r: 1 - torch.cos(r * math.pi / 2),
    "linear": lambda r: r,
    "root": torch.sqrt,
    "square": torch.square,
}
"""Share that is known when a share r of the steps is done."""

_FALLING: dict[str, Callable[[Tensor], Tensor]] = {
    "arccos": lambda r: torch.arccos(r) / (math.pi / 2),
    "cosine": lambda r: torch.cos(r * math.pi / 2),
    "linear": lambda r: 1 - r,
    "root": lambda r: 1 - r**0.5,
    "square": lambda r: 1 - r**2,
}
"""Relative counts of the first generation, along r from 1 to 0."""


class ClassCodeBackbone:
    """Codes of a `mmdiff.models.maskgit.MaskGIT`: ids 0 .. K-1, K masked, then the classes, then no class.

    Args:
        model: The network.
    """

    offset = 0

    def __init__(self, model: Any) -> None:
        self.model = model
        self.mask_id: int = model.config.codebook
        self.null_id: int = model.config.codebook + 1 + model.config.classes

    def forward(self, canvas: Canvas, index: Int[Tensor, "B q"]) -> Float[Tensor, "B q V"]:
        """Logits of the codes, and of the mask, at ``index``."""
        labels = canvas.tokens[:, 0] - self.mask_id - 1
        logits = self.model(canvas.tokens[:, canvas.start :], labels)
        return logits.gather(1, (index - canvas.start).clamp_min(0)[..., None].expand(-1, -1, logits.shape[-1]))


def class_canvas(
    backbone: ClassCodeBackbone, labels: Int[Tensor, "B"], codes: Int[Tensor, "B N"], open_: Bool[Tensor, "B N"]
) -> Canvas:
    """One slot for the class, then one per image token.

    Args:
        backbone: Knows the ids.
        labels: Class of each row.
        codes: Codes; those that are to be drawn may hold anything.
        open_: True = to be drawn.
    """
    b, n = codes.shape
    front = torch.zeros_like(open_[:, :1])
    undecided = torch.cat((front, open_), dim=1)
    tokens = torch.cat((labels[:, None] + backbone.mask_id + 1, codes.masked_fill(open_, backbone.mask_id)), dim=1)
    return Canvas(
        tokens=tokens,
        undecided=undecided,
        frozen=~undecided,
        valid=torch.ones_like(undecided),
        positions=torch.arange(n + 1, device=codes.device).expand(b, -1),
        start=1,
        order=torch.full((b, n + 1), -1, dtype=torch.int32, device=codes.device),
        droppable=torch.cat((~front, torch.zeros_like(open_)), dim=1),
    )


@dataclass(frozen=True)
class Rounded:
    """Counts of the first PyTorch MaskGIT: a curve over linspace(1, 0), scaled to the sum, rounded, at least one each.

    Attributes:
        steps: Passes.
        mode: Curve.

    Source: MaskGIT-pytorch v1, published code's behaviour.
    """

    steps: int
    mode: Mode = "arccos"

    def raw(self, masks: int, steps: int) -> list[int]:
        """The published list; its last entry takes the difference and may be 0 or less."""
        weights = _FALLING[self.mode](torch.linspace(1, 0, steps))
        shares = (weights / weights.sum() * masks).round()
        shares[shares == 0] = 1
        shares[-1] += masks - shares.sum()
        return shares.long().tolist()

    def counts(self, masks: int, steps: int) -> list[int]:
        """Tokens per pass: the published list, cut where no masks are left."""
        out, left = [], masks
        for n in self.raw(masks, steps):
            out.append(min(n, left))
            left -= out[-1]
            if not left:
                break
        return out


@dataclass(frozen=True)
class Cumulative:
    """Counts of the second PyTorch MaskGIT: a curve of how many tokens are known after each step.

    Attributes:
        steps: Passes.
        mode: Curve.
        published: As the published confidence sampler does: the mask may be drawn, which leaves a slot open, and the
            run ends after its steps, masks left or not.

    Source: Halton-MaskGIT, published code's behaviour.
    """

    steps: int
    mode: Mode = "arccos"
    published: bool = False
    idle = True

    def curve(self, masks: int, steps: int) -> list[int]:
        """Known tokens after each pass, before the rule that each pass adds one at least."""
        known = (_RISING[self.mode](torch.linspace(0, 1, steps)) * masks).int().tolist()
        return [*known[:-1], masks]

    def counts(self, masks: int, steps: int) -> list[int]:
        """Tokens per pass."""
        return _differences([max(k + 1, n) for k, n in enumerate(self.curve(masks, steps))], masks, self.published)


@dataclass(frozen=True)
class HaltonCounts:
    """Counts of the Halton sampler: the arccos curve over the share of steps done, this one included.

    Attributes:
        steps: Passes.

    Source: Halton scheduler (arXiv 2503.17076), published code's behaviour.
    """

    steps: int

    def curve(self, masks: int, steps: int) -> list[int]:
        """Known tokens after each pass; each adds one at least."""
        ratios = torch.tensor([(k + 1) / steps for k in range(steps)])
        known = (_RISING["arccos"](ratios) * masks).int().tolist()
        return [max(k + 1, n) for k, n in enumerate(known)]

    def counts(self, masks: int, steps: int) -> list[int]:
        """Tokens per pass."""
        return _differences(self.curve(masks, steps), masks, False)


_SIGMOID_END = 1 / (1 + math.exp(-3))
"""Value at the end of the stretch from -3 to 3."""


@dataclass(frozen=True)
class MaskRatio:
    """Counts by the original MaskGIT: after step k of n a share f(k/n) of the tokens stays masked.

    Attributes:
        steps: Passes.
        method: ``cosine``, ``uniform``, ``sigmoid``, ``log``, ``exp``, or ``pow`` with an exponent such as ``pow2.5``.
        tokens: Number that the share is taken of, as Show-o and MMaDA take the whole image's even if a part of it is
            given; None: the masks at the start.

    Source: MaskGIT (arXiv 2202.04200), Show-o (arXiv 2408.12528) and MMaDA (arXiv 2505.15809), published code's
        behaviour.
    """

    steps: int
    method: str = "cosine"
    tokens: int | None = None

    def share(self, ratio: Float[Tensor, "*S"], masks: int) -> Float[Tensor, "*S"]:
        """Share that stays masked, in [1e-6, 1]."""
        bits = math.log2(masks)
        if self.method.startswith("pow"):
            value = 1 - ratio ** float(self.method.removeprefix("pow"))
        else:
            curves: dict[str, Callable[[Tensor], Tensor]] = {
                "uniform": lambda r: 1 - r,
                "cosine": lambda r: torch.cos(math.pi / 2 * r),
                "sigmoid": lambda r: (_SIGMOID_END - torch.sigmoid(6 * r - 3)) / (2 * _SIGMOID_END - 1),
                "log": lambda r: -torch.log2(r) / bits,
                "exp": lambda r: 1 - torch.exp2(-bits * (1 - r)),
            }
            value = curves[self.method](ratio)
        return value.clamp(1e-6, 1)

    def keep(self, masks: int, steps: int) -> list[int]:
        """Tokens that stay masked after each pass, at least one, at least one fewer than before."""
        left, out, whole = masks, [], masks if self.tokens is None else self.tokens
        for share in self.share(torch.tensor([(k + 1) / steps for k in range(steps)]), masks):
            left = max(1, min(left - 1, int((whole * share).floor())))
            out.append(left)
        return out

    def counts(self, masks: int, steps: int) -> list[int]:
        """Tokens per pass; the last decides all."""
        known = [masks - n for n in self.keep(masks, steps)[:-1]]
        return _differences([*known, masks], masks, False)


@dataclass(frozen=True)
class PublishedDraw:
    """A draw by the Gumbel-max trick from all classes, that of the mask included, as published.

    A slot that draws the mask counts as decided; the network goes on reading a masked token there. A tape holds the
    Gumbel numbers.

    Attributes:
        top_k: Draw among this many most probable classes, in falling order; None = all.

    Source: MaskGIT-pytorch in both generations, published code's behaviour.
    """

    top_k: int | None = None
    dtype = torch.float32
    draws_mask = True

    def choose(self, logits: Float[Tensor, "B q V"], draw: Draw) -> Int[Tensor, "B q"]:
        """Argmax with noise."""
        if self.top_k is None:
            return (logits + draw.gumbel(logits.shape[-1])).argmax(-1)
        values, classes = logits.topk(self.top_k, dim=-1)
        return classes.gather(-1, (values + draw.gumbel(self.top_k)).argmax(-1, keepdim=True))[..., 0]


@dataclass(frozen=True)
class Tempered:
    """Another selector, with all logits multiplied by a number per pass before anything is drawn or compared.

    Attributes:
        selector: The selector.
        multipliers: One per pass; the last serves further ones.
    """

    selector: Selector
    multipliers: tuple[float, ...]

    @property
    def counts(self) -> bool:
        """As the selector."""
        return self.selector.counts

    def transform(
        self, logits: Float[Tensor, "B q V"], index: Int[Tensor, "B q"], candidates: Bool[Tensor, "B q"], turn: Turn
    ) -> None:
        """Multiply, in place."""
        by = [self.multipliers[min(step, len(self.multipliers) - 1)] for step in turn.step]
        logits *= torch.tensor(by, dtype=logits.dtype).to(logits.device, non_blocking=True)[:, None, None]

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """As the selector."""
        return self.selector.select(proposal, candidates, turn)


@dataclass(frozen=True)
class ConfidentRedraw:
    """The most confident slots up to the number that shall be known, whatever was lost to draws of the mask before.

    Attributes:
        noise: Log-probability with Gumbel noise.
        schedule: Numbers of known tokens.
        tokens: N.

    Source: Halton-MaskGIT's confidence sampler, published code's behaviour.
    """

    noise: RandomTopK
    schedule: Cumulative
    tokens: int
    counts = True

    def select(self, proposal: Proposal, candidates: Bool[Tensor, "B q"], turn: Turn) -> Bool[Tensor, "B q"]:
        """By log-probability with noise."""
        goals = [max(k + 1, n) for k, n in enumerate(self.schedule.curve(self.tokens, self.schedule.steps))]
        goal = torch.tensor([goals[step] for step in turn.step], device=candidates.device)
        left = turn.masks.sum(1)
        return best(self.noise.score(proposal, turn), candidates, (goal - self.tokens + left).clamp_min(0))


@dataclass(frozen=True)
class Redraw:
    """Every slot that was decided before takes the token of this pass, too.

    Attributes:
        mask_id: A slot that draws this id becomes open again; None: it keeps it.
        patience: The run ends with the pass that decides the last slot, though that pass changes others.

    Source: Halton-MaskGIT, published samplers' behaviour.
    """

    mask_id: int | None = None
    patience: int = -1

    def edit(
        self,
        proposal: Proposal,
        tokens: Int[Tensor, "B q"],
        candidates: Bool[Tensor, "B q"],
        decided: Bool[Tensor, "B q"],
        commit: Bool[Tensor, "B q"],
        slots: int,
    ) -> Edit:
        """Write all, or open those that drew the mask."""
        drawn = commit | decided
        lost = torch.zeros_like(drawn) if self.mask_id is None else decided & (proposal.tokens == self.mask_id)
        return Edit(drawn & ~lost, lost)


@dataclass(frozen=True)
class RampedCfg(Cfg):
    """Guidance whose strength grows linearly from none in the first pass to ``scale`` (a number) in the last.

    Source: MaskGIT-pytorch, published code's behaviour.
    """

    def at(self, rows: Sequence[Any]) -> Cfg:
        """The guidance of one pass."""
        full = self.scale - 1
        now = torch.tensor([1 + full * r.step / max(1, r.steps - 1) for r in rows])
        return Cfg(now[:, None, None])


def halton_multipliers(
    steps: int, low: float = 1.0, high: float = 1.2, power: float = 1.0, warmup: int = 0
) -> tuple[float, ...]:
    """Numbers that the logits of each pass are multiplied by: linspace(low, high) ** power, halved in the warm-up.

    Source: Halton-MaskGIT, published code's behaviour.
    """
    values = torch.linspace(low, high, steps) ** power
    values[:warmup] *= 0.5
    return tuple(values.tolist())


def _differences(known: Sequence[int], masks: int, zeros: bool) -> list[int]:
    """Counts from cumulative numbers, which are cut at ``masks``."""
    capped = [min(n, masks) for n in known]
    counts = [b - a for a, b in itertools.pairwise([0, *itertools.accumulate(capped, max)])]
    return counts if zeros else [n for n in counts if n]
