"""Inception Score, computed while images stream by: only sums per split are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["InceptionScore", "ScoreSums", "inception_score", "splits_in_order", "splits_shuffled"]


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """exp of the mean divergence of an image's classes from the mean classes of its split.

    Attributes:
        mean: Mean over the splits.
        std: Population standard deviation over the splits.
    """

    mean: float
    std: float


def splits_shuffled(count: int, *, splits: int = 10, shuffle: bool = True, seed: int = 2020) -> np.ndarray:
    """Split of each image, int64 [count]: equal parts of a seeded permutation.

    Source: behaviour of torch-fidelity (0.3.0 and 0.4.0 have the same seed).
    """
    order = np.random.RandomState(seed).permutation(count) if shuffle else np.arange(count)
    bounds = [i * count // splits for i in range(splits + 1)]
    out = np.empty(count, dtype=np.int64)
    for number in range(splits):
        out[order[bounds[number] : bounds[number + 1]]] = number
    return out


def splits_in_order(count: int, *, size: int = 5000) -> np.ndarray:
    """Split of each image, int64 [count]: blocks of ``size`` in the order of the files, the last one shorter.

    Source: behaviour of the ADM evaluator. Files sorted by class would make this score collapse.
    """
    return np.arange(count, dtype=np.int64) // size


class ScoreSums:
    """Sums of class probabilities per split; may be filled in any order and merged.

    Args:
        splits: Split of each image, int64 [N].
    """

    def __init__(self, splits: np.ndarray) -> None:
        self.splits = torch.from_numpy(splits)
        self.count = torch.zeros(int(splits.max()) + 1, dtype=torch.float64)
        self.entropy = torch.zeros_like(self.count)
        self.classes = torch.zeros(len(self.count), 0, dtype=torch.float64)

    def update(self, logits: Float[Tensor, "B K"], places: Tensor) -> ScoreSums:
        """Take in the images with numbers ``places``, int64 [B]; returns itself."""
        logs = logits.double().log_softmax(dim=1)
        if not self.classes.numel():
            self.classes = torch.zeros(len(self.count), logs.shape[1], dtype=torch.float64)
        at = self.splits[places]
        self.count.index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
        self.entropy.index_add_(0, at, (logs.exp() * logs).sum(dim=1))
        self.classes.index_add_(0, at, logs.exp())
        return self

    def result(self) -> InceptionScore:
        """The score of everything seen."""
        if not bool((self.count > 0).all()):
            raise ConfigError(f"Inception Score of {int(self.count.sum())} images in {len(self.count)} splits")
        mean = self.classes / self.count[:, None]
        own = torch.special.xlogy(mean, mean).sum(dim=1)
        each = (self.entropy / self.count - own).exp()
        return InceptionScore(mean=float(each.mean()), std=float(each.std(correction=0)))


def inception_score(logits: Float[Tensor, "N K"], splits: np.ndarray) -> InceptionScore:
    """Score of logits held in memory; see `splits_shuffled` and `splits_in_order`."""
    return ScoreSums(splits).update(logits, torch.arange(len(logits))).result()
