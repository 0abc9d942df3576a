"""Writing shards: deterministic tar files with their index beside them.

The same samples give the same bytes on any machine and day, from any number of processes, interrupted or not. Reading
is ``reader``'s; what samples hold is decided by the callers (``datasets``, ``cache``, and ``importers``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError, SampleError, ShardError

from .importers import Row, Rows
from .index import SUFFIXES, build_index, index_name, read_index, split_name, write_index
from .parallel import Tick, orphaned, run_parts
from .tarscan import MAX_MEMBER_BYTES

__all__ = ["PackReport", "pack", "write_shard", "write_shards"]

_TICK = 50
"""Samples between two reports of progress."""


@dataclass(frozen=True)
class PackReport:
    """What `pack` did.

    Attributes:
        shards: The shards, in order.
        samples: Samples in them.
        resumed: Shards that an interrupted call had finished before.
        skipped: Samples left out, by reason.
    """

    shards: tuple[Path, ...]
    samples: int
    resumed: int
    skipped: Mapping[str, int]


def pack(
    rows: Rows,
    out: str | Path,
    name: str = "shard",
    samples_per_shard: int = 2000,
    *,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    keep_finished: bool = False,
    tick: Tick = lambda done: None,
) -> PackReport:
    """Write samples as ``out/name-00000.tar``, ..., each with its index, and ``out/name.pack.json`` about them.

    A call that was interrupted is taken up by the next one with the same arguments: finished shards stay.

    Args:
        rows: The samples.
        out: Folder, made if missing.
        name: First part of the file names.
        samples_per_shard: Samples of ``rows`` per shard, at least 1.
        workers: Processes; the shards' bytes do not depend on it.
        skip_bad: Leave out and count samples that cannot be read, instead of raising.
        overwrite: Replace shards of that name.
        keep_finished: Accept what a finished call with the same arguments has written, instead of raising.
        tick: Called with numbers of samples that were done.

    Raises:
        ConfigError: No samples, two of the same key, a bad argument, or other shards of that name are there.
        SampleError: A sample cannot be read, unless ``skip_bad``.
        ShardError: A process died.
    """
    _check_arguments(name, samples_per_shard)
    _check_keys(rows, name)
    folder = Path(out)
    job = _Job(rows, folder, name, samples_per_shard, skip_bad)
    done = job.begin(overwrite, keep_finished)
    tick(sum(len(job.numbers(n)) for n in done))
    todo = [n for n in range(job.count) if n not in done]
    for _ in run_parts(functools.partial(_pack_one, job), todo, workers, tick):
        pass
    _remove_stale(folder, name, job.count)
    return job.finish(len(done))


@dataclass(frozen=True)
class _Job:
    """A set of shards to be packed."""

    rows: Rows
    folder: Path
    name: str
    samples_per_shard: int
    skip_bad: bool

    @property
    def count(self) -> int:
        return -(-len(self.rows) // self.samples_per_shard)

    @property
    def note(self) -> Path:
        return self.folder / f"{self.name}.pack.json"

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.tar"

    def numbers(self, number: int) -> range:
        """Numbers of the rows of a shard."""
        start = number * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, len(self.rows)))

    def plan(self) -> dict[str, Any]:
        """What decides the shards' bytes."""
        return {
            "format": "mmdiff-pack",
            "version": 1,
            "source": self.rows.digest(),
            "samples_per_shard": self.samples_per_shard,
            "skip_bad": self.skip_bad,
        }

    def begin(self, overwrite: bool, keep_finished: bool) -> set[int]:
        """Note the plan; numbers of the shards that an interrupted call with the same plan has finished."""
        there = any(self.folder.glob(f"{self.name}-*.tar"))
        noted = _read_note(self.note)
        unfinished = {**self.plan(), "finished": False}
        same = keep_finished and noted is not None and all(noted.get(k) == v for k, v in self.plan().items())
        if there and not overwrite and noted != unfinished and not same:
            names = f"{self.name}-*.tar"
            raise ConfigError(
                f"{self.folder}: holds shards named {names} already; add --overwrite, or choose another name"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.note, fcntl.LOCK_EX):
            return self._begun(overwrite, unfinished)

    def _begun(self, overwrite: bool, unfinished: Mapping[str, Any]) -> set[int]:
        for partial in self.folder.glob(f"{self.name}-*.tmp-*"):
            partial.unlink(missing_ok=True)
        if overwrite:
            self.note.unlink(missing_ok=True)
            # Without their indexes the old shards are not taken for finished ones of this plan, come what may.
            for old in self.folder.glob(f"{self.name}-*.tar.idx.json"):
                old.unlink()
        _write_note(self.note, unfinished)
        return {n for n in range(self.count) if _whole(self.shard(n))}

    def finish(self, resumed: int) -> PackReport:
        """Count what was written, ask once more what was left out, and note it."""
        self.note.with_name(f".{self.note.name}.lock").unlink(missing_ok=True)
        skipped: Counter[str] = Counter()
        listed: list[dict[str, Any]] = []
        for number in range(self.count):
            index = read_index(index_name(self.shard(number)))
            written = {index.key(i) for i in range(len(index))}
            listed.append({"name": self.shard(number).name, "samples": len(index), "bytes": index.size})
            for i in self.numbers(number):
                if self.rows.key(i) not in written:
                    skipped[_reason(self.rows, i)] += 1
        samples = sum(entry["samples"] for entry in listed)
        told = {"finished": True, "samples": samples, "skipped": dict(sorted(skipped.items())), "shards": listed}
        _write_note(self.note, {**self.plan(), **told})
        return PackReport(tuple(self.shard(n) for n in range(self.count)), samples, resumed, dict(skipped))


