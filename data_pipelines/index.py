"""The index of a tar shard: where every member lies, how long it is and its crc32.

The index is the contract: samples are read by offset, never by walking the archive, so a shard that was cut,
overwritten or damaged afterwards cannot lose samples silently. Walking tar headers belongs to ``tarscan``, reading
members to ``reader``, writing shards to ``pack``.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mmdiff.errors import ShardError

from .tarscan import MAX_MEMBER_BYTES, scan

__all__ = [
    "SUFFIXES",
    "Entry",
    "Member",
    "Place",
    "ShardIndex",
    "build_index",
    "index_name",
    "parse_index",
    "read_index",
    "split_name",
    "write_index",
]

_ENCODED = tuple(f"{kind}{mirror}.npy" for kind in ("codes", "latents", "moments") for mirror in ("", "_flip"))
_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
SUFFIXES = (*_ENCODED, *_PICTURES, "json", "txt", "text", "caption", "cls", "npy")
"""Suffixes that name a member of a sample; whatever stands before one is the key, dots included. Further pictures of a
sample are ``image2.jpg``, ``image3.png``, ... up to ``image99``, and their codes ``image2.codes.npy`` and so on."""

_NUMBERED = "|".join(map(re.escape, (*_PICTURES, *_ENCODED)))
_KNOWN = "|".join((rf"(?:image(?:[2-9]|[1-9]\d)\.)?(?:{_NUMBERED})", *map(re.escape, SUFFIXES)))
_NAME = re.compile(rf"(?s)(.+?)\.({_KNOWN})", re.IGNORECASE)
_FORMAT = "mmdiff-shard-index"
_VERSION = 1
_MAX_MEMBERS = 10_000_000
_MAX_INDEX_BYTES = 1 << 30
_MAX_CONCEPT_JSON = 1 << 18


class Member(NamedTuple):
    """Where one member's bytes lie in its shard."""

    offset: int
    size: int
    crc32: int


Place = tuple[str, int, int, int]
"""Suffix, offset, size and crc32 of a member."""


