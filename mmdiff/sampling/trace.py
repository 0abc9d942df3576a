"""What a run cost and what it decided when: the record that benchmarks and tests read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.sampling.canvas import Canvas

__all__ = ["Account", "Decoded", "Done", "Drift", "Pass", "Step", "Trace"]


@dataclass(frozen=True)
class Pass:
    """The cost of one forward pass.

    Attributes:
        rows: Rows; a guided row counts once per branch.
        computed: Slots per row that went through the network.
        slots: Slots per row that could be attended.
        read: Slots per row that went through the head.
    """

    rows: int
    computed: int
    slots: int
    read: int


@dataclass(frozen=True)
class Drift:
    """How far the logits of a cached pass are from those of a full pass on the same canvas.

    Attributes:
        largest: Scalar; largest difference over the open slots and all classes.
        mean: Scalar; mean difference.
        flips: Scalar; share of open slots whose most probable class differs.
    """

    largest: Float[Tensor, ""]
    mean: Float[Tensor, ""]
    flips: Float[Tensor, ""]

    @classmethod
    def between(cls, cached: Float[Tensor, "B q V"], full: Float[Tensor, "B q V"], open_: Bool[Tensor, "B q"]) -> Drift:
        """Compare at the slots ``open_``."""
        a, b = cached[open_].float(), full[open_].float()
        return cls((a - b).abs().max(), (a - b).abs().mean(), (a.argmax(-1) != b.argmax(-1)).float().mean())


@dataclass(frozen=True)
class Done:
    """What a pass did.

    Attributes:
        taken: Slots it decided per row, less those it opened again.
        changed: Whether it changed any slot that was decided before; None without an editor.
        cost: What it cost.
        drift: The drift, if watched.
    """

    taken: Int[Tensor, "B"]
    changed: Bool[Tensor, "B"] | None
    cost: Pass
    drift: Drift | None


@dataclass(frozen=True)
class Trace:
    """The cost of a run.

    Attributes:
        passes: Every forward pass of the network.
        row_nfe: Passes in which each of the B rows took part.
        committed: Int64 [nfe, B]; slots that each pass decided in each row.
        order: Int32 [B, T]; number of the pass that wrote a slot, -1 where none did.
        drift: By number of the pass, if the cache policy watches it.
    """

    passes: tuple[Pass, ...]
    row_nfe: tuple[int, ...]
    committed: Int[Tensor, "S B"]
    order: Int[Tensor, "B T"]
    drift: dict[int, Drift]

    @property
    def nfe(self) -> int:
        """Forward passes of the network."""
        return len(self.passes)

    @property
    def row_passes(self) -> int:
        """Rows summed over passes."""
        return sum(p.rows for p in self.passes)

    @property
    def query_slots(self) -> int:
        """Slots through the network, summed over passes and rows."""
        return sum(p.rows * p.computed for p in self.passes)

    @property
    def head_slots(self) -> int:
        """Slots through the head, summed over passes and rows."""
        return sum(p.rows * p.read for p in self.passes)


@dataclass(frozen=True)
class Decoded:
    """The result of `mmdiff.sampling.decode`.

    Attributes:
        tokens: Int64 [B, G]; the slots after the prompt.
        canvas: The final canvas.
        trace: What it cost.
        values: Float [B, G, C]; the same slots of a canvas of continuous tokens.
    """

    tokens: Int[Tensor, "B G"]
    canvas: Canvas
    trace: Trace
    values: Float[Tensor, "B G C"] | None = None


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
        self._passes: list[Pass] = []
        self._row_nfe = [0] * len(canvas)
        self._committed: list[Tensor] = []
        self._drift: dict[int, Drift] = {}

    @property
    def nfe(self) -> int:
        """Passes so far."""
        return len(self._passes)

    def book(
        self, rows: list[int], place: Int[Tensor, "b"], taken: Int[Tensor, "b"], cost: Pass, drift: Drift | None
    ) -> None:
        """Book one pass over ``rows`` (also given as a tensor), which decided ``taken`` slots."""
        if drift is not None:
            self._drift[self.nfe] = drift
        self._passes.append(cost)
        for row in rows:
            self._row_nfe[row] += 1
        self._committed.append(torch.zeros(len(self._row_nfe), dtype=torch.long, device=taken.device))
        self._committed[-1][place] = taken

    def close(self, canvas: Canvas) -> Trace:
        """The finished record."""
        empty = torch.zeros(0, len(self._row_nfe), dtype=torch.long, device=canvas.tokens.device)
        return Trace(
            passes=tuple(self._passes),
            row_nfe=tuple(self._row_nfe),
            committed=torch.stack(self._committed) if self._committed else empty,
            order=canvas.order,
            drift=self._drift,
        )
