"""Loader: the same batches for any ranks, workers and interruptions; counted skips that stop a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.index import ShardIndex, parse_index
from data_pipelines.loader import DataConfig, Loader, Skip, open_loader
from data_pipelines.pack import write_shard, write_shards
from data_pipelines.plan import Plan, SourceTable
from data_pipelines.reader import ShardReader
from data_pipelines.source import open_shards
from mmdiff.batch import Batch, Layout
from mmdiff.config import dump, load, parse
from mmdiff.errors import ConfigError, MmdiffError, ShardError
from mmdiff.text import Tokenizer
from tests.helpers.dying_task import Dies

from .conftest import members

Make = Callable[..., list[Path]]
MIXTURE = [{"type": "caption", "weight": 2}, {"type": "vqa"}, {"type": "text_to_image"}, {"type": "pair"}]


def data(shards: list[Path] | str, tasks: list[dict[str, Any]] | None = None, **fields: Any) -> DataConfig:
    names = [shards] if isinstance(shards, str) else [str(s) for s in shards]
    source = {"shards": names, "tasks": tasks or [{"type": "caption", "augment": {"shift_px": 2}}]}
    return parse(DataConfig, {"sources": [source], "batch_size": 6, **fields}, "test")


def take(loader: Loader, count: int) -> list[Batch]:
    batches = iter(loader)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


def same(a: Batch, b: Batch) -> bool:
    tensors = ("ids", "labels", "weights", "droppable", "valid", "pixels")
    return (a.keys, a.tasks) == (b.keys, b.tasks) and all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)


@pytest.fixture
def opened(tokenizer: Tokenizer, layout: Layout) -> Callable[..., Loader]:
    def opened(options: DataConfig, **extra: Any) -> Loader:
        return open_loader(options, tokenizer, layout, **{"seed": 0, **extra})

    return opened


def test_a_loader_gives_full_batches_of_all_tasks(make_shards: Make, opened: Callable[..., Loader]) -> None:
    loader = opened(data(make_shards(40), MIXTURE, batch_size=10))
    batches = take(loader, 4)
    assert [len(b) for b in batches] == [10] * 4
    tasks = [t for b in batches for t in b.tasks]
    assert {t: tasks.count(t) for t in set(tasks)} == {"caption": 16, "vqa": 8, "text_to_image": 8, "pair": 8}
    assert batches[0].pixels is not None
    assert len(batches[0].pixels) == sum(t != "text_to_image" for t in batches[0].tasks)
    assert loader.state_dict() == {"position": 40, "plan_hash": loader.plan.hash}
    assert loader.skip_report() == "no samples skipped of 40"


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([0, 1, 3, 7, 20]), min_size=1, max_size=7).filter(any), st.integers(0, 2**30))
def test_r04_two_epochs_over_uneven_shards_hold_each_key_once_per_epoch_for_any_ranks(
    tmp_path: Path, tokenizer: Tokenizer, layout: Layout, sizes: list[int], seed: int
) -> None:
    shards = []
    for number, size in enumerate(sizes):
        rows = [(f"{number}-{i}", members(i)) for i in range(size)]
        if rows:
            shards += write_shards(rows, tmp_path / f"{number}", "s", 50)
    total = sum(sizes)
    whole = [b.keys for b in take(open_loader(data(shards, batch_size=2), tokenizer, layout, seed=seed), total)]
    keys = [k for batch in whole for k in batch]
    for epoch in (keys[:total], keys[total:]):
        assert len(set(epoch)) == len(epoch) == total
    ranks = [
        take(open_loader(data(shards, batch_size=2), tokenizer, layout, seed=seed, rank=r, world=2), total)
        for r in (0, 1)
    ]
    assert [a.keys + b.keys for a, b in zip(*ranks, strict=True)] == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(make_shards: Make, opened: Callable[..., Loader], workers: int) -> None:
    options = data(make_shards(40), MIXTURE, start_method="fork")
    plain = take(opened(options), 4)
    worked = take(opened(dataclasses.replace(options, workers=workers)), 4)
    assert all(same(a, b) for a, b in zip(plain, worked, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_r04_uneven_shards_give_every_key_once_per_epoch_for_any_ranks_and_workers(
    tmp_path: Path, tokenizer: Tokenizer, layout: Layout
) -> None:
    shards = []
    for number, size in enumerate([0, 1, 3, 50, 0, 7, 20]):
        path = tmp_path / f"{number}.tar"
        shards.append(write_shard(path, [(f"{number}-{i}", members(i)) for i in range(size)]))
    options = data(shards, [{"type": "text", "fields": ["caption"]}], batch_size=6, start_method="fork")
    whole = [b.keys for b in take(open_loader(options, tokenizer, layout, seed=5), 27)]
    keys = [k for batch in whole for k in batch]
    assert [len(set(epoch)) for epoch in (keys[:81], keys[81:])] == [81, 81]
    for world, workers in itertools.product((1, 2), (0, 1, 3)):
        worked = dataclasses.replace(options, workers=workers)
        ranks = [take(open_loader(worked, tokenizer, layout, seed=5, rank=r, world=world), 27) for r in range(world)]
        assert [tuple(k for b in parts for k in b.keys) for parts in zip(*ranks, strict=True)] == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_r03_resuming_with_0_then_3_then_1_workers_gives_the_same_batches(
    make_shards: Make, opened: Callable[..., Loader]
) -> None:
    options = data(make_shards(40), MIXTURE, start_method="fork")
    whole = take(opened(options), 12)
    state = opened(options).state_dict()
    parts: list[Batch] = []
    for workers, count in ((0, 3), (3, 5), (1, 4)):
        loader = opened(dataclasses.replace(options, workers=workers))
        loader.load_state_dict(json.loads(json.dumps(state)))
        parts += take(loader, count)
        state = loader.state_dict()
    assert all(same(a, b) for a, b in zip(parts, whole, strict=True))


def test_workers_may_be_forked_after_the_loader_has_read_itself(
    make_shards: Make, opened: Callable[..., Loader]
) -> None:
    loader = opened(data(make_shards(40), workers=1, start_method="fork"))
    first = loader.batch_at(0)  # leaves threads behind, which do not survive the fork
    assert same(take(loader, 1)[0], first)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_r32_workers_can_be_started_in_every_way(make_shards: Make, opened: Callable[..., Loader], method: str) -> None:
    options = data(make_shards(10), MIXTURE)
    worked = take(opened(dataclasses.replace(options, workers=1, start_method=method)), 2)
    assert all(same(a, b) for a, b in zip(take(opened(options), 2), worked, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_r32_a_worker_that_dies_is_reported_however_it_was_started(make_shards: Make, method: str) -> None:
    index = open_shards([str(s) for s in make_shards(20)])
    plan = Plan(0, [SourceTable.from_shards(index)])
    loader = Loader(plan, [ShardReader(index)], [[Dies()]], 2, workers=1, start_method=method)
    with pytest.raises(ShardError, match=r"s-00000\.tar"):
        take(loader, 1)


def test_batch_size_changes_only_where_batches_end(make_shards: Make, opened: Callable[..., Loader]) -> None:
    shards = make_shards(30)
    keys = [[k for b in take(opened(data(shards, batch_size=size)), 24 // size) for k in b.keys] for size in (2, 6, 12)]
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("stop", [0, 1, 2, 5])
def test_resuming_equals_going_on_even_on_another_number_of_ranks(
    make_shards: Make, opened: Callable[..., Loader], stop: int
) -> None:
    options = data(make_shards(40))
    whole = take(opened(options), 7)
    first = opened(options)
    take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["position"] == stop * 6
    second = opened(options)
    second.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(take(second, 7 - stop), whole[stop:], strict=True))
    halves = [opened(options, rank=r, world=2) for r in (0, 1)]
    for half in halves:
        half.load_state_dict(state)
    keys = [a.keys + b.keys for a, b in zip(*(take(h, 7 - stop) for h in halves), strict=True)]
    assert keys == [b.keys for b in whole[stop:]]


def test_the_state_counts_batches_that_were_handed_out_not_prefetched(
    make_shards: Make, opened: Callable[..., Loader]
) -> None:
    loader = opened(data(make_shards(40), prefetch=4))
    batches = iter(loader)
    for n in range(1, 4):
        next(batches)
        assert loader.state_dict()["position"] == 6 * n
    batches.close()  # type: ignore[attr-defined]


def test_a_state_of_other_data_or_another_seed_is_refused_unless_allowed(
    make_shards: Make, opened: Callable[..., Loader]
) -> None:
    options = data(make_shards(20))
    state = opened(options).state_dict()
    with pytest.raises(ConfigError, match="allow_changed"):
        opened(options, seed=1).load_state_dict(state)
    other = opened(data(make_shards(20, folder="b", caption="x"), allow_changed=True))
    other.load_state_dict({**state, "position": 12})
    assert other.position == 12
    for bad in ({}, {**state, "position": -1}, {**state, "position": "3"}, {**state, "position": True}):
        with pytest.raises(ConfigError, match="position"):
            opened(options).load_state_dict(bad)


def synthetic(samples: int, shard: Path) -> ShardIndex:
    """An index of many samples that all lie at the same few bytes."""
    (real,) = open_shards(str(shard))
    one = {s: (m.offset, m.size, m.crc32) for s, m in real[0].members.items()}
    tree: dict[str, Any] = {
        "format": "mmdiff-shard-index",
        "version": 1,
        "size": real.size,
        "concepts": [],
        "ignored": {},
    }
    tree |= {"suffixes": list(one), "keys": [str(i) for i in range(samples)], "concept": [-1] * samples}
    tree |= {"member_ends": [len(one) * (i + 1) for i in range(samples)], "suffix": list(range(len(one))) * samples}
    for column, values in zip(("offset", "length", "crc32"), zip(*one.values(), strict=True), strict=True):
        tree[column] = list(values) * samples
    return parse_index(json.dumps(tree).encode(), str(shard))


def test_r05_resuming_reads_one_batch_wherever_it_is(make_shards: Make, opened: Callable[..., Loader]) -> None:
    (shard,) = make_shards(1)
    source = opened(data([shard]))
    index = synthetic(50_000, shard)
    read = {}
    for position in (10, 10**5, 10**9):
        reader = ShardReader([index])
        plan = Plan(0, [SourceTable.from_shards([index])])
        loader = Loader(plan, [reader], source._fetcher.tasks, 6)
        loader.load_state_dict({"position": position, "plan_hash": plan.hash})
        loader.batch_at(loader.position)
        read[position] = reader.bytes_read
        reader.close()
    assert len(set(read.values())) == 1
    assert read[10] <= 6 * shard.stat().st_size


def spoil(shards: list[Path], numbers: set[int], count: int, damaged: str) -> None:
    """Replace some samples' images or captions before packing."""
    rows = []
    for i in range(count):
        content = members(i)
        if i in numbers:
            content |= {"png": b"junk"} if damaged == "image" else {"json": b"{}"}
        rows.append((f"v1.5_{i:05d}", content))
    write_shards(rows, shards[0].parent, "s", max(20, count // 10))


@pytest.mark.parametrize(("damaged", "reason"), [("image", "undecodable_image"), ("caption", "missing_caption")])
def test_unusable_samples_are_counted_reported_and_replaced(
    make_shards: Make, opened: Callable[..., Loader], damaged: str, reason: str
) -> None:
    shards = make_shards(40)
    spoil(shards, {3, 17, 33}, 40, damaged)
    skips: list[Skip] = []
    loader = opened(data(shards, batch_size=8), on_skip=skips.append)
    batches = take(loader, 10)
    bad = {f"v1.5_{i:05d}" for i in (3, 17, 33)}
    assert all(len(b) == 8 and bad.isdisjoint(b.keys) for b in batches)
    assert len(skips) >= 6  # two epochs: each bad sample comes up twice, and perhaps again as a replacement
    assert {s.key for s in skips} == bad
    assert loader.skipped == {reason: len(skips)}
    assert all("s-0000" in s.url and s.url in s.message and s.key in s.message for s in skips)
    owed = [p for p in range(80) if _key(loader, p) in bad]
    assert sorted({s.position for s in skips}) == owed
    assert f"{len(skips)} samples skipped of 80 ({reason} {len(skips)})" == loader.skip_report()
    again = take(opened(data(shards, batch_size=8, workers=1, start_method="fork")), 10)
    assert [b.keys for b in again] == [b.keys for b in batches]


def _key(loader: Loader, position: int) -> str:
    draw = loader.plan.at(position)
    return loader._fetcher.readers[0].shards[draw.shard].key(draw.sample)


def test_r19_a_stretch_of_a_hundred_bad_samples_stops_with_a_list(
    make_shards: Make, opened: Callable[..., Loader]
) -> None:
    shards = make_shards(130, 20)
    loader = opened(data(shards, batch_size=10))
    numbers = {int(_key(loader, p)[-5:]) for p in range(20, 125)}
    spoil(shards, numbers, 130, "image")
    loader = opened(data(shards, batch_size=10))
    with pytest.raises(ShardError, match="in a row") as caught:
        take(loader, 13)
    assert caught.value.exit_code == 3
    assert loader.position < 130
    assert str(caught.value).count("  undecodable_image: ") == 100
    assert "mmdiff data lint" in str(caught.value)


def test_nothing_usable_stops_at_once(make_shards: Make, opened: Callable[..., Loader]) -> None:
    shards = make_shards(20)
    spoil(shards, set(range(20)), 20, "image")
    with pytest.raises(ShardError, match="100 samples in a row"):
        take(opened(data(shards)), 1)


def test_r19_few_bad_samples_pass_and_too_many_stop(make_shards: Make, opened: Callable[..., Loader]) -> None:
    shards = make_shards(200, 50)
    spoil(shards, {5}, 200, "caption")
    tasks = [{"type": "text", "fields": ["caption"]}]
    loader = opened(data(shards, tasks, batch_size=100, max_skip_fraction=0.02))
    take(loader, 12)
    assert loader.skipped["missing_text"] >= 6
    strict = opened(data(shards, tasks, batch_size=100, max_skip_fraction=0.001))
    with pytest.raises(ShardError, match=r"max_skip_fraction is 0\.001"):
        take(strict, 12)
    assert strict.position == 900  # judged from 1,000 samples on


def test_r19_five_bad_samples_in_ten_thousand_pass_with_exact_counts(
    make_shards: Make, opened: Callable[..., Loader]
) -> None:
    shards = make_shards(2000, 2000)
    spoil(shards, {5}, 2000, "caption")
    (tmp,) = {s.parent for s in shards}
    options = data([tmp], [{"type": "text", "fields": ["caption"]}], batch_size=100)
    skips: list[Skip] = []
    loader = opened(options, on_skip=skips.append)
    take(loader, 40)  # two epochs: 0.05 % of the samples
    loader.finish()
    assert loader.skipped == {"missing_text": len(skips)}
    assert {s.key for s in skips} == {"v1.5_00005"}
    assert sum(_key(loader, s.position) == s.key for s in skips) == 2
    assert loader.seen == 4000


def test_damage_done_after_indexing_is_skipped_by_reason(make_shards: Make, opened: Callable[..., Loader]) -> None:
    shards = make_shards(40)
    content = bytearray(shards[0].read_bytes())
    (index, _) = open_shards([str(s) for s in shards])
    member = index[4].members["json"]
    content[member.offset + 3] ^= 4
    shards[0].write_bytes(bytes(content))
    shards[1].write_bytes(shards[1].read_bytes()[:-30_000])
    with pytest.raises(ShardError, match="its index says"):
        opened(data(shards, damaged="refuse"))
    loader = opened(data(shards, max_skip_fraction=1.0))
    batches = take(loader, 7)
    assert loader.skipped.keys() == {"crc_mismatch", "shard_differs_from_index"}
    assert {k[-5:] for b in batches for k in b.keys} == {f"{i:05d}" for i in range(20) if i != 4}


def test_content_that_no_task_foresaw_is_counted_but_a_wrong_configuration_is_raised(make_shards: Make) -> None:
    index = open_shards([str(s) for s in make_shards(20)])
    plan = Plan(0, [SourceTable.from_shards(index)])

    def surprised(sample: object, generator: object) -> Any:
        raise ZeroDivisionError("one over nothing")

    def misconfigured(sample: object, generator: object) -> Any:
        raise ConfigError("wrong key")

    loader = Loader(plan, [ShardReader(index)], [[surprised]], 2)
    with pytest.raises(ShardError, match="unexpected_ZeroDivisionError"):
        take(loader, 1)
    with pytest.raises(ConfigError, match="wrong key"):
        take(Loader(plan, [ShardReader(index)], [[misconfigured]], 2), 1)


class Complains:
    """A task that finds the configuration wrong."""

    def __call__(self, sample: object, generator: object) -> Any:
        raise ConfigError("wrong key")


@pytest.mark.parametrize(
    ("task", "error", "word"), [(Dies(), ShardError, r"s-00000\.tar"), (Complains(), ConfigError, "^wrong")]
)
def test_r32_a_worker_that_dies_or_raises_is_reported(
    make_shards: Make, task: Any, error: type[MmdiffError], word: str
) -> None:
    index = open_shards([str(s) for s in make_shards(20)])
    plan = Plan(0, [SourceTable.from_shards(index)])
    loader = Loader(plan, [ShardReader(index)], [[task]], 2, workers=1, start_method="fork")
    with pytest.raises(error, match=word):
        take(loader, 1)


def test_leaving_a_loop_ends_the_thread(make_shards: Make, opened: Callable[..., Loader]) -> None:
    before = set(threading.enumerate())  # others may end meanwhile
    for batch in opened(data(make_shards(20))):
        assert len(batch) == 6
        break
    batches = iter(opened(data(make_shards(20))))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_a_process_ends_cleanly_in_the_middle_of_prefetching(make_shards: Make, repository: Path) -> None:
    (shard,) = make_shards(20)
    code = (
        "from data_pipelines.loader import *; from mmdiff.batch import Layout; from mmdiff.config import parse\n"
        f"source = {{'shards': [{str(shard)!r}], 'tasks': [{{'type': 'image'}}]}}\n"
        "options = parse(DataConfig, {'sources': [source], 'batch_size': 4}, 'x')\n"
        "it = iter(open_loader(options, None, Layout(), seed=0)); print(len(next(it)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


def test_sources_are_mixed_by_weight_and_balanced(make_shards: Make, tokenizer: Tokenizer, layout: Layout) -> None:
    one, two = make_shards(20, folder="one"), make_shards(20, folder="two")
    sources = [
        {"shards": [str(one[0])], "tasks": [{"type": "image"}], "weight": 3, "balance": "concept"},
        {"shards": [str(two[0])], "tasks": [{"type": "text"}]},
    ]
    loader = open_loader(parse(DataConfig, {"sources": sources, "batch_size": 20}, "x"), tokenizer, layout, seed=0)
    (batch,) = take(loader, 1)
    assert batch.tasks.count("image") == 15
    keys = [int(k[-5:]) % 5 for k, t in zip(batch.keys, batch.tasks, strict=True) if t == "image"]
    assert [sorted(keys[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3


def test_a_batch_that_ranks_cannot_share_is_refused(make_shards: Make, opened: Callable[..., Loader]) -> None:
    with pytest.raises(ConfigError, match="divide evenly"):
        opened(data(make_shards(20), batch_size=5), world=2)


def test_the_configuration_survives_yaml(make_shards: Make, tmp_path: Path) -> None:
    options = data(make_shards(3), MIXTURE, seed=4)
    (tmp_path / "c.yaml").write_text(dump(options))
    assert load(DataConfig, tmp_path / "c.yaml") == options
    for key, value in (
        ("sources", []),
        ("batch_size", 0),
        ("workers", -1),
        ("max_skip_fraction", 2),
        ("damaged", "no"),
    ):
        with pytest.raises(ConfigError, match=key):
            load(DataConfig, tmp_path / "c.yaml", [f"{key}={value}"])


def test_a_short_run_is_judged_when_it_ends(make_shards: Make, opened: Callable[..., Loader]) -> None:
    shards = make_shards(40)
    spoil(shards, {3, 17, 33}, 40, "image")
    loader = opened(data(shards))
    take(loader, 10)
    with pytest.raises(ShardError, match="max_skip_fraction"):
        loader.finish()
