"""Shards read from front to back: what the lesser way still holds."""

from __future__ import annotations

import itertools
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines import ranges
from data_pipelines.loader import DataConfig, Loader, open_loader
from data_pipelines.pack import write_shards
from data_pipelines.ranges import RangeReader
from data_pipelines.reader import iter_samples
from data_pipelines.streams import samples_of
from mmdiff.batch import Batch, Layout
from mmdiff.config import parse
from mmdiff.errors import ConfigError, ShardError
from mmdiff.text import Tokenizer
from tests.helpers.range_server import Server

from .conftest import members

Make = Callable[..., list[Path]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(ranges, "PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "shards").mkdir()
    running = Server(tmp_path / "shards")
    running.ranges = False
    yield running
    running.close()


def opened(
    names: list[Any], tokenizer: Tokenizer, layout: Layout, rank: int = 0, world: int = 1, **more: Any
) -> Loader:
    source = {"shards": [str(n) for n in names], "tasks": [{"type": "caption", "weight": 2}, {"type": "text"}]}
    tree = {"sources": [source], "batch_size": 6, "stream": True, "stream_buffer": 8, **more}
    return open_loader(parse(DataConfig, tree, "x"), tokenizer, layout, seed=0, rank=rank, world=world)


def take(loader: Loader, count: int) -> list[Batch]:
    batches = iter(loader)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(
    make_shards: Make, tokenizer: Tokenizer, layout: Layout
) -> None:
    loader = opened(make_shards(36, 10), tokenizer, layout)
    keys = [k for b in take(loader, 12) for k in b.keys]
    assert sorted(keys[:36]) == sorted(keys[36:]) == [f"v1.5_{i:05d}" for i in range(36)]
    assert keys[:36] != keys[36:] != sorted(keys[36:])
    assert [t for b in take(loader, 1) for t in b.tasks].count("caption") == 4


def test_ranks_share_the_same_batches_and_a_resumed_loader_goes_on_exactly(
    make_shards: Make, tokenizer: Tokenizer, layout: Layout
) -> None:
    shards = make_shards(36, 10)
    whole = take(opened(shards, tokenizer, layout), 9)
    halves = [take(opened(shards, tokenizer, layout, rank=r, world=2), 9) for r in (0, 1)]
    assert [a.keys + b.keys for a, b in zip(*halves, strict=True)] == [b.keys for b in whole]
    first = opened(shards, tokenizer, layout)
    take(first, 4)
    second = opened(shards, tokenizer, layout)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for a, b in zip(take(second, 5), whole[4:], strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.ids, b.ids)
    assert second.batch_at(0).keys == whole[0].keys
    with pytest.raises(ConfigError, match="allow_changed"):
        opened(shards, tokenizer, layout, stream_buffer=9).load_state_dict(first.state_dict())


def test_samples_are_those_of_the_indexed_reader(make_shards: Make) -> None:
    (shard,) = make_shards(12)
    streamed = list(samples_of(RangeReader().forward(str(shard)), "x"))
    assert {s.key: s.members for s in streamed} == {s.key: s.members for s, _ in iter_samples(str(shard)) if s}


def test_r07_a_cut_stream_is_never_read_as_if_it_were_whole(make_shards: Make, tmp_path: Path) -> None:
    (shard,) = make_shards(4)
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        last = max(m.offset_data + m.size for m in tar)
    for cut in range(0, last, 512):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match="cut"):
            list(samples_of(RangeReader().forward(str(shard)), "x"))


def test_r06_damaged_streams_yield_samples_or_an_error_and_nothing_else(make_shards: Make) -> None:
    (shard,) = make_shards(6)
    whole, draw = shard.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 10, 100])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        shard.write_bytes(bytes(data))
        try:
            assert len(list(samples_of(RangeReader().forward(str(shard)), "x"))) <= 12
        except ShardError:
            refused += 1
    assert refused > 20


def test_servers_without_ranges_can_be_streamed_through_faults(
    server: Server, make_shards: Make, tokenizer: Tokenizer, layout: Layout
) -> None:
    shards = make_shards(36, 10)
    local = take(opened(shards, tokenizer, layout), 6)
    names = [f"{server.url}/{s.name}" for s in shards]
    server.faults[:] = ["500", "cut", "reset", "cut", "503"]
    remote = take(opened(names, tokenizer, layout), 6)
    assert server.faults == []
    assert sorted(k for b in remote for k in b.keys) == sorted(k for b in local for k in b.keys)
    with pytest.raises(ShardError, match=r"does not serve ranges; .*data\.stream"):
        opened(names, tokenizer, layout, stream=False)
    with pytest.raises(ShardError, match="does not exist"):
        take(opened([f"{server.url}/gone.tar"], tokenizer, layout), 1)
    server.faults[:] = ["500"] * 40
    with pytest.raises(ShardError, match="5 tries"):
        take(opened(names, tokenizer, layout), 1)


def test_unusable_samples_give_way_to_a_neighbour_and_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, layout: Layout
) -> None:
    rows = [(f"{i:02d}", members(i) | ({"json": b"{"} if i % 5 == 0 else {})) for i in range(20)]
    write_shards(rows, tmp_path, "s", 7)
    loader = opened([tmp_path], tokenizer, layout, batch_size=10, max_skip_fraction=1)
    batches = take(loader, 4)
    assert [len(b) for b in batches] == [10] * 4
    assert loader.skipped == {"bad_json": 8}
    assert not {k for b in batches for k in b.keys} & {"00", "05", "10", "15"}
    write_shards([(k, m | {"json": b"{"}) for k, m in rows], tmp_path / "none", "s", 7)
    with pytest.raises(ShardError, match="bad_json"):
        take(opened([tmp_path / "none"], tokenizer, layout), 30)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"workers": 1}, "one thread"), ({"max_tokens": 9}, "measured ahead"), ({"balance": "concept"}, "balanced")],
)
def test_what_a_stream_cannot_do_is_refused(
    make_shards: Make, tokenizer: Tokenizer, layout: Layout, changes: dict[str, Any], word: str
) -> None:
    source = {
        "shards": [str(make_shards(3)[0])],
        "tasks": [{"type": "image"}],
        "balance": changes.pop("balance", "none"),
    }
    tree = {"sources": [source], "batch_size": 8, "stream": True, **changes}
    with pytest.raises(ConfigError, match=word):
        open_loader(parse(DataConfig, tree, "x"), tokenizer, layout, seed=0)
