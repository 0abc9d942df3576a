"""Fingerprints of samples: what is the same picture, byte for byte or nearly so.

The content of an image is its decoded pixels, so a copy in another lossless file is the same one. How alike two images
look is told by 128 bits that compare neighbouring cells of a small grey copy (the difference hash of D. Krawetz, 2013,
along rows and columns) and by their mean colour.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmdiff.errors import SampleError
from mmdiff.images import decode

from .index import ShardIndex
from .parallel import Tick, run_parts
from .reader import Sample, ShardReader

__all__ = ["Fingerprint", "Groups", "fingerprints", "near_groups"]

NEAR_BITS, NEAR_COLOR = 6, 12
"""Images are alike if at most so many of the 128 bits differ, and so many levels of each channel's mean."""


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a sample.

    Attributes:
        exact: Digests of its images; of a sample without one, the digest of its texts.
        looks: Per image that could be decoded, 16 bytes of difference hash and 3 of mean colour.
    """

    exact: tuple[bytes, ...]
    looks: tuple[bytes, ...]


class Groups:
    """Numbers joined into groups.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, i: int) -> int:
        """The smallest number of the group of ``i``."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        """Make one group of two."""
        a, b = sorted((self.root(i), self.root(j)))
        self._parent[b] = a

    def groups(self) -> list[list[int]]:
        """Groups of two and more, in order of their smallest number."""
        found: dict[int, list[int]] = {}
        for i in range(len(self._parent)):
            found.setdefault(self.root(i), []).append(i)
        return [members for members in found.values() if len(members) > 1]


def fingerprints(
    shards: Sequence[ShardIndex], workers: int = 1, tick: Tick = lambda done: None
) -> list[Fingerprint | None]:
    """Fingerprint of every sample of some shards, in order; None for samples that cannot be read.

    Args:
        shards: As `source.open_shards` returns them.
        workers: Processes.
        tick: Called with numbers of samples that were done.

    Raises:
        ShardError: A shard cannot be reached, or a process died.
    """
    found = dict(run_parts(functools.partial(_of_shard, list(shards)), range(len(shards)), workers, tick))
    return [mark for number in range(len(shards)) for mark in found[number]]


def near_groups(looks: Sequence[bytes]) -> list[list[int]]:
    """Groups of images that look alike, as their numbers; chains count, so the ends of a group may differ more."""
    unique = sorted(set(looks))
    table = np.frombuffer(b"".join(unique), dtype=np.uint8).reshape(-1, 19)
    alike = Groups(len(unique))
    # Two hashes that differ in at most n bits agree in at least one of n + 1 bands of them.
    bits = np.unpackbits(table[:, :16], axis=1)
    for band in np.array_split(np.arange(128), NEAR_BITS + 1):
        keys = np.packbits(bits[:, band], axis=1)
        _, bucket = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(bucket[order])) + 1):
            _join_alike(members, table, alike)
    number = {look: i for i, look in enumerate(unique)}
    found: dict[int, list[int]] = {}
    for i, look in enumerate(looks):
        found.setdefault(alike.root(number[look]), []).append(i)
    return [members for members in found.values() if len(members) > 1]


def _join_alike(members: np.ndarray, table: np.ndarray, alike: Groups) -> None:
    for place in range(len(members) - 1):
        one, others = table[members[place]], table[members[place + 1 :]]
        distance = np.bitwise_count(one[:16] ^ others[:, :16]).sum(1, dtype=np.int64)
        colors = np.abs(one[16:].astype(np.int16) - others[:, 16:]).max(1)
        for other in members[place + 1 :][(distance <= NEAR_BITS) & (colors <= NEAR_COLOR)]:
            alike.join(int(members[place]), int(other))


def _of_shard(shards: list[ShardIndex], number: int, tick: Tick) -> list[Fingerprint | None]:
    reader = ShardReader([shards[number]])
    found: list[Fingerprint | None] = []
    for i in range(len(shards[number])):
        try:
            found.append(_of_sample(reader.read(0, i)))
        except SampleError:
            found.append(None)
        tick(1)
    reader.close()
    return found


def _of_sample(sample: Sample) -> Fingerprint:
    try:
        images = sample.images()
    except SampleError:
        texts = b"".join(data for suffix, data in sorted(sample.members.items()) if not suffix.endswith(".npy"))
        return Fingerprint((_digest(texts),), ())
    exact, looks = [], []
    for data in images:
        try:
            image = decode(data)
        except SampleError:
            exact.append(_digest(data))
            continue
        exact.append(_digest(f"{image.width}x{image.height} ".encode(), image.tobytes()))
        looks.append(_look(image))
    return Fingerprint(tuple(exact), tuple(looks))


def _look(image: Image.Image) -> bytes:
    grey = image.convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    columns = np.asarray(grey.resize((8, 9), Image.Resampling.BILINEAR), dtype=np.int16)
    # A difference of one level is noise of the encoding, above all in flat parts.
    bits = np.concatenate([(np.diff(rows, axis=1) > 1).ravel(), (np.diff(columns, axis=0) > 1).ravel()])
    color = np.asarray(image.resize((1, 1), Image.Resampling.BOX), dtype=np.uint8).ravel()
    return np.packbits(bits).tobytes() + color.tobytes()


def _digest(*parts: bytes) -> bytes:
    told = hashlib.sha256()
    for part in parts:
        told.update(part)
    return told.digest()[:16]
