"""The order of training as a pure function: position in, (source, task, shard, sample, seed) out.

Nothing about an epoch is stored. Sources and tasks take turns in a fixed, evenly spread cycle of their integer
weights; the n-th turn of a source falls into epoch n // G at place n % G of a permutation of its G groups that is
computed, not kept (a Feistel network). So the sequence does not depend on batch size, ranks or workers, and resuming
anywhere costs nothing. Reading is ``reader``'s, batching ``loader``'s.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mmdiff.errors import ConfigError, ShardError
from mmdiff.rng import derive, series

from .index import ShardIndex

__all__ = ["Draw", "Plan", "SourceTable", "permute", "permute_all", "turns"]

MAX_CYCLE = 100_000
"""Longest cycle of source and task weights."""

_MASK = (1 << 64) - 1
_ROUND_OFFSETS = tuple(round_ << 58 for round_ in range(6))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXES = tuple((np.uint64(a), np.uint64(b)) for a, b in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)))
_FEW = 12  # numbers that are faster one by one than as an array


class Draw(NamedTuple):
    """What stands at one position.

    Attributes:
        source: Number of the source.
        task: Number of the task within its source.
        shard: Number of the shard within its source.
        sample: Number of the sample within its shard.
        seed: Seed of everything random in making this example, 63 bits.
    """

    source: int
    task: int
    shard: int
    sample: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceTable:
    """One source's samples, arranged in groups of which one member is drawn per epoch.

    Attributes:
        shard_ends: Int64 [shards]; samples up to and including each shard.
        weights: Weight of each task of this source, integers from 1.
        group_ends: Int64 [groups]; where each group's members end; None if every sample is its own group.
        members: Int64 [samples]; numbers of the samples, group by group.
        identity: Digest of the shards' content.
    """

    shard_ends: np.ndarray
    weights: tuple[int, ...]
    group_ends: np.ndarray | None = None
    members: np.ndarray | None = None
    identity: str = ""

    @classmethod
    def from_shards(
        cls,
        shards: Sequence[ShardIndex],
        weights: Sequence[int] = (1,),
        balance: str = "none",
        labels: Sequence[Collection[str]] | None = None,
    ) -> SourceTable:
        """Table of a source.

        Args:
            shards: Its indexes.
            weights: Weight of each task.
            balance: ``"none"``, or ``"concept"`` to make one group of all samples with the same concept.
            labels: Instead of ``balance``: labels of each sample; all samples with a label are a group, so a sample
                may be in several, and one without labels is in none.

        Raises:
            ShardError: No samples at all, or ``"concept"`` or ``labels`` where no sample has one.
        """
        ends = np.cumsum([len(s) for s in shards], dtype=np.int64)
        if not len(ends) or ends[-1] == 0:
            raise ShardError(f"{', '.join(s.url for s in shards[:3]) or 'a source'}: no samples in these shards")
        groups: dict[str, Any] = {}
        if labels is not None:
            groups = dict(zip(("group_ends", "members"), _by_label(labels, shards[0].url), strict=True))
        elif balance == "concept":
            groups = dict(zip(("group_ends", "members"), _group(shards), strict=True))
        return cls(shard_ends=ends, weights=tuple(weights), identity=_identity(shards), **groups)

    @functools.cached_property
    def _ends(self) -> list[int]:
        return self.shard_ends.tolist()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.shard_ends[-1])

    @functools.cached_property
    def groups(self) -> int:
        """Number of groups: how many draws make an epoch."""
        return self.samples if self.group_ends is None else len(self.group_ends)

    def locate(self, number: int) -> tuple[int, int]:
        """Shard and sample within it of the sample of that number."""
        shard = bisect.bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def locate_all(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """Shards, and samples within them, of several samples: `locate` for all of them."""
        wanted = np.array(numbers, dtype=np.int64)
        shards = np.searchsorted(self.shard_ends, wanted, side="right")
        before = np.concatenate(([0], self.shard_ends))[shards]
        return shards.tolist(), (wanted - before).tolist()

    def member(self, group: int, draw: int) -> int:
        """Number of the sample that ``draw`` (any integer) picks from a group."""
        if self.group_ends is None or self.members is None:
            return group
        start, end = (int(self.group_ends[group - 1]) if group else 0), int(self.group_ends[group])
        return int(self.members[start + draw % (end - start)])


class Plan:
    """The sequence of all samples of a training run.

    Args:
        seed: Seed of the order.
        sources: Tables of the sources.

    Raises:
        ConfigError: No sources, a weight below 1, or weights whose cycle is longer than `MAX_CYCLE`.
    """

    def __init__(self, seed: int, sources: Sequence[SourceTable]) -> None:
        self.seed = int(seed)
        self.sources = tuple(sources)
        pairs = [(s, t, w) for s, table in enumerate(self.sources) for t, w in enumerate(table.weights)]
        pair, turn, self._turns = _cycle(pairs, len(self.sources))
        # Lists, because reading one number of an array takes longer than everything else here.
        self._pair, self._turn = pair.tolist(), turn.tolist()
        self._pairs = [(s, t) for s, t, _ in pairs]
        self._order_keys: dict[tuple[int, int], int] = {}
        self._seed_at = series(self.seed, "draw")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_seed_at"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._seed_at = series(self.seed, "draw")

    @functools.cached_property
    def hash(self) -> str:
        """Sixteen hex digits that change when the order changes: data, seed, weights or balancing."""
        tree = [self.seed, [[t.identity, list(t.weights), t.groups, t.samples] for t in self.sources]]
        return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]

    def at(self, position: int) -> Draw:
        """What stands at ``position`` (0 is the first sample of the run)."""
        source, task, turn = self._turn_at(position)
        groups = self.sources[source].groups
        group = permute(turn % groups, groups, self._order_key(source, turn // groups))
        return self._draw(source, task, group, self._variant(source, turn), self._seed_at(position))

    def many(self, positions: Sequence[int]) -> list[Draw]:
        """What stands at each of several positions: `at` for all of them, in a fraction of its time."""
        turns = [self._turn_at(position) for position in positions]
        orders: dict[tuple[int, int], list[int]] = {}
        for number, (source, _, turn) in enumerate(turns):
            orders.setdefault((source, turn // self.sources[source].groups), []).append(number)
        found: dict[int, Draw] = {}
        for (source, epoch), numbers in orders.items():
            table, mine = self.sources[source], [turns[number][2] for number in numbers]
            first = epoch * table.groups
            groups = permute_all([turn - first for turn in mine], table.groups, self._order_key(source, epoch))
            if table.members is not None:
                groups = [table.member(g, self._variant(source, t)) for g, t in zip(groups, mine, strict=True)]
            for number, shard, sample in zip(numbers, *table.locate_all(groups), strict=True):
                found[number] = Draw(source, turns[number][1], shard, sample, self._seed_at(positions[number]))
        return [found[number] for number in range(len(turns))]

    def _turn_at(self, position: int) -> tuple[int, int, int]:
        """Source and task of a position, and how often the source had its turn before."""
        cycle, slot = divmod(position, len(self._pair))
        source, task = self._pairs[self._pair[slot]]
        return source, task, cycle * self._turns[source] + self._turn[slot]

    def _variant(self, source: int, turn: int) -> int:
        """What picks the member of a group."""
        return 0 if self.sources[source].members is None else derive(self.seed, "variant", source, turn)

    def _order_key(self, source: int, epoch: int) -> int:
        """Key of a source's permutation in an epoch; the last ones are kept, as a run stays in one for long."""
        key = self._order_keys.get((source, epoch))
        if key is None:
            if len(self._order_keys) > 2 * len(self.sources):
                self._order_keys.clear()
            key = self._order_keys[source, epoch] = derive(self.seed, "order", source, epoch)
        return key

    def replacement(self, position: int, attempt: int) -> Draw:
        """What takes the place of a skipped sample: the same source and task, another sample.

        Args:
            position: The position that was skipped.
            attempt: 1 for the first replacement, 2 if that one is skipped as well, ...
        """
        first = self.at(position)
        drawn = derive(self.seed, "replacement", position, attempt)
        group = drawn % self.sources[first.source].groups
        return self._draw(first.source, first.task, group, drawn >> 20, derive(self.seed, "draw", position, attempt))

    def _draw(self, source: int, task: int, group: int, variant: int, seed: int) -> Draw:
        table = self.sources[source]
        return Draw(source, task, *table.locate(table.member(group, variant)), seed)


