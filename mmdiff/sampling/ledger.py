"""The books of a run: per row, how much of which block is left and what its turn is. Plain numbers on the host.

With a selector that only counts, everything here is known beforehand and the loop never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.sampling.canvas import Canvas
from mmdiff.sampling.schedules import Independent, Schedule, share_steps

__all__ = ["Ledger", "Row"]


@dataclass
class _Block:
    """One block of a row: its number, its slots, the masks among them, and the counts of its passes.

    Without a schedule the one count is the number of masks.
    """

    number: int
    slots: int
    masks: int
    counts: list[int]


@dataclass
class Row:
    """One row that is not complete.

    Attributes:
        number: The row's place in the batch.
        left: Masks that may be decided now.
        step: Passes done in the current block.
        passes: Passes done in all.
        mended: Passes done in the current block that began without masks.
    """

    number: int
    blocks: list[_Block]
    left: int
    step: int = 0
    passes: int = 0
    mended: int = 0

    @property
    def block(self) -> int:
        """Number of the current block."""
        return self.blocks[0].number

    @property
    def quota(self) -> int:
        """Slots to decide in the next pass."""
        return min(self.blocks[0].counts[min(self.step, self.steps - 1)], self.left)

    @property
    def steps(self) -> int:
        """Passes the schedule has for the current block."""
        return len(self.blocks[0].counts)

    def advance(self) -> None:
        """Start the next block."""
        self.blocks, self.step, self.mended = self.blocks[1:], 0, 0
        self.left += self.blocks[0].masks if self.blocks else 0


@dataclass
class Ledger:
    """All rows that are not complete.

    Attributes:
        rows: These, in batch order.
        scheduled: Whether there is a schedule.
        by_steps: Whether a block ends with its last scheduled pass, masks left or not (published behaviour).
        by_masks: Whether a block ends with its last mask.
        total: Passes of the whole run if the schedule alone decides, else None.
    """

    rows: list[Row] = field(default_factory=list)
    scheduled: bool = False
    by_steps: bool = False
    by_masks: bool = True
    total: int | None = None

    @classmethod
    def open(
        cls,
        canvas: Canvas,
        numbers: Int[Tensor, "B T"],
        schedule: Schedule | None,
        *,
        counted: bool,
        sources: rng.Source | None = None,
    ) -> Ledger:
        """Count the masks of every block (the one place that always waits for the device)."""
        rows = []
        for number, (before, *sizes) in enumerate(_table(canvas, numbers)):
            masks = {k: n for k, n in enumerate(sizes) if n}
            if masks:
                source = sources[number] if isinstance(sources, Sequence) else sources
                counts = _counts(list(masks.values()), schedule, source)
                blocks = [_Block(k, n, n, c) for (k, n), c in zip(masks.items(), counts, strict=True)]
                rows.append(Row(number, blocks, left=before + blocks[0].masks))
        total = max((sum(len(b.counts) for b in r.blocks) for r in rows), default=0) if counted else None
        published = getattr(schedule, "published", False)
        return cls(rows, schedule is not None, published, not (published and getattr(schedule, "idle", False)), total)

    @property
    def numbers(self) -> list[int]:
        """Places of the rows in the batch."""
        return [r.number for r in self.rows]

    @property
    def in_step(self) -> bool:
        """Whether all rows have the same passes before them."""
        return all([b.counts for b in r.blocks] == [b.counts for b in self.rows[0].blocks] for r in self.rows)

    def book(self, row: Row, taken: int, *, mending: bool, patience: int) -> bool:
        """Book a pass of a row; returns whether it finished the row's block.

        Args:
            row: The row.
            taken: Slots decided, less those opened again.
            mending: Whether a slot that had been decided was changed.
            patience: Passes without masks that a block may take; it ends after the first of them that mends nothing.
        """
        row.mended += row.left == 0
        row.left -= taken
        row.step += 1
        row.passes += 1
        settled = (row.mended > 0 and not mending) or row.mended > patience or not patience
        whole = row.left == 0 and settled
        finished = (self.by_masks and whole) or (self.by_steps and row.step >= row.steps)
        if finished:
            row.advance()
        return finished

    def recount(self, canvas: Canvas, numbers: Int[Tensor, "B T"]) -> None:
        """Read off the canvas what is left, after slots were closed by something else than a selector."""
        table = _table(canvas, numbers)
        for row in self.rows:
            masks = table[row.number]
            for block in row.blocks:
                block.masks = masks[block.number + 1]
            current = row.block if row.blocks else len(masks)
            row.blocks = [b for b in row.blocks if b.masks or (b.number == current and row.step and not row.left)]
            if row.blocks and row.block != current:
                row.step = 0
            row.left = sum(masks[: row.block + 2]) if row.blocks else 0

    def close(self) -> bool:
        """Drop rows that are complete; returns whether any was."""
        kept = [r for r in self.rows if r.blocks]
        changed = len(kept) != len(self.rows)
        self.rows = kept
        return changed


def _table(canvas: Canvas, numbers: Int[Tensor, "B T"]) -> list[list[int]]:
    """Per row, the masks of no block and of blocks 0, 1, 2, ..."""
    table = torch.zeros(len(canvas), int(numbers.max()) + 2, dtype=torch.long, device=numbers.device)
    return table.scatter_add_(1, numbers + 1, canvas.undecided.long()).tolist()


def _counts(masks: Sequence[int], schedule: Schedule | None, source: rng.Source | None) -> list[list[int]]:
    if schedule is None:
        return [[n] for n in masks]
    if isinstance(schedule, Independent):
        if len(masks) > 1:
            raise ConfigError("counts of chance are drawn for the whole canvas: leave blocks at their default")
        return [schedule.counts(masks[0], schedule.steps, source)]
    shares = masks if schedule.steps is None else share_steps(schedule.steps, len(masks))
    return [schedule.counts(n, s) for n, s in zip(masks, shares, strict=True)]
