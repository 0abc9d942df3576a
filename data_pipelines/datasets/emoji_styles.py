"""The same emoji in five drawing styles: two of Microsoft's Fluent, two of Google's Noto, and Firefox OS's.

For questions of style and concept apart: ``novel_combinations`` holds known concepts in a style that training has not
seen them in, ``novel_concepts`` the same base concepts as the emoji dataset, in every style. Beside its picture a
sample holds the same emoji in other styles (``image2`` and on) and an instruction that leads from them to it: the task
``edit`` learns from those. All styles but 3d are SVG and are rasterised with the optional package resvg-py.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmdiff.errors import ConfigError, MissingExtraError, ShardError
from mmdiff.images import decode

from ..pack import write_shards
from .archive import read_members
from .emoji import (
    FLUENT,
    LOOK_SIZE,
    TEXTS,
    Picture,
    encode_webp,
    load_texts,
    look_of,
    on_white,
    read_pictures,
    sample_json,
    samples,
)
from .emojibase import Entry, normal_hexcode
from .fetch import Package, obtain
from .licences import APACHE_NOTE, MIT_TEXT
from .report import BuildReport, compact_json, write_description
from .splits import COMBINATIONS, CONCEPTS, HELD_OUT, SALT, TRAIN, assign, unit_hash

__all__ = ["ICON_SETS", "STYLES", "build"]


def _icons(name: str, version: str, sha256: str, licence: str) -> Package:
    return Package(kind="npm", name=f"@iconify-json/{name}", version=version, sha256=sha256, licence=licence)


ICON_SETS = {
    "flat": _icons("fluent-emoji-flat", "1.2.6", "7d064769dee69081", "MIT"),
    "noto": _icons("noto", "1.2.9", "3e918d88fc945c0b", "Apache-2.0"),
    "blob": _icons("noto-v1", "1.2.5", "2bf62c26c2c2884a", "Apache-2.0"),
    "firefox": _icons("fxemoji", "1.2.2", "f3e72b3c59d05e1d", "Apache-2.0"),
}
"""Packages of the styles that are drawn from SVG. (npm @iconify-json/fluent-emoji, which has gradients, is left out: at
64 pixels it cannot be told from 3d, so that nothing held out in one of them would be unseen.)"""
STYLES = ("3d", *ICON_SETS)
_SAME_PICTURE = 1e-3
"""Two styles of one emoji with a smaller mean squared difference (of values in [0, 1]) look the same."""
_MOST_SOURCES = 3
_MOST_SVG_BYTES = 2**20
# Only references inside the drawing itself: nothing may be loaded from elsewhere.
_FOREIGN = re.compile(r"<(?:image|script|style|foreignObject|text)\b|href=\"(?!#)|url\((?!#)", re.IGNORECASE)
NOTICE = f"""# Notice

3d: Fluent Emoji by Microsoft Corporation, MIT, from npm {FLUENT.spec}.
flat: Fluent Emoji Flat by Microsoft Corporation, MIT, from npm {ICON_SETS["flat"].spec}.
noto, blob: Noto Emoji, now and version 1, by Google Inc, Apache License 2.0, from npm {ICON_SETS["noto"].spec} and
{ICON_SETS["blob"].spec}.
firefox: Firefox OS Emoji by Mozilla, Apache License 2.0 as the package states, from npm {ICON_SETS["firefox"].spec}.
{APACHE_NOTE}
Texts: emojibase-data by Miles Johnson, MIT, from npm {TEXTS.spec}.
All pictures were rasterised, resized and laid over white.

MIT License

