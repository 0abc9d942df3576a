"""How much work a step is, and how fast the device could do it: what "share of the peak" (MFU) is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
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


class Throughput:
    """Counts the operations of the first part that a process runs, and turns speeds into a share of the peak.

    Args:
        device: Where the training is.
        dtype: Dtype of most matrix products.
        recomputes: Forward passes of blocks are run twice; the second time does not count.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, recomputes: bool) -> None:
        self._device, self._dtype, self._recomputes = device, dtype, recomputes
        self._per_slot: float | None = None
        self._peak: float | None = None

    @contextmanager
    def counted(self, part: Batch) -> Iterator[Callable[[], None]]:
        """Around forward and backward of a part; what it yields is to be called between the two."""
        if self._per_slot is not None:
            yield lambda: None
            return
        counter, forward = _Counter(), [0]
        # Compiled code is opaque to the counter, so this once it is not used.
        with torch.compiler.set_stance("force_eager"), counter:
            yield lambda: forward.__setitem__(0, counter.total)
        work = counter.total - (forward[0] if self._recomputes else 0)
        self._per_slot = work / work_of(part)["slots"]

    def mfu(self, slots_per_second: float) -> float | None:
        """Share of the device's measured peak; None if there is nothing that counts."""
        if not self._per_slot:
            return None
        if self._peak is None:
            self._peak = peak_flops(self._device, self._dtype)
        return round(self._per_slot * slots_per_second / self._peak, 4)


def work_of(batch: Batch) -> dict[str, float]:
    """``tokens`` (real slots of a sequence), ``images``, and ``slots`` that a network runs over, padding included."""
    images = sum(len(row) for row in batch.images) if batch.images else 0
    images = max(images, *(len(x) for x in (batch.pixels, batch.latents) if x is not None), 0)
    return {
        "tokens": float(batch.valid.sum()),
        "images": float(images),
        "slots": float(len(batch) * max(batch.ids.shape[1], 1)),
    }


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on a device, measured: the most that a step could reach.

    On a CPU with the threads that PyTorch uses now; takes some hundredths of a second.
    """
    sizes = (8192, 4096) if device.type == "cuda" else (512, 256)
    return max(_speed(torch.ones(n, n, device=device, dtype=dtype)) for n in sizes)


class _Counter(TorchDispatchMode):
    """Adds up operations of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
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
