"""How much work a step is, and how fast the device could do it: what "share of the peak" (MFU) is made of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmdiff.batch import Batch

__all__ = ["Throughput", "peak_flops", "work_of"]

_ATEN: Any = torch.ops.aten
_SAME = {
    "_scaled_dot_product_flash_attention_for_cpu": _ATEN._scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _ATEN._scaled_dot_product_flash_attention_backward,
}
"""Attention on a CPU, which PyTorch's own table leaves out -> what costs the same."""
_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    **{getattr(_ATEN, name): flop_registry[same] for name, same in _SAME.items() if hasattr(_ATEN, name)},
}
_FORWARD_PASSES = 3
"""A step is about this many: the backward pass multiplies twice for each product of the forward pass."""


class Throughput:
    """Counts the operations of one part of a batch, and turns speeds into a share of the peak.

    The part is watched while it is trained on, so nothing is computed that would not be.

    Args:
        device: Where the training is.
        dtype: Dtype of most matrix products.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._counter = _Counter()
        self._peak: float | None = None
        self.per_slot: float | None = None
        """Operations for each slot that the network runs over; None before they were counted."""

    @contextmanager
    def counted(self, part: Batch, *, forward_only: bool = False) -> Iterator[None]:
        """Around the passes of a part; only the first one is looked at.

        Args:
            part: What the passes are of.
            forward_only: There is no backward pass, so that two more forward passes are taken for it.
        """
        if self.per_slot is not None:
            yield
            return
        with self._counter:
            yield
        work = self._counter.total * (_FORWARD_PASSES if forward_only else 1)
        self.per_slot = work / work_of(part)["slots"]

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around what is computed a second time only to save memory: it is no progress."""
        before, self._counter.on = self._counter.on, False
        try:
            yield
        finally:
            self._counter.on = before

    def mfu(self, slots_per_second: float) -> float | None:
        """Share of the device's measured peak; None if there is nothing that counts."""
        if not self.per_slot:
            return None
        if self._peak is None:
            self._peak = peak_flops(self._device, self._dtype)
        return round(self.per_slot * slots_per_second / self._peak, 4)


def work_of(batch: Batch) -> dict[str, float]:
    """``tokens`` (real slots of a sequence, or codes), ``images``, and ``slots`` that a network runs over."""
    images = sum(len(row) for row in batch.images) if batch.images else 0
    images = max(images, *(len(x) for x in (batch.pixels, batch.latents) if x is not None), 0)
    tokens = float(batch.valid.sum())
    slots = float(len(batch) * max(batch.ids.shape[1], 1))
    if batch.packing is not None:
        slots = tokens / batch.packing.share
    elif not tokens and batch.latents is not None and not batch.latents.is_floating_point():
        tokens = float(batch.latents.numel())
    return {"tokens": tokens, "images": float(images), "slots": slots}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on a device, measured: the most that a step could reach.

    On a CPU with the threads that PyTorch uses now; takes some hundredths of a second.
    """
    sizes = (4096, 8192) if device.type == "cuda" else (256, 512)
    # Numbers of many bits: with equal ones a GPU draws less power and runs faster than it ever will in training.
    return max(_speed(torch.linspace(-1, 1, n * n, device=device, dtype=dtype).view(n, n)) for n in sizes)


class _Counter(TorchDispatchMode):
    """Adds up operations of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.on = 0, True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket) if self.on else None
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def _speed(square: Tensor) -> float:
    best = float("inf")
    for _ in range(4):
        _wait(square.device)
        started = time.perf_counter()
        torch.mm(square, square)
        _wait(square.device)
        best = min(best, time.perf_counter() - started)
    return 2 * len(square) ** 3 / best


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps", "xpu"):
        torch.accelerator.synchronize(device)
