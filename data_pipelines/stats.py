"""What shards hold: counts and sizes of images, lengths of texts and answers, concepts, questions, a few pictures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmdiff.errors import SampleError
from mmdiff.images import Limits, decode

from .reader import IMAGE_SUFFIXES, TEXT_SUFFIXES, Sample, ShardReader
from .source import open_shards

__all__ = ["Stats", "has_image", "histogram", "stats", "texts_of"]

MOST_COMMON = 10
"""Entries listed of every count."""

_THUMBNAIL = 96
_COUNTED = (
    *("members", "sizes", "captions", "concepts", "kinds", "answers", "images", "bytes", "sides", "words", "turns"),
    *("caption_tokens", "answer_tokens", "reasons"),
)
_PROMPTS = ("Describe this image.",)


Thumbnail = tuple[str, bytes]
"""``shard: key`` and PNG bytes."""


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
        images: Samples by number of images.
        image_bytes: Histogram of the images' bytes.
        longer_side: Histogram of the images' longer sides in pixels.
        caption_lengths: Histogram of words per caption.
        caption_tokens: Histogram of tokens per caption; empty without a tokenizer.
        answer_tokens: Histogram of tokens per answer with its end, which is what training may mask and learn (the
            answers to questions and in conversations); empty without a tokenizer.
        turns: Conversations by number of turns.
        reasons: Unusable samples by reason.
        thumbnails: Pictures from all over the shards as PNG bytes, with ``shard: key``; not part of the counts.
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
    images: dict[str, int]
    image_bytes: dict[str, int]
    longer_side: dict[str, int]
    caption_lengths: dict[str, int]
    caption_tokens: dict[str, int]
    answer_tokens: dict[str, int]
    turns: dict[str, int]
    reasons: dict[str, int]
    thumbnails: tuple[Thumbnail, ...] = ()

    def counts(self) -> dict[str, Any]:
        """All but the thumbnails, as JSON can hold it."""
        tree = asdict(self)
        del tree["thumbnails"]
        return tree

    def __str__(self) -> str:
        return "\n".join(f"{name.replace('_', ' '):20} {_shown(value)}" for name, value in self.counts().items())


def stats(
    shards: str | Path | Sequence[str | Path],
    *,
    tokens: Callable[[str], int] | None = None,
    thumbnails: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> Stats:
    """Count what shards hold.

    Args:
        shards: Shards, as `source.open_shards` takes them.
        tokens: Number of tokens of a text; None leaves tokens uncounted.
        thumbnails: So many pictures are kept.
        progress: Wraps the list of samples, to show a bar.
    """
    opened = open_shards(shards)
    reader = ShardReader(opened)
    c: dict[str, Counter[Any]] = {name: Counter() for name in _COUNTED}
    kept: list[tuple[str, bytes]] = []
    numbers = [(s, n) for s, index in enumerate(opened) for n in range(len(index))]
    every = max(1, len(numbers) // max(thumbnails, 1))
    for place, (shard, number) in enumerate(progress(numbers)):
        try:
            sample = reader.read(shard, number)
            _count(sample, c, tokens)
            if place % every == 0 and len(kept) < thumbnails and has_image(sample):
                kept.append((str(sample), _thumbnail(sample)))
        except SampleError as error:
            c["reasons"][error.reason] += 1
    reader.close()
    captions = c["captions"].total()
    words = sum(n * times for n, times in c["words"].items())
    return Stats(
        shards=len(opened),
        samples=len(numbers),
        unusable=c["reasons"].total(),
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
        images=histogram(c["images"]),
        image_bytes=histogram(c["bytes"]),
        longer_side=histogram(c["sides"]),
        caption_lengths=histogram(c["words"]),
        caption_tokens=histogram(c["caption_tokens"]),
        answer_tokens=histogram(c["answer_tokens"]),
        turns=histogram(c["turns"]),
        reasons=dict(c["reasons"]),
        thumbnails=tuple(kept),
    )


def histogram(values: Mapping[int, int]) -> dict[str, int]:
    """Counts of whole numbers in bins that double: 0, 1, 2, 3-4, 5-8, 9-16, ...; empty bins between others stay.

    >>> histogram({1: 2, 3: 1, 8: 5})
    {'1': 2, '2': 0, '3-4': 1, '5-8': 5}
    """
    bins = Counter[int]()
    for value, count in values.items():
        bins[(value - 1).bit_length() if value > 0 else -1] += count
    if not bins:
        return {}
    return {_bin(b): bins[b] for b in range(min(bins), max(bins) + 1)}


def _bin(number: int) -> str:
    if number < 2:
        return str(1 << number) if number >= 0 else "0"
    return f"{(1 << (number - 1)) + 1}-{1 << number}"


def texts_of(shards: str | Path | Sequence[str | Path]) -> Iterator[str]:
    """Every text of some shards: captions, questions, answers, conversations, and the tasks' own requests.

    Samples that cannot be read are passed over: a tokenizer does not need them.
    """
    yield from _PROMPTS
    reader = ShardReader(open_shards(shards), suffixes=("json", *TEXT_SUFFIXES))
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


def has_image(sample: Sample) -> bool:
    """Whether a sample holds an image."""
    return any(s in sample.members for s in IMAGE_SUFFIXES)


def _count(sample: Sample, c: dict[str, Counter[Any]], tokens: Callable[[str], int] | None) -> None:
    c["members"].update(sample.members.keys())
    images = sample.images() if has_image(sample) else []
    c["images"][len(images)] += 1
    for data in images:
        width, height = _image_size(sample, data)
        c["sizes"][f"{width}x{height}"] += 1
        c["sides"][max(width, height)] += 1
        c["bytes"][len(data)] += 1
    info = sample.info()
    caption = info.get("caption", sample.text())
    if isinstance(caption, str) and caption:
        c["captions"][caption] += 1
        c["words"][len(caption.split())] += 1
        if tokens is not None:
            c["caption_tokens"][tokens(caption)] += 1
    if isinstance(info.get("concept"), str):
        c["concepts"][info["concept"]] += 1
    for entry in info["qa"] if isinstance(info.get("qa"), list) else []:
        if isinstance(entry, list) and len(entry) >= 2:
            c["answers"][str(entry[1])] += 1
            c["kinds"][str(entry[2]) if len(entry) > 2 else ""] += 1
    if isinstance(info.get("conversations"), list):
        c["turns"][len(info["conversations"])] += 1
    if tokens is not None:
        c["answer_tokens"].update(tokens(answer) + 1 for answer in _answers(info))


def _answers(info: Mapping[str, Any]) -> Iterator[str]:
    for entry in info["qa"] if isinstance(info.get("qa"), list) else []:
        if isinstance(entry, list) and len(entry) >= 2:
            yield str(entry[1])
    for turn in info["conversations"] if isinstance(info.get("conversations"), list) else []:
        if isinstance(turn, dict) and turn.get("from") in ("gpt", "assistant") and isinstance(turn.get("value"), str):
            yield turn["value"]


def _image_size(sample: Sample, data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=Limits().formats) as image:
            return image.width, image.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError("undecodable_image", f"{sample}: {type(error).__name__}") from None


def _thumbnail(sample: Sample) -> bytes:
    image = decode(sample.image())
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _top(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:MOST_COMMON])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k or '(none)'} {v:,}" for k, v in value.items()) or "none"
    return f"{value:,}"
