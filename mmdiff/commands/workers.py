"""What long commands share that several processes may run: device, stop, settings, batch size."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

__all__ = [
    "BatchSize",
    "differing",
    "digest",
    "local_device",
    "out_of_memory",
    "rank_and_world",
    "sigterm_as_interrupt",
]

_PARTS = (".json", ".safetensors", ".pth", ".pt", ".ckpt", ".bin")
"""Suffixes of files that decide what a checkpoint does."""
_FASTER = 1.05
"""A batch twice as large is kept if items per second grow by this factor."""


class BatchSize:
    """Items per pass: as many as asked for, or found out; fewer after memory ran out.

    Args:
        asked: Items per pass; None doubles from 1 for as long as that is faster.
        most: Largest number that is tried.
    """

    def __init__(self, asked: int | None = None, most: int = 256) -> None:
        self.size = asked or 1
        self._growing = asked is None
        self._most = most
        self._speed = 0.0

    def went_well(self, items: int, seconds: float) -> None:
        """A pass of ``items`` took so long; the next may be larger."""
        if not self._growing or items < self.size:
            return
        speed = items / max(seconds, 1e-9)
        if speed < _FASTER * self._speed:
            self._growing = False
            self.size = max(1, self.size // 2)
        elif self.size < self._most:
            self._speed = speed
            self.size *= 2

    def was_too_large(self, error: BaseException) -> None:
        """Memory ran out: half as many from now on.

        Raises:
            ConfigError: It ran out for a single item.
        """
        self._growing = False
        if self.size == 1:
            raise ConfigError(
                "memory ran out for a single item; lower gen_length, take --dtype bfloat16 or --quantize, or a larger "
                "device"
            ) from error
        self.size //= 2


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no more memory."""
    import torch

    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(w in text for w in words)
    )


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun and accelerate tell."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device() -> str | None:
    """The GPU of this process under torchrun; None where the default is right."""
    local = os.environ.get("LOCAL_RANK")
    if local is None:
        return None
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else None


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def digest(model: str | Path) -> str:
    """SHA-256 over a checkpoint's files."""
    import hashlib

    from mmdiff.io.atomic import MANIFEST
    from mmdiff.models.registry import resolve

    path, total = resolve(model), hashlib.sha256()
    folder = path if path.is_dir() else path.parent
    # A weight file that comes without a config.json is all there is to a checkpoint, whatever lies beside it.
    bare = path.is_file() and not (folder / "config.json").is_file()
    files = [path] if bare else sorted(p for p in folder.rglob("*") if p.suffix in _PARTS and p.is_file())
    for path in files:
        if path.name != MANIFEST:
            with path.open("rb") as file:
                total.update(f"{path.relative_to(folder).as_posix()} ".encode())
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def differing(mine: dict[str, Any], theirs: Any) -> list[str]:
    """Keys in which two plain settings differ."""
    if not isinstance(theirs, dict):
        return sorted(mine)
    return sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
