"""What an objective returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Losses"]


@dataclass(frozen=True)
class Losses:
    """Loss of one batch.

    Attributes:
        total: Scalar to differentiate.
        terms: Per task (sum of losses, number of summands), for the log; detached.
    """

    total: Tensor
    terms: dict[str, tuple[Tensor, int]]
