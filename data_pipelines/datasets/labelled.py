"""What the class-labelled datasets share: samples from pictures and labels, one folder of shards per split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmdiff.errors import ConfigError, ShardError
from mmdiff.images import encode_png

from ..pack import write_shards
from .fetch import Package
from .report import BuildReport, compact_json, write_description

__all__ = ["LabelledSplit", "build_labelled", "with_article"]

LabelledSplit = tuple[np.ndarray, np.ndarray]
"""Pictures, uint8 [N, H, W] or [N, H, W, 3], and labels [N]."""


def build_labelled(
    name: str,
    out: Path,
    splits: Mapping[str, LabelledSplit],
    classes: Sequence[str],
    *,
    size: int,
    kinds: Mapping[str, str] | None = None,
    kind_question: str = "",
    samples_per_shard: int,
    progress: bool,
    packages: Sequence[Package],
    notice: str,
) -> BuildReport:
    """Write every split.

    Args:
        name: The dataset.
        out: Folder for the splits, ``dataset.json`` and ``NOTICE.md``.
        splits: Pictures and labels by split.
        classes: Names by label.
        size: Side in pixels, 8 to 1024; other than the source's is resized with the bicubic filter.
        kinds: A broader word by class name, the answer to ``kind_question``.
        kind_question: The question that tells the broader words apart.
        samples_per_shard: Samples in all shards of a split but the last.
        progress: Show a bar.
        packages: Where the data came from.
        notice: Text of ``NOTICE.md``.
    """
    if not 8 <= size <= 1024:
        raise ConfigError(f"size is {size}; ask for 8 to 1024 pixels")
    shards = {}
    for split, (pixels, labels) in splits.items():
        if len(pixels) != len(labels) or (len(labels) and not 0 <= int(labels.max()) < len(classes)):
            raise ShardError(
                f"{name}: split {split} has {len(pixels):,} pictures and {len(labels):,} labels up to "
                f"{labels.max()} of {len(classes)} classes; fetch the source again"
            )
        made = _samples(split, (pixels, labels), size, classes, kinds or {}, kind_question)
        bar = tqdm(made, total=len(labels), desc=f"{name} {split}", unit="image", disable=not progress)
        shards[split] = write_shards(bar, out / split, name, samples_per_shard)
    counts = {split: len(labels) for split, (_, labels) in splits.items()}
    details = {"size": size, "classes": list(classes)}
    return write_description(name, out, shards, counts, {}, packages, details, notice)


def _samples(
    split: str,
    data: LabelledSplit,
    size: int,
    classes: Sequence[str],
    kinds: Mapping[str, str],
    kind_question: str,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, (pixels, label) in enumerate(zip(*data, strict=True)):
        image = Image.fromarray(pixels).convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        key = f"{split}-{number:06d}"
        content = _json(key, int(label), classes, kinds, kind_question)
        yield key, {"png": encode_png(image), "json": compact_json(content)}


def _json(key: str, label: int, classes: Sequence[str], kinds: Mapping[str, str], kind_question: str) -> dict[str, Any]:
    word = classes[label]
    # Half of the yes/no questions name the right class, the others any of the wrong ones.
    draw = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big")
    wrong = classes[(label + 1 + (draw >> 1) % (len(classes) - 1)) % len(classes)]
    claimed = word if draw % 2 else wrong
    questions = [
        ["What is shown?", word, "what"],
        [f"Does this show {with_article(claimed)}?", "yes" if claimed == word else "no", "is_class"],
    ]
    if word in kinds:
        questions.append([kind_question, kinds[word], "kind"])
    return {
        "caption": with_article(word),
        "captions": [with_article(word), word],
        "tags": [kinds[word]] if word in kinds else [],
        "concept": word,
        "group": word,
        "subgroup": kinds.get(word, word),
        "tone": None,
        "gender": None,
        "style": None,
        "color": None,
        "label": label,
        "qa": questions,
    }


def with_article(word: str) -> str:
    """``"a cat"``, ``"an airplane"``; plurals such as ``"trousers"`` stay bare."""
    if word.endswith("s") and not word.endswith("ss"):
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
