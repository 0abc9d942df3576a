"""Folders of images: with texts beside them, with a table of captions, alone, or one folder per class."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from ..reader import IMAGE_SUFFIXES
from .rows import Rows, image_suffix, load, packed, read_file, read_text

__all__ = ["TABLES", "Captions", "Classes", "Images", "has_text", "images_in"]

TABLES = (
    "captions.json",
    "metadata.jsonl",
    "metadata.csv",
    "captions.csv",
    "captions.tsv",
    "captions.txt",
)
"""Tables of captions that are looked for in a folder, in this order."""

_FILE_COLUMNS = ("image", "file_name", "filename", "file", "path", "filepath")
_TEXT_COLUMNS = ("caption", "text", "title", "description")


class Captions(Rows):
    """Images at any depth with a ``.txt`` or ``.json`` of the same name, or a table of captions in the folder.

    Args:
        folder: The folder.

    Raises:
        ConfigError: No images, or a table that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._table = folder, dict(_table(folder))
        self._files = images_in(folder, deep=True)
        if not self._files:
            raise ConfigError(f"{folder}: no images here")
        names = [p.relative_to(folder).as_posix() for p in self._files]
        super().__init__([n.rpartition(".")[0] for n in names], f"captions {sorted(self._table.items())!r}")

    def members(self, i: int) -> Mapping[str, bytes]:
        """The image, its text, and its row of the table as JSON; errors as in `Rows`."""
        path = self._files[i]
        members = {image_suffix(path.name): read_file(path)}
        for suffix in ("txt", "json"):
            beside = path.with_suffix(f".{suffix}")
            if beside.is_file() and beside.name not in TABLES:
                members[suffix] = read_file(beside)
        name = path.relative_to(self._folder).as_posix()
        if name in self._table:
            members["json"] = packed(self._table[name])
        return members


class Images(Rows):
    """Images at any depth and nothing else, for image tokenizers and the like.

    Args:
        folder: The folder.

    Raises:
        ConfigError: No images.
    """

    def __init__(self, folder: Path) -> None:
        self._files = images_in(folder, deep=True)
        if not self._files:
            raise ConfigError(f"{folder}: no images here")
        names = [p.relative_to(folder).as_posix() for p in self._files]
        super().__init__([n.rpartition(".")[0] for n in names], "images")

    def members(self, i: int) -> Mapping[str, bytes]:
        """The image; errors as in `Rows`."""
        return {image_suffix(self._files[i].name): read_file(self._files[i])}


class Classes(Rows):
    """One folder per class: its name becomes ``concept`` and ``caption``, its number ``cls``.

    Args:
        folder: The folder of folders.

    Raises:
        ConfigError: None of them holds images.
    """

    def __init__(self, folder: Path) -> None:
        classes = sorted(p for p in folder.iterdir() if p.is_dir() and images_in(p, deep=True))
        if not classes:
            raise ConfigError(f"{folder}: no folders with images in it")
        self._files = [(n, below.name, p) for n, below in enumerate(classes) for p in images_in(below, deep=True)]
        names = [p.relative_to(folder).as_posix() for *_, p in self._files]
        super().__init__([n.rpartition(".")[0] for n in names], "classes")

    def members(self, i: int) -> Mapping[str, bytes]:
        """The image, the number of its class, and the name; errors as in `Rows`."""
        number, name, path = self._files[i]
        info = {"caption": name.replace("_", " "), "concept": name}
        return {image_suffix(path.name): read_file(path), "cls": str(number).encode(), "json": packed(info)}


def images_in(folder: Path, deep: bool = False) -> list[Path]:
    """Image files of a folder, sorted."""
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(p for p in found if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and p.is_file())


def has_text(path: Path) -> bool:
    """Whether this is an image with a text or a JSON of the same name beside it."""
    if path.suffix.lower().lstrip(".") not in IMAGE_SUFFIXES:
        return False
    return path.with_suffix(".txt").is_file() or path.with_suffix(".json").is_file()


def _table(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File names with what the folder's table says of them."""
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    for row in [] if path is None else _rows(path):
        yield _named(row, path or folder)


def _rows(path: Path) -> list[Any]:
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
        try:
            return [{k: v for k, v in row.items() if k is not None and v is not None} for row in reader]
        except csv.Error as error:
            raise ConfigError(f"{path}: line {reader.line_num}: {error}") from None
    if path.suffix in (".json", ".jsonl"):
        content = load(path)
        return [{"image": k, "caption": v} for k, v in content.items()] if isinstance(content, dict) else content
    pairs = (line.partition("\t") for line in read_text(path).splitlines() if line.strip())
    return [{"image": file, "caption": text.strip()} for file, _, text in pairs]


def _named(row: Any, path: Path) -> tuple[str, dict[str, Any]]:
    column = next((c for c in _FILE_COLUMNS if isinstance(row, dict) and isinstance(row.get(c), str)), None)
    if column is None:
        raise ConfigError(f"{path}: {row!r:.80}: expected 'image' or 'file_name' and 'caption'")
    info = {k: v for k, v in row.items() if k != column}
    text = next((info[c] for c in _TEXT_COLUMNS if isinstance(info.get(c), str)), None)
    if text is not None:
        info.setdefault("caption", text)
    return row[column].removeprefix("./"), info
