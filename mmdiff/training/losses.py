"""What an objective returns, and how losses of positions become those of rows and tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmdiff.batch import Batch

__all__ = ["Losses", "count_rows", "row_sum"]


@dataclass(frozen=True)
class Losses:
    """Loss of one batch.

    Attributes:
        total: Scalar to differentiate.
        terms: Per task (sum of losses, number of summands), for the log; detached.
    """

    total: Tensor
    terms: dict[str, tuple[Tensor, int]]


def row_sum(values: Float[Tensor, "n"], where: Bool[Tensor, "B L"]) -> Float[Tensor, "B"]:
    """Sum values that stand at the True places of [B, L] into their rows."""
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values).sum(1)


def count_rows(
    terms: dict[str, tuple[Tensor, int]], batch: Batch, per_row: Float[Tensor, "B"], rows: Bool[Tensor, "B"]
) -> None:
    """Add the losses of ``rows`` to the terms of their tasks."""
    for task in dict.fromkeys(batch.tasks):
        mine = torch.tensor([t == task for t in batch.tasks], device=rows.device) & rows
        if bool(mine.any()):
            terms[task] = (per_row[mine].sum(), int(mine.sum()))
