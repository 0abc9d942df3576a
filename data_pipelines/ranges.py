"""Byte ranges of shards, wherever they lie: local files by descriptor, remote ones by range requests with retries.

Which addresses are allowed is decided here as well: a name never runs anything. What bytes mean is ``reader``'s and
``index``'s business.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mmdiff.errors import MissingExtraError, SampleError, ShardError
from mmdiff.images import redact

from .http import HttpStore, InterruptedTransferError

__all__ = [
    "REMOTE",
    "ForwardStream",
    "RangeReader",
    "fetch_ahead",
    "in_memory",
    "read_checked",
    "scheme_of",
    "shown",
]

T = TypeVar("T")

TRIES = 5
"""Attempts of a remote read."""
PAUSE_SECONDS = 0.5
"""Pause after the first failed attempt; it doubles each time."""
REMOTE = ("http", "https", "s3", "gs", "hf")
"""Schemes that are read over a network."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_OPEN_FILES = 64
_FAR = 1 << 62
_CLIENTS = ("aiohttp", "botocore", "gcsfs", "httpx", "requests", "urllib3")


def shown(url: str) -> str:
    """A URL without credentials, a path as it is: for messages and records."""
    return redact(url) if "://" in url else url


def scheme_of(name: str) -> str:
    """Scheme of a URL in lower case, empty for a local path.

    Raises:
        ShardError: A scheme that is not allowed, ``pipe:`` among them.
    """
    match = _SCHEME.match(name)
    scheme = match[1].lower() if match else ""
    if not scheme or scheme == "file":
        return ""
    if scheme == "embedded" or (scheme in REMOTE and name[len(scheme) :].startswith("://")):
        return scheme
    if scheme == "pipe":
        raise ShardError(
            "pipe: names a shell command, and nothing that is read here may run one; give the s3://, gs:// or https:// "
            "address itself, or copy the shards to a folder"
        )
    if "://" in name or not Path(name).parent.is_dir():
        raise ShardError(f"{shown(name)}: {scheme}: is not a known kind of address; known: {', '.join(REMOTE)}, file")
    return ""


class _File:
    """A descriptor and how many reads use it."""

    __slots__ = ("descriptor", "retired", "users")

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.users, self.retired = descriptor, 0, False

    def retire(self) -> None:
        """Close it, or have it closed when the last read is done."""
        self.retired = True
        if not self.users:
            os.close(self.descriptor)


