"""Mean and covariance of features: streaming, mergeable, float64; and the ``.npz`` files that hold them.

What the numbers mean (FID, KID) lives in `eval.fid` and `eval.kid`; where features come from in `eval.features`.
"""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError

from .rows import Rows, blocks

__all__ = ["Moments", "Statistics", "array_names", "file_sha256", "read_statistics", "write_statistics"]

_MAX_STATISTICS_BYTES = 4 << 30
"""ADM's reference files carry 10,000 images beside the statistics."""
_MAX_INFLATED, _MAX_RATIO = 64 << 20, 20
"""An array may inflate to this many bytes, or to this many times its file."""
_MAX_DIM = 8192
_SYMMETRY = 1e-4
"""Largest relative asymmetry of a covariance in a file; published float32 files have about 1e-7."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """First two moments of a set of features.

    Attributes:
        mean: Float64 [F].
        covariance: Float64 [F, F], with n - 1 in the denominator.
        count: Number of samples; None when a file does not say.
    """

    mean: Float[Tensor, "F"]
    covariance: Float[Tensor, "F F"]
    count: int | None = None

    @classmethod
    def of(cls, features: Rows) -> Statistics:
        """Statistics of features, any float dtype [N, F]."""
        moments = Moments(features.shape[1])
        for _, rows in blocks(features):
            moments.update(rows)
        return moments.result()


class Moments:
    """Running count, mean and centred second moment in float64.

    Batches may come in any order and any size, and two halves may be merged: the result is the same up to float64
    rounding, because the centred moments are combined and no large sums are subtracted.

    Args:
        dim: F, length of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Float[Tensor, "N F"]) -> Moments:
        """Take in one batch, any float dtype [N, F]; returns itself.

        Raises:
            ConfigError: Another feature length, or a value that is not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ConfigError(f"features of shape {tuple(features.shape)}; these statistics take [N, {len(self.mean)}]")
        batch = features.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(batch).all()):
            rows = (~torch.isfinite(batch).all(dim=1)).nonzero()[:, 0]
            first = self.count + int(rows[0])
            raise ConfigError(f"features of {len(rows)} of {len(batch)} images are not finite, first image {first}")
        if len(batch):
            mean = batch.mean(dim=0)
            centred = batch - mean
            self.scatter.addmm_(centred.T, centred)
            self._move(len(batch), mean)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in everything that ``other`` has seen; returns itself."""
        if other.count:
            self.scatter += other.scatter
            self._move(other.count, other.mean)
        return self

    def result(self) -> Statistics:
        """The statistics of everything seen.

        Raises:
            ConfigError: Fewer than two samples: a covariance needs two.
        """
        if self.count < 2:
            raise ConfigError(f"statistics of {self.count} image(s); at least 2 are needed")
        covariance = self.scatter / (self.count - 1)
        return Statistics(mean=self.mean.clone(), covariance=(covariance + covariance.T) / 2, count=self.count)

    def _move(self, count: int, mean: Tensor) -> None:
        """Count and mean of both parts together, and the scatter between the two means; in place."""
        total = self.count + count
        delta = mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total