{MIT_TEXT}"""


def build(
    out: Path,
    *,
    size: int = 64,
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
    quality: int = 88,
    samples_per_shard: int = 2000,
    styles: tuple[str, ...] = STYLES,
) -> BuildReport:
    """Build the three splits.

    Args:
        out: Folder for the splits, ``dataset.json`` and ``NOTICE.md``.
        size: Side of the pictures in pixels, 8 to 256.
        source: Folder with the npm tarballs; None asks cache and npm.
        progress: Show a bar.
        quality: WebP quality, 1 to 100.
        samples_per_shard: Samples in all shards of a split but the last.
        styles: At least two of ``STYLES``.
    """
    if not 8 <= size <= 256 or not 1 <= quality <= 100:
        raise ConfigError(f"size is {size} (8 to 256) and quality is {quality} (1 to 100)")
    if len(set(styles)) < 2 or not set(styles) <= set(STYLES):
        raise ConfigError(f"styles are {', '.join(styles)}; give at least two of {', '.join(STYLES)}")
    entries = load_texts(obtain(TEXTS, source))
    skipped: Counter[str] = Counter()
    pictures: dict[str, Picture] = {}
    for style in styles:
        found = _read_style(style, entries, size, source, skipped, progress)
        _add_new(pictures, style, found, styles, skipped)
    splits = _splits(pictures)
    sources = _Sources(pictures, splits, lambda picture: encode_webp(picture.data, size, quality))
    shards, counts = {}, {}
    for split in (TRAIN, CONCEPTS, COMBINATIONS):
        part = {key: picture for key, picture in sorted(pictures.items()) if splits[key] == split}
        counts[split] = len(part)
        made = sources.beside(samples(part, size, quality, known=split != CONCEPTS, named=_named))
        bar = tqdm(made, total=len(part), desc=f"emoji-styles {split}", unit="image", disable=not progress)
        if part:
            shards[split] = write_shards(bar, out / split, "emoji-styles", samples_per_shard)
    details = {
        "size": size,
        "quality": quality,
        "styles": list(styles),
        "splits": {
            CONCEPTS: f"base concepts whose hash is below {HELD_OUT}, in every style",
            COMBINATIONS: f"pairs of another concept and a style whose hash is below {HELD_OUT}",
            "image2 and on": f"at most {_MOST_SOURCES} other styles of the emoji; for {COMBINATIONS} those of {TRAIN}",
            "hash": f"blake2b, 64 bit, salt {SALT!r}",
        },
    }
    packages = [TEXTS, *(FLUENT if style == "3d" else ICON_SETS[style] for style in styles)]
    return write_description("emoji-styles", out, shards, counts, skipped, packages, details, NOTICE)


def _named(key: str, picture: Picture) -> dict[str, Any]:
    style = _style(key)
    content = sample_json(picture.entry, picture.look, style)
    content["captions"] = [f"{picture.entry.caption}, {style} style", *content["captions"]]
    content["caption"] = content["captions"][0]
    content["qa"] = [["What style is it?", style, "style"]]
    return content


def _style(key: str) -> str:
    return key.rpartition("-")[2]


def _emoji(key: str) -> str:
    return key.rpartition("-")[0]


def _add_new(
    pictures: dict[str, Picture],
    style: str,
    found: Mapping[str, Picture],
    styles: Sequence[str],
    skipped: Counter[str],
) -> None:
    """Add a style's pictures but those that look as in another style: a held-out one must be new to training."""
    for key, picture in found.items():
        others = [pictures[name] for other in styles if (name := f"{key}-{other}") in pictures]
        if any(_difference(picture, other) < _SAME_PICTURE for other in others):
            skipped[f"{style}: the same picture as in another style"] += 1
        else:
            pictures[f"{key}-{style}"] = picture


def _difference(one: Picture, other: Picture) -> float:
    return float(np.mean(((one.small.astype(float) - other.small) / 255) ** 2))


def _splits(pictures: Mapping[str, Picture]) -> dict[str, str]:
    """The split of every key: all emoji of one concept in one style are in the same."""
    pairs = {(picture.entry.concept, _style(key)) for key, picture in pictures.items()}
    split_of = assign((pair, pair[0], (pair[1],)) for pair in sorted(pairs))
    return {key: split_of[picture.entry.concept, _style(key)] for key, picture in pictures.items()}


