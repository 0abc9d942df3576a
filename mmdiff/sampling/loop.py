"""The one decoding loop: masks become tokens, pass by pass.

Everything that can differ is a part: which slots are open (blocks), how many are decided (schedule), which ones
(selector), by which token (sampler), what is taken back (editor), from which reading of the canvas (guidance), what of
the network's work is kept from pass to pass (cache), with which classes excluded (constraint), and when a row stops
early (exit). With every part at its default this is LLaDA's published sampler.

Each row has its own block, its own pass count and its own draws, and leaves the batch when it is complete. Rows that
compute different slots take turns, others never wait. What a row holds at the end does not depend on the rows beside
it.
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
from mmdiff.diffusion.guidance import GuidanceSchedule
from mmdiff.errors import ConfigError
from mmdiff.sampling.blocks import Blocks, Whole, window
from mmdiff.sampling.caches import Cache
from mmdiff.sampling.canvas import Backbone, Canvas, as_backbone, layout
from mmdiff.sampling.constraints import Constraint, restrict_range, without
from mmdiff.sampling.continuous import LatentBackbone, LatentPass
from mmdiff.sampling.editors import Editor
from mmdiff.sampling.exits import Exit
from mmdiff.sampling.guidance import Guidance
from mmdiff.sampling.heads import TokenSolver
from mmdiff.sampling.ledger import Ledger, Row
from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.reading import Reader
from mmdiff.sampling.samplers import Draw, Greedy, Sampler
from mmdiff.sampling.schedules import Linear, Schedule
from mmdiff.sampling.selectors import Quota, Selector, TopConfidence, Turn
from mmdiff.sampling.thresholds import Factor, Threshold
from mmdiff.sampling.trace import Account, Decoded, Done, Step

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
    sampler: Sampler | TokenSolver | None = None,
    editor: Editor | None = None,
    cache: Cache | None = None,
    exit: Exit | None = None,  # noqa: A002
    guidance: Guidance | GuidanceSchedule | None = None,
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
        sampler: Which token a slot takes; default `Greedy`, and `DpmSolver` for continuous tokens.
        editor: What is changed in slots that were decided before; default nothing.
        cache: What is not recomputed in every pass; default none, everything is.
        exit: When a row ends early; default never.
        guidance: Default none; for continuous tokens a `GuidanceSchedule`.
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
        editor=editor,
        cache=cache,
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


def steps(
    model: Any,
    prompt: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    canvas: Canvas | None = None,
    length: int | None = None,
    blocks: Blocks | None = None,
    schedule: Schedule | None = None,
    selector: Selector | Quota | None = None,
    sampler: Sampler | TokenSolver | None = None,
    editor: Editor | None = None,
    cache: Cache | None = None,
    exit: Exit | None = None,  # noqa: A002
    guidance: Guidance | GuidanceSchedule | None = None,
    constraint: Constraint | None = None,
    generators: Sources | None = None,
) -> Generator[Step, None, Decoded]:
    """`decode` as an iterator over passes; its return value (``StopIteration.value``) is the `Decoded`.

    Arguments and errors as in `decode`.
    """
    backbone = as_backbone(model)
    schedule, rule = _who_decides(schedule, selector)
    published = getattr(schedule, "published", False)
    full = _rows(backbone, model, prompt, length, canvas, published)
    numbers = (blocks or Whole()).assign(full)
    sources = _sources(generators, len(full), joint=getattr(rule, "joint", False))
    ledger = Ledger.open(full, numbers, schedule, counted=rule.counts, sources=sources)
    latent = isinstance(backbone, LatentBackbone)
    reader = Reader(backbone, None if isinstance(guidance, GuidanceSchedule) else guidance, cache, full, numbers)
    rule = rule.start(*full.tokens.shape) if hasattr(rule, "start") else rule
    if latent:
        _refuse_for_values(blocks=blocks, editor=editor, cache=cache, constraint=constraint, exit=exit)
        one_pass: Any = LatentPass.of(backbone, schedule, rule, sampler, guidance)
    else:
        scheduled = schedule is not None
        one_pass = _Pass(reader, rule, _of_ids(sampler), editor, constraint or Constraint(), scheduled, published)
    account = Account(full)
    total = ledger.total if editor is None and (cache is None or ledger.in_step) else None
    here: list[int] = []
    while ledger.rows:
        rows, whole = reader.group(ledger.rows)
        if here != (here := [r.number for r in rows]):
            place = torch.tensor(here, device=full.tokens.device)
            work, block = full.select(place), numbers[place]
        draw = Draw(_pick(sources, here), [r.left for r in rows], one_pass.width(rows), full.tokens.device)
        done = one_pass(work, block, rows, whole, draw, account.nfe)
        account.book(here, place, done.taken, done.cost, done.drift)
        # A selector that only counts needs no look at the device.
        known = rule.counts and not published and editor is None
        decided = [r.quota for r in rows] if known else done.taken.tolist()
        changed = [False] * len(rows) if done.changed is None else done.changed.tolist()
        if not published and any(n == 0 and r.left and not c for n, r, c in zip(decided, rows, changed, strict=True)):
            raise RuntimeError(f"{type(rule).__name__} decided nothing in a row: it would never end")
        patience = 0 if editor is None else editor.patience
        finished = [
            ledger.book(r, n, mending=c, patience=patience) for r, n, c in zip(rows, decided, changed, strict=True)
        ]
        full.put(place, work)
        if exit is not None and (exit.every_pass or any(finished)):
            exit.fill(work, _tensor(finished, place.device), account.nfe - 1)
            full.put(place, work)
            ledger.recount(full, numbers)
        if ledger.close() and ledger.rows:
            reader.keep(ledger.numbers)
        yield Step(account.nfe - 1, full, total)
    values = None if full.values is None else full.values[:, full.start :]
    return Decoded(full.tokens[:, full.start :], full, account.close(full), values)


@dataclass(frozen=True)
class _Pass:
    """One forward pass and the decisions it leads to."""

    reader: Reader
    selector: Selector
    sampler: Sampler
    editor: Editor | None
    constraint: Constraint
    scheduled: bool
    published: bool

    @torch.no_grad()
    def __call__(
        self, canvas: Canvas, block: Int[Tensor, "B T"], rows: list[Row], whole: bool, draw: Draw, number: int
    ) -> Done:
        """Decide slots of ``canvas`` in place."""
        current = _tensor([r.block for r in rows], block.device)
        open_slots = window(canvas, block, current)
        shown = open_slots.byte() * 2
        if self.editor is not None:
            shown += ~canvas.undecided & ~canvas.frozen & (block == current[:, None])
        # Candidates stand first, then what may be edited, in slot order; further columns of a row are never used.
        index = shown.argsort(dim=1, descending=True, stable=True)[:, : draw.width]
        shown, candidates = shown.gather(1, index), open_slots.gather(1, index)
        # Unused columns may be slots that this pass does not compute: the row's first slot is read in their place.
        read = torch.where(shown > 0, index, index[:, :1])
        logits, cost, drift = self.reader.read(canvas, rows, whole, read, candidates)
        masks = canvas.valid & (canvas.tokens == self.reader.backbone.mask_id)
        turn = Turn.of(rows, draw, masks, scheduled=self.scheduled)
        proposal = self.propose(logits, canvas, index, candidates, turn)
        commit = candidates & self.selector.select(proposal, candidates, turn)
        if self.published:
            commit &= proposal.tokens != self.reader.backbone.mask_id
        if self.editor is None:
            canvas.write(index, commit, proposal.tokens, number)
            return Done(commit.sum(1), None, cost, drift)
        decided = shown == 1
        slots = canvas.tokens.shape[1]
        edit = self.editor.edit(proposal, canvas.tokens.gather(1, index), candidates, decided, commit, slots)
        canvas.write(index, edit.write, proposal.tokens, number)
        canvas.reopen(index, edit.reopen, self.reader.backbone.mask_id)
        taken = (edit.write & candidates).sum(1) - edit.reopen.sum(1)
        return Done(taken, ((edit.write & decided) | edit.reopen).any(1), cost, drift)

    def width(self, rows: list[Row]) -> int:
        """Slots that a pass has to look at, the same number in each row."""
        return max(r.left if self.editor is None else r.blocks[0].slots for r in rows)

    def propose(
        self, logits: Tensor, canvas: Canvas, index: Int[Tensor, "B q"], candidates: Bool[Tensor, "B q"], turn: Turn
    ) -> Proposal:
        """Choose a token for every slot of ``index``; the logits are worked on in place."""
        offset = self.reader.backbone.offset
        logits = restrict_range(logits.to(self.sampler.dtype), canvas, index, offset)
        self.constraint.restrict(logits, offset)
        if hasattr(self.selector, "transform"):
            self.selector.transform(logits, index, candidates, turn)
        # The mask class counts in the confidence, as published, but is never chosen: it would never be decided.
        drawable = self.published or getattr(self.sampler, "draws_mask", False)
        hidden = () if drawable else (self.reader.backbone.mask_id,)
        with without(logits, hidden, offset):
            classes = self.sampler.choose(logits, turn.draw)
        self.constraint.rescore(logits, offset)
        return Proposal(classes + offset, classes, logits, index)


def _rows(
    backbone: Backbone, model: Any, prompt: Any, length: int | None, canvas: Canvas | None, published: bool
) -> Canvas:
    """The rows to work on, a copy; in the published loop every mask id is open, wherever it stands."""
    rows = _laid_out(backbone, model, prompt, length, canvas)
    if not published:
        return rows
    masks = (rows.tokens == backbone.mask_id) & rows.valid
    return dataclasses.replace(rows, undecided=masks, frozen=~masks, droppable=rows.droppable & ~masks)


def _laid_out(backbone: Backbone, model: Any, prompt: Any, length: int | None, canvas: Canvas | None) -> Canvas:
    if (canvas is None) == (prompt is None) or (length is None) == (canvas is None):
        raise ConfigError("give either canvas, or prompt and length")
    if canvas is not None:
        return canvas.copy()
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


def _refuse_for_values(**parts: Any) -> None:
    """Parts that need ids, probabilities or stored keys and values, which continuous tokens do not have."""
    given = sorted(name for name, part in parts.items() if part is not None and not isinstance(part, Whole))
    if given:
        raise ConfigError(f"continuous tokens are decoded without {', '.join(given)}")


def _of_ids(sampler: Sampler | TokenSolver | None) -> Sampler:
    if isinstance(sampler, TokenSolver):
        raise ConfigError(f"{type(sampler).__name__} draws continuous tokens; a network over ids needs a sampler")
    return sampler or Greedy()


def _sources(generators: Sources | None, rows: int, *, joint: bool) -> Sources | None:
    """One source per row, or one tape for all; ``joint`` selectors take one generator for all rows."""
    if generators is None or isinstance(generators, rng.Tape) or (joint and isinstance(generators, torch.Generator)):
        return generators
    if joint:
        raise ConfigError("this selector draws for all rows together: give one generator, not one per row")
    if isinstance(generators, torch.Generator):
        generators = [generators]
    if len(generators) != rows:
        raise ConfigError(f"{len(generators)} generators for {rows} rows; give one per row")
    return generators


def _pick(sources: Any, rows: list[int]) -> Any:
    return [sources[r] for r in rows] if isinstance(sources, Sequence) else sources


def _tensor(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values).to(device, non_blocking=True)
