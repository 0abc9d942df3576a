"""Batches for training: plan, reader and tasks put together, with counted skips and a state of one integer.

The sequence of batches depends on the data, the seed and the batch size (or the token budget) alone: ranks slice each
global batch, workers only prefetch. What a sample teaches is ``tasks``', the order is ``plan``'s, skipping ``fetch``'s.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from mmdiff.batch import Batch, Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError, SampleError, ShardError
from mmdiff.text import Tokenizer

from .contents import answers_of
from .fetch import MAX_CONSECUTIVE, Chunk, Fetched, Fetcher, Ruler, Skip
from .index import ShardIndex
from .packing import TokenBudget
from .plan import Plan, SourceTable
from .prefetch import prefetch, worker_batches
from .ranges import shown
from .reader import ShardReader
from .source import expand, open_shards
from .streams import StreamFetcher, StreamOrder, check_options
from .task_config import TaskConfig
from .tasks import Task, build_task
from .transforms import PixelCache

__all__ = ["DataConfig", "Fetched", "Loader", "Skip", "SourceConfig", "open_loader"]

MIN_SEEN = 1000
"""The fraction of skipped samples is judged from this many samples on."""


@config
class SourceConfig:
    """Some shards and what is learnt from them."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Files, folders, globs, URLs, or embedded:NAME/SPLIT."""
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """Tasks that take turns by their weights."""
    weight: int = Field(default=1, ge=1)
    """Multiplies the weights of this source's tasks."""
    balance: Literal["none", "concept", "answer"] = "none"
    """What an epoch draws. none: every sample; concept: one sample of each JSON field concept; answer: one sample of
    each answer to the questions of the source's vqa tasks and of each instruction of its edit tasks, and none without
    either."""


@config
class DataConfig:
    """Where batches come from."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """One or several sources, mixed by their weights."""
    batch_size: int = Field(ge=1)
    """Samples of a global batch, over all ranks; with ``max_tokens`` the most samples."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a global batch, padding included unless rows are packed: as many samples as fit. Null: batch_size."""
    multiple: int = Field(default=8, ge=1)
    """With ``max_tokens``: a global batch holds a multiple of so many samples, and at least so many; the number of
    ranks must divide it."""
    pack_length: int | None = Field(default=None, ge=1)
    """Put short samples side by side in rows of this many tokens instead of padding them (for the objective masked);
    they do not see each other, and what is learnt is the same. Null: no packing."""
    workers: int = Field(default=0, ge=0, le=256)
    """Processes that prepare batches; 0 uses a thread of this process."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """How workers are started; default: the platform's."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that are prepared ahead, per worker."""
    fill: bool = False
    """Fill rows to the longest of the batch with end of text that is learnt like the answer, as LLaDA's fine-tuning and
    LLaDA-V's first stage do; otherwise padding is neither seen nor learnt."""
    seed: int | None = None
    """Seed of the order; default: the run's."""
    max_skip_fraction: float = Field(default=0.001, ge=0, le=1)
    """Larger fractions of skipped samples end the run (judged from 1,000 samples on)."""
    stream: bool = False
    """Read shards from front to back, for servers without byte ranges: no index, no order over everything, slow resume
    (docs/data.md says what is not promised)."""
    stream_buffer: int = Field(default=1000, ge=1)
    """With ``stream``: samples among which the next one is drawn."""
    damaged: Literal["skip", "refuse"] = "skip"
    """What happens if a shard's size differs from its index: its samples are skipped and counted, or an error at the
    start."""
    allow_changed: bool = False
    """Go on from a saved position although the data, the weights or the seed are not those it was saved with."""
    cache_decoded: bool = True
    """Keep decoded images in memory."""
    cache_mib: int = Field(default=256, ge=0)
    """Most memory for decoded images, per process."""


