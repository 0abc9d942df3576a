"""Reading shards: ours beside webdataset's own pipeline, beside raw ``pread``, and decoding beside Pillow alone.

Run: ``python benchmarks/loader.py [--samples N] [--bytes N] [--rounds N] [--folder DIR]``. All runs in one process, in
turns within each round, on the same shards; printed are the medians over the rounds and their ratios.

* reading: every sample's bytes in shuffled order. Ours follows the plan (any order, resumable) and checks every crc32;
  webdataset reads sequentially through a shuffle buffer of 1,000 and checks nothing; raw is ``os.pread`` of the same
  bytes in the same order from a list of places, batch by batch, and nothing else; raw+crc32 also computes the checksum
  of each, which bounds every reader that checks in one thread. Once from the page cache, by the clock and per second of
  processor time (which other programs on the machine disturb less), and once from the disk, the shards being dropped
  from the cache before every epoch; there ours asks for the next batch while it reads one, as the loader does.
* decoding: bytes to [3, S, S] floats. Ours with all limits, orientation and alpha; Pillow's open, convert, resize and a
  copy to a tensor; torchvision's decoder and resize, if it is there.
* resuming: from an opened loader to the first batch at position 0 and at position 10^6.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipelines.loader import DataConfig, open_loader
from data_pipelines.pack import write_shards
from data_pipelines.plan import Plan, SourceTable
from data_pipelines.reader import Sample, ShardReader
from data_pipelines.source import open_shards
from mmdiff.batch import Layout
from mmdiff.config import parse
from mmdiff.images import decode, to_pixels

SIDE, BATCH = 224, 64


def picture(number: int, size: int) -> bytes:
    """A photograph-like JPEG of about ``size`` bytes."""
    draw = np.random.RandomState(number)
    base = Image.fromarray(draw.randint(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
        (400, 300), Image.Resampling.BICUBIC
    )
    noise = draw.randint(-12, 12, (300, 400, 3))
    image = Image.fromarray((np.asarray(base, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8))
    out = io.BytesIO()
    for quality in (90, 80, 70, 60, 50, 40, 30, 20):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        if out.tell() <= size:
            break
    return out.getvalue()


def make(folder: Path, samples: int, size: int) -> str:
    """Shards of that many samples; a few pictures repeat."""
    pictures = [picture(i, size) for i in range(32)]

    def rows() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(samples):
            yield f"{i:08d}", {"jpg": pictures[i % 32], "json": json.dumps({"caption": f"picture {i}"}).encode()}

    write_shards(rows(), folder, "bench", 1000)
    return str(folder)


def ours(shards: str) -> Callable[[], int]:
    """An epoch in the plan's order."""
    indexes = open_shards(shards)
    plan, reader = Plan(0, [SourceTable.from_shards(indexes)]), ShardReader(indexes)
    total = sum(len(i) for i in indexes)

    def batches() -> Iterator[list[tuple[int, int]]]:
        for start in range(0, total, 8 * BATCH):
            draws = plan.many(range(start, min(start + 8 * BATCH, total)))
            yield from ([draw[2:4] for draw in draws[i : i + BATCH]] for i in range(0, len(draws), BATCH))
        yield []

    def epoch() -> int:
        count = 0
        for now, after in itertools.pairwise(batches()):
            reader.prepare(after)
            count += sum(isinstance(sample, Sample) for sample in reader.read_many(now))
        return count

    return epoch


def webdatasets(shards: str) -> Callable[[], int]:
    """An epoch through webdataset, shuffled."""
    import webdataset

    urls = [index.url for index in open_shards(shards)]

    def epoch() -> int:
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(1000, seed=0)
        return sum(1 for _ in dataset)

    return epoch


def raw(shards: str, checked: bool = False) -> Callable[[], int]:
    """The same bytes in the same order as `ours`, by nothing but pread (and ``checked`` by crc32)."""
    indexes = open_shards(shards)
    plan = Plan(0, [SourceTable.from_shards(indexes)])
    files = [os.open(index.url, os.O_RDONLY) for index in indexes]
    places = []
    for position in range(sum(len(i) for i in indexes)):
        draw = plan.at(position)
        members = indexes[draw.shard][draw.sample].members.values()
        start, end = min(m.offset for m in members), max(m.offset + m.size for m in members)
        places.append((files[draw.shard], end - start, start))

    def epoch() -> int:
        count = 0
        for start in range(0, len(places), BATCH):
            # Kept until the batch is whole, as every loader must: a single buffer would never leave the cache.
            batch = [os.pread(*place) for place in places[start : start + BATCH]]
            count += sum(zlib.crc32(data) >= 0 for data in batch) if checked else len(batch)
        return count

    return epoch


