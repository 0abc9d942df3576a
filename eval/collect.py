"""One pass over a set of images: every sum that any distance needs, and the features themselves only on request.

Means, covariances and the sums of the Inception Score do not grow with the number of images. Features do; above a limit
they lie in a temporary file instead of in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .feature_network import FeatureNetwork
from .inception_score import InceptionScore, ScoreSums
from .processes import gather_rows, merge_moments, merge_objects, rank_and_world
from .rows import Rows, feature_store
from .sources import ImageSet
from .statistics import Moments, Statistics

__all__ = ["Collected", "collect"]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What one pass over a set of images left.

    Attributes:
        statistics: Of the features.
        spatial: Of the spatial features of sFID; None where the network has none.
        features: Float32 [N, F], in the order of the set; None where nobody asked, and in all processes but the first.
        score: Inception Score; None where the network has no classifier or nobody asked.
    """

    statistics: Statistics
    spatial: Statistics | None = None
    features: Rows | None = None
    score: InceptionScore | None = None


@torch.no_grad()
def collect(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    keep_features: bool = False,
    spatial: bool = False,
    splits: Callable[[int], np.ndarray] | None = None,
    batch_size: int = 64,
) -> Collected:
    """Run the network over a set of images; several processes share the work.

    Args:
        images: The set.
        network: The network.
        keep_features: Keep every feature vector, for measures over pairs of images.
        spatial: Take the statistics of sFID.
        splits: Number of images -> split of each, for the Inception Score; None: no score.
        batch_size: Images per pass.

    Raises:
        ConfigError: An image is missing, damaged or of another size than the first; fewer than two images.
    """
    rank, world = rank_and_world()
    sums = _Sums(network, len(images), splits if splits is None else splits(len(images)), spatial, keep_features)
    share = images.part(rank, world)
    shape = np.shape(images.read(0)) if world > 1 else None
    with _bar(len(share), network.name) as bar:
        for number, batch in enumerate(share.batches(batch_size, shape=shape)):
            start = number * batch_size
            sums.update(network.taps(batch.permute(0, 3, 1, 2)), start, rank, world)
            bar.update(len(batch))
    return sums.result(rank, world)


class _Sums:
    def __init__(
        self, network: FeatureNetwork, count: int, splits: np.ndarray | None, spatial: bool, keep: bool
    ) -> None:
        self.count, self.dim = count, network.dim
        self.moments = Moments(network.dim)
        self.spatial: Moments | None = None
        self.want_spatial = spatial
        self.splits = splits
        self.score = ScoreSums(splits) if splits is not None else None
        rank, world = rank_and_world()
        self.rows = feature_store(len(range(rank, count, world)), network.dim) if keep else None

    def update(self, taps: dict[str, Tensor], start: int, rank: int, world: int) -> None:
        features = taps["features"]
        self.moments.update(features)
        if self.rows is not None:
            self.rows[start : start + len(features)] = features
        if self.want_spatial and "spatial" in taps:
            if self.spatial is None:
                self.spatial = Moments(taps["spatial"].shape[1])
            self.spatial.update(taps["spatial"])
        if self.score is not None and "logits" in taps:
            places = rank + world * torch.arange(start, start + len(features))
            self.score.update(taps["logits"], places)

    def result(self, rank: int, world: int) -> Collected:
        features = self.rows
        if self.rows is not None and world > 1:
            features = feature_store(self.count, self.dim) if rank == 0 else None
            gather_rows(self.rows, features)
        return Collected(
            statistics=merge_moments(self.moments).result(),
            spatial=merge_moments(self.spatial).result() if self.spatial is not None else None,
            features=features,
            score=self._score(),
        )

    def _score(self) -> InceptionScore | None:
        if self.score is None or self.splits is None:
            return None
        parts = merge_objects((self.score.count, self.score.entropy, self.score.classes))
        if not all(classes.numel() for _, _, classes in parts):
            return None
        total = ScoreSums(self.splits)
        total.count, total.entropy, total.classes = (sum(column) for column in zip(*parts, strict=True))
        return total.result()


def _bar(total: int, name: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=f"{name} features", unit="img", leave=False, disable=None)