class Loader:
    """An endless iterable of batches that can be left and resumed anywhere.

    Args:
        plan: The order; that of streams needs no readers.
        readers: One per source.
        tasks: The tasks of each source, in the plan's order.
        batch_size: Samples of a global batch.
        start: First position.
        workers: Processes that prepare batches; 0 uses a thread.
        rank: Number of this process among ``world``.
        world: Processes that share each global batch.
        max_skip_fraction: Larger fractions of skipped samples raise.
        ahead: Batches prepared ahead, per worker.
        start_method: How workers are started.
        allow_changed: Accept a saved state of another plan.
        on_skip: Called with every skip, in order.
        fill_id: As in `fetch.Fetcher`.
        pack_length: As in `fetch.Fetcher`.
        budget: How many samples fit into a global batch, at most ``batch_size``; None for always so many.

    Raises:
        ConfigError: ``world`` processes cannot share every global batch evenly.
    """

    def __init__(
        self,
        plan: Plan | StreamOrder,
        readers: Sequence[ShardReader],
        tasks: Sequence[Sequence[Task]],
        batch_size: int,
        *,
        start: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        max_skip_fraction: float = 0.001,
        ahead: int = 2,
        start_method: str | None = None,
        allow_changed: bool = False,
        on_skip: Callable[[Skip], None] | None = None,
        fill_id: int | None = None,
        pack_length: int | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        shared = ("batch_size", batch_size) if budget is None else ("multiple", budget.multiple)
        if shared[1] % world or not 0 <= rank < world:
            raise ConfigError(
                f"data.{shared[0]} is {shared[1]}, rank {rank} of {world}; the global batch must divide evenly"
            )
        self.plan: Plan | StreamOrder = plan
        self.position = start
        self.fill_id = fill_id
        self.batch_size = batch_size
        self.skipped: Counter[str] = Counter()
        self.seen = 0
        self.on_skip = on_skip
        self._readers = list(readers)
        self._fetcher: Fetcher | StreamFetcher
        self._ruler: Ruler | None = None
        if isinstance(plan, StreamOrder):
            self._fetcher = StreamFetcher(plan, tasks, fill_id, pack_length)
        else:
            self._fetcher = Fetcher(plan, readers, tasks, fill_id, pack_length)
            self._ruler = None if budget is None else Ruler(plan, readers, tasks, budget)
        self._workers, self._ahead, self._start_method = workers, ahead, start_method
        self._rank, self._world = rank, world
        self._max_skip_fraction, self._allow_changed = max_skip_fraction, allow_changed
        self._row = 0
        self._recent: deque[Skip] = deque(maxlen=MAX_CONSECUTIVE)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on, without end.

        Raises:
            ShardError: Too many samples had to be skipped, a shard vanished, or a worker died.
        """
        chunks = self._chunks(self.position)
        if self._workers:
            fetched = worker_batches(self._fetcher, chunks, self._workers, self._ahead, self._start_method, self.where)
        else:
            fetched = prefetch(self._fetcher, chunks, self._ahead)
        try:
            for item in fetched:
                self._count(item)
                if item.batch is None:
                    raise ShardError(
                        f"no usable sample for the batch at position {self.position:,}: {self.skip_report()}; the last "
                        f"was: {self._recent[-1].message}; check the shards with: mmdiff data lint"
                    )
                self.position = item.end
                yield item.batch
        finally:
            fetched.close()
            self._fetcher.close()

    def batch_at(self, position: int) -> Batch:
        """This rank's slice of the batch that begins at ``position``, made here and now; nothing is counted.

        Raises:
            ShardError: No usable sample was found.
        """
        item = self._fetcher(self._chunk(position))
        if item.batch is None:
            raise ShardError(f"position {position}: {item.skips[-1][-1].message}")
        return item.batch

    def state_dict(self) -> dict[str, Any]:
        """``{"position": samples consumed over all ranks, "plan_hash": ...}``."""
        return {"position": self.position, "plan_hash": self.plan.hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; costs nothing, wherever it is.

        Raises:
            ConfigError: The state is of another plan (data, weights or seed changed), or malformed.
        """
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ConfigError(f"data state: position {position!r} is not a number of samples")
        if state.get("plan_hash") != self.plan.hash and not self._allow_changed:
            raise ConfigError(
                f"data state: saved for plan {state.get('plan_hash')}, the present data, weights and seed give "
                f"{self.plan.hash}; restore them, or set data.allow_changed=true to go on with the new ones"
            )
        self.position = position

    def skip_report(self) -> str:
        """Counts of skipped samples by reason, one line."""
        total = sum(self.skipped.values())
        if not total:
            return f"no samples skipped of {self.seen:,}"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.most_common())
        return f"{total:,} samples skipped of {self.seen:,} ({reasons})"

    def close(self) -> None:
        """Close files; they are opened again when needed."""
        self._fetcher.close()
        for reader in self._readers:
            reader.close()
        if self._ruler is not None:
            self._ruler.close()

    def _chunks(self, position: int) -> Iterator[Chunk]:
        while True:
            chunk = self._chunk(position)
            yield chunk
            position = chunk.end

    def _chunk(self, position: int) -> Chunk:
        """This rank's part of the global batch that begins at ``position``."""
        lengths = None if self._ruler is None else self._ruler.lengths(position)
        count = self.batch_size if lengths is None else len(lengths)
        first, last = (count * r // self._world for r in (self._rank, self._rank + 1))
        limits = () if lengths is None else tuple(lengths[first:last])
        step = count * max(1, self._workers) if lengths is None else 0
        return Chunk(range(position + first, position + last), position + count, limits, step)

    def _count(self, item: Fetched) -> None:
        for missed in item.skips:
            self.seen += 1
            for skip in missed:
                self.skipped[skip.reason] += 1
                self._recent.append(skip)
                if self.on_skip is not None:
                    self.on_skip(skip)
            # A replacement that works does not end a bad stretch: only a position whose own sample works does.
            self._row = self._row + len(missed) if missed else 0
            self._judge()

    def finish(self) -> None:
        """Judge the skipped samples once more at the end of a run, however few samples it had.

        Raises:
            ShardError: More than ``max_skip_fraction`` of them were skipped.
        """
        self._judge(1)

    def _judge(self, enough: int = MIN_SEEN) -> None:
        total = sum(self.skipped.values())
        if self._row >= MAX_CONSECUTIVE:
            why = f"{self._row} samples in a row could not be used"
        elif self.seen >= enough and total > self._max_skip_fraction * self.seen:
            limit = f"max_skip_fraction is {self._max_skip_fraction:g}"
            why = f"{total:,} of {self.seen:,} samples could not be used, {limit}"
        else:
            return
        listed = "\n".join(f"  {s.reason}: {s.url}: {s.key}" for s in self._recent)
        raise ShardError(
            f"{why} ({self.skip_report()}); the last was: {self._recent[-1].message}\n{listed}\n"
            "check the shards with: mmdiff data lint"
        )

    def where(self) -> str:
        """The shards that the next batch reads, for the message when a worker dies or nothing comes."""
        if isinstance(self.plan, StreamOrder):
            return f"after position {self.position:,}"
        draws = [self.plan.at(p) for p in range(self.position, self.position + self.batch_size)]
        urls = {shown(self._readers[d.source].shards[d.shard].url) for d in draws}
        return f"after position {self.position:,}, which reads {', '.join(sorted(urls)[:5])}"


def open_loader(
    options: DataConfig,
    tokenizer: Tokenizer | None,
    layout: Layout,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    on_skip: Callable[[Skip], None] | None = None,
) -> Loader:
    """Open a configuration's shards and make its loader.

    Args:
        options: Sources and sizes.
        tokenizer: For tasks with text.
        layout: What the model expects of a sequence.
        seed: Seed of the order, unless ``options.seed`` gives one.
        rank: Number of this process among ``world``.
        world: Processes that share each global batch.
        on_skip: Called with every skip.

    Raises:
        ConfigError: A task does not fit the tokenizer or the layout.
        ShardError: Shards are missing or damaged.
    """
    cache = PixelCache(options.cache_mib << 20) if options.cache_decoded else None
    tasks = [[build_task(task, tokenizer, layout, cache) for task in source.tasks] for source in options.sources]
    seed = seed if options.seed is None else options.seed
    readers = [] if options.stream else [_reader(source, options.damaged) for source in options.sources]
    return Loader(
        _streamed(seed, options) if options.stream else Plan(seed, list(map(_table, options.sources, readers))),
        readers,
        tasks,
        options.batch_size,
        workers=options.workers,
        rank=rank,
        world=world,
        max_skip_fraction=options.max_skip_fraction,
        ahead=options.prefetch,
        start_method=options.start_method,
        allow_changed=options.allow_changed,
        on_skip=on_skip,
        fill_id=None if tokenizer is None or not options.fill else tokenizer.pad_id,
        pack_length=options.pack_length,
        budget=_budget(options),
    )


def _reader(source: SourceConfig, damaged: str) -> ShardReader:
    return ShardReader(open_shards(source.shards, damaged=damaged))


def _table(source: SourceConfig, reader: ShardReader) -> SourceTable:
    weights = [source.weight * task.weight for task in source.tasks]
    labels = _answers(source, reader.shards) if source.balance == "answer" else None
    return SourceTable.from_shards(reader.shards, weights, source.balance, labels)


def _streamed(seed: int, options: DataConfig) -> StreamOrder:
    check_options(options.workers, options.max_tokens, [source.balance for source in options.sources])
    return StreamOrder(
        seed=seed,
        urls=tuple(tuple(url for spec in source.shards for url in expand(spec)) for source in options.sources),
        weights=tuple(tuple(source.weight * task.weight for task in source.tasks) for source in options.sources),
        buffer=options.stream_buffer,
    )


def _budget(options: DataConfig) -> TokenBudget | None:
    if options.fill and (options.max_tokens or options.pack_length):
        raise ConfigError("data.fill makes rows as long as the longest; leave it out, or max_tokens and pack_length")
    if options.max_tokens is None:
        return None
    if options.multiple > options.batch_size:
        raise ConfigError(f"data.multiple is {options.multiple}, data.batch_size at most {options.batch_size} samples")
    return TokenBudget(options.max_tokens, options.multiple, options.batch_size, options.pack_length is not None)


def _answers(source: SourceConfig, shards: Sequence[ShardIndex]) -> list[set[str]]:
    """Kind and answer of every question that a source's tasks may ask, per sample; reads each JSON once."""
    tasks = [task for task in source.tasks if task.type in ("vqa", "edit")]
    if not tasks:
        raise ConfigError("data.sources: balance 'answer' needs a vqa or edit task in the same source")
    reader = ShardReader(shards, ("json",))
    found: list[set[str]] = []
    for shard, index in enumerate(shards):
        for number in range(len(index)):
            labels: set[str] = set()
            for task in tasks:
                # A sample that cannot be read, or has no such question, is in no group and never drawn.
                with contextlib.suppress(SampleError):
                    labels |= answers_of(reader.read(shard, number), task)
            found.append(labels)
    reader.close()
    return found
