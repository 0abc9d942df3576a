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
    share = images.part(rank, world, batch_size)
    sums = _Sums(network, splits if splits is None else splits(len(images)), spatial)
    rows = feature_store(len(share), network.dim) if keep_features else None
    shape = np.shape(images.read(0)) if world > 1 else None
    with _bar(len(share), network.name) as bar:
        for number, batch in enumerate(share.batches(batch_size, shape=shape)):
            taps = network.taps(batch.permute(0, 3, 1, 2))
            sums.update(taps, first=(rank + world * number) * batch_size)
            if rows is not None:
                rows[number * batch_size : number * batch_size + len(batch)] = taps["features"]
            bar.update(len(batch))
    if rows is not None and world > 1:
        whole = feature_store(len(images), network.dim) if rank == 0 else None
        gather_rows(rows, whole, batch_size)
        rows = whole
    return sums.result(rows)


class _Sums:
    def __init__(self, network: FeatureNetwork, splits: np.ndarray | None, spatial: bool) -> None:
        self.moments = Moments(network.dim)
        self.spatial: Moments | None = None
        self.want_spatial = spatial
        self.splits = splits
        self.score = ScoreSums(splits) if splits is not None else None

    def update(self, taps: dict[str, Tensor], first: int) -> None:
        """Take in a batch whose first image has the number ``first`` in the whole set."""
        self.moments.update(taps["features"])
        if self.want_spatial and "spatial" in taps:
            if self.spatial is None:
                self.spatial = Moments(taps["spatial"].shape[1])
            self.spatial.update(taps["spatial"])
        if self.score is not None and "logits" in taps:
            self.score.update(taps["logits"], torch.arange(first, first + len(taps["logits"])))

    def result(self, features: Rows | None) -> Collected:
        return Collected(
            statistics=merge_moments(self.moments).result(),
            spatial=self._spatial(),
            features=features,
            score=self._score(),
        )

    def _spatial(self) -> Statistics | None:
        # A process without a single batch must take part in the merging all the same.
        sizes = merge_objects(0 if self.spatial is None else len(self.spatial.mean))
        return merge_moments(self.spatial or Moments(max(sizes))).result() if any(sizes) else None

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