def permute(i: int, n: int, key: int) -> int:
    """Place of ``i`` in the permutation of 0 .. n-1 that ``key`` selects.

    A balanced Feistel network on the next even power of two; what falls outside is sent round again until it is inside.

    Source: Luby and Rackoff 1988; cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for offset in _ROUND_OFFSETS:
            # SplitMix64's finaliser, written out: a call each round would take most of the time.
            x = ((right + offset ^ key) + 0x9E3779B97F4A7C15) & _MASK
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
            left, right = right, left ^ ((x ^ (x >> 31)) & low)
        i = left << half | right
        if i < n:
            return i


def permute_all(numbers: Sequence[int], n: int, key: int) -> list[int]:
    """`permute` of several numbers, computed side by side."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    found, left_over = np.array(numbers, dtype=np.uint64), np.arange(len(numbers))
    while len(left_over) > _FEW:
        found[left_over] = _rounds(found[left_over], half, key)
        left_over = left_over[found[left_over] >= n]
    out: list[int] = found.tolist()
    for i in left_over.tolist():
        out[i] = permute(out[i], n, key)
    return out


def _rounds(numbers: np.ndarray, half: int, key: int) -> np.ndarray:
    """The network of `permute` once, on uint64 numbers, whose arithmetic wraps as it is masked there."""
    low, key_ = np.uint64((1 << half) - 1), np.uint64(key)
    left, right = numbers >> np.uint64(half), numbers & low
    shifted = np.empty_like(left)
    for offset in _ROUND_OFFSETS:
        x = right + np.uint64(offset)
        x ^= key_
        x += _GOLDEN
        for shift, factor in _MIXES:
            np.right_shift(x, shift, shifted)
            x ^= shifted
            x *= factor
        x &= low
        x ^= left
        left, right = right, x
    return left << np.uint64(half) | right


