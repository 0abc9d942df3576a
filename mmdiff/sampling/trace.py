"""What a run cost and what it decided when: the record that benchmarks and tests read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmdiff.sampling.canvas import Canvas

__all__ = ["Account", "Decoded", "Step", "Trace"]


@dataclass(frozen=True)
class Trace:
    """The cost of a run.

    Attributes:
        nfe: Forward passes of the network.
        row_passes: Rows summed over passes; a guided row counts twice.
        query_slots: Slots through the head, summed over passes and rows.
        row_nfe: Passes in which each of the B rows took part.
        committed: Int64 [nfe, B]; slots that each pass decided in each row.
        order: Int32 [B, T]; number of the pass that wrote a slot, -1 where none did.
    """

    nfe: int
    row_passes: int
    query_slots: int
    row_nfe: tuple[int, ...]
    committed: Int[Tensor, "S B"]
    order: Int[Tensor, "B T"]


@dataclass(frozen=True)
class Decoded:
    """The result of `mmdiff.sampling.decode`.

    Attributes:
        tokens: Int64 [B, G]; the slots after the prompt.
        canvas: The final canvas.
        trace: What it cost.
    """

    tokens: Int[Tensor, "B G"]
    canvas: Canvas
    trace: Trace


@dataclass(frozen=True)
class Step:
    """The state after one pass.

    Attributes:
        number: The pass, from 0.
        canvas: All B rows; to be read only.
        total: Passes of the whole run if the schedule alone fixes them, else None.
    """

    number: int
    canvas: Canvas
    total: int | None


class Account:
    """Collects a `Trace` without waiting for the device.

    Args:
        canvas: All rows, before the first pass.
    """

    def __init__(self, canvas: Canvas) -> None:
        self.nfe = 0
        self._row_passes = self._query_slots = 0
        self._row_nfe = [0] * len(canvas)
        self._committed: list[Tensor] = []

    def book(self, rows: list[int], place: Int[Tensor, "b"], taken: Int[Tensor, "b"], q: int, branches: int) -> None:
        """Book one pass over ``rows`` (also given as a tensor) of q slots each, which decided ``taken`` slots."""
        self.nfe += 1
        self._row_passes += len(rows) * branches
        self._query_slots += len(rows) * branches * q
        for row in rows:
            self._row_nfe[row] += 1
        self._committed.append(torch.zeros(len(self._row_nfe), dtype=torch.long, device=taken.device))
        self._committed[-1][place] = taken

    def close(self, canvas: Canvas) -> Trace:
        """The finished record."""
        empty = torch.zeros(0, len(self._row_nfe), dtype=torch.long, device=canvas.tokens.device)
        return Trace(
            nfe=self.nfe,
            row_passes=self._row_passes,
            query_slots=self._query_slots,
            row_nfe=tuple(self._row_nfe),
            committed=torch.stack(self._committed) if self._committed else empty,
            order=canvas.order,
        )
