"""Samples out of shards: the bytes of a sample by its place in the index, checked against their crc32.

This is the first of the two places where a sample may be refused (the second is the task): every refusal is a
`SampleError` with a reason, which the loader counts. Which sample comes when is ``plan``'s, decoding ``tasks``'.
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import SampleError

from .index import Place, ShardIndex
from .ranges import REMOTE, RangeReader, read_checked, scheme_of, shown
from .source import open_shards, size_complaint

__all__ = ["IMAGE_SUFFIXES", "TEXT_SUFFIXES", "Sample", "ShardReader", "iter_samples", "numbered"]

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
"""Suffixes of a sample's image, in the order in which they are tried."""
TEXT_SUFFIXES = ("txt", "text", "caption")
"""Suffixes of a sample's text, in the order in which they are tried; those that others use are read as well."""
MAX_SAMPLE_BYTES = 256 << 20
"""Largest sample that is read."""

_GAP = 4096  # remote members that lie this close are fetched with one request
_LOCAL_THREADS, _REMOTE_THREADS = 8, 16  # requests on their way at once: disks, too, are faster with several
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
        index = self.shards[shard]
        self._check_shard(shard)
        if not 0 <= sample < len(index):
            raise IndexError(f"{index.url}: sample {sample} of {len(index)}")
        places = index.places(sample)
        if self._suffixes is not None:
            places = [place for place in places if place[0] in self._suffixes]
        key, total = index.key(sample), 0
        for place in places:
            total += place[2]
        if total > MAX_SAMPLE_BYTES:
            message = f"{shown(index.url)}: {key}: {total:,} bytes, limit {MAX_SAMPLE_BYTES:,}"
            raise SampleError("sample_too_large", message)
        members: dict[str, bytes] = {}
        if self._is_remote(shard):
            for run in _runs(places):
                members.update(self._read_run(index.url, key, run))
        else:
            self._read_each(index.url, key, places, members)
        return Sample(key, self._names[shard], members)

    def read_many(self, places: Sequence[tuple[int, int]]) -> list[Sample | SampleError]:
        """Several samples at once, with several requests on their way: a sample, or what is wrong with it, for each.

        Args:
            places: Shard and sample of each.

        Raises:
            ShardError: A shard cannot be reached at all.
        """
        remote = any(self._is_remote(shard) for shard in {shard for shard, _ in places})
        threads = min(_REMOTE_THREADS if remote else _LOCAL_THREADS, len(places))
        if threads < 2:
            return [self._attempt(place) for place in places]
        if self._pool is None or self._pool_pid != os.getpid():  # threads do not survive a fork
            self._pool_pid = os.getpid()
            self._pool = ThreadPoolExecutor(_REMOTE_THREADS if remote else _LOCAL_THREADS, "mmdiff-read")
        # A thread's share is a whole stretch: handing over sample by sample would take longer than reading them.
        cuts = [len(places) * i // threads for i in range(threads + 1)]
        parts = [places[a:b] for a, b in itertools.pairwise(cuts)]
        found = self._pool.map(lambda part: [self._attempt(place) for place in part], parts)
        return [result for part in found for result in part]

    def _is_remote(self, shard: int) -> bool:
        known = self._remote.get(shard)
        if known is None:
            known = self._remote[shard] = scheme_of(self.shards[shard].url) in REMOTE
        return known

    def _attempt(self, place: tuple[int, int]) -> Sample | SampleError:
        try:
            return self.read(*place)
        except SampleError as error:
            return error

    def _check_shard(self, shard: int) -> None:
        if shard not in self._differs:
            index = self.shards[shard]
            self._differs[shard] = size_complaint(index, self._ranges.size(index.url))
        complaint = self._differs[shard]
        if complaint is not None:
            raise SampleError("shard_differs_from_index", complaint)

    def _read_each(self, url: str, key: str, places: Sequence[Place], members: dict[str, bytes]) -> None:
        """Members of a local sample, one read each: that costs less than cutting them out of a common one."""
        found = self._ranges.read_local(url, [place[1:3] for place in places])
        for place, data in zip(places, found, strict=True):
            if len(data) == place[2] and zlib.crc32(data) == place[3]:
                members[place[0]] = data
            else:
                members.update(self._read_run(url, key, [place]))  # which says what is wrong

    def _read_run(self, url: str, key: str, run: Sequence[Place]) -> dict[str, bytes]:
        start = run[0][1]
        size = run[-1][1] + run[-1][2] - start

        def wrong(data: bytes) -> str | None:
            whole = memoryview(data)
            for suffix, offset, length, crc in run:
                if zlib.crc32(whole[offset - start : offset - start + length]) != crc:
                    return f"member {key}.{suffix} differs from its checksum in the index"
            return None

        data = read_checked(self._ranges, url, start, size, wrong)
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
        for number in range(len(index)):
            try:
                yield reader.read(shard, number), None
            except SampleError as error:
                yield None, error


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
