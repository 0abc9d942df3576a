"""Whole sets of shards: written anew in other sizes, split without leakage, searched for duplicates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from .fingerprints import Fingerprint, Groups, fingerprints, near_groups
from .importers import Rows, Shards
from .pack import PackReport, pack
from .parallel import Tick
from .plan import permute
from .ranges import shown
from .source import expand, open_shards

__all__ = ["Chosen", "DedupReport", "SplitReport", "dedup", "reshard", "split"]


class Chosen(Rows):
    """Some samples of others, in an order of their own.

    Args:
        rows: The others.
        numbers: Which of them.
    """

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        self._rows, self._numbers = rows, list(numbers)
        super().__init__([rows.key(i) for i in numbers], f"chosen of {rows.digest()}")

    def members(self, i: int) -> Mapping[str, bytes]:
        """Members of the sample; errors as in `Rows`."""
        return self._rows.members(self._numbers[i])


def reshard(
    shards: str | Sequence[str],
    out: str | Path,
    samples_per_shard: int,
    *,
    name: str = "shard",
    shuffle: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    tick: Tick = lambda done: None,
) -> PackReport:
    """Write the samples of shards into shards of another size; arguments not named here as `pack.pack`'s.

    Args:
        shards: As `source.open_shards` takes them.
        out: Another folder than theirs.
        samples_per_shard: Samples per new shard.
        name: First part of their names.
        shuffle: Seed of a new order, None for the present one.
        workers: Processes.
        overwrite: Replace shards of that name.
        tick: Called with numbers of samples that were done.

    Raises:
        ConfigError: As `pack.pack`; or ``out`` is where the shards are.
        ShardError: The shards cannot be read.
    """
    _elsewhere(shards, out)
    rows: Rows = Shards(shards)
    if shuffle is not None:
        key = int.from_bytes(hashlib.sha256(f"reshard {shuffle}".encode()).digest()[:8], "big")
        rows = Chosen(rows, [permute(i, len(rows), key) for i in range(len(rows))])
    return pack(rows, out, name, samples_per_shard, workers=workers, overwrite=overwrite, tick=tick)


@dataclass(frozen=True)
class SplitReport:
    """What `split` did.

    Attributes:
        parts: The report of every part, by its name.
        groups: Groups of samples with a picture in common; no group is in two parts.
        unreadable: Samples that were left out because they could not be read.
    """

    parts: Mapping[str, PackReport]
    groups: int
    unreadable: int


def split(
    shards: str | Sequence[str],
    out: str | Path,
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    near: bool = False,
    samples_per_shard: int = 2000,
    workers: int = 1,
    overwrite: bool = False,
    tick: Tick = lambda done: None,
) -> SplitReport:
    """Share out samples by the content of their pictures: the same picture is never in two parts.

    Where a sample goes depends on its pictures and the seed, not on its name, its place or what else there is; samples
    that have a picture in common with another go together.

    Args:
        shards: As `source.open_shards` takes them.
        out: Folder in which each part gets a folder.
        shares: Share of each part; they add up to 1.
        seed: Another seed, another split.
        near: Also keep together pictures that look alike.
        samples_per_shard: Samples per new shard.
        workers: Processes.
        overwrite: Replace what an earlier split has written.
        tick: Called with numbers of samples that were read or written.

    Raises:
        ConfigError: The shares are none, or a part gets no sample.
        ShardError: The shards cannot be read.
    """
    if len(shares) < 2 or min(shares.values()) <= 0 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ConfigError(f"shares {dict(shares)}: at least two, each above 0, adding up to 1")
    _elsewhere(shards, out)
    rows = Shards(shards)
    marks = fingerprints(open_shards(shards), workers, tick)
    together = _together(marks, near)
    numbers: dict[str, list[int]] = {name: [] for name in shares}
    for i, mark in enumerate(marks):
        if mark is not None:
            first = marks[together.root(i)]
            assert first is not None
            numbers[_part(shares, seed, min(first.exact))].append(i)
    if empty := [name for name, mine in numbers.items() if not mine]:
        raise ConfigError(f"part {', '.join(empty)} gets none of {len(rows):,} samples; give it a larger share")
    options: dict[str, Any] = {"workers": workers, "overwrite": overwrite, "keep_finished": True, "tick": tick}
    parts = {
        name: pack(Chosen(rows, mine), Path(out) / name, "shard", samples_per_shard, **options)
        for name, mine in numbers.items()
    }
    return SplitReport(parts, len(together.groups()), sum(mark is None for mark in marks))


@dataclass(frozen=True)
class DedupReport:
    """What occurs more than once.

    Attributes:
        samples: Samples looked at.
        unreadable: Those of them that could not be read.
        exact: Groups of samples with an identical picture (without one: identical texts), as ``shard: key``.
        near: Groups of samples with pictures that look alike, those of ``exact`` among them counted once.
        across: Groups that span more than one of the given names, such as a training and a test set.
    """

    samples: int
    unreadable: int
    exact: tuple[tuple[str, ...], ...]
    near: tuple[tuple[str, ...], ...]
    across: int

    @property
    def copies(self) -> int:
        """Samples that could go without losing a picture."""
        return sum(len(group) - 1 for group in self.exact)

    def __str__(self) -> str:
        lines = [
            f"{self.samples:,} samples, {self.unreadable:,} unreadable",
            f"identical: {len(self.exact):,} groups, {self.copies:,} samples more than pictures",
            f"alike:     {len(self.near):,} groups of different pictures",
            f"across the given names: {self.across:,} groups",
        ]
        for title, groups in (("identical", self.exact), ("alike", self.near)):
            for group in groups[:5]:
                lines.append(
                    f"{title}: " + "; ".join(group[:4]) + (f"; and {len(group) - 4:,} more" if group[4:] else "")
                )
        return "\n".join(lines)


def dedup(shards: Sequence[str], *, workers: int = 1, tick: Tick = lambda done: None) -> DedupReport:
    """Look for samples with the same or nearly the same pictures; nothing is changed.

    Args:
        shards: Names as `source.open_shards` takes them.
        workers: Processes.
        tick: Called with numbers of samples that were done.

    Raises:
        ShardError: The shards cannot be read.
    """
    origins = {url: n for n, name in reversed(list(enumerate(shards))) for url in expand(name)}
    indexes = open_shards(list(shards))
    marks = fingerprints(indexes, workers, tick)
    names = [f"{shown(index.url)}: {index.key(i)}" for index in indexes for i in range(len(index))]
    origin = [origins[index.url] for index in indexes for _ in range(len(index))]
    exact = _together(marks, near=False)
    alike = _together([m if exact.root(i) == i else None for i, m in enumerate(marks)], near=True)
    groups = [exact.groups(), alike.groups()]
    across = sum(len({origin[i] for i in group}) > 1 for group in _together(marks, near=True).groups())
    told = [tuple(tuple(names[i] for i in group) for group in found) for found in groups]
    return DedupReport(len(marks), sum(m is None for m in marks), told[0], told[1], across)


def _together(marks: Sequence[Fingerprint | None], near: bool) -> Groups:
    """Samples joined by a picture that they have in common, or that looks alike."""
    groups = Groups(len(marks))
    first: dict[bytes, int] = {}
    looks: list[bytes] = []
    owner: list[int] = []
    for i, mark in enumerate(marks):
        if mark is None:
            continue
        for digest in mark.exact:
            groups.join(i, first.setdefault(digest, i))
        looks += mark.looks
        owner += [i] * len(mark.looks)
    for found in near_groups(looks) if near and looks else []:
        for number in found[1:]:
            groups.join(owner[found[0]], owner[number])
    return groups


def _part(shares: Mapping[str, float], seed: int, digest: bytes) -> str:
    place = int.from_bytes(hashlib.sha256(f"split {seed} ".encode() + digest).digest()[:8], "big") / 2**64
    total = 0.0
    for name, share in shares.items():
        total += share
        if place < total:
            return name
    return list(shares)[-1]


def _elsewhere(shards: str | Sequence[str], out: str | Path) -> None:
    names = [shards] if isinstance(shards, str) else list(shards)
    folder = Path(out).resolve()
    if any(Path(url).resolve().parent == folder for name in names for url in expand(name) if "://" not in url):
        raise ConfigError(f"{out}: holds the shards that are to be read; choose another folder")
