"""Sequence packing: short samples side by side in one row instead of padding.

Which samples share a row is decided here; what the network computes for a packed row is `mmdiff.batch.Packing`'s:
samples of a row do not see each other, and positions start again at each of them, so hidden states and losses are those
of the samples by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmdiff.batch import Batch, PackedRows, Packing
from mmdiff.errors import ConfigError

__all__ = ["PackedRows", "Packing", "TokenBudget", "first_fit", "pack"]


def pack(batch: Batch, capacity: int) -> Batch:
    """The batch with a packing of its rows.

    Args:
        batch: Rows whose real slots come before their padding.
        capacity: Slots of a packed row; a longer sample has a row of its own.

    Raises:
        ConfigError: A capacity below 1.
    """
    lengths = batch.valid.sum(1).tolist()
    return replace(batch, packing=Packing(first_fit(lengths, capacity), tuple(lengths)))


def first_fit(lengths: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of the samples in each row: the longest first, each into the first row with room.

    Args:
        lengths: Slots of each sample.
        capacity: Slots of a row.

    Raises:
        ConfigError: A capacity below 1.

    Source: first-fit decreasing (D. S. Johnson, 1973): at most 11/9 of the fewest rows and one more.

    >>> first_fit([3, 5, 2, 4], 7)
    ((1, 2), (3, 0))
    """
    if capacity < 1:
        raise ConfigError(f"packed rows of {capacity} slots; at least 1")
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            rows.append([i])
            room.append(capacity - lengths[i])
        else:
            rows[row].append(i)
            room[row] -= lengths[i]
    return tuple(tuple(row) for row in rows)


@dataclass(frozen=True)
class TokenBudget:
    """How many samples a global batch holds: as many as fit.

    Attributes:
        tokens: Slots of a global batch.
        multiple: The number of samples is a multiple of this, and at least this, so that ranks can share them.
        most: Most samples.
        packed: Whether padding is free; otherwise every row counts as long as the longest.
    """

    tokens: int
    multiple: int
    most: int
    packed: bool

    def fits(self, samples: int, total: int, longest: int) -> bool:
        """Whether a batch of so many samples, slots, and slots of the longest sample is within the budget."""
        return samples <= self.most and (total if self.packed else samples * longest) <= self.tokens

    def whole(self, samples: int) -> int:
        """The largest multiple that is not above ``samples``, at least one."""
        return max(samples - samples % self.multiple, self.multiple)
