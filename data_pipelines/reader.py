"""Samples out of shards: the bytes of a sample by its place in the index, checked against their crc32.

This is the first of the two places where a sample may be refused (the second is the task): every refusal is a
`SampleError` with a reason, which the loader counts. Which sample comes when is ``plan``'s, decoding ``tasks``'.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import operator
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmdiff.errors import SampleError, ShardError

from .index import Place, ShardIndex
from .ranges import REMOTE, RangeReader, fetch_ahead, in_memory, read_checked, scheme_of, shown
from .source import open_shards, size_complaint
from .tarscan import MAX_MEMBER_BYTES

__all__ = ["IMAGE_SUFFIXES", "TEXT_SUFFIXES", "Sample", "ShardReader", "iter_samples", "numbered"]

T = TypeVar("T")

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
"""Suffixes of a sample's image, in the order in which they are tried."""
TEXT_SUFFIXES = ("txt", "text", "caption")
"""Suffixes of a sample's text, in the order in which they are tried; those that others use are read as well."""
MAX_SAMPLE_BYTES = 256 << 20
"""Largest sample that is read."""

_GAP = 4096  # remote members that lie this close are fetched with one request
_LOCAL_THREADS, _REMOTE_THREADS = 8, 16  # requests on their way at once: disks, too, are faster with several
_STRETCH = 64  # local samples that are read at once: so many files may have to be open
_PROBES = 8
_SURELY_FIT = MAX_SAMPLE_BYTES // MAX_MEMBER_BYTES
_Wanted = tuple[int, str, list[Place]]  # shard, key, places of the members
_BY_OFFSET = operator.itemgetter(1)


@dataclass(frozen=True)
class Sample:
    """One sample as bytes.

    Attributes:
        key: Its name in the shard.
        url: The shard, without credentials.
        members: Bytes by suffix.
    """

    key: str
    url: str
    members: Mapping[str, bytes]

    def image(self) -> bytes:
        """Bytes of the image.

        Raises:
            SampleError: Reason ``"missing_image"``.
        """
        if (data := self._image(0)) is not None:
            return data
        raise SampleError("missing_image", f"{self}: has no image, only {', '.join(self.members) or 'nothing'}")

    def images(self) -> list[bytes]:
        """Bytes of all images: the first one, then ``image2``, ``image3``, ... for as long as there are any.

        Raises:
            SampleError: Reason ``"missing_image"``.
        """
        found = [self.image()]
        while (data := self._image(len(found))) is not None:
            found.append(data)
        return found

    def info(self) -> dict[str, Any]:
        """Content of the JSON member, empty if there is none.

        Raises:
            SampleError: Reason ``"bad_json"``.
        """
        data = self.members.get("json")
        if data is None:
            return {}
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SampleError("bad_json", f"{self}: the JSON member cannot be read ({type(error).__name__})") from None
        if not isinstance(value, dict):
            raise SampleError("bad_json", f"{self}: the JSON member holds {type(value).__name__}, expected an object")
        return value

    def text(self, suffix: str | None = None) -> str | None:
        """A text member without surrounding whitespace, None if there is none.

        Args:
            suffix: The member; default: the first of `TEXT_SUFFIXES` that is there.

        Raises:
            SampleError: Reason ``"bad_text"``: not UTF-8.
        """
        wanted = TEXT_SUFFIXES if suffix is None else (suffix,)
        found = next((s for s in wanted if s in self.members), None)
        if found is None:
            return None
        try:
            return self.members[found].decode().strip()
        except UnicodeDecodeError:
            raise SampleError("bad_text", f"{self}: the member {found!r} is not UTF-8 text") from None

    def _image(self, number: int) -> bytes | None:
        return next((self.members[s] for s in _image_names(number) if s in self.members), None)

    def __str__(self) -> str:
        return f"{self.url}: {self.key}"


def numbered(number: int, suffix: str) -> str:
    """Suffix of the member that holds image ``number``, from 0, in a file format.

    >>> numbered(0, "png"), numbered(1, "jpg")
    ('png', 'image2.jpg')
    """
    return f"image{number + 1}.{suffix}" if number else suffix


@functools.cache
def _image_names(number: int) -> tuple[str, ...]:
    return tuple(numbered(number, suffix) for suffix in IMAGE_SUFFIXES)