class Entry(NamedTuple):
    """One sample of a shard: its key, its members by suffix, and its group for balancing."""

    key: str
    members: dict[str, Member]
    concept: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """Index of one shard, stored by columns (about 18 bytes per member).

    Attributes:
        url: Path or URL of the shard.
        size: Bytes of the shard when it was indexed.
        keys: UTF-8 keys of all samples, joined without separator.
        key_ends: Int32 [samples]; where each key ends in ``keys``.
        member_ends: Int32 [samples]; where each sample's members end in the member columns.
        suffix: Int16 [members]; position in ``suffixes``.
        offset: Int64 [members].
        length: Int32 [members].
        crc32: UInt32 [members].
        suffixes: Suffixes that occur.
        concept: Int32 [samples]; position in ``concepts``, -1 for none.
        concepts: Values of the field ``concept`` of the samples' JSON.
        ignored: Number of members left out, by suffix, because their suffix is not one of `SUFFIXES`.
    """

    url: str
    size: int
    keys: bytes
    key_ends: np.ndarray
    member_ends: np.ndarray
    suffix: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray
    suffixes: tuple[str, ...]
    concept: np.ndarray
    concepts: tuple[str, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.key_ends)

    def __getitem__(self, i: int) -> Entry:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.url}: sample {i} of {len(self)}")
        members = {suffix: Member(*place) for suffix, *place in self.places(i)}
        group = int(self.concept[i])
        return Entry(self.key(i), members, self.concepts[group] if group >= 0 else None)

    def places(self, i: int) -> list[Place]:
        """Places of every member of sample ``i``: what reading needs, and no more."""
        _, ends, suffix, offset, length, crc32 = self._views
        names = self.suffixes
        members = range(ends[i - 1] if i else 0, ends[i])
        return [(names[suffix[m]], offset[m], length[m], crc32[m]) for m in members]

    @functools.cached_property
    def _views(self) -> tuple[memoryview, ...]:
        """The columns in a form of which single numbers are read ten times as fast as from an array."""
        columns = (self.key_ends, self.member_ends, self.suffix, self.offset, self.length, self.crc32)
        return tuple(column.data for column in columns)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_views"}

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    @property
    def samples(self) -> Sequence[Entry]:
        """All entries; indexing the `ShardIndex` itself makes only one."""
        return list(self)

    def key(self, i: int) -> str:
        """Key of sample ``i``."""
        ends, *_ = self._views
        return self.keys[ends[i - 1] if i else 0 : ends[i]].decode()

    def first_beyond(self, size: int) -> str | None:
        """Key of the first sample, in order of the file, that does not fit into ``size`` bytes."""
        beyond = np.flatnonzero(self.offset + self.length > size)
        if not len(beyond):
            return None
        member = int(beyond[np.argmin(self.offset[beyond])])
        return self.key(int(np.searchsorted(self.member_ends, member, side="right")))


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member name; only a known suffix is split off.

    >>> split_name("v1.5_img.png")
    ('v1.5_img', 'png')
    """
    if found := _NAME.fullmatch(name):
        return found[1], found[2].lower()
    stem, dot, suffix = name.rpartition(".")
    return (stem, "." + suffix.lower()) if dot and stem else (name, ".")


def index_name(url: str | Path) -> str:
    """Where the index of a shard is looked for: beside it."""
    return f"{url}.idx.json"


def build_index(shard: str | Path, *, url: str | None = None, stream: BinaryIO | None = None) -> ShardIndex:
    """Read a whole shard once and index it.

    Args:
        shard: Path of the shard.
        url: Name to store; default the path.
        stream: Open seekable bytes instead of the path (remote shards).

    Raises:
        ShardError: Not readable, not a plain tar, cut, or holding something `scan` refuses or a duplicate.
    """
    where = url or str(shard)
    if stream is not None:
        return _index_stream(stream, where)
    try:
        with Path(shard).open("rb") as opened:
            return _index_stream(opened, where)
    except OSError as error:
        raise ShardError(f"{where}: cannot be read ({error.strerror})") from None


def write_index(index: ShardIndex, path: str | Path) -> Path:
    """Save an index as JSON: written to a temporary name, then renamed."""
    path = Path(path)
    tree = {
        "format": _FORMAT,
        "version": _VERSION,
        "size": index.size,
        "suffixes": list(index.suffixes),
        "concepts": list(index.concepts),
        "ignored": dict(sorted(index.ignored.items())),
        "keys": [index.key(i) for i in range(len(index))],
        **{name: getattr(index, name).tolist() for name in _COLUMNS},
    }
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.write_text(json.dumps(tree, separators=(",", ":")), encoding="utf-8")
    partial.replace(path)
    return path


def read_index(path: str | Path, *, url: str | None = None) -> ShardIndex:
    """Read an index that `write_index` saved.

    Args:
        path: The index file.
        url: The shard it belongs to; default: the path without ``.idx.json``.

    Raises:
        ShardError: Missing, or not a valid index.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ShardError(f"{path}: index of more than 1 GiB; split the shard")
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_index(data, url or str(path).removesuffix(".idx.json"))


def parse_index(data: bytes, url: str) -> ShardIndex:
    """Check and unpack the JSON text of an index.

    Raises:
        ShardError: Not a valid index.
    """
    try:
        return _unpack(json.loads(data), url)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError(
            f"{index_name(url)}: not a valid index ({type(error).__name__}: {error}); run: mmdiff data index"
        ) from None


_COLUMNS: dict[str, Any] = {
    "member_ends": np.int32,
    "suffix": np.int16,
    "offset": np.int64,
    "length": np.int32,
    "crc32": np.uint32,
    "concept": np.int32,
}


def _unpack(tree: Any, url: str) -> ShardIndex:
    if tree["format"] != _FORMAT or tree["version"] != _VERSION:
        raise ValueError(f"format {tree['format']!r} version {tree['version']!r}, expected {_FORMAT!r} {_VERSION}")
    keys = [k.encode() for k in tree["keys"]]
    columns = {name: np.array(tree[name], dtype=kind) for name, kind in _COLUMNS.items()}
    if any(c.ndim != 1 for c in columns.values()):
        raise ValueError("a column is not a flat list")
    _check_columns(columns, len(keys), int(tree["size"]), len(tree["suffixes"]), len(tree["concepts"]))
    return ShardIndex(
        url=url,
        size=int(tree["size"]),
        keys=b"".join(keys),
        key_ends=np.cumsum([len(k) for k in keys], dtype=np.int32),
        suffixes=tuple(map(str, tree["suffixes"])),
        concepts=tuple(map(str, tree["concepts"])),
        ignored={str(k): int(v) for k, v in tree["ignored"].items()},
        **columns,
    )