class _Sources:
    """The same emoji in other styles, as further images of a sample.

    Args:
        pictures: All of them by key.
        splits: Their splits.
        encode: A picture as WebP.
    """

    def __init__(
        self, pictures: Mapping[str, Picture], splits: Mapping[str, str], encode: Callable[[Picture], bytes]
    ) -> None:
        self.splits, self._encoded = splits, cache(lambda key: encode(pictures[key]))
        self._styles: dict[str, list[str]] = {}
        for key in sorted(pictures):
            self._styles.setdefault(_emoji(key), []).append(key)

    def beside(self, made: Iterable[tuple[str, dict[str, bytes]]]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Samples with their sources; training never shows a picture that is held out."""
        for key, members in made:
            chosen = self._chosen(key)
            images = {f"image{n}.webp": self._encoded(other) for n, other in enumerate(chosen, 2)}
            told = {"instruction": f"the same in {_style(key)} style"} if chosen else {}
            yield key, members | images | {"json": compact_json(json.loads(members["json"]) | told)}

    def _chosen(self, key: str) -> list[str]:
        wanted = CONCEPTS if self.splits[key] == CONCEPTS else TRAIN
        others = [k for k in self._styles[_emoji(key)] if k != key and self.splits[k] == wanted]
        return sorted(others, key=lambda other: unit_hash("source", key, other))[:_MOST_SOURCES]


def _read_style(
    style: str,
    entries: Mapping[str, Entry],
    size: int,
    source: str | os.PathLike[str] | None,
    skipped: Counter[str],
    progress: bool,
) -> dict[str, Picture]:
    if style == "3d":
        pictures, _ = read_pictures(obtain(FLUENT, source), entries, skipped, progress)
        return pictures
    icons = _load_icons(obtain(ICON_SETS[style], source), lambda: _spellings(entries, source))
    pictures = {}
    for key, (body, width, height) in tqdm(icons.items(), desc=f"draw {style}", unit="image", disable=not progress):
        if key not in entries:
            skipped[f"{style}: without text"] += 1
        elif len(body) > _MOST_SVG_BYTES or _FOREIGN.search(body):
            skipped[f"{style}: drawing too large or with foreign parts"] += 1
        else:
            data = _rasterise(body, width, height, max(size, LOOK_SIZE))
            small, alpha = on_white(decode(data, mode="RGBA"), LOOK_SIZE)
            look = look_of(entries[key], small, alpha)
            pictures[key] = Picture(entry=entries[key], data=data, look=look, small=small)
    return pictures


def _load_icons(package: Path, spellings: Callable[[], Mapping[str, str]]) -> dict[str, tuple[str, int, int]]:
    """SVG body, width and height by hexcode, from an iconify package; ``spellings`` is for one without code points."""
    characters, icons = _read_icons(package)
    width, height = icons.get("width", 16), icons.get("height", 16)
    if not characters:
        known = spellings()
        characters = {known.get(_squashed(name), f"no code point: {name}"): name for name in icons["icons"]}
    result: dict[str, tuple[str, int, int]] = {}
    for code, name in characters.items():
        if (icon := icons["icons"].get(name)) is not None:
            result.setdefault(
                normal_hexcode(code), (icon["body"], icon.get("width", width), icon.get("height", height))
            )
    return result


def _read_icons(package: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Names of the icons by code point (empty in some packages), and the icons."""
    names = ("package/chars.json", "package/icons.json")
    files = dict(read_members(package, lambda name: name in names))
    if len(files) != 2:
        raise ShardError(f"{package}: is not an iconify package, it holds no {' and '.join(names)}")
    return json.loads(files[names[0]]), json.loads(files[names[1]])


def _spellings(entries: Mapping[str, Entry], source: str | os.PathLike[str] | None) -> dict[str, str]:
    """Hexcodes by what an emoji is called, without blanks and dashes: its English label, or its name in other sets."""
    known = {_squashed(entry.caption): key for key, entry in entries.items()}
    for style in ("noto", "flat"):
        characters, _ = _read_icons(obtain(ICON_SETS[style], source))
        known |= {_squashed(name): normal_hexcode(code) for code, name in characters.items()}
    return known


def _squashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _rasterise(body: str, width: int, height: int, size: int) -> bytes:
    """The drawing as PNG, fitted into ``size`` pixels."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtraError("resvg-py", "pack", "to draw the SVG styles of emoji-styles") from error
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    wide, high = (size, None) if width >= height else (None, size)
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, width=wide, height=high))