class ShardReader:
    """Reads samples of a list of shards by number.

    Args:
        shards: Indexes, as `open_shards` returns them.
        suffixes: Members to read; default all.
    """

    def __init__(self, shards: Sequence[ShardIndex], suffixes: Collection[str] | None = None) -> None:
        self.shards = list(shards)
        self._suffixes = None if suffixes is None else frozenset(suffixes)
        self._ranges = RangeReader()
        self._differs: dict[int, str | None] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = os.getpid()
        self._names = [shown(index.url) for index in self.shards]
        self._remote: dict[int, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}

    @property
    def bytes_read(self) -> int:
        """Bytes read from shards so far."""
        return self._ranges.bytes_read

    def close(self) -> None:
        """Close files and end threads; they are made again when needed."""
        self.end_threads()
        self._ranges.close()

    def end_threads(self) -> None:
        """End the threads of `read_many`; they are made again when needed."""
        if self._pool is not None and self._pool_pid == os.getpid():
            self._pool.shutdown()
        self._pool = None

    def read(self, shard: int, sample: int) -> Sample:
        """Read and check one sample.

        Args:
            shard: Number of the shard.
            sample: Number of the sample in its shard.

        Raises:
            SampleError: Reason ``"shard_differs_from_index"``, ``"crc_mismatch"`` or ``"sample_too_large"``.
            ShardError: The shard cannot be reached at all.
        """
        [found] = self.read_many([(shard, sample)])
        if isinstance(found, SampleError):
            raise found
        return found

    def read_many(self, places: Sequence[tuple[int, int]]) -> list[Sample | SampleError]:
        """Several samples at once: a sample, or what is wrong with it, for each.

        What the system holds in memory is read here and now; from disks and networks several requests are on their way
        at the same time.

        Args:
            places: Shard and sample of each.

        Raises:
            ShardError: A shard cannot be reached at all.
        """
        if any(self._is_remote(shard) for shard in {shard for shard, _ in places}):
            return self._spread(self._read_remote, [self._find(*place) for place in places], _REMOTE_THREADS)
        parts = [places[start : start + _STRETCH] for start in range(0, len(places), _STRETCH)]
        return [found for part in parts for found in self._read_files(part)]

    def prepare(self, places: Sequence[tuple[int, int]]) -> None:
        """Have the system bring local samples into memory that are read soon, without waiting for them.

        Args:
            places: Shard and sample of each.
        """
        local = [place for place in places if not self._is_remote(place[0])]
        with contextlib.suppress(ShardError):  # reading them will say so
            for start in range(0, len(local), _STRETCH):
                part = local[start : start + _STRETCH]
                with self._opened(part) as files:
                    if not in_memory(_spans([self._find(*place) for place in _probes(part)], files)):
                        fetch_ahead(_spans([self._find(*place) for place in part], files))

    def _read_files(self, places: Sequence[tuple[int, int]]) -> list[Sample | SampleError]:
        """Local samples, all of whose shards are open meanwhile."""
        wanted = [self._find(*place) for place in places]
        with self._opened(places) as files:
            read = functools.partial(self._read_open, files)
            if in_memory(_spans(_probes(wanted), files)):
                return read(wanted)
            fetch_ahead(_spans(wanted, files))
            return self._spread(read, wanted, _LOCAL_THREADS)

    def _opened(self, places: Sequence[tuple[int, int]]) -> AbstractContextManager[Mapping[int, int]]:
        return self._ranges.opened({shard: self.shards[shard].url for shard, _ in places})

    def _find(self, shard: int, sample: int) -> _Wanted:
        index = self.shards[shard]
        if not 0 <= sample < len(index):
            raise IndexError(f"{index.url}: sample {sample} of {len(index)}")
        places = index.places(sample)
        if self._suffixes is not None:
            places = [place for place in places if place[0] in self._suffixes]
        return shard, index.key(sample), places

    def _is_remote(self, shard: int) -> bool:
        known = self._remote.get(shard)
        if known is None:
            known = self._remote[shard] = scheme_of(self.shards[shard].url) in REMOTE
        return known

    def _spread(
        self, read: Callable[[Sequence[_Wanted]], list[Sample | SampleError]], wanted: Sequence[_Wanted], threads: int
    ) -> list[Sample | SampleError]:
        """``read(wanted)``, by several threads."""
        parts = min(threads, len(wanted))
        if parts < 2:
            return read(wanted)
        if self._pool is None or self._pool_pid != os.getpid():  # threads do not survive a fork
            self._pool_pid = os.getpid()
            self._pool = ThreadPoolExecutor(threads, "mmdiff-read")
        # A thread's share is a whole stretch: handing over sample by sample would take longer than reading them.
        cuts = [len(wanted) * i // parts for i in range(parts + 1)]
        found = self._pool.map(read, [wanted[a:b] for a, b in itertools.pairwise(cuts)])
        return [result for part in found for result in part]

    def _read_open(self, files: Mapping[int, int], wanted: Sequence[_Wanted]) -> list[Sample | SampleError]:
        """Members of local samples, one read each: that costs less than cutting them out of a common one."""
        found: list[Sample | SampleError] = []
        total, pread, crc32, names = 0, os.pread, zlib.crc32, self._names
        sound = {shard for shard in files if self._complaint(shard) is None}
        for shard, key, places in wanted:
            members: dict[str, bytes] = {}
            try:
                if shard not in sound or len(places) > _SURELY_FIT:
                    self._check(shard, key, places)
                file = files[shard]
                for suffix, offset, size, crc in places:
                    data = pread(file, size, offset)
                    total += size
                    if crc32(data) != crc or len(data) != size:
                        # Says what is wrong, or has better luck.
                        data = self._read_run(shard, key, [(suffix, offset, size, crc)])[suffix]
                    members[suffix] = data
                found.append(Sample(key, names[shard], members))
            except SampleError as error:
                found.append(error)
            except OSError as error:
                raise ShardError(f"{names[shard]}: cannot be read ({error.strerror})") from None
        self._ranges.count(total)
        return found

    def _read_remote(self, wanted: Sequence[_Wanted]) -> list[Sample | SampleError]:
        """Samples one by one; members that lie close to each other with one request."""
        found: list[Sample | SampleError] = []
        for shard, key, places in wanted:
            members: dict[str, bytes] = {}
            try:
                self._check(shard, key, places)
                for run in _runs(places):
                    members.update(self._read_run(shard, key, run))
                found.append(Sample(key, self._names[shard], members))
            except SampleError as error:
                found.append(error)
        return found

    def _complaint(self, shard: int) -> str | None:
        """What is wrong with a whole shard; looked at once."""
        if shard not in self._differs:
            index = self.shards[shard]
            self._differs[shard] = size_complaint(index, self._ranges.size(index.url))
        return self._differs[shard]

    def _check(self, shard: int, key: str, places: Sequence[Place]) -> None:
        """Refuse samples of a shard that differs from its index, and those that are too large."""
        if (complaint := self._complaint(shard)) is not None:
            raise SampleError("shard_differs_from_index", complaint)
        if len(places) > _SURELY_FIT and (total := sum(place[2] for place in places)) > MAX_SAMPLE_BYTES:
            message = f"{self._names[shard]}: {key}: {total:,} bytes, limit {MAX_SAMPLE_BYTES:,}"
            raise SampleError("sample_too_large", message)

    def _read_run(self, shard: int, key: str, run: Sequence[Place]) -> dict[str, bytes]:
        start = run[0][1]
        size = run[-1][1] + run[-1][2] - start

        def wrong(data: bytes) -> str | None:
            whole = memoryview(data)
            for suffix, offset, length, crc in run:
                if zlib.crc32(whole[offset - start : offset - start + length]) != crc:
                    return f"member {key}.{suffix} differs from its checksum in the index"
            return None

        data = read_checked(self._ranges, self.shards[shard].url, start, size, wrong)
        return {suffix: data[offset - start : offset - start + length] for suffix, offset, length, _ in run}


def iter_samples(
    specs: str | Path | Sequence[str | Path], suffixes: Collection[str] | None = None
) -> Iterator[tuple[Sample | None, SampleError | None]]:
    """Every sample of some shards once, in order: for evaluation and conversion, not for training.

    Args:
        specs: Shards, as `open_shards` takes them.
        suffixes: Members to read; default all.

    Yields:
        A sample and None, or None and what is wrong with it.
    """
    reader = ShardReader(open_shards(specs), suffixes)
    for shard, index in enumerate(reader.shards):
        for start in range(0, len(index), _STRETCH):
            numbers = range(start, min(start + _STRETCH, len(index)))
            for found in reader.read_many([(shard, number) for number in numbers]):
                yield (None, found) if isinstance(found, SampleError) else (found, None)


def _runs(places: Sequence[Place]) -> list[list[Place]]:
    """Members in file order, grouped where one request may fetch several."""
    runs: list[list[Place]] = []
    end = -_GAP - 1
    for place in sorted(places, key=_BY_OFFSET):
        if runs and place[1] - end <= _GAP:
            runs[-1].append(place)
        else:
            runs.append([place])
        end = place[1] + place[2]
    return runs


def _probes(items: Sequence[T]) -> Sequence[T]:
    """A few of a batch, which tell whether it lies in memory."""
    return items[:: len(items) // _PROBES + 1]


def _spans(wanted: Sequence[_Wanted], files: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """Descriptor, offset and size of every member."""
    return [(files[shard], offset, size) for shard, _, places in wanted for _, offset, size, _ in places]