def _check_columns(c: Mapping[str, np.ndarray], samples: int, size: int, suffixes: int, concepts: int) -> None:
    members = len(c["offset"])
    if len(c["member_ends"]) != samples or len(c["concept"]) != samples:
        raise ValueError(f"{samples} keys, {len(c['member_ends'])} samples")
    if any(len(c[name]) != members for name in ("suffix", "length", "crc32")):
        raise ValueError("member columns differ in length")
    if (np.diff(c["member_ends"], prepend=0) < 0).any() or (c["member_ends"][-1:] != members).any():
        raise ValueError("member_ends is not a partition of the members")
    if members and not samples:
        raise ValueError("members without samples")
    inside = (c["offset"] >= 0) & (c["length"] >= 0) & (c["length"] <= MAX_MEMBER_BYTES)
    if not (inside & (c["offset"] + c["length"] <= size)).all():
        raise ValueError("a member lies outside the shard or is too large")
    if not ((c["suffix"] >= 0) & (c["suffix"] < suffixes)).all():
        raise ValueError("a suffix number is out of range")
    if not ((c["concept"] >= -1) & (c["concept"] < concepts)).all():
        raise ValueError("a concept number is out of range")


def _index_stream(stream: BinaryIO, where: str) -> ShardIndex:
    samples: dict[str, dict[str, Member]] = {}
    concepts: dict[str, int] = {}
    concept_of: dict[str, int] = {}
    ignored: dict[str, int] = {}
    for count, (name, offset, size) in enumerate(scan(stream, where)):
        if count >= _MAX_MEMBERS:
            raise ShardError(f"{where}: more than {_MAX_MEMBERS:,} members; split the shard")
        key, suffix = split_name(name)
        if suffix.startswith("."):
            ignored[suffix] = ignored.get(suffix, 0) + 1
            continue
        members = samples.setdefault(key, {})
        if suffix in members:
            raise ShardError(f"{where}: two members for key {key!r} and suffix {suffix!r}; rename one and repack")
        stream.seek(offset)
        data = stream.read(size)
        members[suffix] = Member(offset, size, zlib.crc32(data))
        if suffix == "json" and (concept := _concept(data)) is not None:
            concept_of[key] = concepts.setdefault(concept, len(concepts))
    return _columns(where, stream.seek(0, os.SEEK_END), samples, concept_of, tuple(concepts), ignored)


def _columns(
    url: str,
    size: int,
    samples: Mapping[str, Mapping[str, Member]],
    concept_of: Mapping[str, int],
    concepts: tuple[str, ...],
    ignored: Mapping[str, int],
) -> ShardIndex:
    suffixes = tuple(sorted({s for members in samples.values() for s in members}))
    number = {s: i for i, s in enumerate(suffixes)}
    rows = [(number[s], *m) for members in samples.values() for s, m in members.items()]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    keys = [k.encode() for k in samples]
    return ShardIndex(
        url=url,
        size=size,
        keys=b"".join(keys),
        key_ends=np.cumsum([len(k) for k in keys], dtype=np.int32),
        member_ends=np.cumsum([len(m) for m in samples.values()], dtype=np.int32),
        suffix=table[:, 0].astype(np.int16),
        offset=table[:, 1].copy(),
        length=table[:, 2].astype(np.int32),
        crc32=table[:, 3].astype(np.uint32),
        suffixes=suffixes,
        concept=np.array([concept_of.get(k, -1) for k in samples], dtype=np.int32),
        concepts=concepts,
        ignored=ignored,
    )


def _concept(data: bytes) -> str | None:
    if len(data) > _MAX_CONCEPT_JSON or b'"concept"' not in data:
        return None
    try:
        value = json.loads(data)["concept"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # a broken JSON member is the task's business: it is skipped and counted there
    return value if isinstance(value, str) else None
