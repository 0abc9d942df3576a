"""Examples at given positions: read, made by their task, replaced where they cannot be used.

This is where samples are skipped: every skip has a reason and is handed to the loader, which counts it. The same code
runs in a thread and in worker processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmdiff.batch import Batch, Example, collate, fill
from mmdiff.errors import ConfigError, MmdiffError, SampleError, ShardError

from .index import SUFFIXES
from .packing import TokenBudget, pack
from .plan import Draw, Plan
from .ranges import shown
from .reader import IMAGE_SUFFIXES, Sample, ShardReader
from .tasks import Task

__all__ = ["MAX_CONSECUTIVE", "Chunk", "Fetched", "Fetcher", "Ruler", "Skip"]

MAX_CONSECUTIVE = 100
"""So many samples skipped in a row end the run."""

_DRAWN = 512  # positions whose place in the order is found at once
_TEXT_MEMBERS = frozenset(SUFFIXES) - frozenset(IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Skip:
    """A sample that was left out.

    Attributes:
        reason: Short code.
        key: Its name.
        url: Its shard, without credentials.
        position: The position it would have had.
        message: The sentence for the log.
    """

    reason: str
    key: str
    url: str
    position: int
    message: str


@dataclass(frozen=True)
class Chunk:
    """One rank's part of a global batch.

    Attributes:
        positions: Of this rank.
        end: Where the next global batch begins.
        limits: Most slots of the example at each position; empty for no limit.
        step: How far ahead the same process reads next; 0 if that is not known.
    """

    positions: range
    end: int
    limits: tuple[int, ...] = ()
    step: int = 0


@dataclass(frozen=True)
class Fetched:
    """A batch, what was skipped for it (one tuple per position), and where the next one begins."""

    batch: Batch | None
    skips: tuple[tuple[Skip, ...], ...]
    end: int


class Fetcher:
    """Makes the examples at given positions.

    Args:
        plan: The order.
        readers: One per source.
        tasks: The tasks of each source.
        fill_id: Id that rows are filled with to equal length, to be learnt; None for padding that is not.
        pack_length: Slots of packed rows; None leaves every sample in a row of its own.
    """

    def __init__(
        self,
        plan: Plan,
        readers: Sequence[ShardReader],
        tasks: Sequence[Sequence[Task]],
        fill_id: int | None = None,
        pack_length: int | None = None,
    ) -> None:
        self.plan, self.readers, self.tasks = plan, list(readers), [list(t) for t in tasks]
        self.fill_id, self.pack_length = fill_id, pack_length
        self._drawn: dict[range, list[Draw]] = {}

    def __call__(self, chunk: Chunk) -> Fetched:
        """The batch of a chunk; None if a position found no usable sample in `MAX_CONSECUTIVE` attempts."""
        examples: list[Example] = []
        skips: list[tuple[Skip, ...]] = []
        draws = self._draws(chunk.positions, chunk.step)
        if chunk.step:
            self._prepare(self._draws(_later(chunk.positions, chunk.step), chunk.step))
        for number, (position, first) in enumerate(zip(chunk.positions, self._read(draws), strict=True)):
            example, missed = self._fetch(position, first, chunk.limits[number] if chunk.limits else None)
            skips.append(missed)
            if example is None:
                return Fetched(None, tuple(skips), chunk.end)
            examples.append(example)
        batch = collate(examples if self.fill_id is None else fill(examples, self.fill_id))
        return Fetched(batch if self.pack_length is None else pack(batch, self.pack_length), tuple(skips), chunk.end)

    def close(self) -> None:
        """End threads; they are made again when needed."""
        for reader in self.readers:
            reader.end_threads()

    def _draws(self, positions: range, step: int) -> list[Draw]:
        """What stands at a chunk's positions; that of the following chunks is found with it, which costs less."""
        drawn = self._drawn  # `Loader.batch_at` may ask from another thread meanwhile
        if positions not in drawn:
            count = max(1, _DRAWN // max(1, len(positions))) if step else 1
            chunks = [_later(positions, i * step) for i in range(count)]
            draws = iter(self.plan.many(list(itertools.chain(*chunks))))
            drawn = self._drawn = {chunk: list(itertools.islice(draws, len(chunk))) for chunk in chunks}
        return drawn[positions]

    def _prepare(self, draws: Sequence[Draw]) -> None:
        """Have the next batch's samples brought into memory while this one is decoded."""
        for source, reader in enumerate(self.readers):
            reader.prepare([draw[2:4] for draw in draws if draw.source == source])

    def _read(self, draws: Sequence[Draw]) -> list[Sample | SampleError]:
        """The samples of several draws, read together where they come from the same source."""
        found: list[Any] = [None] * len(draws)
        for source, reader in enumerate(self.readers):
            mine = [i for i, draw in enumerate(draws) if draw.source == source]
            places = [(draws[i].shard, draws[i].sample) for i in mine]
            for i, result in zip(mine, reader.read_many(places), strict=True):
                found[i] = result
        return found

    def _fetch(
        self, position: int, first: Sample | SampleError, limit: int | None
    ) -> tuple[Example | None, tuple[Skip, ...]]:
        """The example of a position, whose own sample was read before; then its replacements are tried."""
        missed: list[Skip] = []
        attempt = 0
        while len(missed) < MAX_CONSECUTIVE:
            draw = self.plan.replacement(position, attempt) if attempt else self.plan.at(position)
            attempt += 1
            try:
                example = self._make(draw, first if attempt == 1 else self._read([draw])[0])
                # A longer replacement is passed over, no fault of its own: the batch was measured without it.
                if limit is None or len(example.ids) <= limit or attempt > 10 * MAX_CONSECUTIVE:
                    return example, tuple(missed)
            except SampleError as error:
                missed.append(self._skip(draw, position, error.reason, str(error)))
            except (MmdiffError, MemoryError):
                raise  # the configuration's or the machine's fault, not the sample's
            except Exception as error:
                # Content no task foresaw: counted by its own reason, and too much of it stops the run all the same.
                missed.append(self._skip(draw, position, f"unexpected_{type(error).__name__}", str(error)))
        return None, tuple(missed)

    def _make(self, draw: Draw, sample: Sample | SampleError) -> Example:
        if isinstance(sample, SampleError):
            raise sample
        generator = torch.Generator().manual_seed(draw.seed)
        return self.tasks[draw.source][draw.task](sample, generator)

    def _skip(self, draw: Draw, position: int, reason: str, message: str) -> Skip:
        index = self.readers[draw.source].shards[draw.shard]
        return Skip(reason, index.key(draw.sample), shown(index.url), position, message)


def _later(positions: range, step: int) -> range:
    return range(positions.start + step, positions.stop + step)


class Ruler:
    """Says which positions make a global batch under a token budget: a function of where it begins.

    Lengths are measured without decoding images, by every rank for the whole batch. A sample that turns out later to
    be undecodable is replaced by one that is not longer, so the batch's bounds stand.

    Args:
        plan: The order.
        readers: One per source.
        tasks: The tasks of each source.
        budget: How many samples fit.

    Raises:
        ConfigError: A task cannot tell the length of its examples.
    """

    def __init__(
        self, plan: Plan, readers: Sequence[ShardReader], tasks: Sequence[Sequence[Task]], budget: TokenBudget
    ) -> None:
        for task in (task for mine in tasks for task in mine):
            if not hasattr(task, "length"):
                raise ConfigError(
                    f"data.max_tokens: {type(task).__name__} makes no sequences; set data.batch_size alone"
                )
        self._plan, self._budget = plan, budget
        self._tasks: list[list[Any]] = [list(mine) for mine in tasks]
        self._readers = [self._reader(r, mine) for r, mine in zip(readers, self._tasks, strict=True)]
        self._known: dict[int, int] = {}

    def lengths(self, position: int) -> list[int]:
        """Lengths of the samples of the global batch that begins at ``position``.

        Raises:
            ShardError: A shard cannot be reached, or no sample could be measured.
        """
        self._known = {p: n for p, n in self._known.items() if p >= position}
        lengths = [self._length(position)]
        total = longest = lengths[0]
        while True:
            length = self._length(position + len(lengths))
            total, longest = total + length, max(longest, length)
            if not self._budget.fits(len(lengths) + 1, total, longest):
                break
            lengths.append(length)
        count = self._budget.whole(len(lengths))
        return [self._length(position + i) for i in range(count)]

    def close(self) -> None:
        """Close files; they are opened again when needed."""
        for reader in self._readers:
            reader.close()

    def _reader(self, reader: ShardReader, tasks: Sequence[Any]) -> ShardReader:
        images = any(task.reads_images for task in tasks)
        return ShardReader(reader.shards, None if images else _TEXT_MEMBERS)

    def _length(self, position: int) -> int:
        if position not in self._known:
            self._known[position] = self._measure(position)
        return self._known[position]

    def _measure(self, position: int) -> int:
        for attempt in range(MAX_CONSECUTIVE):
            draw = self._plan.replacement(position, attempt) if attempt else self._plan.at(position)
            generator = torch.Generator().manual_seed(draw.seed)
            try:
                sample = self._readers[draw.source].read(draw.shard, draw.sample)
                return max(1, self._tasks[draw.source][draw.task].length(sample, generator))
            except SampleError:
                continue
        raise ShardError(f"position {position}: none of {MAX_CONSECUTIVE} samples can be used; see: mmdiff data lint")
