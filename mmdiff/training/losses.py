"""What an objective returns, and how losses of positions become those of rows and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmdiff.batch import Batch

__all__ = ["Losses", "count_rows", "row_sum"]


@dataclass(frozen=True)
class Losses:
    """Loss of one batch, or of a part of one.

    A batch may lie on several processes or be cut into parts. Then `total` is not what is learnt, because it divides by
    what the part alone has: the loop divides `sums` by the number of summands in all parts.

    Attributes:
        total: Scalar to differentiate.
        terms: Per task (sum of losses, number of summands), for the log; detached.
        sums: What `total` is made of: name -> sum, to be divided by the number of its summands, which the objective's
            ``counts`` tells beforehand under the same name. For an objective without ``counts`` `total` is a mean over
            rows.
    """

    total: Tensor
    terms: dict[str, tuple[Tensor, int]]
    sums: Mapping[str, Tensor] = field(default_factory=dict)


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
