"""What all importers share: a numbered sequence of samples, and the reading of files within limits.

Images are copied byte for byte; which cannot be decoded says `Decoded` while packing, or ``lint`` afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError, SampleError
from mmdiff.images import decode

from ..index import MAX_MEMBER_BYTES, split_name
from ..reader import IMAGE_SUFFIXES, numbered

__all__ = [
    "Decoded",
    "Row",
    "Rows",
    "clean_keys",
    "image_suffix",
    "inside",
    "load",
    "packed",
    "parse",
    "pictures",
    "read_file",
    "read_text",
]

MAX_TABLE_BYTES = 4 << 30
"""Largest table or JSON file that is read."""

Row = tuple[str, Mapping[str, bytes]]
"""A key and the members of a sample by suffix."""


class Rows(Sequence[Row]):
    """Samples by number: their keys are known at once, their bytes are read when they are asked for.

    Safe to hand to another process.

    Args:
        keys: Key of every sample.
        origin: Says what is read, for the digest.
    """

    def __init__(self, keys: Sequence[str], origin: str) -> None:
        self._keys, self._origin = list(keys), origin

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        return self.key(i), self.members(range(len(self))[i])

    def key(self, i: int) -> str:
        """Key of sample ``i``."""
        return self._keys[i]

    def members(self, i: int) -> Mapping[str, bytes]:
        """Members of sample ``i``.

        Raises:
            SampleError: It cannot be used: a file is missing, too large or not an image.
        """
        raise NotImplementedError

    def digest(self) -> str:
        """Sixteen hex digits that change when other samples would be read."""
        told = hashlib.sha256(self._origin.encode())
        for key in self._keys:
            told.update(key.encode() + b"\0")
        return told.hexdigest()[:16]


class Decoded(Rows):
    """Samples of another source; those with an image that cannot be decoded are refused.

    Args:
        rows: The source.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        super().__init__([rows.key(i) for i in range(len(rows))], f"decoded {rows.digest()}")

    def members(self, i: int) -> Mapping[str, bytes]:
        """Members of the source's sample; errors as in `mmdiff.images.decode`."""
        members = self._rows.members(i)
        for suffix, data in members.items():
            if suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
                try:
                    decode(data)
                except SampleError as error:
                    raise SampleError(error.reason, f"{self.key(i)}.{suffix}: {error}") from None
        return members


def clean_keys(names: Iterable[object]) -> list[str]:
    """Unique keys out of names of any kind; an unusable or repeated name becomes ``entry_`` and its number."""
    used: set[str] = set()
    keys = []
    for number, name in enumerate(names):
        key = "".join(c if c.isalnum() or c in "-_./" else "_" for c in str(name)).strip("/.")
        if not key or key in used or ".." in key.split("/") or not split_name(f"{key}.png")[0] == key:
            key = f"entry_{number:09d}"
        used.add(key)
        keys.append(key)
    return keys


def image_suffix(name: str) -> str:
    """Suffix of an image file.

    Raises:
        SampleError: Reason ``"not_an_image"``.
    """
    suffix = name.rpartition(".")[2].lower()
    if suffix not in IMAGE_SUFFIXES:
        raise SampleError("not_an_image", f"{name}: not an image of a known kind: {', '.join(IMAGE_SUFFIXES)}")
    return suffix


def inside(folder: Path, name: str, where: str) -> Path:
    """The file ``name`` below a folder.

    Raises:
        ConfigError: It lies elsewhere.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(f"{where}: image {name!r} leads out of {folder}")
    return path


def read_file(path: Path) -> bytes:
    """A file that becomes a member.

    Raises:
        SampleError: Reason ``"missing_file"`` or ``"too_large"``.
    """
    try:
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise SampleError("too_large", f"{path}: {size:,} bytes, limit {MAX_MEMBER_BYTES:,}; make it smaller")
        return path.read_bytes()
    except OSError as error:
        lost = isinstance(error, FileNotFoundError)
        hint = "; the folder of the images that a file names is given with --images DIR" if lost else ""
        raise SampleError("missing_file", f"{path}: cannot be read ({error.strerror}){hint}") from None


def pictures(paths: Sequence[Path]) -> dict[str, bytes]:
    """Members of one or several image files, in order."""
    return {numbered(n, image_suffix(path.name)): read_file(path) for n, path in enumerate(paths)}


def read_text(path: Path) -> str:
    """A table or JSON file.

    Raises:
        ConfigError: Missing, too large, or not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ConfigError(f"{path}: more than 4 GiB; split it")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None


def load(path: Path) -> Any:
    """Content of a JSON file, or the list of a file with one JSON value per line (``.jsonl``); errors as `parse`."""
    text = read_text(path)
    if path.suffix == ".jsonl":
        return [parse(line, path) for line in text.splitlines() if line.strip()]
    return parse(text, path)


def parse(text: str, path: Path) -> Any:
    """A JSON value.

    Raises:
        ConfigError: It is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None


def packed(value: Any) -> bytes:
    """JSON text of a member; the same value gives the same bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
