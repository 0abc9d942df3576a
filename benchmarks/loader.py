"""Samples per second of our indexed reader beside webdataset's own pipeline, on the same shards in the same run.

Run: ``python benchmarks/loader.py [SHARDS]``. Both sides do the same work on one thread of one process: read every
sample's bytes, then read and decode image and JSON. Ours reads in random order and checks every member's crc32;
webdataset reads sequentially through a shuffle buffer and checks nothing. The ratio is ours / theirs.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch

from data_pipelines.plan import Plan, SourceTable
from data_pipelines.reader import ShardReader
from data_pipelines.source import open_shards
from mmdiff.images import decode, to_pixels

ROUNDS = 5
SIDE = 64


def ours(shards: str) -> Callable[[], Iterator[tuple[bytes, bytes]]]:
    """Image and JSON bytes in the plan's order."""
    indexes = open_shards(shards)
    plan, reader = Plan(0, [SourceTable.from_shards(indexes)]), ShardReader(indexes, ("webp", "png", "jpg", "json"))
    total = sum(len(i) for i in indexes)

    def epoch() -> Iterator[tuple[bytes, bytes]]:
        for position in range(total):
            draw = plan.at(position)
            sample = reader.read(draw.shard, draw.sample)
            yield sample.image(), sample.members["json"]

    return epoch


def theirs(shards: str) -> Callable[[], Iterator[tuple[bytes, bytes]]]:
    """The same through webdataset."""
    import webdataset

    urls = [index.url for index in open_shards(shards)]

    def epoch() -> Iterator[tuple[bytes, bytes]]:
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(1000, seed=0)
        for sample in dataset:
            yield next(sample[s] for s in ("webp", "png", "jpg") if s in sample), sample["json"]

    return epoch


def work(samples: Iterable[tuple[bytes, bytes]]) -> int:
    """Decode everything; returns the number of samples."""
    count = 0
    for image, info in samples:
        to_pixels(decode(image), SIDE)
        json.loads(info)
        count += 1
    return count


def speed(task: Callable[[], int]) -> float:
    """Best samples per second of several rounds."""
    best = 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        count = task()
        best = max(best, count / (time.perf_counter() - start))
    return best


def main(shards: str = "embedded:emoji/train") -> None:
    """Measure and print a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    a, b = ours(shards), theirs(shards)
    rows = [
        ("bytes only", speed(lambda: sum(1 for _ in a())), speed(lambda: sum(1 for _ in b()))),
        ("decoded", speed(lambda: work(a())), speed(lambda: work(b()))),
    ]
    sys.stdout.write(f"{'samples/s':12} {'ours':>10} {'webdataset':>11} {'ratio':>6}\n")
    for name, x, y in rows:
        sys.stdout.write(f"{name:12} {x:10,.0f} {y:11,.0f} {x / y:6.2f}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
