"""Rows of all processes in one tensor, for losses that compare a row with every other one of the global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

__all__ = ["of_everyone"]


def of_everyone(rows: Float[Tensor, "B E"]) -> tuple[Float[Tensor, "M E"], int]:
    """The rows of all processes in the order of their ranks; gradients go back to the process that a row came from.

    Args:
        rows: As many on every process.

    Returns:
        All rows, and the number of this process's first one among them.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    return _Gather.apply(rows), dist.get_rank() * len(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.count
        return total[first : first + ctx.count]
