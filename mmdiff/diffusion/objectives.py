"""Losses of masked diffusion, computed at masked positions only.

The hidden states of masked positions are gathered first and the head runs on those, in chunks whose logits are
recomputed in the backward pass: for a vocabulary of 126,464 the logits never exist as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["chunked_cross_entropy", "token_weights"]


def chunked_cross_entropy(
    hidden: Float[Tensor, "n D"],
    labels: Int[Tensor, "n"],
    head: Callable[[Tensor], Tensor],
    *,
    chunk: int = 2048,
) -> Float[Tensor, "n"]:
    """Cross-entropy per position in float32, without holding all logits at once.

    Args:
        hidden: Float [n, D], states of the masked positions.
        labels: Int64 [n], the true classes of the head's vocabulary.
        head: Maps [m, D] to logits [m, V].
        chunk: Positions whose logits exist at the same time.

    Returns:
        Float32 [n], in nats.
    """

    def part(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), y, reduction="none")

    if len(hidden) <= chunk:
        return part(hidden, labels)
    pieces = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat([checkpoint(part, h, y, use_reentrant=False) for h, y in pieces])


def token_weights(
    masked: Bool[Tensor, "B L"], p: Float[Tensor, "B"], weights: Float[Tensor, "B L"]
) -> Float[Tensor, "B L"]:
    """Weight of every masked position: weight / p / (sum of the row's weights).

    With all weights 1 on an answer this is LLaDA's fine-tuning loss, cross-entropy / p / answer length; smaller weights
    on padding slots take them out of the normaliser as well. Rows without weights get zeros.

    Source: LLaDA (arXiv 2502.09992), published SFT code.
    """
    total = weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return masked * weights / p[:, None] / total
