"""What shards hold: counts and sizes of images, texts, concepts and questions."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmdiff.errors import SampleError

from .reader import IMAGE_SUFFIXES, Sample, ShardReader
from .source import open_shards

__all__ = ["Stats", "stats", "texts_of"]

MOST_COMMON = 10
"""Entries listed of every count."""

_PROMPTS = ("Describe this image.",)


@dataclass(frozen=True)
class Stats:
    """Counts over shards; every dictionary holds the commonest `MOST_COMMON` entries.

    Attributes:
        shards: Number of shards.
        samples: Number of samples.
        unusable: Samples that could not be read.
        bytes: Bytes of the shards.
        members: Samples by suffix of a member.
        image_sizes: Images by ``"WIDTHxHEIGHT"``, read from their headers.
        captions: Samples with a caption.
        distinct_captions: Different captions.
        caption_words: Mean words per caption.
        concepts: Number of different concepts.
        commonest_concepts: Samples by concept.
        questions: Questions by kind.
        answers: Answers by text.
    """

    shards: int
    samples: int
    unusable: int
    bytes: int
    members: dict[str, int]
    image_sizes: dict[str, int]
    captions: int
    distinct_captions: int
    caption_words: float
    concepts: int
    commonest_concepts: dict[str, int]
    questions: dict[str, int]
    answers: dict[str, int]

    def __str__(self) -> str:
        return "\n".join(f"{name.replace('_', ' '):20} {_shown(value)}" for name, value in asdict(self).items())


def stats(
    shards: str | Path | Sequence[str | Path],
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> Stats:
    """Count what shards hold.

    Args:
        shards: Shards, as `source.open_shards` takes them.
        progress: Wraps the list of samples, to show a bar.
    """
    opened = open_shards(shards)
    reader = ShardReader(opened)
    c = {name: Counter[str]() for name in ("members", "sizes", "captions", "concepts", "kinds", "answers")}
    unusable = 0
    numbers = [(s, n) for s, index in enumerate(opened) for n in range(len(index))]
    for shard, number in progress(numbers):
        try:
            _count(reader.read(shard, number), c)
        except SampleError:
            unusable += 1
    reader.close()
    captions = c["captions"].total()
    words = sum(len(text.split()) * n for text, n in c["captions"].items())
    return Stats(
        shards=len(opened),
        samples=len(numbers),
        unusable=unusable,
        bytes=sum(s.size for s in opened),
        members=_top(c["members"]),
        image_sizes=_top(c["sizes"]),
        captions=captions,
        distinct_captions=len(c["captions"]),
        caption_words=round(words / max(captions, 1), 2),
        concepts=len(c["concepts"]),
        commonest_concepts=_top(c["concepts"]),
        questions=_top(c["kinds"]),
        answers=_top(c["answers"]),
    )


def texts_of(shards: str | Path | Sequence[str | Path]) -> Iterator[str]:
    """Every text of some shards: captions, questions, answers, conversations, and the tasks' own requests.

    Samples that cannot be read are passed over: a tokenizer does not need them.
    """
    yield from _PROMPTS
    reader = ShardReader(open_shards(shards), suffixes=("json", "txt"))
    for shard, index in enumerate(reader.shards):
        for number in range(len(index)):
            try:
                yield from _texts(reader.read(shard, number))
            except SampleError:
                continue
    reader.close()


def _texts(sample: Sample) -> Iterator[str]:
    info = sample.info()
    found: list[Any] = [sample.text(), info.get("caption"), info.get("text"), info.get("concept")]
    for name in ("captions", "tags"):
        found += info[name] if isinstance(info.get(name), list) else []
    for entry in info["qa"] if isinstance(info.get("qa"), list) else []:
        found += entry[:2] if isinstance(entry, list) else []
    for turn in info["conversations"] if isinstance(info.get("conversations"), list) else []:
        found.append(turn.get("value") if isinstance(turn, dict) else None)
    yield from (text for text in found if isinstance(text, str) and text)


def _count(sample: Sample, c: dict[str, Counter[str]]) -> None:
    c["members"].update(sample.members.keys())
    if any(s in sample.members for s in IMAGE_SUFFIXES):
        c["sizes"][_image_size(sample)] += 1
    info = sample.info()
    caption = info.get("caption", sample.text())
    if isinstance(caption, str) and caption:
        c["captions"][caption] += 1
    if isinstance(info.get("concept"), str):
        c["concepts"][info["concept"]] += 1
    for entry in info["qa"] if isinstance(info.get("qa"), list) else []:
        if isinstance(entry, list) and len(entry) >= 2:
            c["answers"][str(entry[1])] += 1
            c["kinds"][str(entry[2]) if len(entry) > 2 else ""] += 1


def _image_size(sample: Sample) -> str:
    try:
        with Image.open(io.BytesIO(sample.image()), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as image:
            return f"{image.width}x{image.height}"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError("undecodable_image", f"{sample}: {type(error).__name__}") from None


def _top(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:MOST_COMMON])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k or '(none)'} {v:,}" for k, v in value.items()) or "none"
    return f"{value:,}"
