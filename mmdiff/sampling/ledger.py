"""The books of a run: per row, how much of which block is left and what its turn is. Plain numbers on the host.

With a selector that only counts, everything here is known beforehand and the loop never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from mmdiff.sampling.canvas import Canvas
from mmdiff.sampling.schedules import Schedule, share_steps

__all__ = ["Ledger", "Row"]


@dataclass
class Row:
    """One row that is not complete.

    Attributes:
        number: The row's place in the batch.
        blocks: Per block that holds masks, the counts of its passes (without a schedule: its masks).
        masks: Per block, its masks.
        left: Masks left in the current block.
        step: Passes done in the current block.
        passes: Passes done in all.
    """

    number: int
    blocks: list[list[int]]
    masks: list[int]
    left: int = 0
    step: int = 0
    passes: int = 0

    @property
    def quota(self) -> int:
        """Slots to decide in the next pass."""
        return self.blocks[0][min(self.step, self.steps - 1)]

    @property
    def steps(self) -> int:
        """Passes the schedule has for the current block."""
        return len(self.blocks[0])


@dataclass
class Ledger:
    """All rows that are not complete.

    Attributes:
        rows: These, in batch order.
        scheduled: Whether there is a schedule.
        total: Passes of the whole run if the schedule alone decides, else None.
    """

    rows: list[Row] = field(default_factory=list)
    scheduled: bool = False
    total: int | None = None

    @classmethod
    def open(cls, canvas: Canvas, numbers: Int[Tensor, "B T"], schedule: Schedule | None, *, counted: bool) -> Ledger:
        """Count the masks of every block (the one place that always waits for the device)."""
        most = int(numbers.max()) + 1
        table = torch.zeros(len(canvas), most, dtype=torch.long, device=numbers.device)
        table.scatter_add_(1, numbers.clamp(min=0), canvas.undecided.long())
        rows = []
        for number, sizes in enumerate(table.tolist()):
            masks = [n for n in sizes if n]
            if masks:
                rows.append(Row(number, _counts(masks, schedule), masks, left=masks[0]))
        total = max((sum(map(len, r.blocks)) for r in rows), default=0) if counted else None
        return cls(rows, schedule is not None, total)

    @property
    def numbers(self) -> list[int]:
        """Places of the rows in the batch."""
        return [r.number for r in self.rows]

    @property
    def left(self) -> list[int]:
        """Masks left in each row's current block."""
        return [r.left for r in self.rows]

    @property
    def quotas(self) -> list[int]:
        """Slots each row decides in the next pass (without a schedule: all that are left)."""
        return [min(r.quota, r.left) for r in self.rows]

    @property
    def step(self) -> list[int]:
        """Passes each row has done in its block."""
        return [r.step for r in self.rows]

    @property
    def steps(self) -> list[int]:
        """Passes the schedule has for each row's block."""
        return [r.steps if self.scheduled else r.step + 1 for r in self.rows]

    def advance(self, taken: Sequence[int]) -> list[bool]:
        """Book a pass; returns which rows have finished their block in it."""
        finished = []
        for row, n in zip(self.rows, taken, strict=True):
            row.left -= n
            row.step += 1
            row.passes += 1
            finished.append(row.left == 0)
            if row.left == 0:
                row.blocks, row.masks, row.step = row.blocks[1:], row.masks[1:], 0
                row.left = row.masks[0] if row.masks else 0
        return finished

    def close(self, ended: Sequence[bool]) -> bool:
        """Drop rows that are complete or ``ended``; returns whether any was."""
        kept = [r for r, end in zip(self.rows, ended, strict=True) if r.left and not end]
        changed = len(kept) != len(self.rows)
        self.rows = kept
        return changed


def _counts(masks: list[int], schedule: Schedule | None) -> list[list[int]]:
    if schedule is None:
        return [[n] for n in masks]
    shares = masks if schedule.steps is None else share_steps(schedule.steps, len(masks))
    return [schedule.counts(n, s) for n, s in zip(masks, shares, strict=True)]
