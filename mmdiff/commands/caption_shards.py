"""``mmdiff caption MODEL SHARDS… --out DIR``: shards in, shards out.

Every shard gives one of the same name: the same samples, with a new ``caption`` in their JSON. What has been described
is written down after every pass, so that a killed run loses one pass; a finished shard is recognised by its index and
left alone. Several processes take turns with the shards.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.index import ShardIndex, index_name
from data_pipelines.pack import write_shard
from data_pipelines.reader import Sample, ShardReader
from data_pipelines.source import open_shards
from mmdiff.commands.workers import BatchSize, differing, out_of_memory
from mmdiff.errors import ConfigError, SampleError, ShardError
from mmdiff.io.atomic import load_json, save_json

__all__ = ["BulkReport", "caption_shards"]

_MANIFEST = "captions.json"


@dataclass(frozen=True, kw_only=True)
class BulkReport:
    """What came of `caption_shards`.

    Attributes:
        out: Folder of the shards.
        shards: Shards of this process, finished ones included.
        samples: Samples in them.
        captioned: Samples that this run described.
        skipped: Why samples are missing from the output -> how many, over all shards of this process.
        batch: Pictures per pass at the end.
        seconds: Duration.
    """

    out: str
    shards: int
    samples: int
    captioned: int
    skipped: dict[str, int]
    batch: int
    seconds: float


def caption_shards(
    describe: Any,
    shards: Sequence[str],
    out: Path,
    settings: Mapping[str, Any],
    *,
    batch: int | None = None,
    field: str = "caption",
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> BulkReport:
    """Describe every picture of some shards.

    Args:
        describe: Maps a list of pictures to a list of texts, item by item.
        shards: As `data_pipelines.source.open_shards` takes them.
        out: Folder, made if it does not exist.
        settings: What decides the texts, plain data; a folder of other settings is refused.
        batch: Pictures per pass; None finds the fastest number.
        field: JSON field that gets the text.
        rank: Number of this process among ``world``.
        world: Processes that share the shards.
        progress: Show a bar on stderr.

    Raises:
        ConfigError: The folder holds captions of other settings, two shards have one name, or memory ran out for one
            picture.
        ShardError: A shard cannot be read, or none of its samples can be described.
    """
    started, found = time.perf_counter(), open_shards(shards)
    _agree(out, {**settings, "field": field}, main=rank == 0)
    names = _names(found)
    size, done, skipped, samples = BatchSize(batch), 0, Counter[str](), 0
    mine = list(zip(found, names, strict=True))[rank::world]
    for index, name in mine:
        journal = _Journal(out / f".{name}.jsonl", out / f"{name}.skipped.jsonl")
        samples += len(index)
        if not Path(index_name(out / name)).is_file():
            reader = ShardReader([index])
            done += _describe(describe, reader, index, journal, size, progress)
            _assemble(reader, index, journal, out / name, field)
        skipped.update(journal.skips())
    return BulkReport(
        out=str(out),
        shards=len(mine),
        samples=samples,
        captioned=done,
        skipped=dict(sorted(skipped.items())),
        batch=size.size,
        seconds=round(time.perf_counter() - started, 3),
    )


class _Journal:
    """What is known of a shard's samples, a line each; ``skips`` outlives the shard, the rest does not.

    Args:
        path: The lines while the shard is not finished.
        left_out: Those of samples that were left out, once it is.
    """

    def __init__(self, path: Path, left_out: Path) -> None:
        self.path, self.left_out = path, left_out

    def read(self) -> dict[int, dict[str, Any]]:
        """Number of the sample -> its line; the half line of a killed run is cut off."""
        found: dict[int, dict[str, Any]] = {}
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else ():
            try:
                tree = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            found[tree["n"]] = tree
            whole += len(line)
        if self.path.is_file():
            os.truncate(self.path, whole)
        return found

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines down; they are on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, skips: Sequence[Mapping[str, Any]]) -> None:
        """The shard is written: only what was left out is still of interest."""
        if skips:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skips)
            self.left_out.write_text(text, encoding="utf-8")
        self.path.unlink(missing_ok=True)

    def skips(self) -> Counter[str]:
        """Reasons of the samples that were left out of a finished shard."""
        lines = self.left_out.read_text("utf-8").splitlines() if self.left_out.is_file() else []
        return Counter(json.loads(line)["reason"] for line in lines)


def _describe(
    describe: Any, reader: ShardReader, index: ShardIndex, journal: _Journal, size: BatchSize, progress: bool
) -> int:
    """Describe what the journal does not know yet; the number of new texts."""
    from tqdm import tqdm

    known, new = journal.read(), 0
    todo = [n for n in range(len(index)) if n not in known]
    with tqdm(
        total=len(index), initial=len(known), unit="image", desc=journal.left_out.stem, disable=not progress
    ) as bar:
        while todo:
            part, todo = todo[: size.size], todo[size.size :]
            began = time.perf_counter()
            try:
                lines = list(_lines(describe, reader, index, part))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                size.was_too_large(error)
                todo = part + todo
                continue
            size.went_well(len(part), time.perf_counter() - began)
            journal.add(lines)
            new += sum("text" in line for line in lines)
            bar.update(len(part))
    return new


def _lines(describe: Any, reader: ShardReader, index: ShardIndex, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    from mmdiff.images import decode

    pictures, places = [], []
    for n in numbers:
        try:
            pictures.append(decode(reader.read(0, n).image()))
            places.append(n)
        except SampleError as error:
            yield {"n": n, "key": index.key(n), "reason": error.reason, "message": str(error)}
    for n, text in zip(places, describe(pictures) if pictures else [], strict=True):
        yield {"n": n, "key": index.key(n), "text": text}


def _assemble(reader: ShardReader, index: ShardIndex, journal: _Journal, path: Path, field: str) -> None:
    """Write the shard of all that was described."""
    known = journal.read()
    told = {n: line["text"] for n, line in known.items() if "text" in line}
    skips = [line for line in known.values() if "text" not in line]
    if not told:
        raise ShardError(f"{index.url}: none of {len(index)} samples could be described; first: {skips[0]['message']}")
    write_shard(path, (_with(reader.read(0, n), field, told[n]) for n in sorted(told)))
    journal.finish(skips)


def _with(sample: Sample, field: str, text: str) -> tuple[str, dict[str, bytes]]:
    try:
        info = sample.info()
    except SampleError:
        info = {}  # a JSON that cannot be read held nothing worth keeping
    tree = json.dumps({**info, field: text}, ensure_ascii=False)
    return sample.key, {**sample.members, "json": tree.encode()}


def _names(found: Sequence[ShardIndex]) -> list[str]:
    names = [index.url.rstrip("/").rpartition("/")[2] for index in found]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"several shards are called {twice[0]}; caption them into different folders")
    return names


def _agree(out: Path, settings: dict[str, Any], *, main: bool) -> None:
    """Write the settings down, or make sure that the folder's are the same."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / _MANIFEST
    if path.is_file():
        wrong = differing(settings, load_json(path))
        if wrong:
            raise ConfigError(
                f"{out}: holds captions of other settings ({', '.join(wrong)} differ); give another folder"
            )
    elif main:
        save_json(path, settings)
