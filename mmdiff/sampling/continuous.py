"""Continuous image tokens in the decoding loop: a pass that first chooses slots and then draws their values.

There is no confidence to choose by, so the choice comes first; the network's last block and the head then run for the
chosen slots only. What a row is about stands before the image, a class in one slot or a prompt; guidance drops it.

Source: MAR (arXiv 2406.11838); eMIGM (arXiv 2503.07197).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.diffusion.guidance import GuidanceSchedule
from mmdiff.diffusion.mask_schedules import sampling_times
from mmdiff.errors import ConfigError
from mmdiff.sampling.canvas import Canvas, inputs, options
from mmdiff.sampling.guidance import without_condition
from mmdiff.sampling.heads import Conditions, DpmSolver, Noise, TokenSolver
from mmdiff.sampling.ledger import Row
from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.samplers import Draw
from mmdiff.sampling.schedules import Schedule
from mmdiff.sampling.selectors import Selector, Turn
from mmdiff.sampling.trace import Done, Pass

__all__ = ["LatentBackbone", "LatentPass", "PromptedLatents", "latent_canvas"]

_UNDECIDED, _DECIDED = -1, -2
"""Ids in ``tokens`` of image slots; class numbers are never negative."""


class LatentBackbone:
    """A network over continuous tokens: classes and tokens in, conditions out.

    Args:
        model: `mmdiff.models.emigm.EMIGM`, or a network with its ``condition`` and ``head``.
    """

    mask_id: int = _UNDECIDED
    decided_id: int = _DECIDED
    offset = 0

    def __init__(self, model: Any) -> None:
        self.model = model
        self.null_id: int = model.config.classes
        self.tokens: int = model.config.tokens

    @property
    def head(self) -> Any:
        """Draws tokens from conditions."""
        return self.model.head

    def forward(
        self, canvas: Canvas, index: Int[Tensor, "B q"], counts: tuple[int, int] | None = None
    ) -> Float[Tensor, "B q D"]:
        """Conditions of the slots ``index``; ``counts`` as in `mmdiff.models.emigm.EMIGM.condition`."""
        assert canvas.values is not None
        start = canvas.start
        return self.model.condition(
            canvas.values[:, start:],
            canvas.undecided[:, start:],
            canvas.tokens[:, 0],
            index=index - start,
            counts=counts,
        )


class PromptedLatents(LatentBackbone):
    """Continuous tokens behind a prompt of text, perhaps with pictures in it.

    Args:
        model: A `mmdiff.models.unified.Unified` that draws continuous tokens.
    """

    def __init__(self, model: Any) -> None:
        shape = model.layout()
        self.model, self.tokens = model, shape.codes
        self.mask_id, self.decided_id = shape.code_mask_id, shape.code_offset
        self.null_id = model.config.language.mask_id

    def forward(
        self, canvas: Canvas, index: Int[Tensor, "B q"], counts: tuple[int, int] | None = None
    ) -> Float[Tensor, "B q D"]:
        """Conditions of the slots ``index``; the last norm runs there only."""
        hidden = self.model.hidden(embeds=inputs(self.model, canvas), **options(self.model, canvas, index))
        return self.model.latents.condition(hidden, self.model.number(canvas.tokens).gather(1, index))


def latent_canvas(
    labels: Int[Tensor, "B"], values: Float[Tensor, "B N C"], open_: Bool[Tensor, "B N"] | None = None
) -> Canvas:
    """One slot for the class, then one per image token.

    Args:
        labels: Class of each row.
        values: Tokens; those that are to be drawn may hold anything.
        open_: True = to be drawn; None = all.
    """
    b, n = values.shape[:2]
    device = values.device
    open_ = torch.ones(b, n, dtype=torch.bool, device=device) if open_ is None else open_
    front = torch.zeros(b, 1, dtype=torch.bool, device=device)
    undecided = torch.cat((front, open_), dim=1)
    tokens = torch.where(undecided, _UNDECIDED, _DECIDED)
    tokens[:, 0] = labels
    clean = torch.where(open_[..., None], torch.zeros_like(values), values)
    return Canvas(
        tokens=tokens,
        undecided=undecided,
        frozen=~undecided,
        valid=torch.ones_like(undecided),
        positions=torch.arange(n + 1, device=device).expand(b, -1),
        start=1,
        order=torch.full((b, n + 1), -1, dtype=torch.int32, device=device),
        droppable=torch.cat((~front, torch.zeros_like(open_)), dim=1),
        values=torch.cat((values.new_zeros(b, 1, values.shape[2]), clean), dim=1),
    )


@dataclass(frozen=True)
class LatentPass:
    """One pass: choose, compute conditions there, draw the values, write them.

    Attributes:
        backbone: The network.
        selector: Which slots; a blind one.
        solver: How the head is sampled.
        guidance: How strong, and when; None = never.
        steps: Passes of the whole run, for the time of a pass.
    """

    backbone: LatentBackbone
    selector: Selector
    solver: TokenSolver
    guidance: GuidanceSchedule | None
    steps: int

    @classmethod
    def of(
        cls,
        backbone: Any,
        schedule: Schedule | None,
        selector: Selector,
        solver: Any,
        guidance: GuidanceSchedule | Any | None,
    ) -> LatentPass:
        """The pass of the parts of a run.

        Raises:
            ConfigError: Parts that are for ids.
        """
        steps = getattr(schedule or selector, "steps", None)
        if steps is None:
            raise ConfigError("continuous tokens take a schedule with a number of steps, such as Independent or Cosine")
        if not getattr(selector, "blind", False):
            name = type(selector).__name__
            raise ConfigError(f"continuous tokens have no confidence, which {name} goes by: take Random or an order")
        solver = DpmSolver() if solver is None else solver
        if not isinstance(solver, TokenSolver):
            raise ConfigError(f"{type(solver).__name__} chooses ids; continuous tokens need DpmSolver or Ddpm")
        if not isinstance(guidance, (GuidanceSchedule, NoneType)):
            raise ConfigError(f"{type(guidance).__name__} guides ids; continuous tokens need a GuidanceSchedule")
        return cls(backbone, selector, solver, guidance, steps)

    def guided(self, step: int) -> bool:
        """Whether pass ``step`` reads the canvas without the class too."""
        return self.guidance is not None and self.guidance.active(sampling_times(self.steps)[step + 1].item())

    def width(self, rows: Sequence[Row]) -> int:
        """Slots that a pass has to look at, the same number in each row."""
        return max(r.left for r in rows)

    @torch.no_grad()
    def __call__(
        self, canvas: Canvas, block: Int[Tensor, "B T"], rows: Sequence[Row], whole: bool, draw: Draw, number: int
    ) -> Done:
        """Decide slots of ``canvas`` in place; arguments as in the loop's pass over ids."""
        index = canvas.undecided.byte().argsort(dim=1, descending=True, stable=True)[:, : draw.width]
        candidates = canvas.undecided.gather(1, index)
        left = [r.left for r in rows]
        blank = Proposal(index, index, index.new_empty(*index.shape, 0, dtype=torch.float32), index)
        turn = Turn.of(rows, draw, canvas.undecided, scheduled=self.selector.counts)
        chosen = candidates & self.selector.select(blank, candidates, turn)
        taken = chosen.sum(1)
        # A selector that only counts needs no look at the device.
        counts = [r.quota for r in rows] if self.selector.counts else taken.tolist()
        index, commit = _narrow(index, chosen, max(counts))
        known = [canvas.tokens.shape[1] - canvas.start - n for n in left]
        guided = [self.guided(r.step) for r in rows]
        branches = 2 if any(guided) else 1
        both = canvas.stack(without_condition(canvas, self.backbone.null_id)) if branches == 2 else canvas
        z = self.backbone.forward(both, index.repeat(branches, 1), (min(known), max(known)))
        conditions = self._conditions(z, counts, known, guided)
        head = self.backbone.head
        drawn = self.solver.tokens(head, conditions, Noise(draw.source, counts, head.channels, z.device))
        values = drawn.new_zeros(*index.shape, head.channels)
        values.flatten(0, 1)[_places(counts, index.shape[1], z.device)] = drawn
        canvas.write(index, commit, torch.full_like(index, self.backbone.decided_id), number)
        assert canvas.values is not None
        canvas.write_values(index, commit, values.to(canvas.values.dtype))
        slots = canvas.tokens.shape[1]
        return Done(taken, None, Pass(len(rows) * branches, slots, slots, index.shape[1]), None)

    def _conditions(
        self, z: Float[Tensor, "R q D"], counts: Sequence[int], known: Sequence[int], guided: Sequence[bool]
    ) -> Conditions:
        """Conditions of the chosen slots, packed, and the guidance of each."""
        rows = len(counts)
        places = _places(counts, z.shape[1], z.device)
        given = z[:rows].flatten(0, 1)[places]
        if self.guidance is None or not any(guided):
            return Conditions(given)
        after = torch.tensor([k + n for k, n in zip(known, counts, strict=True)])
        scale = torch.where(torch.tensor(guided), self.guidance.at(after, self.backbone.tokens), 1.0)
        each = scale.repeat_interleave(torch.tensor(counts)).float().to(z.device)
        return Conditions(given, z[rows:].flatten(0, 1)[places], each[:, None])


def _narrow(
    index: Int[Tensor, "B q"], chosen: Bool[Tensor, "B q"], width: int
) -> tuple[Int[Tensor, "B w"], Bool[Tensor, "B w"]]:
    """The chosen slots first, in slot order, and which columns they are."""
    order = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    return index.gather(1, order), chosen.gather(1, order)


def _places(counts: Sequence[int], width: int, device: torch.device) -> Int[Tensor, "M"]:
    """Flat places of the first ``counts`` columns of each row."""
    rows = [torch.arange(n) + row * width for row, n in enumerate(counts)]
    return torch.cat(rows).to(device, non_blocking=True)
