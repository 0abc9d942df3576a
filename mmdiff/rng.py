"""Random draws: generators derived from (seed, stream, index), and draws that go through them.

No function of the house draws from global state. A *source* is a ``torch.Generator``, a ``Tape`` of recorded
draws (so that golden data can be fed in), or a list with one of them per row of the batch: then row *i* does not
depend on the other rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "Source",
    "Tape",
    "derive",
    "generator",
    "gumbel",
    "integer",
    "normal",
    "permutation",
    "restore",
    "series",
    "shuffles",
    "state",
    "uniform",
]


def derive(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for one stream, independent of every other stream of the same seed.

    >>> derive(0, "mask", 1) != derive(0, "mask", 2)
    True
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(s).__name__}:{s}" for s in stream)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def series(seed: int, *stream: str | int) -> Callable[[int], int]:
    """``derive(seed, *stream, number)`` as a function of ``number``, for those who need it for every sample.

    >>> series(0, "draw")(7) == derive(0, "draw", 7)
    True
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(s).__name__}:{s}" for s in stream), "int:"])
    begun = hashlib.blake2b(text.encode(), digest_size=8)

    def numbered(number: int) -> int:
        told = begun.copy()
        told.update(b"%d" % number)
        return int.from_bytes(told.digest(), "big") >> 1

    return numbered


def generator(seed: int, *stream: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator for stream ``stream`` of ``seed``, such as ``generator(0, "image", 17)``."""
    return torch.Generator(device=device).manual_seed(derive(seed, *stream))


class Tape:
    """Recorded draws, played back in order.

    Args:
        draws: Tensors in the order in which they will be asked for.
    """

    def __init__(self, draws: Iterable[Tensor]) -> None:
        self._draws = list(draws)
        self._next = 0

    def play(self, shape: Sequence[int]) -> Tensor:
        """The next recorded draw.

        Raises:
            ValueError: The tape is at its end, or the recorded shape differs from ``shape``.
        """
        if self._next >= len(self._draws):
            raise ValueError(
                f"the tape holds {len(self._draws)} draws and one more of shape {tuple(shape)} was asked for"
            )
        draw = self._draws[self._next]
        if tuple(draw.shape) != tuple(shape):
            raise ValueError(f"draw {self._next} of the tape has shape {tuple(draw.shape)}, asked for {tuple(shape)}")
        self._next += 1
        return draw


Source = torch.Generator | Tape | Sequence["torch.Generator | Tape"]


def uniform(source: Source, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """U[0, 1) numbers in float32.

    Args:
        source: Generator, tape, or one of them per row; a list must have ``shape[0]`` entries.
        shape: Shape of the result.
        device: Where the result goes; default: where the generator lives.
    """
    return _draw(torch.rand, source, shape, device)


def normal(source: Source, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """Standard normal numbers in float32; arguments as in `uniform`."""
    return _draw(torch.randn, source, shape, device)


def gumbel(source: Source, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """Standard Gumbel numbers -log(-log u) in float32; a tape holds the Gumbel numbers themselves.

    Arguments as in `uniform`.
    """

    def draw(shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
        u = torch.rand(shape, generator=generator, device=device).clamp_(1e-20, 1 - 1e-7)
        return -torch.log(-torch.log(u))

    return _draw(draw, source, shape, device)


def permutation(source: Source, rows: int, n: int, *, device: torch.device | str | None = None) -> Tensor:
    """One random permutation of 0..n-1 per row, int64 [rows, n] (by sorting `uniform` draws)."""
    return uniform(source, (rows, n), device=device).argsort(dim=-1, stable=True)


def shuffles(source: Source, rows: int, n: int) -> Tensor:
    """One random permutation of 0..n-1 per row, int64 [rows, n], drawn as ``torch.randperm`` does.

    `permutation` is the same in distribution; this one replays code that calls ``torch.randperm`` row by row. A tape
    holds the permutations themselves.
    """

    def draw(shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
        rows = [torch.randperm(shape[-1], generator=generator, device=device) for _ in range(math.prod(shape[:-1]))]
        return torch.stack(rows).view(*shape) if rows else torch.empty(*shape, dtype=torch.long, device=device)

    return _draw(draw, source, (rows, n), None)


def integer(source: Source, high: int) -> int:
    """A random integer from 0 to ``high`` - 1, drawn as ``torch.randint`` does; a tape holds it as a tensor [1]."""

    def draw(shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.randint(high, tuple(shape), generator=generator, device=device)

    return int(_draw(draw, source, (1,), None))


def state(gen: torch.Generator) -> list[int]:
    """The generator's state as plain integers, for JSON."""
    return gen.get_state().tolist()


def restore(gen: torch.Generator, saved: Sequence[int]) -> torch.Generator:
    """Set ``gen`` to a state that `state` returned; returns ``gen``."""
    gen.set_state(torch.tensor(saved, dtype=torch.uint8))
    return gen


def _draw(
    draw: Callable[..., Tensor], source: Source, shape: Sequence[int], device: torch.device | str | None
) -> Tensor:
    if isinstance(source, Tape):
        out = source.play(shape)
    elif isinstance(source, torch.Generator):
        out = draw(tuple(shape), generator=source, device=source.device)
    else:
        if len(source) != shape[0]:
            raise ValueError(f"{len(source)} generators for {shape[0]} rows")
        out = torch.stack([_draw(draw, s, shape[1:], device) for s in source])
    return out if device is None else out.to(device)
