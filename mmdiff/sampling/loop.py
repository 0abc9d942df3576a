"""The one decoding loop: masks become tokens, pass by pass.

Everything that can differ is a part: which slots are open (blocks), how many are decided (schedule), which ones
(selector), by which token (sampler), from which reading of the canvas (guidance), with which classes excluded
(constraint), and when a row stops early (exit). With every part at its default this is LLaDA's published sampler.

Rows never wait for each other: each has its own block, its own pass count and its own draws, and leaves the batch
when it is complete. What a row holds at the end does not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.sampling.blocks import Blocks, Whole, window
from mmdiff.sampling.canvas import Backbone, Canvas, as_backbone, layout
from mmdiff.sampling.constraints import Constraint, exclude, restrict_range
from mmdiff.sampling.exits import Exit
from mmdiff.sampling.guidance import Guidance
from mmdiff.sampling.ledger import Ledger
from mmdiff.sampling.samplers import Draw, Greedy, Proposal, Sampler
from mmdiff.sampling.schedules import Linear, Schedule
from mmdiff.sampling.selectors import Factor, Quota, Selector, Threshold, TopConfidence, Turn
from mmdiff.sampling.trace import Account, Decoded, Step

__all__ = ["Sources", "decode", "steps"]

Sources = torch.Generator | rng.Tape | Sequence[torch.Generator | rng.Tape]


def decode(
    model: Any,
    prompt: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    canvas: Canvas | None = None,
    length: int | None = None,
    blocks: Blocks | None = None,
    schedule: Schedule | None = None,
    selector: Selector | Quota | None = None,
    sampler: Sampler | None = None,
    exit: Exit | None = None,  # noqa: A002
    guidance: Guidance | None = None,
    constraint: Constraint | None = None,
    generators: Sources | None = None,
    callback: Callable[[Step], Any] | None = None,
) -> Decoded:
    """Generate.

    Args:
        model: A `Backbone`, or a network with LLaDA's signature (its text is generated).
        prompt: Int64 [B, P], or one list of ids per row; rows are padded on the left.
        canvas: Instead of ``prompt`` and ``length``: rows that are laid out already. It is not changed.
        length: Slots to generate after each prompt.
        blocks: Which slots are open; default the whole canvas.
        schedule: How many slots are decided per pass. Default with no selector: one slot per pass.
        selector: Which slots are decided; default `TopConfidence`. `Quota` gives both.
        sampler: Which token a slot takes; default `Greedy`.
        exit: When a row ends early; default never.
        guidance: Default none.
        constraint: Excluded classes; default none.
        generators: One generator (or tape) per row, needed by parts that draw. One for the whole batch is taken if it
            has a single row, or is a `Tape` of whole [B, q] draws.
        callback: Called after every pass.

    Raises:
        ConfigError: Parts that contradict each other, or something missing.
    """
    run = steps(
        model,
        prompt,
        canvas=canvas,
        length=length,
        blocks=blocks,
        schedule=schedule,
        selector=selector,
        sampler=sampler,
        exit=exit,
        guidance=guidance,
        constraint=constraint,
        generators=generators,
    )
    while True:
        try:
            step = next(run)
        except StopIteration as end:
            return end.value
        if callback is not None:
            callback(step)


@torch.no_grad()
def steps(
    model: Any,
    prompt: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    canvas: Canvas | None = None,
    length: int | None = None,
    blocks: Blocks | None = None,
    schedule: Schedule | None = None,
    selector: Selector | Quota | None = None,
    sampler: Sampler | None = None,
    exit: Exit | None = None,  # noqa: A002
    guidance: Guidance | None = None,
    constraint: Constraint | None = None,
    generators: Sources | None = None,
) -> Generator[Step, None, Decoded]:
    """`decode` as an iterator over passes; its return value (``StopIteration.value``) is the `Decoded`.

    Arguments and errors as in `decode`.
    """
    backbone = as_backbone(model)
    full = _rows(backbone, model, prompt, length, canvas)
    schedule, selector = _who_decides(schedule, selector)
    one_pass = _Pass(backbone, selector, sampler or Greedy(), guidance, constraint or Constraint())
    sources = _sources(generators, len(full))
    numbers = (blocks or Whole()).assign(full)
    ledger = Ledger.open(full, numbers, schedule, counted=selector.counts)
    account, changed = Account(full), True
    while ledger.rows:
        if changed:
            rows = ledger.numbers
            here = torch.tensor(rows, device=full.tokens.device)
            work, block = full.select(here), numbers[here]
        draw = Draw(_pick(sources, rows), ledger.left, max(ledger.left), full.tokens.device)
        taken = one_pass(work, window(work, block), ledger, draw, account.nfe)
        # A selector that only counts needs no look at the device.
        decided = ledger.quotas if selector.counts else taken.tolist()
        if 0 in decided:
            raise RuntimeError(f"{type(selector).__name__} decided nothing in a row: it would never end")
        finished = ledger.advance(decided)
        ended = _leave_early(exit, work, finished, account.nfe)
        account.book(rows, here, taken, draw.width, one_pass.branches)
        full.put(here, work)
        changed = ledger.close(ended)
        yield Step(account.nfe - 1, full, ledger.total)
    return Decoded(full.tokens[:, full.start :], full, account.close(full))


@dataclass(frozen=True)
class _Pass:
    """One forward pass and the decisions it leads to."""

    backbone: Backbone
    selector: Selector
    sampler: Sampler
    guidance: Guidance | None
    constraint: Constraint

    @property
    def branches(self) -> int:
        return 1 if self.guidance is None else self.guidance.branches

    def __call__(
        self, canvas: Canvas, open_slots: Bool[Tensor, "B T"], ledger: Ledger, draw: Draw, number: int
    ) -> Int[Tensor, "B"]:
        """Decide slots of ``canvas`` in place; returns how many in each row."""
        # Candidates stand first, in slot order; further columns of a row that has fewer are never decided.
        index = open_slots.byte().argsort(dim=1, descending=True, stable=True)[:, : draw.width]
        candidates = open_slots.gather(1, index)
        proposal = self.propose(canvas, index, draw)
        quota = _tensor(ledger.quotas, index.device) if ledger.scheduled else None
        turn = Turn(quota, ledger.step, ledger.steps, draw, canvas.tokens.shape[1])
        commit = candidates & self.selector.select(proposal, candidates, turn)
        canvas.write(index, commit, proposal.tokens, number)
        return commit.sum(1)

    def propose(self, canvas: Canvas, index: Int[Tensor, "B q"], draw: Draw) -> Proposal:
        """Read the canvas and choose a token for every slot of ``index``."""
        if self.guidance is None:
            logits = self.backbone.forward(canvas, index)
        else:
            logits = self.guidance.logits(self.backbone, canvas, index)
        offset = self.backbone.offset
        logits = restrict_range(logits.to(self.sampler.dtype), canvas, index, offset)
        logits = self.constraint.restrict(logits, offset)
        # The mask class counts in the confidence, as published, but is never chosen: it would never be decided.
        classes = self.sampler.choose(exclude(logits, (self.backbone.mask_id,), offset), draw)
        return Proposal(classes + offset, classes, self.constraint.rescore(logits, offset), index)


def _rows(backbone: Backbone, model: Any, prompt: Any, length: int | None, canvas: Canvas | None) -> Canvas:
    if (canvas is None) == (prompt is None) or (length is None) == (canvas is None):
        raise ConfigError("give either canvas, or prompt and length")
    if canvas is not None:
        return dataclasses.replace(
            canvas, tokens=canvas.tokens.clone(), undecided=canvas.undecided.clone(), order=canvas.order.clone()
        )
    if length is None or length < 1:
        raise ConfigError(f"length is {length}; it must be at least 1")
    prompts = prompt.tolist() if isinstance(prompt, Tensor) else [list(p) for p in prompt]
    device = next((p.device for p in model.parameters()), "cpu") if hasattr(model, "parameters") else "cpu"
    return layout(prompts, [[None] * length] * len(prompts), mask_id=backbone.mask_id, device=device)


def _who_decides(schedule: Schedule | None, selector: Selector | Quota | None) -> tuple[Schedule | None, Selector]:
    if isinstance(selector, Quota):
        if schedule is not None:
            raise ConfigError("Quota is a schedule with a selector: drop schedule, or name the selector itself")
        return selector.parts
    if selector is None:
        return schedule or Linear(), TopConfidence()
    if selector.counts and schedule is None:
        raise ConfigError(f"{type(selector).__name__} decides a number of slots per pass: give a schedule")
    if isinstance(selector, (Threshold, Factor)) and schedule is not None:
        raise ConfigError(f"{type(selector).__name__} decides by confidence and takes no schedule")
    return schedule, selector


def _sources(generators: Sources | None, rows: int) -> Sources | None:
    """One source per row, or one tape for all."""
    if generators is None or isinstance(generators, rng.Tape):
        return generators
    if isinstance(generators, torch.Generator):
        generators = [generators]
    if len(generators) != rows:
        raise ConfigError(f"{len(generators)} generators for {rows} rows; give one per row")
    return generators


def _pick(sources: Any, rows: list[int]) -> Any:
    return [sources[r] for r in rows] if isinstance(sources, Sequence) else sources


def _leave_early(rule: Exit | None, canvas: Canvas, finished: list[bool], number: int) -> list[bool]:
    if rule is None or not any(finished):
        return [False] * len(finished)
    rule.fill(canvas, _tensor(finished, canvas.tokens.device), number)
    return (~canvas.undecided.any(1)).tolist()


def _tensor(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values).to(device, non_blocking=True)
