"""Fréchet and kernel distances between two sets of images: ``mmdiff eval fid A B``.

`score` is pure: features or statistics in, numbers out. `compare` reads images and runs the feature network;
images come from `eval.sources`, networks from `eval.features`, moments from `eval.statistics`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdiff.errors import ConfigError, MmdiffError

from .kid import Kid, kid, kid_subsets
from .statistics import Statistics, read_statistics

if TYPE_CHECKING:
    from .features import FeatureNetwork

__all__ = ["PROTOCOLS", "FidResult", "compare", "frechet_distance", "main", "score"]

PROTOCOLS = ("full", "torch-fidelity")
"""``full``: KID from all pairs. ``torch-fidelity``: KID from 100 seeded subsets of 1,000. FID is the same in both."""


@dataclass(frozen=True, kw_only=True)
class FidResult:
    """Distances of two sets of images, and everything that decided them.

    Attributes:
        name: ``fid50k``, ``fid10k`` or ``fid<N>``: the metric depends on N, so its name carries it.
        fid: Fréchet distance.
        kid_mean: Kernel distance (unbiased); None when a side is known by its statistics only.
        kid_std: See `eval.kid.Kid`.
        n_a: Images in the first set.
        n_b: Images in the second set; None when a statistics file does not say.
        protocol: One of `PROTOCOLS`.
        features: Name of the feature network; ``given`` when features were passed in.
        weights_sha256: Hash of its weights.
        floor: FID of two disjoint parts of the second set, ``floor_n`` images each: real against real.
        floor_kid: KID of the same parts.
        floor_n: Images in each part; the first set's N where the second set is large enough.
    """

    name: str
    fid: float
    kid_mean: float | None
    kid_std: float | None
    n_a: int | None
    n_b: int | None
    protocol: str
    features: str = "given"
    weights_sha256: str | None = None
    floor: float | None = None
    floor_kid: float | None = None
    floor_n: int | None = None


def score(
    features_a: Tensor | Statistics,
    features_b: Tensor | Statistics,
    *,
    protocol: str = "full",
    network: FeatureNetwork | None = None,
    floor: bool = False,
    seed: int = 0,
) -> FidResult:
    """FID and KID of two sets.

    Args:
        features_a: Features of the judged set, float [N, F], or its statistics.
        features_b: Features of the reference set, float [M, F], or its statistics.
        protocol: One of `PROTOCOLS`.
        network: Where the features came from, for the record.
        floor: Also measure two random parts of the reference set against each other.
        seed: Seed of that split.

    Raises:
        ConfigError: Unknown protocol, features of different lengths, fewer than two images, values that are not finite,
            or a floor asked of a reference that has no features.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    a, b = (x if isinstance(x, Statistics) else Statistics.of(x) for x in (features_a, features_b))
    distance = frechet_distance(a, b)
    kernel = _kernel(features_a, features_b, protocol)
    result = FidResult(
        name=_name(a.count),
        fid=distance,
        kid_mean=kernel.mean if kernel else None,
        kid_std=kernel.std if kernel else None,
        n_a=a.count,
        n_b=b.count,
        protocol=protocol,
        features=network.name if network else "given",
        weights_sha256=network.sha256 if network else None,
    )
    return _with_floor(result, features_b, seed) if floor else result


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """‖μa − μb‖² + tr Σa + tr Σb − 2 tr (Σa Σb)^½ in float64.

    The last trace is the sum of the roots of the eigenvalues of Rᵀ Σb R with Σa = R Rᵀ, which is symmetric: it stays
    real even when the covariances are singular (fewer images than features).

    Source: Heusel et al. 2017, equation 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"features of {len(a.mean)} and {len(b.mean)} numbers: they come from different networks")
    root = _root(a.covariance)
    inner = root.T @ b.covariance @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    squared = (a.mean - b.mean).square().sum()
    return float(squared + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def compare(
    a: object,
    b: object,
    *,
    features: str = "inception",
    num: int | None = None,
    floor: bool = False,
    protocol: str = "full",
    batch_size: int = 64,
    device: str = "cpu",
    sha256: str | None = None,
    seed: int = 0,
) -> FidResult:
    """Distances of two sets of images.

    Args:
        a: The judged images: folder, ``.npz`` of images or of statistics, shards, or uint8 array [N, H, W, 3].
        b: The reference images, in any of the same forms.
        features: Name of the feature network, see `eval.features.open_network`.
        num: Exactly this many images of each set: fewer are an error, of more a seeded choice is taken.
        floor: Also print real against real.
        protocol: One of `PROTOCOLS`.
        batch_size: Images per pass of the network.
        device: Device of the network.
        sha256: Hash that a statistics file given as ``b`` must have.
        seed: Seed of the choice and of the floor's split.

    Raises:
        ConfigError: A set is missing, has too few images, or one of them is damaged or of another size.
    """
    from .features import extract, open_network
    from .sources import count_images, is_statistics

    network = open_network(features, device=device)

    def read(source: object, wanted: int | None, digest: str | None = None) -> Tensor | Statistics:
        if is_statistics(source):
            return read_statistics(Path(str(source)), dim=network.dim, sha256=digest)
        return extract(source, network, num=wanted, batch_size=batch_size, seed=seed)

    judged, reference = read(a, num), read(b, num, sha256)
    result = score(judged, reference, protocol=protocol, network=network)
    if not floor:
        return result
    # At the same N where the reference is large enough: the floor falls with N, so another N would flatter or blame.
    if num and not isinstance(reference, Statistics) and count_images(b) >= 2 * num:
        reference = read(b, 2 * num)
    return _with_floor(result, reference, seed)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m eval.fid A B``: the result as JSON on stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eval.fid", description="FID and KID of two sets of images.")
    parser.add_argument("a", help="judged images: folder, .npz, shards, or statistics .npz")
    parser.add_argument("b", help="reference images, in the same forms")
    parser.add_argument("--features", default="inception", help="inception | efficientnet-lite0 | scorer:PATH")
    parser.add_argument("--num", type=int, help="exactly this many images of each set")
    parser.add_argument("--floor", action="store_true", help="also measure real against real")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="full")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sha256", help="hash that a statistics file B must have")
    options = vars(parser.parse_args(argv))
    try:
        result = compare(options.pop("a"), options.pop("b"), **options)
    except MmdiffError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return 0


def _root(covariance: Tensor) -> Tensor:
    """Any R with R Rᵀ = covariance: the triangular one where it exists, at a fiftieth of the cost."""
    triangle, failed = torch.linalg.cholesky_ex(covariance)
    if not int(failed):
        return triangle
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def _kernel(a: Tensor | Statistics, b: Tensor | Statistics, protocol: str) -> Kid | None:
    if isinstance(a, Statistics) or isinstance(b, Statistics):
        return None
    return kid(a, b) if protocol == "full" else kid_subsets(a, b)


def _with_floor(result: FidResult, reference: Tensor | Statistics, seed: int) -> FidResult:
    if isinstance(reference, Statistics):
        raise ConfigError("a floor needs the reference images, and only their statistics were given")
    from mmdiff.rng import generator

    half = min(len(reference) // 2, result.n_a or len(reference))
    order = torch.randperm(len(reference), generator=generator(seed, "fid-floor"))
    one, two = reference[order[:half]], reference[order[half : 2 * half]]
    distance = frechet_distance(Statistics.of(one), Statistics.of(two))
    return dataclasses.replace(result, floor=distance, floor_kid=kid(one, two).mean, floor_n=half)


def _name(count: int | None) -> str:
    if count is None:
        return "fid"
    return f"fid{count // 1000}k" if count % 1000 == 0 else f"fid{count}"


if __name__ == "__main__":
    sys.exit(main())