def decoders(shards: str, count: int = 256) -> dict[str, Callable[[], int]]:
    """Ways to turn the same encoded pictures into tensors."""
    reader = ShardReader(open_shards(shards))
    data = [reader.read(0, i).members["jpg"] for i in range(count)]

    def run(one: Callable[[bytes], torch.Tensor]) -> Callable[[], int]:
        return lambda: sum(one(d).shape[-1] == SIDE for d in data)

    def pillow(one: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(one)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)

    found = {"ours": run(lambda d: to_pixels(decode(d), SIDE)), "pillow": run(pillow)}
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2 import functional
    except ImportError:
        return found

    def vision(one: bytes) -> torch.Tensor:
        image = decode_jpeg(torch.frombuffer(bytearray(one), dtype=torch.uint8), ImageReadMode.RGB)
        # Bicubic with antialiasing, as the others; on bytes, which is its fastest way.
        small = functional.resize(image, [SIDE, SIDE], functional.InterpolationMode.BICUBIC, antialias=True)
        return small.float().div_(127.5).sub_(1)

    return {**found, "torchvision": run(vision)}


def resume(shards: str, position: int) -> float:
    """Seconds from a saved position to the first batch."""
    source = {"shards": [shards], "tasks": [{"type": "image"}]}
    loader = open_loader(
        parse(DataConfig, {"sources": [source], "batch_size": 32}, "x"), None, Layout(image_size=64), seed=0
    )
    start = time.perf_counter()
    loader.load_state_dict({"position": position, "plan_hash": loader.plan.hash})
    batches: Any = iter(loader)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return seconds


def drop(shards: str) -> None:
    """Have the system forget the shards' pages; what is dirty is written first."""
    for index in open_shards(shards):
        descriptor = os.open(index.url, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def medians(
    tasks: dict[str, Callable[[], int]], rounds: int, before: Callable[[], None] = lambda: None
) -> tuple[dict[str, float], dict[str, float]]:
    """Median samples per second by the clock and of processor time of each task; they take turns in every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            before()
            start, used = time.perf_counter(), time.process_time()
            count = task()
            clock, work = time.perf_counter() - start, time.process_time() - used
            found[name].append((count / clock, count / work))
    by_clock, by_work = (
        {name: statistics.median(speed[kind] for speed in speeds) for name, speeds in found.items()} for kind in (0, 1)
    )
    return by_clock, by_work


def table(title: str, speeds: dict[str, float]) -> Iterable[str]:
    """Lines of one comparison: speeds, and ours over each of the others."""
    yield title
    for name, speed in speeds.items():
        ratio = "" if name == "ours" else f"   ours / {name} {speeds['ours'] / speed:6.2f}"
        yield f"  {name:12} {speed:10,.0f}{ratio}"


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--bytes", type=int, default=22_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the shards are made; default: the system's temporary folder")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shards = make(Path(folder), options.samples, options.bytes)
        readers = {"ours": ours(shards), "webdataset": webdatasets(shards), "raw": raw(shards)}
        readers["raw+crc32"] = raw(shards, checked=True)
        warm, work = medians(readers, options.rounds)
        cold, _ = medians(readers, options.rounds, lambda: drop(shards))
        decoding, _ = medians(decoders(shards), options.rounds)
        seconds = {p: statistics.median(resume(shards, p) for _ in range(options.rounds)) for p in (0, 10**6)}
    ms = [f"position {p:,}: {s * 1000:.1f} ms" for p, s in seconds.items()]
    lines = itertools.chain(
        table("reading from the page cache, samples/s", warm),
        table("reading from the page cache, samples per second of processor time", work),
        table("reading from the disk, samples/s", cold),
        table(f"decoding to {SIDE} pixels, samples/s", decoding),
        [f"first batch after resuming: {', '.join(ms)}   ratio {seconds[10**6] / seconds[0]:.2f}"],
    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
