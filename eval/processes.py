"""Several processes, one measurement: who does which part, and how their sums come together.

Started by torchrun or accelerate, every process takes every ``world``-th item. Results are merged in the order of the
ranks, so they do not depend on which process was fast.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from .rows import Rows
from .statistics import Moments

__all__ = ["barrier", "gather_rows", "joined", "merge_moments", "merge_objects", "rank_and_world"]


@contextlib.contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Rank and number of processes; several are joined for the length of the block, unless they already are."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or torch.distributed.is_initialized():
        yield rank_and_world()
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield rank_and_world()
    finally:
        torch.distributed.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait for all processes."""
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()


def merge_objects(mine: Any) -> list[Any]:
    """What each process hands in, in the order of the ranks, in every process. Plain data only."""
    world = rank_and_world()[1]
    if world == 1:
        return [mine]
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, mine)
    return found


def merge_moments(moments: Moments) -> Moments:
    """Moments of everything that all processes have seen, equal bit by bit in every process."""
    world = rank_and_world()[1]
    if world == 1:
        return moments
    dim = len(moments.mean)
    flat = torch.cat([torch.tensor([moments.count]).double(), moments.mean, moments.scatter.reshape(-1)])
    parts = [torch.empty_like(flat) for _ in range(world)]
    torch.distributed.all_gather(parts, flat)
    total = Moments(dim)
    for part in parts:
        one = Moments(dim)
        one.count, one.mean, one.scatter = int(part[0]), part[1 : 1 + dim], part[1 + dim :].reshape(dim, dim)
        total.merge(one)
    return total


def gather_rows(rows: Rows, out: Rows | None, size: int) -> None:
    """Bring the rows of all processes to the first one: batch k of rank r becomes batch ``r + world * k`` of ``out``.

    Args:
        rows: This process's rows, float32: its batches one after the other.
        out: In the first process, where to; None elsewhere.
        size: Rows of a batch.
    """
    rank, world = rank_and_world()
    most = max(merge_objects(len(rows)))
    for start in range(0, most, size):
        block = torch.zeros(size, rows.shape[1])
        mine = rows[start : start + size]
        block[: len(mine)] = mine
        parts = [torch.empty_like(block) for _ in range(world)] if rank == 0 else None
        torch.distributed.gather(block, parts, dst=0)
        if parts is not None and out is not None:
            first = start * world
            together = torch.cat(parts)[: len(out) - first]
            out[first : first + len(together)] = together
