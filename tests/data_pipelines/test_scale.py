"""Long runs and large indexes: memory stays flat, access stays right."""

from __future__ import annotations

import gc
import io
import itertools
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.index import ShardIndex, build_index, read_index, write_index
from data_pipelines.loader import DataConfig, open_loader
from data_pipelines.pack import write_shards
from data_pipelines.plan import Plan, SourceTable
from mmdiff.batch import Layout
from mmdiff.config import parse

MIB = 1 << 20


def resident() -> int:
    """Bytes of memory that this process holds now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_r21_memory_stays_flat_over_200_000_samples(tmp_path: Path) -> None:
    draw = np.random.RandomState(0)
    rows = []
    for i in range(200):
        out = io.BytesIO()
        Image.fromarray(draw.randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(out, "JPEG")
        rows.append((f"k{i}", {"jpg": out.getvalue(), "txt": b"a thing"}))
    shards = [str(s) for s in write_shards(rows, tmp_path, "s", 50)]
    source = {"shards": shards, "tasks": [{"type": "image", "augment": {"flip": True}}]}
    options = parse(DataConfig, {"sources": [source], "batch_size": 50, "cache_decoded": False}, "test")
    loader = open_loader(options, None, Layout(image_size=64), seed=0)
    batches = iter(loader)
    for _ in itertools.islice(batches, 400):
        pass
    early = resident()
    for _ in itertools.islice(batches, 3600):
        pass
    late = resident()
    batches.close()  # type: ignore[attr-defined]
    assert loader.position == 200_000
    assert late - early <= max(30 * MIB, early // 20)


def synthetic(number: int, samples: int) -> ShardIndex:
    """An index of a shard of pictures and texts that does not exist, by formula."""
    keys = [f"{number:03d}-{i:06d}".encode() for i in range(samples)]
    place = np.arange(2 * samples, dtype=np.int64)
    return ShardIndex(
        url=f"{number}.tar",
        size=4096 * samples,
        keys=b"".join(keys),
        key_ends=np.cumsum([len(k) for k in keys], dtype=np.int32),
        member_ends=np.arange(2, 2 * samples + 2, 2, dtype=np.int32),
        suffix=(place % 2).astype(np.int8),
        offset=place * 2048 + 512,
        length=np.full(2 * samples, 1000, np.int32),
        crc32=(place + number).astype(np.uint32),
        suffixes=("jpg", "txt"),
        concept=np.full(samples, -1, np.int32),
        concepts=(),
    )


@pytest.mark.slow
def test_r23_a_million_samples_are_indexed_in_64_mib_and_found_again(tmp_path: Path) -> None:
    shards, samples = 50, 20_000
    for number in range(shards):
        write_index(synthetic(number, samples), tmp_path / f"{number}.tar.idx.json")
    before = resident()
    indexes = [read_index(tmp_path / f"{n}.tar.idx.json", url=f"{n}.tar") for n in range(shards)]
    plan = Plan(0, [SourceTable.from_shards(indexes)])
    assert resident() - before < 64 * MIB
    draw = random.Random(0)
    for _ in range(10_000):
        number, i = draw.randrange(shards), draw.randrange(samples)
        entry = indexes[number][i]
        assert entry.key == f"{number:03d}-{i:06d}"
        assert entry.members["txt"] == ((2 * i + 1) * 2048 + 512, 1000, 2 * i + 1 + number)
        assert plan.sources[0].locate(number * samples + i) == (number, i)
    found = {plan.at(p)[2:4] for p in range(10**9, 10**9 + 1000)}
    assert len(found) == 1000


@pytest.mark.slow
def test_r23_an_index_is_built_in_memory_that_its_shard_bounds(tmp_path: Path) -> None:
    def make(samples: int) -> Path:
        path = tmp_path / f"{samples}.tar"
        with tarfile.open(path, "w") as out:
            for i in range(samples):
                for suffix in ("jpg", "txt"):
                    info = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    info.size = 100
                    out.addfile(info, io.BytesIO(bytes(100)))
        return path

    shard = make(50_000)
    before = resident()
    index = build_index(shard)
    assert len(index) == 50_000
    assert resident() - before < 64 * MIB
    assert index[49_999].key == "00049999"
