"""Shards that can only be read from front to back: the lesser way, for servers without byte ranges.

What it cannot promise, beside the indexed way:

* an order over everything: shards are shuffled as a whole, samples in a buffer;
* a resume that costs nothing: everything up to the position is read again;
* ranks that share the reading: each reads all shards, and makes its own part of each batch;
* checksums: damage that leaves the tar's headers in order is not noticed, and members of a sample must be adjacent;
* replacements of its own: an unusable sample gives way to a neighbour in its batch;
* a missing shard found at the start: it is found when its turn comes.

What holds: nothing is lost silently (a cut shard is an error), every skip is counted, the global batches do not depend
on the number of ranks as long as all samples are usable.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from mmdiff.batch import Example, collate, fill
from mmdiff.errors import ConfigError, SampleError, ShardError
from mmdiff.rng import derive

from .fetch import Chunk, Fetched, Skip
from .index import split_name
from .packing import pack
from .plan import permute, turns
from .ranges import ForwardStream, RangeReader, shown
from .reader import MAX_SAMPLE_BYTES, Sample
from .tarscan import scan
from .tasks import Task

__all__ = ["StreamFetcher", "StreamOrder", "check_options", "samples_of"]


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """Which source and task stand at a position; which sample that is, only reading can tell.

    Attributes:
        seed: Seed of the order.
        urls: Shards of each source.
        weights: Weights of the tasks of each source.
        buffer: Samples among which the next one is drawn.
    """

    seed: int
    urls: tuple[tuple[str, ...], ...]
    weights: tuple[tuple[int, ...], ...]
    buffer: int

    @functools.cached_property
    def hash(self) -> str:
        """Sixteen hex digits that change when the order does, as far as names tell."""
        names = [[shown(url) for url in urls] for urls in self.urls]
        tree = ["stream", self.seed, names, self.weights, self.buffer]
        return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]

    def at(self, position: int) -> tuple[int, int]:
        """Source and task."""
        return self._cycle[position % len(self._cycle)]

    @functools.cached_property
    def _cycle(self) -> list[tuple[int, int]]:
        return turns(self.weights)

    def samples(self, source: int) -> Generator[Sample, None, None]:
        """The samples of a source without end, epoch after epoch.

        Raises:
            ShardError: A shard is missing, damaged or cut, or there are no samples at all.
        """
        for epoch in itertools.count():
            draw = random.Random(derive(self.seed, "buffer", source, epoch))
            held: list[Sample] = []
            empty = True
            for sample in self._epoch(source, epoch):
                empty = False
                held.append(sample)
                if len(held) > self.buffer:
                    yield _take(held, draw)
            while held:
                yield _take(held, draw)
            if empty:
                raise ShardError(f"{shown(self.urls[source][0])}: no samples in these shards")

    def _epoch(self, source: int, epoch: int) -> Iterator[Sample]:
        urls, key = self.urls[source], derive(self.seed, "order", source, epoch)
        ranges = RangeReader()
        for i in range(len(urls)):
            url = urls[permute(i, len(urls), key)]
            yield from samples_of(ranges.forward(url), shown(url))


class StreamFetcher:
    """Makes batches one after the other; asked for an earlier one, it begins anew.

    Args:
        order: What is read.
        tasks: The tasks of each source.
        fill_id: As in `fetch.Fetcher`.
        pack_length: As in `fetch.Fetcher`.
    """

    def __init__(
        self,
        order: StreamOrder,
        tasks: Sequence[Sequence[Task]],
        fill_id: int | None = None,
        pack_length: int | None = None,
    ) -> None:
        self.order, self.tasks = order, [list(mine) for mine in tasks]
        self.fill_id, self.pack_length = fill_id, pack_length
        self._streams: list[Generator[Sample, None, None]] = []
        self._at = 0

    def __call__(self, chunk: Chunk) -> Fetched:
        """The batch of a chunk; None if none of its samples can be used."""
        if chunk.positions.start < self._at or not self._streams:
            self._streams = [self.order.samples(source) for source in range(len(self.order.urls))]
            self._at = 0
        made = [self._next(position, position in chunk.positions) for position in range(self._at, chunk.end)]
        self._at = chunk.end
        mine = [entry for entry in made if entry is not None]
        skips = tuple((entry,) if isinstance(entry, Skip) else () for entry in mine)
        examples = _filled([None if isinstance(entry, Skip) else entry for entry in mine])
        if examples is None:
            return Fetched(None, skips, chunk.end)
        batch = collate(examples if self.fill_id is None else fill(examples, self.fill_id))
        return Fetched(batch if self.pack_length is None else pack(batch, self.pack_length), skips, chunk.end)

    def close(self) -> None:
        """Close what is open; the next batch begins anew."""
        for stream in self._streams:
            stream.close()
        self._streams = []

    def _next(self, position: int, wanted: bool) -> Example | Skip | None:
        """The next sample as an example, or why it is none; None if it belongs to others."""
        source, task = self.order.at(position)
        sample = next(self._streams[source])
        if not wanted:
            return None
        generator = torch.Generator().manual_seed(derive(self.order.seed, "draw", position))
        try:
            return self.tasks[source][task](sample, generator)
        except SampleError as error:
            return Skip(error.reason, sample.key, sample.url, position, str(error))


def samples_of(stream: ForwardStream, where: str) -> Iterator[Sample]:
    """Samples of one shard, their members being adjacent; members of unknown suffixes are left out.

    Args:
        stream: The shard from its beginning.
        where: Its name, for messages.

    Raises:
        ShardError: Refused by `tarscan.scan`, cut, or a sample that is too large or holds a member twice.
    """
    try:
        yield from _grouped(stream, where)
    finally:
        stream.close()


def _grouped(stream: ForwardStream, where: str) -> Iterator[Sample]:
    key, members, size = "", dict[str, bytes](), 0
    for name, offset, length in scan(stream, where):
        of, suffix = split_name(name)
        if suffix.startswith("."):
            continue
        if of != key and members:
            yield Sample(key, where, members)
            members, size = {}, 0
        key, size = of, size + length
        if suffix in members or size > MAX_SAMPLE_BYTES:
            raise ShardError(f"{where}: sample {key!r} holds {suffix!r} twice, or more than {MAX_SAMPLE_BYTES:,} bytes")
        stream.seek(offset)
        members[suffix] = stream.read(length)
        if len(members[suffix]) < length:
            raise ShardError(f"{where}: ends inside member {name!r}: it was cut; make it again")
    if members:
        yield Sample(key, where, members)


def check_options(workers: int, max_tokens: int | None, balance: Sequence[str]) -> None:
    """Refuse what streams cannot do.

    Raises:
        ConfigError: Worker processes, a token budget, or balanced groups.
    """
    if workers:
        raise ConfigError(f"data.workers is {workers}; data.stream reads in one thread, set data.workers=0")
    if max_tokens is not None:
        raise ConfigError(
            "data.max_tokens: the samples of a stream cannot be measured ahead; set data.batch_size alone"
        )
    if set(balance) != {"none"}:
        raise ConfigError(
            "data.sources: a stream cannot be balanced; leave balance out, or make indexes and shards with ranges"
        )


def _take(held: list[Sample], draw: random.Random) -> Sample:
    """One of the held samples; the last takes its place."""
    place = draw.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


def _filled(examples: Sequence[Example | None]) -> list[Example] | None:
    """Gaps closed by the usable neighbour before, else behind; None if there is none."""
    usable = [e for e in examples if e is not None]
    if not usable:
        return None
    last, out = usable[0], []
    for example in examples:
        last = last if example is None else example
        out.append(last)
    return out
