"""Distances between two sets of images: ``mmdiff eval fid A B``.

`score` is pure: features or statistics in, numbers out. `compare` reads images and runs the feature network. How a
published tool measures is in `eval.fid_protocols`, the pass over the images in `eval.collect`, networks in
`eval.features`, moments in `eval.statistics`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdiff.errors import ConfigError

from .cli import finish
from .cmmd import cmmd
from .collect import Collected
from .fid_interval import DistanceInterval, interval
from .fid_protocols import MEASURES, PROTOCOLS, FidProtocol
from .frechet import frechet_distance
from .kid import kid
from .neighbours import coverage, precision_recall
from .rows import Rows, picked
from .statistics import Statistics

if TYPE_CHECKING:
    from .feature_network import FeatureNetwork
    from .fid_study import Study

__all__ = ["MEASURES", "PROTOCOLS", "FidResult", "compare", "frechet_distance", "main", "score", "study", "with_floor"]


@dataclass(frozen=True, kw_only=True)
class FidResult:
    """Distances of two sets of images, and everything that decided them. A number is None where it was not measured.

    Attributes:
        name: ``fid50k``, ``fid10k`` or ``fid<N>``: the metric depends on N, so its name carries it.
        fid: Fréchet distance.
        kid_mean: Kernel distance (unbiased); needs the images of both sides.
        kid_std: See `eval.kid.Kid`.
        n_a: Images in the first set.
        n_b: Images in the second set; None when a statistics file does not say.
        protocol: One of `PROTOCOLS`.
        features: Name of the feature network; ``given`` when features were passed in.
        weights_sha256: Hash of its weights.
        statistics_sha256: Hash of the statistics file, where one was given as the second set.
        sfid: Fréchet distance of spatial features.
        isc_mean: Inception Score of the first set.
        isc_std: Its spread over the splits.
        precision: See `eval.neighbours`.
        recall: See `eval.neighbours`.
        density: See `eval.neighbours`.
        coverage: See `eval.neighbours`.
        cmmd: See `eval.cmmd`.
        interval: How far the Fréchet distance moves with other images of the same kind.
        floor: FID of two disjoint parts of the second set, ``floor_n`` images each: real against real.
        floor_kid: KID of the same parts.
        floor_n: Images in each part; the first set's N where the second set is large enough.
        notes: Why a number is missing, and what a reader must know.
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
    statistics_sha256: str | None = None
    sfid: float | None = None
    isc_mean: float | None = None
    isc_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    cmmd: float | None = None
    interval: DistanceInterval | None = None
    floor: float | None = None
    floor_kid: float | None = None
    floor_n: int | None = None
    notes: tuple[str, ...] = ()


