"""Does an image find its own text among all texts? Recall at k from two matrices of unit vectors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["RetrievalResult", "score"]

_UNIT = 1e-3


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Recall of the true text.

    Attributes:
        n: Number of images.
        candidates: Number of different texts.
        recall: ``(k, share of images whose true text is among the best k)`` for each k.
        chance: The same for a random order.
        median_rank: Median rank of the true text, 1 = best.
        ranks: Rank of each image's true text; for `eval.bootstrap`.
    """

    n: int
    candidates: int
    recall: tuple[tuple[int, float], ...]
    chance: tuple[tuple[int, float], ...]
    median_rank: float
    ranks: tuple[int, ...]


def score(
    images: Float[Tensor, "N E"],
    texts: Float[Tensor, "M E"],
    *,
    truth: Sequence[int] | None = None,
    keys: Sequence[Hashable] | None = None,
    protocol: Sequence[int] = (1, 5, 10),
) -> RetrievalResult:
    """Rank of the true text of each image among all texts, ties counted against the model.

    Args:
        images: Unit vectors of the images, float [N, E].
        texts: Unit vectors of the texts, float [M, E].
        truth: Number of each image's text; None: text i belongs to image i.
        keys: Text behind each row of ``texts``; rows with an equal key are one candidate (equal captions are no error).
        protocol: The k of recall at k.

    Raises:
        ConfigError: Shapes that do not fit, vectors that are not unit, or a truth outside the texts.
    """
    target = torch.arange(len(images)) if truth is None else torch.as_tensor(list(truth))
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or len(target) != len(images):
        raise ConfigError(f"images {tuple(images.shape)}, texts {tuple(texts.shape)}, {len(target)} truths do not fit")
    if not len(images) or int(target.max()) >= len(texts) or int(target.min()) < 0:
        raise ConfigError(f"truth {target.tolist()[:3]}... must number the {len(texts)} texts")
    for name, rows in (("image", images), ("text", texts)):
        if (gap := float((rows.double().norm(dim=1) - 1).abs().max())) > _UNIT:
            raise ConfigError(f"{name} vectors differ from unit length by up to {gap:.2g}; normalise them")
    texts, target = _distinct(texts, target, keys)
    similarity = images.double() @ texts.double().T
    own = similarity.gather(1, target[:, None])
    others = torch.ones_like(similarity, dtype=torch.bool).scatter_(1, target[:, None], False)
    ranks = 1 + ((similarity >= own) & others).sum(dim=1)
    return RetrievalResult(
        n=len(images),
        candidates=len(texts),
        recall=tuple((k, float((ranks <= k).double().mean())) for k in protocol),
        chance=tuple((k, min(1.0, k / len(texts))) for k in protocol),
        median_rank=float(ranks.double().quantile(0.5)),
        ranks=tuple(ranks.tolist()),
    )


def _distinct(texts: Tensor, target: Tensor, keys: Sequence[Hashable] | None) -> tuple[Tensor, Tensor]:
    if keys is None:
        return texts, target
    if len(keys) != len(texts):
        raise ConfigError(f"{len(keys)} keys for {len(texts)} texts")
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    number = {key: n for n, key in enumerate(first)}
    return texts[list(first.values())], torch.tensor([number[key] for key in keys])[target]
