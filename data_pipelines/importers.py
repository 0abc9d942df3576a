"""Folders and files of other tools as samples for `pack.write_shards`: captioned folders, ImageFolder, LLaVA JSON.

Images are copied byte for byte; ``lint`` says afterwards which cannot be decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from .index import MAX_MEMBER_BYTES
from .reader import IMAGE_SUFFIXES

__all__ = ["KINDS", "detect", "read_folder"]

KINDS = ("captions", "classes", "llava")
"""Forms that can be read: images with texts, one folder per class, LLaVA's JSON."""

_MAX_TABLE_BYTES = 4 << 30
_TABLES = ("captions.json", "metadata.jsonl", "captions.txt", "captions.tsv")

Row = tuple[str, Mapping[str, bytes]]


def detect(source: Path) -> str:
    """Which of `KINDS` a path looks like.

    Raises:
        ConfigError: None of them.
    """
    if source.is_file() and source.suffix == ".json":
        return "llava"
    if not source.is_dir():
        raise ConfigError(f"{source}: expected a folder of images, or a LLaVA JSON file")
    if any((source / table).is_file() for table in _TABLES) or any(_has_text(image) for image in source.rglob("*")):
        return "captions"
    if any(_images(folder) for folder in source.iterdir() if folder.is_dir()):
        return "classes"
    raise ConfigError(f"{source}: found neither images with .txt or .json beside them nor one folder per class")


def read_folder(source: str | Path, kind: str = "auto", images: str | Path | None = None) -> Iterator[Row]:
    """Samples of a folder or file, in sorted order.

    * ``captions``: images at any depth with a ``.txt`` or ``.json`` of the same name, or a table in the folder:
      ``captions.json`` ({file: caption} or a list of objects with ``image`` or ``file_name`` and ``caption``),
      ``metadata.jsonl`` (such an object per line), ``captions.txt`` or ``.tsv`` (file, tab, caption);
    * ``classes``: one folder per class; its name becomes ``concept`` and ``caption``, its number ``cls``;
    * ``llava``: a JSON list of ``{"id", "image", "conversations"}``.

    Args:
        source: The folder, or the LLaVA file.
        kind: One of `KINDS`, or ``"auto"``.
        images: Folder of the images of a LLaVA file; default: the file's own.

    Raises:
        ConfigError: Not of that form, an image is missing, or a path leads out of the folder.
    """
    path = Path(source)
    chosen = detect(path) if kind == "auto" else kind
    if chosen == "captions":
        return _captions(path)
    if chosen == "classes":
        return _classes(path)
    if chosen == "llava":
        return _llava(path, Path(images) if images is not None else path.parent)
    raise ConfigError(f"kind {kind!r}: expected auto, {', '.join(KINDS)}")


def _captions(folder: Path) -> Iterator[Row]:
    table = _table(folder)
    found = _images(folder, deep=True)
    if not found:
        raise ConfigError(f"{folder}: no images here")
    for path in found:
        name = path.relative_to(folder).as_posix()
        members = {_suffix(path): _read(path)}
        for suffix in ("txt", "json"):
            beside = path.with_suffix(f".{suffix}")
            if beside.is_file() and beside.name not in _TABLES:
                members[suffix] = _read(beside)
        if name in table:
            members["json"] = _json(table[name])
        yield _key(name), members


def _classes(folder: Path) -> Iterator[Row]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and _images(p, deep=True))
    if not classes:
        raise ConfigError(f"{folder}: no folders with images in it")
    for number, below in enumerate(classes):
        text = below.name.replace("_", " ")
        for path in _images(below, deep=True):
            key = _key(path.relative_to(folder).as_posix())
            info = _json({"caption": text, "concept": below.name})
            yield key, {_suffix(path): _read(path), "cls": str(number).encode(), "json": info}


def _llava(file: Path, images: Path) -> Iterator[Row]:
    rows = _load(file)
    if not isinstance(rows, list):
        raise ConfigError(f"{file}: expected a list of conversations")
    used: set[str] = set()
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
            raise ConfigError(f"{file}: entry {number} has no list 'conversations'")
        members = {"json": _json({k: v for k, v in row.items() if k != "image"})}
        if row.get("image") is not None:
            path = _below(images, str(row["image"]), f"{file}: entry {number}")
            suffix = _suffix(path)
            members[suffix] = _read(path)
        key = "".join(c if c.isalnum() or c in "-_./" else "_" for c in str(row.get("id", number))).strip("/.")
        if not key or key in used or ".." in key.split("/"):
            key = f"entry_{number:09d}"
        used.add(key)
        yield key, members


def _table(folder: Path) -> dict[str, dict[str, Any]]:
    """Texts by file name."""
    for name in _TABLES:
        path = folder / name
        if not path.is_file():
            continue
        if name.endswith(".json"):
            content = _load(path)
            rows = [{"image": k, "caption": v} for k, v in content.items()] if isinstance(content, dict) else content
        elif name.endswith(".jsonl"):
            rows = [_parse(line, path) for line in _text(path).splitlines() if line.strip()]
        else:
            pairs = (line.partition("\t") for line in _text(path).splitlines() if line.strip())
            rows = [{"image": file, "caption": text.strip()} for file, _, text in pairs]
        return dict(_named(row, path) for row in rows)
    return {}


def _named(row: Any, path: Path) -> tuple[str, dict[str, Any]]:
    name = row.get("image", row.get("file_name")) if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f"{path}: {row!r:.80}: expected an object with 'image' or 'file_name' and 'caption'")
    info = {k: v for k, v in row.items() if k not in ("image", "file_name")}
    if isinstance(info.get("text"), str):  # the word of Hugging Face's image folders
        info.setdefault("caption", info["text"])
    return name.removeprefix("./"), info


def _has_text(path: Path) -> bool:
    """Whether this is an image with a text or a JSON of the same name beside it."""
    if path.suffix.lower().lstrip(".") not in IMAGE_SUFFIXES:
        return False
    return path.with_suffix(".txt").is_file() or path.with_suffix(".json").is_file()


def _images(folder: Path, deep: bool = False) -> list[Path]:
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(p for p in found if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and p.is_file())


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in IMAGE_SUFFIXES:
        raise ConfigError(f"{path}: not an image of a known kind: {', '.join(IMAGE_SUFFIXES)}")
    return suffix


def _key(name: str) -> str:
    return name.rpartition(".")[0]


def _below(folder: Path, name: str, where: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(f"{where}: image {name!r} leads out of {folder}")
    return path


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes, limit {MAX_MEMBER_BYTES:,}; make it smaller")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            raise ConfigError(f"{path}: more than 4 GiB; split it")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None


def _load(path: Path) -> Any:
    return _parse(_text(path), path)


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
