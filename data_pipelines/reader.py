"""Samples out of shards: the bytes of a sample by its place in the index, checked against their crc32.

This is the first of the two places where a sample may be refused (the second is the task): every refusal is a
`SampleError` with a reason, which the loader counts. Which sample comes when is ``plan``'s, decoding ``tasks``'.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import SampleError

from .index import Entry, Member, ShardIndex
from .ranges import RangeReader, read_checked, shown
from .source import open_shards, size_complaint

__all__ = ["IMAGE_SUFFIXES", "TEXT_SUFFIXES", "Sample", "ShardReader", "iter_samples", "numbered"]

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
"""Suffixes of a sample's image, in the order in which they are tried."""
TEXT_SUFFIXES = ("txt", "text", "caption")
"""Suffixes of a sample's text, in the order in which they are tried; those that others use are read as well."""
MAX_SAMPLE_BYTES = 256 << 20
"""Largest sample that is read."""

_GAP = 4096  # members that lie this close are fetched with one read


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

    @property
    def bytes_read(self) -> int:
        """Bytes read from shards so far."""
        return self._ranges.bytes_read

    def close(self) -> None:
        """Close files; they are opened again when needed."""
        self._ranges.close()

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
        entry = index[sample]
        wanted = {s: m for s, m in entry.members.items() if self._suffixes is None or s in self._suffixes}
        total = sum(m.size for m in wanted.values())
        if total > MAX_SAMPLE_BYTES:
            message = f"{shown(index.url)}: {entry.key}: {total:,} bytes, limit {MAX_SAMPLE_BYTES:,}"
            raise SampleError("sample_too_large", message)
        members: dict[str, bytes] = {}
        for run in _runs(wanted):
            members.update(self._read_run(index.url, entry, run))
        return Sample(entry.key, shown(index.url), {s: members[s] for s in wanted})

    def _check_shard(self, shard: int) -> None:
        if shard not in self._differs:
            index = self.shards[shard]
            self._differs[shard] = size_complaint(index, self._ranges.size(index.url))
        complaint = self._differs[shard]
        if complaint is not None:
            raise SampleError("shard_differs_from_index", complaint)

    def _read_run(self, url: str, entry: Entry, run: list[tuple[str, Member]]) -> dict[str, bytes]:
        start = run[0][1].offset
        size = run[-1][1].offset + run[-1][1].size - start

        def cut(data: bytes, member: Member) -> bytes:
            return data[member.offset - start : member.offset - start + member.size]

        def wrong(data: bytes) -> str | None:
            for suffix, member in run:
                if zlib.crc32(cut(data, member)) != member.crc32:
                    return f"member {entry.key}.{suffix} differs from its checksum in the index"
            return None

        data = read_checked(self._ranges, url, start, size, wrong)
        return {suffix: cut(data, member) for suffix, member in run}


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


def _runs(members: Mapping[str, Member]) -> list[list[tuple[str, Member]]]:
    """Members in file order, grouped where one read may fetch several."""
    runs: list[list[tuple[str, Member]]] = []
    for suffix, member in sorted(members.items(), key=lambda item: item[1].offset):
        last = runs[-1][-1][1] if runs else None
        if last is not None and member.offset - (last.offset + last.size) <= _GAP:
            runs[-1].append((suffix, member))
        else:
            runs.append([(suffix, member)])
    return runs