def turns(weights: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The cycle in which sources and their tasks take turns: (source, task) of each slot.

    Args:
        weights: Weight of every task of every source.

    Raises:
        ConfigError: As `Plan`.
    """
    pairs = [(s, t, w) for s, mine in enumerate(weights) for t, w in enumerate(mine)]
    pair, *_ = _cycle(pairs, len(weights))
    return [pairs[i][:2] for i in pair.tolist()]


def _cycle(pairs: Sequence[tuple[int, int, int]], sources: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pair of each slot of the cycle, the turn of its source there, and turns of each source per cycle."""
    if not pairs or min(w for *_, w in pairs) < 1:
        raise ConfigError("data.sources: at least one source with one task, all weights at least 1")
    divisor = math.gcd(*(w for *_, w in pairs))
    weights = [w // divisor for *_, w in pairs]
    if sum(weights) > MAX_CYCLE:
        raise ConfigError(
            f"data.sources: weights add up to {sum(weights):,} (limit {MAX_CYCLE:,}); use smaller integers"
        )
    pair = np.repeat(np.arange(len(pairs)), weights)
    when = np.concatenate([(np.arange(w) + 0.5) / w for w in weights])
    pair = pair[np.lexsort((pair, when))]
    source = np.array([s for s, *_ in pairs])[pair]
    turn = np.zeros(len(pair), dtype=np.int64)
    for s in range(sources):
        turn[source == s] = np.arange((source == s).sum())
    return pair, turn, np.bincount(source, minlength=sources).tolist()


def _group(shards: Sequence[ShardIndex]) -> tuple[np.ndarray, np.ndarray]:
    """Ends and members of the groups; a sample without a concept is a group of its own."""
    numbers: dict[str, int] = {}
    columns = []
    for shard in shards:
        known = np.array([numbers.setdefault(c, len(numbers)) for c in shard.concepts] + [-1], dtype=np.int64)
        columns.append(known[shard.concept])
    group = np.concatenate(columns)
    alone = group < 0
    if alone.all():
        raise ShardError(f"{shards[0].url}: balance is 'concept', but no sample's JSON has a field 'concept'")
    group[alone] = len(numbers) + np.arange(alone.sum())
    _, group = np.unique(group, return_inverse=True)
    return np.cumsum(np.bincount(group), dtype=np.int64), np.argsort(group, kind="stable").astype(np.int64)


def _by_label(labels: Sequence[Collection[str]], url: str) -> tuple[np.ndarray, np.ndarray]:
    """Ends and members of the groups of equal labels, in the order of the labels."""
    members: dict[str, list[int]] = {}
    for number, mine in enumerate(labels):
        for label in mine:
            members.setdefault(label, []).append(number)
    if not members:
        raise ShardError(f"{url}: balance is 'answer', but no sample has a question of the wanted kinds")
    groups = [members[label] for label in sorted(members)]
    return np.cumsum([len(g) for g in groups], dtype=np.int64), np.concatenate(groups).astype(np.int64)


def _identity(shards: Sequence[ShardIndex]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.size} {len(shard)} ".encode())
        for part in (shard.keys, shard.key_ends, shard.member_ends, shard.suffix, shard.offset, shard.crc32):
            digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
        digest.update(",".join(shard.suffixes).encode())
    return digest.hexdigest()[:16]