def _pack_one(job: _Job, number: int, tick: Tick) -> None:
    # A killed call leaves processes that end their shard; the next call waits for them instead of working beside them.
    with _locked(job.note, fcntl.LOCK_SH):
        if not orphaned():
            write_shard(job.shard(number), _readable(job, number, tick))


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    """Hold a file's lock; where the file system has none, go on without."""
    with path.with_name(f".{path.name}.lock").open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, kind)
        yield


def _readable(job: _Job, number: int, tick: Tick) -> Iterator[Row]:
    """Rows of a shard, checked; progress is told now and then."""
    pending = 0
    for i in job.numbers(number):
        try:
            key, members = job.rows[i]
            _check(key, members, set())
            yield key, members
        except SampleError:
            if not job.skip_bad:
                raise
        pending += 1
        if pending == _TICK:
            tick(pending)
            pending = 0
    tick(pending)


def _reason(rows: Rows, i: int) -> str:
    try:
        rows.members(i)
    except SampleError as error:
        return error.reason
    return "unknown"


def _check_keys(rows: Rows, name: str) -> None:
    if not len(rows):
        raise ConfigError(f"no samples to write for {name!r}")
    seen: set[str] = set()
    for i in range(len(rows)):
        key = rows.key(i)
        if key in seen:
            raise ConfigError(f"key {key!r} occurs twice; keys must be unique, rename one of the files")
        seen.add(key)


def _whole(shard: Path) -> bool:
    """Whether a shard was finished: its index is written last."""
    try:
        return read_index(index_name(shard)).size == shard.stat().st_size
    except (ShardError, OSError):
        return False


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _write_note(path: Path, note: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


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
    _check_arguments(name, samples_per_shard)
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


def _check_arguments(name: str, samples_per_shard: int) -> None:
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard}; at least 1 is needed")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(f"shard name {name!r}: letters, digits and . + - _ only")


def _check(key: str, members: Mapping[str, bytes], seen: set[str]) -> None:
    if not key or key != key.strip("/") or ".." in key.split("/") or "\0" in key:
        raise ConfigError(f"key {key!r}: must be a relative name without '..'")
    if key in seen:
        raise ShardError(f"key {key!r} occurs twice; keys must be unique")
    seen.add(key)
    if not members:
        raise ConfigError(f"key {key!r}: has no members")
    for suffix, data in members.items():
        if split_name(f"{key}.{suffix}") != (key, suffix) or suffix.startswith("."):
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

    Raises:
        ShardError: It could not be written, for want of room or of permission; a former shard of that name is intact.
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
        write_index(index, index_name(path))
    except OSError as error:
        raise ShardError(_unwritten(path, error)) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _unwritten(path: Path, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    advice = f"{shutil.disk_usage(path.parent).free:,} bytes are free: make room" if full else "check the folder"
    return f"{path}: could not be written ({error.strerror or error}); {advice} and run the command again"


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