class RangeReader:
    """Byte ranges of files, local ones by descriptor, remote ones by range requests.

    Safe to hand to another process; connections and descriptors are opened where they are used.

    Attributes:
        bytes_read: Bytes delivered so far.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[str, _File] = {}
        self._stores: dict[str, Any] = {}
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RangeReader.__init__(self)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors; they are opened again when needed."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].retire()

    def size(self, url: str) -> int:
        """Bytes of a file.

        Raises:
            ShardError: Missing or not reachable.
        """
        if scheme_of(url) in REMOTE:
            return int(self._retry(url, lambda: self._store(url).size(url)) or 0)
        try:
            return os.stat(url).st_size
        except OSError as error:
            raise ShardError(f"{url}: cannot be read ({error.strerror})") from None

    def read(self, url: str, offset: int, size: int) -> bytes:
        """The bytes ``offset .. offset + size``; fewer at the end of the file.

        Raises:
            ShardError: The file is gone or cannot be reached: that is not one sample's fault.
        """
        if size <= 0:
            return b""
        if scheme_of(url) in REMOTE:
            data = self._read_remote(url, offset, size)
        else:
            try:
                with self.opened({0: url}) as files:
                    data = os.pread(files[0], size, offset)
            except OSError as error:
                raise ShardError(f"{url}: cannot be read ({error.strerror})") from None
        self.count(len(data))
        return data

    @contextlib.contextmanager
    def opened(self, urls: Mapping[int, str]) -> Iterator[Mapping[int, int]]:
        """Descriptors of local files, which stay open meanwhile, whatever other threads do.

        Raises:
            ShardError: A file cannot be opened.
        """
        taken: dict[int, _File] = {}
        try:
            for number, url in urls.items():
                try:
                    taken[number] = self._take(url)
                except OSError as error:
                    raise ShardError(f"{url}: cannot be read ({error.strerror})") from None
            yield {number: file.descriptor for number, file in taken.items()}
        finally:
            for file in taken.values():
                self._give_back(file)

    def count(self, size: int) -> None:
        """Add to `bytes_read` what was read from a descriptor."""
        with self._lock:
            self.bytes_read += size

    def stream(self, url: str) -> BinaryIO:
        """A seekable, buffered stream over a remote file."""
        return io.BufferedReader(_RangeStream(self, url), 1 << 20)

    def forward(self, url: str) -> ForwardStream:
        """A file from front to back, for servers without ranges; a broken connection is taken up again."""
        if scheme_of(url) in REMOTE:
            return ForwardStream(
                lambda at: self._retry(url, lambda: _skipped(self._store(url).open(url), at)), shown(url)
            )
        return ForwardStream(lambda at: _opened(url, at), url)

    def whole(self, url: str, limit: int) -> bytes | None:
        """A small remote file, None if it does not exist."""
        store = self._store(url)
        if not self._retry(url, lambda: store.exists(url)):
            return None
        return self._retry(url, lambda: store.cat_file(url, start=0, end=limit))

    def listing(self, pattern: str) -> list[str]:
        """URLs that match a remote glob, sorted."""
        scheme = scheme_of(pattern)
        found = self._retry(pattern, lambda: self._store(pattern).glob(pattern))
        return sorted(str(f) if "://" in str(f) else f"{scheme}://{f}" for f in found)

    def _read_remote(self, url: str, offset: int, size: int) -> bytes:
        """A remote range; what a broken transfer has brought is kept, the next try goes on behind it."""
        data = bytearray()

        def go_on() -> None:
            try:
                data.extend(self._store(url).cat_file(url, start=offset + len(data), end=offset + size))
            except InterruptedTransferError as error:
                data.extend(error.data)
                raise

        self._retry(url, go_on)
        return bytes(data)

    def _take(self, url: str) -> _File:
        """The open file of a URL; it is not closed before it is given back, whatever other threads do."""
        with self._lock:
            file = self._files.get(url)
            if file is None:
                if len(self._files) >= _OPEN_FILES:
                    self._files.pop(next(iter(self._files))).retire()
                file = self._files[url] = _File(os.open(url, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            file.users += 1
            return file

    def _give_back(self, file: _File) -> None:
        with self._lock:
            file.users -= 1
            if file.retired:
                file.retire()

    def _store(self, url: str) -> Any:
        if self._pid != os.getpid():  # connections do not survive a fork
            self._stores, self._pid = {}, os.getpid()
        scheme = scheme_of(url)
        if scheme not in self._stores:
            self._stores[scheme] = HttpStore() if scheme in ("http", "https") else _filesystem(scheme)
        return self._stores[scheme]

    def _retry(self, url: str, request: Callable[[], T]) -> T:
        failure: Exception | None = None
        for attempt in range(TRIES):
            try:
                return request()
            except FileNotFoundError:
                raise ShardError(f"{shown(url)}: does not exist") from None
            except Exception as error:
                # Every store has errors of its own for the network's faults; only those and OSError are tried again.
                if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _CLIENTS:
                    raise
                failure = error
            if attempt + 1 < TRIES:
                time.sleep(PAUSE_SECONDS * 2**attempt * (0.75 + 0.5 * (hash(url) % 97) / 97))
        kind = str(failure) if type(failure) is OSError else type(failure).__name__
        raise ShardError(f"{shown(url)}: could not be read in {TRIES} tries ({kind}); is the network up?") from None


def in_memory(spans: Sequence[tuple[int, int, int]]) -> bool:
    """Whether the system holds the beginnings of ranges, (descriptor, offset, size), of local files in memory."""
    try:
        return all(os.preadv(file, [bytearray(1)], at, os.RWF_NOWAIT) >= 0 for file, at, size in spans if size)
    except (OSError, AttributeError):  # not there, or a system that cannot tell
        return False


def fetch_ahead(spans: Sequence[tuple[int, int, int]]) -> None:
    """Ask the system to bring ranges, (descriptor, offset, size), into memory; this does not wait for them."""
    if hasattr(os, "posix_fadvise"):
        for file, at, size in spans:
            os.posix_fadvise(file, at, size, os.POSIX_FADV_WILLNEED)


class ForwardStream:
    """Bytes from front to back, with as much of a file's interface as walking a tar needs.

    Args:
        open_at: Opens the file at an offset.
        where: Its name, for messages.
    """

    def __init__(self, open_at: Callable[[int], Any], where: str) -> None:
        self._open_at, self._where, self._at = open_at, where, 0
        self._stream: Any = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go forward; the end is farther than anything, as nobody knows it yet.

        Raises:
            ShardError: The way leads back.
        """
        if whence == os.SEEK_END:
            return _FAR
        if offset < self._at:
            raise ShardError(f"{self._where}: a stream cannot go back from byte {self._at:,} to {offset:,}")
        while self._at < offset and self.read(min(offset - self._at, 1 << 20)):
            pass
        return self._at

    def read(self, size: int) -> bytes:
        """The next bytes, fewer only at the end.

        Raises:
            ShardError: They could not be read in `TRIES` tries.
        """
        data = bytearray()
        failures = 0
        while len(data) < size:
            try:
                if self._stream is None:
                    self._stream = self._open_at(self._at)
                chunk = self._stream.read(min(size - len(data), 1 << 20))
            except OSError as error:
                self.close()
                failures += 1
                if failures == TRIES:
                    raise ShardError(f"{self._where}: byte {self._at:,} could not be read in {TRIES} tries") from error
                time.sleep(PAUSE_SECONDS * 2**failures)
                continue
            if not chunk:
                break
            data += chunk
            self._at += len(chunk)
        return bytes(data)

    def close(self) -> None:
        """Close the file; reading opens it again where it was."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _opened(path: str, at: int) -> BinaryIO:
    try:
        stream = Path(path).open("rb")
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from None
    stream.seek(at)
    return stream


def _skipped(stream: Any, at: int) -> Any:
    """A stream without its first bytes, which were read before."""
    while at > 0:
        chunk = stream.read(min(at, 1 << 20))
        if not chunk:
            stream.close()
            raise OSError("the file ends before the byte at which the connection broke")
        at -= len(chunk)
    return stream


class _RangeStream(io.RawIOBase):
    """A remote file as a stream, for indexing it once."""

    def __init__(self, ranges: RangeReader, url: str) -> None:
        self._ranges, self._url, self._size, self._at = ranges, url, ranges.size(url), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._ranges.read(self._url, self._at, min(len(buffer), max(self._size - self._at, 0)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _filesystem(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme, "huggingface_hub")
        raise MissingExtraError(package, "remote", f"to read {scheme}:// shards") from error


def read_checked(ranges: RangeReader, url: str, offset: int, size: int, good: Callable[[bytes], str | None]) -> bytes:
    """Read a range and check it; a remote range that fails the check is asked for again, as a transfer can be cut.

    Args:
        ranges: Reads.
        url: The shard.
        offset: First byte.
        size: Bytes.
        good: Returns None, or the name of what is wrong.

    Raises:
        SampleError: The check failed: reason ``"shard_differs_from_index"`` (too short) or ``"crc_mismatch"``.
    """
    left = None
    while left is None or left > 0:
        data = ranges.read(url, offset, size)
        wrong = f"ends {size - len(data):,} bytes too early" if len(data) < size else good(data)
        if wrong is None:
            return data
        left = (TRIES if scheme_of(url) in REMOTE else 1) - 1 if left is None else left - 1
    reason = "shard_differs_from_index" if len(data) < size else "crc_mismatch"
    raise SampleError(reason, f"{shown(url)}: bytes {offset:,} to {offset + size:,}: {wrong}")
