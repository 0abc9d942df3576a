"""Feature vectors that need not fit in memory: float32 rows in a temporary file, indexed as a tensor is.

Measures over pairs of images read them block by block, so what they hold at once does not grow with the number of
images: a few blocks of `BLOCK` rows in float64 and their products, and some numbers per image.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["BLOCK", "RowFile", "Rows", "blocks", "feature_store", "picked"]

BLOCK = 1024
"""Rows that are held in float64 at once."""
_MEMORY_BYTES = 64 << 20
"""Features above this size go to a temporary file."""


class RowFile:
    """Float32 rows in a file that goes away with this object; only what is indexed is read.

    The file is read and not mapped: mapped pages would count as this process's memory.

    Args:
        count: N, number of rows.
        dim: F, length of a row.

    Raises:
        ConfigError: There is no room for the file.
    """

    ndim = 2

    def __init__(self, count: int, dim: int) -> None:
        self.shape = (count, dim)
        with self._refusing():
            self._file = tempfile.TemporaryFile(buffering=0)
            weakref.finalize(self, self._file.close)
            self._file.truncate(4 * count * dim)

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, place: slice, rows: Float[Tensor, "n F"]) -> None:
        start, stop, _ = place.indices(len(self))
        if rows.shape != (stop - start, self.shape[1]):
            raise ValueError(f"rows of shape {tuple(rows.shape)} for places {start} to {stop} of {self.shape}")
        with self._refusing():
            self._file.seek(4 * start * self.shape[1])
            self._file.write(rows.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())

    def __getitem__(self, place: slice | Int[Tensor, "n"]) -> Float[Tensor, "n F"]:
        if isinstance(place, slice):
            start, stop, _ = place.indices(len(self))
            return self._read(start, max(0, stop - start))
        return torch.cat([self._read(i, 1) for i in place.tolist()])

    def _read(self, start: int, count: int) -> Float[Tensor, "n F"]:
        self._file.seek(4 * start * self.shape[1])
        data = bytearray(self._file.read(4 * count * self.shape[1]))
        return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(count, self.shape[1]))

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            size, folder = 4 * self.shape[0] * self.shape[1], tempfile.gettempdir()
            raise ConfigError(f"no room for {size:,} bytes of features in {folder} ({error})") from None


Rows = Tensor | RowFile
"""Features [N, F]; what is read of a `RowFile` is a tensor."""


def feature_store(count: int, dim: int) -> Rows:
    """Room for features, float32 [count, dim]: memory, or above a limit a file.

    Raises:
        ConfigError: There is no room for the file.
    """
    return torch.empty(count, dim) if 4 * count * dim <= _MEMORY_BYTES else RowFile(count, dim)


def blocks(rows: Rows, size: int = BLOCK) -> Iterator[tuple[int, Float[Tensor, "n F"]]]:
    """Number of the first row and the rows, float64, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size].double()


def picked(rows: Rows, order: Int[Tensor, "n"]) -> Rows:
    """The rows in another order, or some of them, kept as `feature_store` keeps them."""
    out = feature_store(len(order), rows.shape[1])
    for start in range(0, len(order), BLOCK):
        out[start : start + BLOCK] = rows[order[start : start + BLOCK]]
    return out
