"""PyTorch's own generators, from which layers such as dropout draw: started anew for every step, put back at the end.

All other draws of a run have generators of their own, from `mmdiff.rng`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["own_randomness", "seed_layers"]


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Layers such as dropout draw from PyTorch's own generators; whatever a run does to them is undone at its end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_layers(device: torch.device, seed: int) -> None:
    """Start PyTorch's own generators anew for a step, so that such layers resume too and probes cannot shift them."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
