"""Running a distance over two sets of images, and looking at single images afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.errors import ConfigError

from .collect import Collected, collect
from .feature_network import FeatureNetwork
from .features import open_network
from .fid import FidResult, score, with_floor
from .fid_protocols import PROTOCOLS, FidProtocol
from .neighbours import nearest
from .processes import rank_and_world
from .rows import blocks
from .sources import ImageSet, is_statistics, open_images
from .statistics import array_names, file_sha256, read_statistics, write_statistics

__all__ = ["GalleryRow", "Study", "study"]

_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class GalleryRow:
    """Pictures that belong together on the page.

    Attributes:
        pictures: uint8 image [H, W, 3] and what it is.
        text: A line below them.
    """

    pictures: tuple[tuple[np.ndarray, str], ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class Study:
    """A measured pair of sets.

    Attributes:
        result: The numbers.
        judged: What was collected of the judged set.
        reference: What was collected of the reference set.
        images: The judged images; None where only statistics were given.
        real: The reference images; None where only statistics were given.
    """

    result: FidResult
    judged: Collected
    reference: Collected
    images: ImageSet | None
    real: ImageSet | None

    def write_statistics(self, path: Path) -> Path:
        """Write the statistics of the judged set, for use as a reference."""
        return write_statistics(path, self.judged.statistics, spatial=self.judged.spatial)

    def items(self) -> list[dict[str, Any]]:
        """For each judged image its nearest reference image; empty where a side has no features."""
        if self.images is None or self.real is None or not self._has_features:
            return []
        distance, place = self._nearest(1)
        rows = zip(self.images.names, place[:, 0].tolist(), distance[:, 0].tolist(), strict=True)
        return [{"image": name, "nearest": self.real.names[p], "distance": d} for name, p, d in rows]

    def galleries(self) -> Iterator[tuple[str, list[GalleryRow]]]:
        """Best and worst images by distance to the reference set, and the neighbours of the first ones."""
        if self.images is None:
            return
        if self.real is None or not self._has_features:
            rows = [GalleryRow(pictures=((self.images.read(i), self.images.names[i]),), text="") for i in self._first]
            yield "First images", rows
            return
        distance, place = self._nearest(min(3, len(self.real)))
        order = distance[:, 0].argsort().tolist()
        yield "Nearest to a reference image", [self._row(i, distance, place) for i in order[:_ROWS]]
        yield "Farthest from every reference image", [self._row(i, distance, place) for i in order[::-1][:_ROWS]]
        yield "Neighbours of the first images", [self._row(i, distance, place) for i in self._first]

    @property
    def _has_features(self) -> bool:
        return self.judged.features is not None and self.reference.features is not None

    @property
    def _first(self) -> range:
        return range(min(_ROWS, len(self.images or ())))

    def _row(self, i: int, distance: Tensor, place: Tensor) -> GalleryRow:
        assert self.images is not None
        assert self.real is not None
        near = [(self.real.read(p), f"{d:.2f}") for p, d in zip(place[i].tolist(), distance[i].tolist(), strict=True)]
        own = (self.images.read(i), "judged")
        return GalleryRow(pictures=(own, *near), text=Path(self.images.names[i]).name)

    def _nearest(self, k: int) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
        assert self.judged.features is not None
        assert self.reference.features is not None
        real = self.reference.features
        found = [nearest(rows, blocks(real), k) for _, rows in blocks(self.judged.features)]
        return torch.cat([near for near, _ in found]), torch.cat([place for _, place in found])


def study(
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
) -> Study:
    """Measure two sets of images; arguments as of `eval.fid.compare`."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    rules = PROTOCOLS[protocol]
    wanted = tuple(measures) if measures is not None else rules.measures
    network = open_network(rules.network_for(features), device=device)
    pairs = bool({"kid", "pr", "dc", "cmmd"} & set(wanted)) or floor or bool(draws)
    reader = _Reader(network, rules, wanted, pairs, batch_size, seed)
    images, judged = reader.read(a, num)
    real, reference = reader.read(b, num, sha256, judged=False)
    parts = reference
    if floor and num and not is_statistics(b) and len(open_images(b)) >= 2 * num:
        # At the same N where the reference is large enough: the floor falls with N, another N would flatter or blame.
        _, parts = reader.read(b, 2 * num, judged=False)
    if rank_and_world()[0]:  # features come together in the first process, which has all numbers
        wanted, floor, draws = ("fid",), False, 0
    result = score(judged, reference, protocol=protocol, measures=wanted, network=network, draws=draws, seed=seed)
    if is_statistics(b):
        result = dataclasses.replace(result, statistics_sha256=file_sha256(Path(str(b))))
    if floor:
        result = with_floor(result, parts.features, seed)
    return Study(result=result, judged=judged, reference=reference, images=images, real=real)


@dataclass(frozen=True)
class _Reader:
    network: FeatureNetwork
    rules: FidProtocol
    wanted: tuple[str, ...]
    pairs: bool
    batch_size: int
    seed: int

    def read(
        self, source: object, num: int | None, sha256: str | None = None, *, judged: bool = True
    ) -> tuple[ImageSet | None, Collected]:
        if is_statistics(source):
            return self._of_statistics(Path(str(source)), sha256)
        images = open_images(source).take(num, seed=self.seed)
        return images, collect(
            images,
            self.network,
            keep_features=self.pairs,
            spatial="sfid" in self.wanted,
            splits=self.rules.splits if judged and "isc" in self.wanted else None,
            batch_size=self.batch_size,
        )

    def _of_statistics(self, path: Path, sha256: str | None) -> tuple[ImageSet | None, Collected]:
        held = array_names(path)
        own = read_statistics(path, dim=self.network.dim, sha256=sha256)
        spatial = read_statistics(path, spatial=True) if "mu_s" in held and "sfid" in self.wanted else None
        if "arr_0" not in held or not self.pairs:
            return None, Collected(statistics=own, spatial=spatial)
        images = open_images(path)
        kept = collect(images, self.network, keep_features=True, batch_size=self.batch_size)
        return images, Collected(statistics=own, spatial=spatial, features=kept.features)
