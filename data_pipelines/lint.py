"""What is wrong with shards, in words: everything that a training run would skip, and what looks like a mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdiff.errors import SampleError, ShardError
from mmdiff.images import decode

from .conversations import placeholders
from .index import SUFFIXES, ShardIndex
from .ranges import RangeReader, shown
from .reader import IMAGE_SUFFIXES, TEXT_SUFFIXES, Sample, ShardReader
from .source import expand, open_shards, size_complaint

__all__ = ["Finding", "LintReport", "lint"]

EXAMPLES = 5
"""Samples named per finding."""

_TEXT_SUFFIXES = frozenset({"json", "cls", *TEXT_SUFFIXES})
_ADVICE = {
    "half_samples": (
        "some samples have only an image and others only a text: the two names of a pair must be equal up to the suffix"
    ),
    "missing_image": "samples have no image; only the tasks text and chat can use them",
    "missing_text": "samples have no json, txt or cls member; only the task image can use them",
    "no_caption": "samples have a JSON without caption, captions, text, qa or conversations",
    "too_few_images": (
        "conversations show more images than the sample holds; the task chat skips them: pack the images with them"
    ),
    "duplicate_key": "keys occur in more than one shard",
    "ignored_suffix": f"members are ignored because their suffix is not one of {', '.join(SUFFIXES)}",
    "empty_shard": "shards hold no samples",
}
_WARNINGS = frozenset({"missing_image", "missing_text", "no_caption", "ignored_suffix", "empty_shard", "duplicate_key"})


@dataclass
class Finding:
    """One kind of problem.

    Attributes:
        code: Short name; of unusable samples the reason that training would count.
        level: ``"error"`` or ``"warning"``.
        message: What it means; of unusable samples the first one's message.
        count: How often.
        examples: The first few places.
    """

    code: str
    level: str
    message: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LintReport:
    """Result of `lint`.

    Attributes:
        shards: Shards looked at.
        samples: Samples looked at.
        findings: Errors first, then by count.
    """

    shards: int
    samples: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        """Number of places with errors."""
        return sum(f.count for f in self.findings if f.level == "error")

    def __str__(self) -> str:
        lines = [f"{self.shards:,} shards, {self.samples:,} samples"]
        for f in self.findings:
            lines.append(f"{f.level}: {f.code} ({f.count:,}): {f.message}")
            lines += [f"    {example}" for example in f.examples]
        return "\n".join(lines if self.findings else [*lines, "nothing to complain about"])


def lint(
    shards: str | Path | Sequence[str | Path],
    *,
    images: bool = True,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> LintReport:
    """Look at every sample of some shards.

    Args:
        shards: Shards, as `source.open_shards` takes them.
        images: Whether every image is decoded.
        progress: Wraps the list of (shard, sample) numbers, to show a bar.

    Raises:
        ShardError: There are no such shards.
    """
    notes: dict[str, Finding] = {}
    names = [shards] if isinstance(shards, (str, Path)) else list(shards)
    urls = list(dict.fromkeys(url for name in names for url in expand(name)))
    opened = [index for url in urls if (index := _open(url, notes)) is not None]
    _look_at_shards(opened, notes)
    reader = ShardReader(opened)
    numbers = [(s, n) for s, index in enumerate(opened) for n in range(len(index))]
    for shard, number in progress(numbers):
        index = opened[shard]
        try:
            _look_at_sample(reader.read(shard, number), notes, images)
        except SampleError as error:
            _note(notes, error.reason, f"{shown(index.url)}: {index.key(number)}", str(error))
    reader.close()
    findings = sorted(notes.values(), key=lambda f: (f.level, -f.count))
    return LintReport(len(urls), len(numbers), tuple(findings))


def _open(url: str, notes: dict[str, Finding]) -> ShardIndex | None:
    try:
        (index,) = open_shards(url, damaged="skip")
    except ShardError as error:
        _note(notes, "unreadable_shard", shown(url), str(error))
        return None
    if (complaint := size_complaint(index, RangeReader().size(url))) is not None:
        _note(notes, "shard_differs_from_index", shown(url), complaint)
        return None
    return index


def _look_at_shards(shards: Sequence[ShardIndex], notes: dict[str, Finding]) -> None:
    seen: dict[str, str] = {}
    for index in shards:
        url = shown(index.url)
        if not len(index):
            _note(notes, "empty_shard", url)
        for suffix, count in index.ignored.items():
            _note(notes, "ignored_suffix", f"{url}: {suffix} ({count:,} members)", count=count)
        images = texts = 0
        for entry in index:
            if entry.key in seen:
                _note(notes, "duplicate_key", f"{entry.key}: {seen[entry.key]} and {url}")
            seen[entry.key] = url
            has_image = any(s in entry.members for s in IMAGE_SUFFIXES)
            has_text = not _TEXT_SUFFIXES.isdisjoint(entry.members)
            images, texts = images + (has_image and not has_text), texts + (has_text and not has_image)
        if images and texts:
            _note(notes, "half_samples", f"{url}: {images:,} images without text, {texts:,} texts without image")


def _look_at_sample(sample: Sample, notes: dict[str, Finding], images: bool) -> None:
    where = str(sample)
    held = len(sample.images()) if any(s in sample.members for s in IMAGE_SUFFIXES) else 0
    if placeholders(sample) > held:
        _note(notes, "too_few_images", f"{where}: {placeholders(sample)} shown, {held} held")
    if any(s in sample.members for s in IMAGE_SUFFIXES):
        if images:
            try:
                for image in sample.images():
                    decode(image)
            except SampleError as error:
                _note(notes, error.reason, where, str(error))
    else:
        _note(notes, "missing_image", where)
    if _TEXT_SUFFIXES.isdisjoint(sample.members):
        _note(notes, "missing_text", where)
    sample.text()
    info = sample.info()
    if (
        info
        and not sample.text()
        and not any(info.get(f) for f in ("caption", "captions", "text", "qa", "conversations"))
    ):
        _note(notes, "no_caption", where)


def _note(notes: dict[str, Finding], code: str, where: str, message: str = "", count: int = 1) -> None:
    level = "warning" if code in _WARNINGS else "error"
    finding = notes.setdefault(code, Finding(code, level, _ADVICE.get(code, message)))
    finding.count += count
    if len(finding.examples) < EXAMPLES:
        finding.examples.append(where)
