"""Tensors that one layout keeps whole and another in parts: stacked projections, swapped halves, tables left out.

Everything is lazy: a part is cut, a whole stacked, when it is asked for. Every function gives new `Tensors`; none
reads a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmdiff.errors import CheckpointError
from mmdiff.io.tensors import TensorInfo, Tensors

__all__ = ["added", "split", "stacked", "swapped", "without"]


def split(tensors: Tensors, whole: str, parts: Sequence[str]) -> Tensors:
    """Cut every tensor whose name holds the segment ``whole`` along its first axis, into equal ``parts``.

    Raises:
        CheckpointError: A first axis does not divide.
    """
    pattern, cuts = _segment(whole), dict[str, tuple[str, int]]()
    info: dict[str, TensorInfo] = {}
    for name, told in tensors.info.items():
        if not pattern.search(name):
            info[name] = told
            continue
        rows, rest = divmod(told.shape[0], len(parts))
        if rest:
            raise CheckpointError(
                f"{told.file}: {name} has {told.shape[0]} rows, which {len(parts)} parts do not share"
            )
        for i, part in enumerate(parts):
            new = pattern.sub(part, name)
            info[new], cuts[new] = replace(told, shape=(rows, *told.shape[1:])), (name, i)

    def fetch(name: str) -> Tensor:
        if name not in cuts:
            return tensors[name]
        old, i = cuts[name]
        # A copy of its own: a view would be saved with the whole behind it.
        return tensors[old].chunk(len(parts))[i].clone()

    return Tensors(info, fetch)


def stacked(tensors: Tensors, whole: str, parts: Sequence[str]) -> Tensors:
    """The inverse of `split`.

    Raises:
        CheckpointError: A part is missing, or the parts are of several dtypes.
    """
    first, sources = _segment(parts[0]), dict[str, list[str]]()
    others = [_segment(part) for part in parts[1:]]
    info: dict[str, TensorInfo] = {}
    for name, told in tensors.info.items():
        if any(other.search(name) for other in others):
            continue
        if not first.search(name):
            info[name] = told
            continue
        names = [first.sub(part, name) for part in parts]
        if missing := [n for n in names if n not in tensors.info]:
            raise CheckpointError(f"{told.file}: {name} is there, but not {', '.join(missing)}")
        if len({tensors.info[n].dtype for n in names}) > 1:
            raise CheckpointError(
                f"{told.file}: {', '.join(names)} are one tensor elsewhere, but of several dtypes here"
            )
        new, rows = first.sub(whole, name), sum(tensors.info[n].shape[0] for n in names)
        info[new], sources[new] = replace(told, shape=(rows, *told.shape[1:])), names
    return Tensors(
        info, lambda name: torch.cat([tensors[n] for n in sources[name]]) if name in sources else tensors[name]
    )


def swapped(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """The two halves of some tensors' first axis exchanged; its own inverse."""
    chosen = frozenset(names)
    return Tensors(
        tensors.info, lambda name: torch.cat(tensors[name].chunk(2)[::-1]) if name in chosen else tensors[name]
    )


def without(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """All but some."""
    gone = frozenset(names)
    return Tensors({name: told for name, told in tensors.info.items() if name not in gone}, lambda name: tensors[name])


def added(tensors: Tensors, made: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, Sequence[int]]) -> Tensors:
    """Some more, computed in float32; those that are there stay as they are."""
    missing = {name: make for name, make in made.items() if name not in tensors.info}
    file = next(iter(tensors.info.values())).file
    info = {n: TensorInfo(shape=tuple(shapes[n]), dtype=torch.float32, file=file) for n in missing}
    return Tensors({**tensors.info, **info}, lambda name: missing[name]() if name in missing else tensors[name])


def _segment(text: str) -> re.Pattern[str]:
    """``text`` as whole segments of a dotted name."""
    return re.compile(rf"(?<![^.]){re.escape(text)}(?=\.)")