def score(
    features_a: Tensor | Statistics | Collected,
    features_b: Tensor | Statistics | Collected,
    *,
    protocol: str = "full",
    measures: Sequence[str] | None = None,
    network: FeatureNetwork | None = None,
    floor: bool = False,
    draws: int = 0,
    seed: int = 0,
) -> FidResult:
    """The distances of two sets.

    Args:
        features_a: Of the judged set: features float [N, F], their statistics, or what `eval.collect.collect` left.
        features_b: Of the reference set, float [M, F], or its statistics.
        protocol: One of `PROTOCOLS`.
        measures: Some of `MEASURES`; None: what the protocol's tool reports. One that cannot be had is None in the
            result, and a note says why.
        network: Where the features came from, for the record.
        floor: Also measure two random parts of the reference set against each other.
        draws: Resamples for the interval; 0: no interval.
        seed: Seed of that split and of the resamples.

    Raises:
        ConfigError: Unknown protocol or measure, features of different lengths, fewer than two images, values that are
            not finite, or a floor or interval asked of a set that has no features.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    rules = PROTOCOLS[protocol]
    wanted = tuple(measures) if measures is not None else rules.measures
    if unknown := sorted(set(wanted) - set(MEASURES)):
        raise ConfigError(f"measure {unknown[0]!r}; known: {', '.join(MEASURES)}")
    a, b = _collected(features_a), _collected(features_b)
    result = FidResult(
        name=_name(a.statistics.count),
        fid=frechet_distance(a.statistics, b.statistics),
        kid_mean=None,
        kid_std=None,
        n_a=a.statistics.count,
        n_b=b.statistics.count,
        protocol=protocol,
        features=network.name if network else "given",
        weights_sha256=network.sha256 if network else None,
        notes=_notes(a.statistics.count, rules),
    )
    for measure in wanted:
        if measure != "fid":
            result = _add(result, measure, a, b, rules, network)
    if draws:
        result = dataclasses.replace(result, interval=interval(a.features, b, draws=draws, seed=seed))
    return with_floor(result, b.features, seed) if floor else result


def compare(
    a: object,
    b: object,
    *,
    features: str = "inception",
    num: int | None = None,
    floor: bool = False,
    protocol: str = "full",
    measures: Sequence[str] | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    sha256: str | None = None,
    draws: int = 0,
    seed: int = 0,
) -> FidResult:
    """Distances of two sets of images; under torchrun, all processes share the work and the first has all numbers.

    Args:
        a: The judged images: folder, ``.npz`` of images or of statistics, shards, uint8 array [N, H, W, 3], or an
            iterable of such arrays.
        b: The reference images, in any of the same forms. ADM's files hold statistics and images: each measure takes
            what it needs.
        features: Name of the feature network, see `eval.features.open_network`.
        num: Exactly this many images of each set: fewer are an error, of more a seeded choice is taken.
        floor: Also measure real against real.
        protocol: One of `PROTOCOLS`.
        measures: Some of `MEASURES`; None: what the protocol's tool reports.
        batch_size: Images per pass of the network.
        device: Device of the network.
        sha256: Hash that a statistics file given as ``b`` must have.
        draws: Resamples for an interval of the Fréchet distance; 0: none.
        seed: Seed of the choice, of the floor's split and of the resamples.

    Raises:
        ConfigError: A set is missing, has too few images, or one of them is damaged or of another size.
    """
    return study(
        a,
        b,
        features=features,
        num=num,
        floor=floor,
        protocol=protocol,
        measures=measures,
        batch_size=batch_size,
        device=device,
        sha256=sha256,
        draws=draws,
        seed=seed,
    ).result


def study(a: object, b: object, **options: Any) -> Study:
    """`compare`, with what its page and its per-image list need; see `eval.fid_study.study`."""
    from .fid_study import study as run

    return run(a, b, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m eval.fid A B``: the result as JSON on stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eval.fid", description="Distances of two sets of images.")
    parser.add_argument("a", help="judged images: folder, .npz, shards, or statistics .npz")
    parser.add_argument("b", help="reference images, in the same forms")
    parser.add_argument("--features", default="inception", help="name of the feature network")
    parser.add_argument("--num", type=int, help="exactly this many images of each set")
    parser.add_argument("--floor", action="store_true", help="also measure real against real")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="full")
    parser.add_argument("--measures", type=lambda text: text.split(","), help=",".join(MEASURES))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sha256", help="hash that a statistics file B must have")
    parser.add_argument("--draws", type=int, default=0, help="resamples for an interval")
    options = vars(parser.parse_args(argv))
    a, b = options.pop("a"), options.pop("b")
    return finish(lambda: compare(a, b, **options))


def _collected(given: Tensor | Statistics | Collected) -> Collected:
    if isinstance(given, Collected):
        return given
    if isinstance(given, Statistics):
        return Collected(statistics=given)
    return Collected(statistics=Statistics.of(given), features=given)


def _add(
    result: FidResult, measure: str, a: Collected, b: Collected, rules: FidProtocol, network: FeatureNetwork | None
) -> FidResult:
    """The result with one more measure, or with a note that says why it is missing."""
    if measure == "isc":
        if a.score is None:
            why = network.without if network else "there are no logits"
            return _note(result, f"Inception Score not available: {why}")
        return dataclasses.replace(result, isc_mean=a.score.mean, isc_std=a.score.std)
    if measure == "sfid":
        if a.spatial is None or b.spatial is None:
            return _note(result, "sFID not available: a side has no statistics of spatial features (mu_s, sigma_s)")
        return dataclasses.replace(result, sfid=frechet_distance(a.spatial, b.spatial))
    if a.features is None or b.features is None:
        return _note(result, f"{measure} not available: it needs the images of both sides, not their statistics")
    return dataclasses.replace(result, **_of_pairs(measure, a.features, b.features, rules))


def _of_pairs(measure: str, a: Rows, b: Rows, rules: FidProtocol) -> dict[str, Any]:
    """Fields of the result that need the features of both sides."""
    if measure == "kid":
        kernel = rules.kid(a, b)
        return {"kid_mean": kernel.mean, "kid_std": kernel.std}
    if measure == "pr":
        return dataclasses.asdict(precision_recall(a, b, k=rules.neighbour, strict=rules.strict))
    if measure == "dc":
        return dataclasses.asdict(coverage(a, b, k=rules.dense_neighbour))
    return {"cmmd": cmmd(a, b)}


def _note(result: FidResult, text: str) -> FidResult:
    return dataclasses.replace(result, notes=(*result.notes, text))


def _notes(count: int | None, rules: FidProtocol) -> tuple[str, ...]:
    notes = [rules.note] if rules.note else []
    if rules.quoted_images and count != rules.quoted_images:
        notes.append(
            f"{count or 'an unknown number of'} images: not comparable with values of {rules.quoted_images:,} images, "
            "which are lower for the same model"
        )
    return tuple(notes)


def with_floor(result: FidResult, reference: Rows | None, seed: int) -> FidResult:
    """The result with two random parts of the reference measured against each other.

    Raises:
        ConfigError: The reference is known by its statistics only.
    """
    if reference is None:
        raise ConfigError("a floor needs the reference images, and only their statistics were given")
    from mmdiff.rng import generator

    half = min(len(reference) // 2, result.n_a or len(reference))
    order = torch.randperm(len(reference), generator=generator(seed, "fid-floor"))
    one, two = picked(reference, order[:half]), picked(reference, order[half : 2 * half])
    distance = frechet_distance(Statistics.of(one), Statistics.of(two))
    return dataclasses.replace(result, floor=distance, floor_kid=kid(one, two).mean, floor_n=half)


def _name(count: int | None) -> str:
    if count is None:
        return "fid"
    return f"fid{count // 1000}k" if count % 1000 == 0 else f"fid{count}"


if __name__ == "__main__":
    sys.exit(main())
