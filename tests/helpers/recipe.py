"""Weights by the recipe of the fixtures that come without a weights file."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["tensor", "tensors"]


def tensor(key: str, shape: Iterable[int]) -> Tensor:
    """One tensor of a state dict, from its full key."""
    shape = tuple(shape)
    r = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if len(shape) >= 2:
        r = r / math.sqrt(math.prod(shape[1:]))
    else:
        r = 1 + 0.1 * r if key.endswith(".weight") else 0.1 * r
    return torch.from_numpy(r).float()


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A whole state dict."""
    return {key: tensor(key, shape) for key, shape in shapes.items()}
