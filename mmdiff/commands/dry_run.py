"""``mmdiff train --dry-run``: what a run would take, from its shapes and, where there is room, from one real batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdiff.commands.recipe import RunConfig
    from mmdiff.training.memory import Estimate

__all__ = ["estimate", "free_memory", "skeleton"]


def estimate(
    spec: RunConfig, device: str, loader: Callable[[Any], Any], objective: Any, build: Callable[[], Any]
) -> Estimate:
    """Memory of a run.

    The network is built on the meta device and one part of the first batch passes through it: nothing of its size is
    allocated. If twice the result is free on ``device``, the network is then built there and the batch really run.

    Args:
        spec: The recipe.
        device: Where the run will be.
        loader: Makes a loader for a model; its batches are the parts into which the run cuts its own.
        objective: What is learnt.
        build: Makes the network with its weights.
    """
    from mmdiff.io.quantize import quantized_nbytes
    from mmdiff.training.memory import estimate as measure

    model = skeleton(spec)
    batch, train = loader(model).batch_at(0), dataclasses.replace(spec.train, accumulate=1)
    weights = None if spec.quantize is None else quantized_nbytes(model, spec.quantize)
    planned = measure(model, objective, batch, train, weights=weights)
    if 2 * planned.total > free_memory(device):
        return planned
    return measure(build(), objective, batch, train, device)


def skeleton(spec: RunConfig) -> Any:
    """The network of a recipe on the meta device; of ``init_from`` nothing but config.json is read.

    Dtypes are ``spec.dtype``, else what new weights have, or what the files of ``init_from`` say.
    """
    import torch

    from mmdiff.io.hub import resolve
    from mmdiff.models import registry

    shape: Any = spec.model
    if spec.init_from is not None:
        shape = registry.identify(resolve(spec.init_from, weights=False)).config
    model = registry.build(shape, device="meta")
    dtype = getattr(torch, spec.dtype) if spec.dtype is not None else _stored_dtype(spec)
    return model.to(dtype) if dtype is not None else model


def free_memory(device: str) -> int:
    """Bytes that could be allocated on a device now."""
    import torch

    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    for line in Path("/proc/meminfo").read_text("ascii").splitlines() if Path("/proc/meminfo").is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def _stored_dtype(spec: RunConfig) -> Any:
    """Dtype of the largest tensor among the weights of ``init_from``; None if there are no weights to look at."""
    from mmdiff.errors import CheckpointError
    from mmdiff.io.checkpoint import read_tensors
    from mmdiff.io.hub import resolve

    if spec.init_from is None:
        return None
    try:
        info = read_tensors(resolve(spec.init_from, weights=False)).info
    except CheckpointError:
        return None  # a folder with config.json alone is enough for shapes
    largest = max(info.values(), key=lambda i: i.nbytes, default=None)
    return None if largest is None else largest.dtype
