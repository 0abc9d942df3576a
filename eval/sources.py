"""Sets of images to be judged: folders, ``.npz`` sample batches, shards, and arrays. Nothing is skipped silently.

A score over a set with a hole in it is a wrong score, so a missing, damaged or odd-sized image is an error that names
it. All images of a set have one size; they come out as uint8 RGB in a fixed order.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mmdiff.errors import ConfigError, SampleError
from mmdiff.rng import generator

from .statistics import array_names

__all__ = ["ImageSet", "count_images", "is_statistics", "open_images"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_THREADS = 8
"""Most threads that decode files of a folder while the network runs."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images in a fixed order, read when asked for.

    Attributes:
        names: What to call each image in messages.
        read: Number of an image -> uint8 [H, W, 3].
        threads: How many may call ``read`` at once.
    """

    names: Sequence[str]
    read: Callable[[int], np.ndarray]
    threads: int = 1

    def __len__(self) -> int:
        return len(self.names)

    def take(self, num: int | None, *, seed: int = 0) -> ImageSet:
        """Exactly ``num`` of the images, a seeded choice in the same order; all of them for None.

        Raises:
            ConfigError: There are fewer.
        """
        if num is None or num == len(self):
            return self
        if num > len(self):
            raise ConfigError(f"{len(self)} images, and {num} are asked for: {num - len(self)} are missing")
        order = torch.randperm(len(self), generator=generator(seed, "choose-images"))
        kept = order[:num].sort().values.tolist()
        names = [self.names[i] for i in kept]
        return ImageSet(names=names, read=lambda i: self.read(kept[i]), threads=self.threads)

    def part(self, rank: int, world: int, size: int) -> ImageSet:
        """Every ``world``-th batch of ``size`` images from number ``rank`` on: the share of one process.

        Batches are whole, so a network sees the same ones however many processes share the work.
        """
        own = [
            i for start in range(rank * size, len(self), world * size) for i in range(len(self))[start : start + size]
        ]
        names = [self.names[i] for i in own]
        return ImageSet(names=names, read=lambda i: self.read(own[i]), threads=self.threads)

    def batches(self, size: int, *, shape: tuple[int, ...] | None = None) -> Iterator[UInt8[Tensor, "B H W 3"]]:
        """All images, ``size`` at a time, uint8 [B, H, W, 3].

        Args:
            size: B; the last batch may be smaller.
            shape: (H, W, 3) of every image; None: that of the first.

        Raises:
            ConfigError: An image cannot be decoded, or is of another size.
        """
        rows: list[np.ndarray] = []
        for i, waiting in enumerate(self._read_ahead(size)):
            image = self._checked(i, waiting, shape)
            shape = image.shape
            rows.append(image)
            if len(rows) == size or i + 1 == len(self):
                yield torch.from_numpy(np.stack(rows))
                rows = []

    def _read_ahead(self, ahead: int) -> Iterator[Future[np.ndarray]]:
        """All images in order; up to ``ahead`` of them are read before they are asked for."""
        waiting: deque[Future[np.ndarray]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="read-images") as pool:
            try:
                for i in range(len(self)):
                    waiting.append(pool.submit(self.read, i))
                    if len(waiting) > ahead:
                        yield waiting.popleft()
                while waiting:
                    yield waiting.popleft()
            finally:
                for one in waiting:
                    one.cancel()

    def _checked(self, i: int, waiting: Future[np.ndarray], shape: tuple[int, ...] | None) -> np.ndarray:
        try:
            image = waiting.result()
        except (SampleError, OSError) as error:
            raise ConfigError(f"{self.names[i]}: cannot be decoded ({error}); write it again or take it out") from None
        if shape is not None and image.shape != shape:
            (h, w), (first_h, first_w) = image.shape[:2], shape[:2]
            raise ConfigError(
                f"{self.names[i]}: {w}x{h} pixels, but {self.names[0]} has {first_w}x{first_h}; "
                "images of a set must have one size"
            )
        return image


def open_images(source: Any) -> ImageSet:
    """The images of a folder (recursively, sorted by path), ``.npz``, shard specification, or array.

    Args:
        source: Folder; ``.npz`` with ``arr_0`` uint8 [N, H, W, 3]; shards such as ``embedded:emoji/train`` or
            ``data/*.tar``; uint8 array or tensor [N, H, W, 3]; or an iterable of such arrays, such as a generator that
            draws images, which is written to a temporary file as it comes.

    Raises:
        ConfigError: No such thing, an empty set, a gap in numbered files, or an array of another kind.
        ShardError: A shard is missing or damaged.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        return _of_array(np.asarray(source), "array")
    if isinstance(source, Iterable) and not isinstance(source, (str, Path)):
        return _of_iterable(source)
    text = str(source)
    path = Path(text)
    if text.startswith("embedded:") or text.endswith((".tar", "}")) or (path.is_dir() and any(path.glob("*.tar"))):
        return _of_shards(text)
    if path.is_dir():
        return _of_folder(path)
    if text.endswith(".npz") and path.is_file():
        return _of_npz(path)
    raise ConfigError(f"{text}: no folder, .npz file or shards of that name")


def count_images(source: Any) -> int:
    """Number of images in a set; see `open_images`."""
    return len(open_images(source))


def is_statistics(source: object) -> bool:
    """Whether ``source`` is an ``.npz`` of statistics (``mu`` and ``sigma``) and not of images.

    Raises:
        ConfigError: An ``.npz`` that is no archive.
    """
    if not isinstance(source, (str, Path)) or not str(source).endswith(".npz") or not Path(source).is_file():
        return False
    return "mu" in array_names(source)


def _of_folder(folder: Path) -> ImageSet:
    from mmdiff.images import decode

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not files:
        raise ConfigError(f"{folder}: no images ({', '.join(_SUFFIXES)}) in this folder or below")
    _refuse_gaps(folder, [p.stem for p in files])
    return ImageSet(
        names=[str(p) for p in files],
        read=lambda i: np.asarray(decode(files[i].read_bytes())),
        threads=min(_THREADS, os.cpu_count() or 1),
    )


def _refuse_gaps(folder: Path, stems: list[str]) -> None:
    """Files named 00000, 00001, ... must have no hole: a sampler that was stopped leaves one."""
    if not all(s.isdecimal() and len(s) == len(stems[0]) for s in stems) or len(stems) < 2:
        return
    numbers = {int(s) for s in stems}
    if len(numbers) < len(stems):
        raise ConfigError(f"{folder}: {len(stems) - len(numbers)} numbers occur twice; keep one file of each")
    missing = sorted(set(range(min(0, *numbers), max(numbers) + 1)) - numbers)
    # Numbers that are far apart are ids of something else (seeds, dataset ids), not a count.
    if missing and len(missing) <= len(numbers):
        some = ", ".join(str(n).zfill(len(stems[0])) for n in missing[:5])
        raise ConfigError(
            f"{folder}: {len(missing)} of {max(numbers) + 1} numbered images missing: {some}; make them again"
        )


def _of_npz(path: Path) -> ImageSet:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if "arr_0" not in archive.files:
                raise ConfigError(f"{path}: holds {', '.join(archive.files[:8])}; images must be the array arr_0")
            mapped = _mapped(path, "arr_0.npy")
            return _of_array(archive["arr_0"] if mapped is None else mapped, str(path))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be read as an .npz of plain arrays ({error})") from None


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """An array that lies uncompressed in the archive, mapped and not read; None if it is compressed.

    A sample batch of ADM holds ten gigabytes at 256 pixels.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
    with path.open("rb") as file:
        # The local header repeats name and extra field, whose lengths are its bytes 26 to 29.
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(info.header_offset + 30 + name + extra)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran or dtype.hasobject:
            return None
        return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape)


def _of_array(array: np.ndarray, name: str) -> ImageSet:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not len(array):
        raise ConfigError(f"{name}: {array.dtype} {array.shape}; images must be uint8 [N, H, W, 3], N at least 1")
    return ImageSet(names=[f"{name}[{i}]" for i in range(len(array))], read=lambda i: array[i])


def _of_iterable(batches: Iterable[Any]) -> ImageSet:
    shape, count = (0, 0, 3), 0
    with tempfile.TemporaryFile() as file:  # the mapping outlives the handle
        for batch in batches:
            array = np.ascontiguousarray(batch)
            first = _of_array(array, f"batch after image {count}").read(0)
            if count and first.shape != shape:
                raise ConfigError(f"images of shape {first.shape} after image {count}, before them {shape}")
            shape, count = first.shape, count + len(array)
            file.write(array.tobytes())
        if not count:
            raise ConfigError("the iterable of images gave none")
        file.flush()
        return _of_array(np.memmap(file, dtype=np.uint8, mode="r", shape=(count, *shape)), "generated")


def _of_shards(spec: str) -> ImageSet:
    from data_pipelines.reader import IMAGE_SUFFIXES, ShardReader
    from data_pipelines.source import open_shards
    from mmdiff.images import decode

    shards = open_shards(spec)
    reader = ShardReader(shards, suffixes=IMAGE_SUFFIXES)
    places = [(shard, sample) for shard, index in enumerate(shards) for sample in range(len(index))]
    names = [f"{Path(shards[shard].url).name}: {shards[shard].key(sample)}" for shard, sample in places]
    return ImageSet(names=names, read=lambda i: np.asarray(decode(reader.read(*places[i]).image())))
