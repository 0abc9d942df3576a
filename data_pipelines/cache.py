"""Shards with encoded images: every image is encoded once, by a callable that is handed in, and the result is packed.

No network is known here. Reading codes back is the tasks' business.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError, SampleError, ShardError

from .pack import write_shards
from .ranges import shown
from .reader import Sample, iter_samples, numbered
from .source import expand
from .transforms import Fit, Pixels

__all__ = ["CACHE_FILE", "CacheReport", "cache"]

CACHE_FILE = "cache.json"
"""File beside cached shards that says what encoded them."""

Encode = Callable[[Float[Tensor, "B 3 S S"]], Tensor]
"""Pixels to integer codes [B, h, w], or to float latents or moments [B, C, h, w]."""


@dataclass(frozen=True)
class _Members:
    """What is added to a sample, and how many images are encoded at once."""

    name: str
    flips: bool
    others: bool
    batch: int


@dataclass(frozen=True)
class CacheReport:
    """What `cache` did.

    Attributes:
        shards: The shards written.
        samples: Samples in them.
        skipped: Samples left out, by reason.
        grid: Codes per column and row.
    """

    shards: tuple[Path, ...]
    samples: int
    skipped: Mapping[str, int]
    grid: tuple[int, int]


def cache(
    shards: str | Path | Sequence[str | Path],
    out: str | Path,
    encode: Encode,
    image_size: int,
    batch: int,
    identity: str,
    *,
    fit: Fit = "square",
    member: str = "codes",
    flips: bool = False,
    others: bool = False,
    name: str = "cached",
    samples_per_shard: int = 2000,
    max_skip_fraction: float = 0.001,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]] = lambda samples: samples,
) -> CacheReport:
    """Copy shards, adding a member such as ``codes.npy`` to every sample.

    Args:
        shards: Shards to read, as `source.open_shards` takes them.
        out: Folder for the new shards and `CACHE_FILE`.
        encode: Float32 [B, 3, S, S] in [-1, 1] to integer codes [B, h, w], or floats [B, C, h, w].
        image_size: S.
        batch: B.
        identity: Names the encoder, such as a hash of its weights; written to `CACHE_FILE`.
        fit: How a rectangle becomes a square.
        member: Name of the new member: ``codes`` (integers), ``latents`` or ``moments`` (floats).
        flips: Also encode the mirrored image, as the member with ``_flip`` behind its name.
        others: Also encode a sample's further images, ``image2`` as ``image2.codes.npy`` and so on.
        name: First part of the new shards' names.
        samples_per_shard: Samples per new shard.
        max_skip_fraction: Larger fractions of unusable samples raise.
        progress: Wraps the samples, to show a bar.

    Raises:
        ConfigError: ``out`` is where the shards are.
        ShardError: Too many samples cannot be used.
    """
    names = [shards] if isinstance(shards, (str, Path)) else list(shards)
    sources = [url for spec in names for url in expand(spec)]
    folder = Path(out).resolve()
    if any(Path(url).resolve().parent == folder for url in sources if "://" not in url):
        raise ConfigError(f"{out}: holds the shards that are to be read; choose another folder")
    skipped: Counter[str] = Counter()
    grid: list[tuple[int, int]] = []
    samples = progress(_usable(names, skipped))
    rows = _encoded(samples, encode, Pixels(image_size, fit), skipped, grid, _Members(member, flips, others, batch))
    counted = Counter[str]()
    written = write_shards(_count(rows, counted), folder, name, samples_per_shard)
    total = counted["samples"] + sum(skipped.values())
    if sum(skipped.values()) > max_skip_fraction * total:
        reasons = ", ".join(f"{r} {c:,}" for r, c in skipped.most_common())
        raise ShardError(
            f"{sum(skipped.values()):,} of {total:,} samples cannot be used ({reasons}); see: mmdiff data lint"
        )
    report = CacheReport(tuple(written), counted["samples"], dict(skipped), grid[0])
    _write_note(folder, report, sources, identity, image_size, fit)
    return report


def _usable(names: Sequence[str | Path], skipped: Counter[str]) -> Iterator[Sample]:
    for sample, error in iter_samples(names):
        if sample is not None:
            yield sample
        elif error is not None:
            skipped[error.reason] += 1


def _encoded(
    samples: Iterable[Sample],
    encode: Encode,
    pixels: Pixels,
    skipped: Counter[str],
    grid: list[tuple[int, int]],
    members: _Members,
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    pending: list[tuple[Sample, Tensor]] = []
    for sample in samples:
        try:
            pending.append((sample, _pictures(sample, pixels, members.others)))
        except SampleError as error:
            skipped[error.reason] += 1
        if sum(len(p) for _, p in pending) >= members.batch:
            yield from _flush(pending, encode, grid, members)
            pending = []
    if pending:
        yield from _flush(pending, encode, grid, members)


def _pictures(sample: Sample, pixels: Pixels, others: bool) -> Tensor:
    """Float [n, 3, S, S]: the first image, or all."""
    unused = torch.Generator()  # without augmentation nothing is drawn
    return torch.cat([pixels(sample, unused, n) for n in range(len(sample.images()) if others else 1)])


def _flush(
    pending: Sequence[tuple[Sample, Tensor]], encode: Encode, grid: list[tuple[int, int]], members: _Members
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    pixels = torch.cat([p for _, p in pending])
    found = {f"{members.name}.npy": _encode(encode, pixels, members)}
    if members.flips:
        found[f"{members.name}_flip.npy"] = _encode(encode, pixels.flip(-1), members)
    first = next(iter(found.values()))
    grid[:] = [(first.shape[-2], first.shape[-1])]
    start = 0
    for sample, own in pending:
        made = {numbered(n, name): _npy(v[start + n]) for name, v in found.items() for n in range(len(own))}
        start += len(own)
        yield sample.key, {**sample.members, **made}


def _encode(encode: Encode, pixels: Tensor, members: _Members) -> np.ndarray:
    with torch.inference_mode():
        values = torch.cat([encode(part).cpu() for part in pixels.split(members.batch)])
    integers = members.name == "codes"
    if values.dim() != (3 if integers else 4) or len(values) != len(pixels) or values.is_floating_point() == integers:
        want = "integers [B, h, w]" if integers else "floats [B, C, h, w]"
        raise ConfigError(f"encode returned {values.dtype} {tuple(values.shape)}; expected {want} for {len(pixels)}")
    return values.numpy() if integers else values.float().numpy()


def _npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    if values.dtype.kind != "f":
        values = values.astype(np.int16 if values.max(initial=0) < 2**15 else np.int32)
    np.lib.format.write_array(stream, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _count(
    rows: Iterable[tuple[str, Mapping[str, bytes]]], counted: Counter[str]
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for row in rows:
        counted["samples"] += 1
        yield row


def _write_note(
    folder: Path, report: CacheReport, sources: Sequence[str], identity: str, image_size: int, fit: str
) -> None:
    note = {
        "encoder": identity,
        "image_size": image_size,
        "fit": fit,
        "grid": list(report.grid),
        "samples": report.samples,
        "skipped": dict(report.skipped),
        "sources": [Path(shown(url)).name for url in sources],
    }
    partial = folder / f"{CACHE_FILE}.tmp"
    partial.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / CACHE_FILE)
