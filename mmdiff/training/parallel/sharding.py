"""Tensors that are spread over processes: the whole of one, this process's part of one, and the norm of many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["gathered", "local", "norm", "spread_like", "whole"]


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; the tensor itself if it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process must call this. The tensor itself if it is not spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to every process, spread as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(like.to_local().device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors without their spread, on the CPU where they were spread; every process must call this.

    Args:
        tensors: By name, the same names everywhere.
        keep: False throws them away one by one and gives nothing.
    """
    out = {}
    for name, tensor in tensors.items():
        full = whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            out[name] = full
    return out


def norm(gradients: Iterable[Tensor]) -> tuple[Tensor, bool]:
    """Euclidean norm of this process's parts of all gradients, and whether any of them is only a part."""
    parts = list(gradients)
    spread = any(isinstance(g, DTensor) for g in parts)
    return torch.nn.utils.get_total_norm([local(g) for g in parts]), spread
