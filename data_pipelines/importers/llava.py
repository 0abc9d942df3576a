"""LLaVA-style JSON: a list of entries with ``conversations`` and no, one or several images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from .rows import Rows, clean_keys, inside, load, packed, pictures

__all__ = ["Llava"]


class Llava(Rows):
    """Entries of a LLaVA file (``.json`` or ``.jsonl``); ``image`` may be a name or a list of names.

    The JSON member holds the entry unchanged, but for the names of the images.

    Args:
        file: The file.
        images: Folder of the images.

    Raises:
        ConfigError: Not of that form, or an image's name leads out of the folder.
    """

    def __init__(self, file: Path, images: Path) -> None:
        entries = load(file)
        if not isinstance(entries, list):
            raise ConfigError(f"{file}: expected a list of conversations")
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
                raise ConfigError(f"{file}: entry {number} has no list 'conversations'")
            for name in _images(entry, f"{file}: entry {number}"):
                inside(images, name, f"{file}: entry {number}")
        self._file, self._folder, self._entries = file, images, entries
        size = file.stat().st_size
        super().__init__(clean_keys(e.get("id", n) for n, e in enumerate(entries)), f"llava {size}")

    def members(self, i: int) -> Mapping[str, bytes]:
        """The images in order, and the entry; errors as in `Rows`."""
        entry, where = self._entries[i], f"{self._file}: entry {i}"
        found = pictures([inside(self._folder, name, where) for name in _images(entry, where)])
        return {**found, "json": packed({k: v for k, v in entry.items() if k not in ("image", "images")})}


def _images(entry: dict[str, Any], where: str) -> list[str]:
    value = entry.get("image", entry.get("images"))
    names = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: image is {value!r:.80}, expected a file name or a list of them")
    return names
