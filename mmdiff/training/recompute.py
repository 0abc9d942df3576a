"""Other ways to run a network's blocks: computed again in the backward pass (gradient checkpointing), or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["blocks", "compiling", "recomputing"]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every list of modules that holds none but one class: a network's blocks."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return [block for members in lists if len({type(m) for m in members}) == 1 for block in members]


@contextmanager
def recomputing(
    model: nn.Module, on: bool = True, *, again: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Within the block every block of ``model`` is computed twice and keeps nothing in between.

    Gradients are the same; a step takes about a third longer. Passes without gradients are left alone.

    Args:
        model: Any network whose blocks stand in a list.
        on: False changes nothing.
        again: Makes the context in which a block is computed the second time.

    Source: Chen et al. (arXiv 1604.06174).
    """
    with _replaced(blocks(model) if on else [], lambda forward: _twice(forward, again)):
        yield


@contextmanager
def compiling(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within the block every block of ``model`` is compiled: once for all blocks of a class and shape, on first use.

    Args:
        model: Any network whose blocks stand in a list.
        on: False changes nothing.
    """
    with _replaced(blocks(model) if on else [], torch.compile):
        yield


@contextmanager
def _replaced(members: list[nn.Module], change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    before = [vars(block).get("forward") for block in members]
    for block in members:
        # On the instance, so that names in the state dict stay.
        block.forward = change(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(members, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _twice(forward: Callable[..., Any], again: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), again()

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run