def write_statistics(path: str | Path, statistics: Statistics, *, spatial: Statistics | None = None) -> Path:
    """Write ``mu`` and ``sigma`` (float64), and ``n`` where known, as an ``.npz`` that the published tools read.

    With ``spatial``, the statistics of sFID are written beside them as ``mu_s`` and ``sigma_s``, as ADM's files have
    them. The file appears whole or not at all.
    """
    path = Path(path)
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    if statistics.count is not None:
        arrays["n"] = np.asarray(statistics.count, dtype=np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def read_statistics(
    path: str | Path, *, dim: int | None = None, sha256: str | None = None, spatial: bool = False
) -> Statistics:
    """Read ``mu`` and ``sigma`` of an ``.npz`` in any float dtype; nothing in it can run code.

    Args:
        path: File with arrays ``mu`` [F] and ``sigma`` [F, F]; ``n``, where present, is the number of samples. The
            files of pytorch-fid, torch-fidelity, clean-fid and ADM are such files.
        dim: F that is expected.
        sha256: Hex digest (or its beginning, at least 8 digits) the file must have.
        spatial: Read ``mu_s`` and ``sigma_s`` instead, the statistics of sFID.

    Raises:
        ConfigError: The file is missing, damaged, has another hash, or holds arrays of another kind or shape.
    """
    path = Path(path)
    _check_file(path, sha256)
    names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if missing := set(names) - set(archive.files):
                found = ", ".join(archive.files[:8]) or "nothing"
                raise ConfigError(f"{path}: holds {found}; statistics need {' and '.join(sorted(missing))}")
            for name in names:
                _check_claim(archive.zip, f"{name}.npy", path)
            mean, covariance = (archive[name] for name in names)
            count = int(archive["n"]) if "n" in archive.files else None
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be read as an .npz of plain arrays ({error})") from None
    _check_arrays(path, mean, covariance, dim)
    return Statistics(
        mean=torch.from_numpy(mean.astype(np.float64)),
        covariance=torch.from_numpy(covariance.astype(np.float64)),
        count=count,
    )


def array_names(path: str | Path) -> tuple[str, ...]:
    """Names of the arrays in an ``.npz``, which is not opened further.

    Raises:
        ConfigError: It is no such archive, or is cut off.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except zipfile.BadZipFile:
        raise ConfigError(f"{path}: is not an .npz archive, or is cut off; write it again") from None


def file_sha256(paths: Path | Iterable[Path]) -> str:
    """Hex SHA-256 of a file, or of several files in the given order."""
    digest = hashlib.sha256()
    for path in [paths] if isinstance(paths, Path) else paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path, sha256: str | None) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: no such statistics file")
    if (size := path.stat().st_size) > _MAX_STATISTICS_BYTES:
        raise ConfigError(f"{path}: {size:,} bytes, limit {_MAX_STATISTICS_BYTES:,} for statistics")
    if sha256 is None:
        return
    if len(sha256) < 8:
        raise ConfigError(f"sha256 {sha256!r} has {len(sha256)} digits; give at least 8")
    if not (found := file_sha256(path)).startswith(sha256.lower()):
        raise ConfigError(f"{path}: sha256 is {found}, expected {sha256}; download or compute the statistics again")


def _check_claim(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """Refuse an array whose header or whose packing claims more than the file can hold, before memory is taken."""
    stored = archive.getinfo(name).file_size
    if stored > max(_MAX_INFLATED, _MAX_RATIO * path.stat().st_size):
        raise ConfigError(f"{path}: {name} inflates to {stored:,} bytes; statistics are not so compressible")
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        claimed = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and claimed != stored - stream.tell():
            raise ConfigError(f"{path}: {name} claims {claimed:,} bytes and holds {stored - stream.tell():,}")


def _check_arrays(path: Path, mean: np.ndarray, covariance: np.ndarray, dim: int | None) -> None:
    for name, array, rank in (("mu", mean, 1), ("sigma", covariance, 2)):
        if array.ndim != rank or array.dtype.kind != "f":
            raise ConfigError(f"{path}: {name} is {array.dtype} {array.shape}, expected floats of {rank} dimension(s)")
        if not np.isfinite(array).all():
            raise ConfigError(f"{path}: {name} has values that are not finite")
    size = len(mean)
    if covariance.shape != (size, size) or not 0 < size <= _MAX_DIM:
        raise ConfigError(f"{path}: mu has {size} numbers (limit {_MAX_DIM}) and sigma is {covariance.shape}")
    if dim is not None and size != dim:
        raise ConfigError(f"{path}: statistics of {size}-d features, expected {dim}-d; they come from another network")
    scale = float(np.abs(covariance).max()) or 1.0
    if (gap := float(np.abs(covariance - covariance.T).max()) / scale) > _SYMMETRY:
        raise ConfigError(f"{path}: sigma is not symmetric (relative difference {gap:.1e}); it is no covariance")
