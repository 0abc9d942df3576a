"""Writing shards: deterministic tar files with their index beside them.

The same samples give the same bytes on any machine and day. Reading is ``reader``'s; what samples hold is decided by
the callers (``datasets``, ``cache``, and the folder readers of ``importers``).
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmdiff.errors import ConfigError, ShardError

from .index import SUFFIXES, build_index, index_name, split_name, write_index
from .tarscan import MAX_MEMBER_BYTES

__all__ = ["write_shard", "write_shards"]


def write_shards(
    samples: Iterable[tuple[str, Mapping[str, bytes]]], out: str | Path, name: str, samples_per_shard: int = 2000
) -> list[Path]:
    """Write samples as ``out/name-00000.tar``, ``out/name-00001.tar``, ..., each with its index.

    Every shard is written under a temporary name and renamed when complete. Shards of the same name that an earlier
    call left and this one did not replace are removed at the end.

    Args:
        samples: Pairs of key and members by suffix, such as ``("a/001", {"png": b"...", "json": b"..."})``; members
            are written in sorted order of their suffixes.
        out: Folder, made if missing.
        name: First part of the file names.
        samples_per_shard: Samples in all shards but the last, at least 1.

    Returns:
        The shards, in order.

    Raises:
        ConfigError: No samples, a key that cannot be read back, an unknown suffix, or a bad argument.
        ShardError: A duplicate key or a member above the size limit.
    """
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard}; at least 1 is needed")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(f"shard name {name!r}: letters, digits and . + - _ only")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    pending: list[tuple[str, Mapping[str, bytes]]] = []
    seen: set[str] = set()
    for key, members in samples:
        _check(key, members, seen)
        pending.append((key, members))
        if len(pending) == samples_per_shard:
            shards.append(write_shard(folder / f"{name}-{len(shards):05d}.tar", pending))
            pending = []
    if pending:
        shards.append(write_shard(folder / f"{name}-{len(shards):05d}.tar", pending))
    if not shards:
        raise ConfigError(f"{folder}: no samples to write for {name!r}")
    _remove_stale(folder, name, len(shards))
    return shards


def _check(key: str, members: Mapping[str, bytes], seen: set[str]) -> None:
    if not key or key != key.strip("/") or ".." in key.split("/") or "\0" in key:
        raise ConfigError(f"key {key!r}: must be a relative name without '..'")
    if key in seen:
        raise ShardError(f"key {key!r} occurs twice; keys must be unique")
    seen.add(key)
    if not members:
        raise ConfigError(f"key {key!r}: has no members")
    for suffix, data in members.items():
        if split_name(f"{key}.{suffix}") != (key, suffix) or suffix not in SUFFIXES:
            raise ConfigError(f"key {key!r}: suffix {suffix!r} would not be read back; known: {', '.join(SUFFIXES)}")
        if len(data) > MAX_MEMBER_BYTES:
            raise ShardError(f"key {key!r}: member {suffix!r} is {len(data):,} bytes, limit {MAX_MEMBER_BYTES:,}")


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Write one shard with its index, atomically: the index comes last, so a shard that has one is whole.

    Args:
        path: The file, ending in ``.tar``; its folder exists.
        samples: Pairs as in `write_shards`, known to be readable.

    Returns:
        ``path``.
    """
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
            for key, members in samples:
                for suffix in sorted(members):
                    _add(tar, f"{key}.{suffix}", members[suffix])
        # The old index goes first: an interruption here leaves no index, which is rebuilt, never a wrong one.
        Path(index_name(path)).unlink(missing_ok=True)
        index = build_index(partial, url=str(path))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    write_index(index, index_name(path))
    return path


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults are fixed: mtime 0, uid 0, no names, mode 0644
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _remove_stale(folder: Path, name: str, count: int) -> None:
    pattern = re.compile(re.escape(name) + r"-(\d{5,})\.tar")
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and int(match[1]) >= count:
            Path(index_name(path)).unlink(missing_ok=True)
            path.unlink()
