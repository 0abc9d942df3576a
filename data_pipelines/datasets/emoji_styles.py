"""The same emoji in three drawing styles: Fluent 3D, Fluent flat, and Google's Noto.

For questions of style and concept apart: ``novel_combinations`` holds known concepts in a style that training has not
seen them in, ``novel_concepts`` the same base concepts as the emoji dataset, in every style. The flat styles are SVG
and are rasterised with the optional package resvg-py.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdiff.errors import ConfigError, MissingExtraError, ShardError
from mmdiff.images import decode

from ..pack import write_shards
from .archive import read_members
from .emoji import FLUENT, LOOK_SIZE, TEXTS, Picture, load_texts, look_of, on_white, read_pictures, sample_json, samples
from .emojibase import Entry, normal_hexcode
from .fetch import Package, obtain
from .licences import APACHE_NOTE, MIT_TEXT
from .report import BuildReport, write_description
from .splits import COMBINATIONS, CONCEPTS, HELD_OUT, SALT, TRAIN, assign

__all__ = ["FLAT", "NOTO", "STYLES", "build"]

FLAT = Package(
    kind="npm", name="@iconify-json/fluent-emoji-flat", version="1.2.6", sha256="7d064769dee69081", licence="MIT"
)
NOTO = Package(kind="npm", name="@iconify-json/noto", version="1.2.9", sha256="3e918d88fc945c0b", licence="Apache-2.0")
STYLES = ("3d", "flat", "noto")
_ICON_SETS = {"flat": FLAT, "noto": NOTO}
_MOST_SVG_BYTES = 2**20
# Only references inside the drawing itself: nothing may be loaded from elsewhere.
_FOREIGN = re.compile(r"<(?:image|script|style|foreignObject|text)\b|href=\"(?!#)|url\((?!#)", re.IGNORECASE)
NOTICE = f"""# Notice

3d: Fluent Emoji by Microsoft Corporation, MIT, from npm {FLUENT.spec}.
flat: Fluent Emoji Flat by Microsoft Corporation, MIT, from npm {FLAT.spec}.
noto: Noto Emoji by Google Inc, Apache License 2.0, from npm {NOTO.spec}. {APACHE_NOTE}
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
    pictures: dict[str, tuple[str, Picture]] = {}
    for style in styles:
        found = _read_style(style, entries, size, source, skipped, progress)
        pictures |= {f"{key}-{style}": (style, picture) for key, picture in found.items()}
    pairs = {(p.entry.concept, style) for style, p in pictures.values()}
    splits = assign((pair, pair[0], (pair[1],)) for pair in sorted(pairs))
    shards, counts = {}, {}
    for split in (TRAIN, CONCEPTS, COMBINATIONS):
        keys = [key for key, (style, p) in sorted(pictures.items()) if splits[p.entry.concept, style] == split]
        counts[split] = len(keys)
        part = {key: pictures[key][1] for key in keys}
        made = samples(part, size, quality, known=split != CONCEPTS, named=_named)
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
            "hash": f"blake2b, 64 bit, salt {SALT!r}",
        },
    }
    packages = [TEXTS, *(FLUENT if style == "3d" else _ICON_SETS[style] for style in styles)]
    return write_description("emoji-styles", out, shards, counts, skipped, packages, details, NOTICE)


def _named(key: str, picture: Picture) -> dict[str, Any]:
    style = key.rpartition("-")[2]
    content = sample_json(picture.entry, picture.look, style)
    content["captions"] = [f"{picture.entry.caption}, {style} style", *content["captions"]]
    content["caption"] = content["captions"][0]
    content["qa"] = [["What style is it?", style, "style"]]
    return content


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
    icons = _load_icons(obtain(_ICON_SETS[style], source))
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


def _load_icons(package: Path) -> dict[str, tuple[str, int, int]]:
    """SVG body, width and height by hexcode, from an iconify package."""
    names = ("package/chars.json", "package/icons.json")
    files = dict(read_members(package, lambda name: name in names))
    if len(files) != 2:
        raise ShardError(f"{package}: is not an iconify package, it holds no {' and '.join(names)}")
    characters, icons = (json.loads(files[name]) for name in names)
    width, height = icons.get("width", 16), icons.get("height", 16)
    result: dict[str, tuple[str, int, int]] = {}
    for code, name in characters.items():
        if (icon := icons["icons"].get(name)) is not None:
            result.setdefault(
                normal_hexcode(code), (icon["body"], icon.get("width", width), icon.get("height", height))
            )
    return result


def _rasterise(body: str, width: int, height: int, size: int) -> bytes:
    """The drawing as PNG, fitted into ``size`` pixels."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtraError("resvg-py", "pack", "to draw the SVG styles of emoji-styles") from error
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    wide, high = (size, None) if width >= height else (None, size)
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, width=wide, height=high))
