"""Walking the headers of a tar file, strictly.

Parsed here rather than by a general library because an index must refuse what a general library accepts: sparse
files, links, members that claim to be huge, archives without an end. Nothing is ever extracted or inflated.

Source: POSIX.1-2001 (ustar and pax), and GNU tar's long names and base-256 numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

from mmdiff.errors import ShardError

__all__ = ["MAX_MEMBER_BYTES", "Walkable", "scan"]

MAX_MEMBER_BYTES = 64 << 20
"""Largest member that is accepted."""

_BLOCK = 512
_MAX_EXTENDED = 1 << 20  # long names and PAX records; real ones have a few hundred bytes


class Walkable(Protocol):
    """What walking a tar needs of a file."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to an offset."""
        ...

    def read(self, size: int, /) -> bytes:
        """The next bytes, fewer only at the end."""
        ...


def scan(stream: Walkable, where: str) -> Iterator[tuple[str, int, int]]:
    """Walk the headers of an uncompressed tar; yields (name, offset, size) of regular files.

    The caller may move the stream between two yields.

    Args:
        stream: Seekable bytes; going forward is enough.
        where: Name for messages.

    Raises:
        ShardError: Bad checksum, link, device, sparse or oversized member, or no end-of-archive mark.
    """
    total = stream.seek(0, os.SEEK_END)
    position, renamed, resized, last = 0, None, None, "the start"
    while True:
        stream.seek(position)
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise ShardError(
                f"{where}: ends at byte {total:,} without a tar's end mark, after {last}: it was cut; make it again"
            )
        if not any(block):
            _check_end(stream, where, position)
            return
        name, size, kind = _header(block, where, position)
        data = position + _BLOCK
        if kind in b"xgLK":
            if size > _MAX_EXTENDED:
                raise ShardError(f"{where}: extended header at byte {position:,} claims {size:,} bytes, limit 1 MiB")
            records = _extended(stream, data, size, kind, where)
            renamed, resized = records.get("path", renamed), records.get("size", resized)
        else:
            name, size = renamed if renamed is not None else name, size if resized is None else resized
            renamed = resized = None
            if kind in b"0\x007":
                _check_member(where, name, size, data, total)
                yield name, data, size
            elif kind != ord("5"):
                raise ShardError(f"{where}: member {name!r} is {_kind(kind)}; only regular files are read, repack it")
            else:
                size = 0
            last = repr(name)
        position = data + -(-size // _BLOCK) * _BLOCK


def _header(block: bytes, where: str, position: int) -> tuple[str, int, int]:
    """Name, size and type flag of one header block."""
    try:
        stored = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError:
        raise ShardError(f"{where}: no tar header at byte {position:,}; damaged, compressed, or not a tar") from None
    if stored != sum(block) - sum(block[148:156]) + 8 * 32:
        raise ShardError(f"{where}: wrong header checksum at byte {position:,}; damaged, compressed, or not a tar")
    if size < 0:
        raise ShardError(f"{where}: header at byte {position:,} claims {size:,} bytes; the shard is damaged")
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name.decode("utf-8", "backslashreplace"), size, block[156]


def _number(text: bytes) -> int:
    if text[0] in (0x80, 0xFF):  # GNU: base 256 for what does not fit into octal digits
        value = int.from_bytes(text[1:], "big")
        return value - 256 ** (len(text) - 1) if text[0] == 0xFF else value
    return int(text.split(b"\0")[0].strip() or b"0", 8)


def _extended(stream: Walkable, offset: int, size: int, kind: int, where: str) -> dict[str, Any]:
    """What a long-name or PAX header says about the next member."""
    stream.seek(offset)
    data = stream.read(size)
    if len(data) < size:
        raise ShardError(f"{where}: ends inside an extended header at byte {offset:,}: it was cut; make it again")
    if kind == ord("L"):
        return {"path": data.split(b"\0")[0].decode("utf-8", "backslashreplace")}
    if kind != ord("x"):
        return {}
    out: dict[str, Any] = {}
    for key, value in _pax(data, where):
        if key.startswith("GNU.sparse"):
            raise ShardError(f"{where}: sparse member before byte {offset:,}; only plain files are read, repack it")
        if key == "path":
            out["path"] = value
        elif key == "size":
            if not value.isdecimal():
                raise ShardError(f"{where}: PAX size {value[:40]!r} before byte {offset:,} is not a number")
            out["size"] = int(value[:20])
    return out


def _pax(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    while data:
        digits, space, _ = data[:24].partition(b" ")
        length = int(digits) if digits.isdigit() and space else 0
        if not len(digits) + 1 < length <= len(data):
            raise ShardError(f"{where}: malformed PAX record {data[:24]!r}; the shard is damaged")
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        yield key.decode("utf-8", "backslashreplace"), value.decode("utf-8", "backslashreplace")
        data = data[length:]


def _check_member(where: str, name: str, size: int, data: int, total: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise ShardError(
            f"{where}: member {name!r} is {size:,} bytes, limit {MAX_MEMBER_BYTES:,}; make it smaller and repack"
        )
    if data + size > total:
        raise ShardError(
            f"{where}: ends at byte {total:,}, inside member {name!r} ({data + size - total:,} bytes are missing): "
            "it was cut; make it again"
        )


def _kind(flag: int) -> str:
    kinds = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe"}
    return {**kinds, "S": "a sparse file"}.get(chr(flag), f"of the unknown type {chr(flag)!r}")


def _check_end(stream: Walkable, where: str, position: int) -> None:
    # A zeroed header, or two archives joined, would otherwise lose everything behind it without a word.
    while chunk := stream.read(1 << 20):
        if any(chunk):
            raise ShardError(f"{where}: data after the end mark at byte {position:,}; damaged or joined, repack it")
