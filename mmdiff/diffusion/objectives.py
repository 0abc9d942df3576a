"""Losses of masked diffusion, computed at masked positions only.

The hidden states of masked positions are gathered first and the head runs on those, in chunks whose logits are
recomputed in the backward pass: for a vocabulary of 126,464 the logits never exist as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mmdiff.errors import ConfigError

__all__ = [
    "LengthRule",
    "chunked_cross_entropy",
    "cross_entropy",
    "length_weights",
    "mean_of",
    "token_weights",
    "weighted_mean",
]

_CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at the same time unless a chunk is asked for: 64 MiB in float32. Half as many are worse on a
CPU: glibc keeps freed blocks below 32 MiB, and the memory a process holds doubles."""


def chunked_cross_entropy(
    hidden: Float[Tensor, "n D"],
    labels: Int[Tensor, "n"],
    head: Callable[[Tensor], Tensor],
    *,
    chunk: int | None = None,
) -> Float[Tensor, "n"]:
    """Cross-entropy per position in float32, without holding all logits at once.

    If there is more than one chunk, logits are computed again in the backward pass, so that at any moment the logits of
    one chunk exist, once in the head's dtype and once in float32.

    Args:
        hidden: Float [n, D], states of the masked positions.
        labels: Int64 [n], the true classes of the head's vocabulary.
        head: Maps [m, D] to logits [m, V].
        chunk: Positions whose logits exist at the same time; default as many as have 2^24 logits, at least one.

    Returns:
        Float32 [n], in nats.

    Raises:
        ConfigError: A chunk below 1.
    """

    def part(h: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(head(h), y)

    if chunk is None:
        with torch.no_grad():
            chunk = max(1, _CHUNK_ELEMENTS // head(hidden[:0]).shape[-1])
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk} positions; at least 1")
    if len(hidden) <= chunk:
        return part(hidden, labels)
    pieces = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    # Nothing in a head draws random numbers, so their state need not be kept.
    return torch.cat([checkpoint(part, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in pieces])


def cross_entropy(logits: Float[Tensor, "n V"], labels: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Cross-entropy per position; statistics and gradient in float32, one float32 copy of the logits at most.

    Args:
        logits: Float [n, V] of any dtype, of which the gradient has the same.
        labels: Int64 [n], the true classes.

    Returns:
        Float32 [n], in nats. It can be differentiated once.
    """
    return _CrossEntropy.apply(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    """Keeps one number per row; PyTorch's own keeps log-probabilities, as many as there are logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = torch.logsumexp(logits.float(), dim=1)
        ctx.save_for_backward(logits, labels, total)
        return total - logits.gather(1, labels[:, None])[:, 0].float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, labels, total = ctx.saved_tensors
        scale = grads[0][:, None]
        # A copy, since a head may need its own output.
        grad = logits.to(torch.float32, copy=True).sub_(total[:, None]).exp_().mul_(scale)
        grad.scatter_add_(1, labels[:, None], -scale)
        return grad.to(logits.dtype), None


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


LengthRule = Literal["token", "square", "sample"]
"""How much an answer counts by its length l: its tokens 1, l^(-1/2), or 1 / l each."""


def length_weights(lengths: Int[Tensor, "B"], p: Float[Tensor, "B"], rule: LengthRule) -> Float[Tensor, "B"]:
    """Weight of every masked token of an answer: its length's, divided by the mask probability.

    The loss is the weighted mean, `weighted_mean`, over all tokens of the step.

    Source: LLaDA-o (arXiv 2603.01068), ``len2weight`` of its published code.
    """
    exponent = {"token": 0.0, "square": -0.5, "sample": -1.0}[rule]
    return lengths.to(p.dtype) ** exponent / p


def weighted_mean(loss: Float[Tensor, "n"], weights: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Sum of weight times loss over the sum of weights; 0 if there is no weight."""
    return (weights * loss).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def mean_of(loss: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Plain mean over the positions; 0 if there are none."""
    return loss.sum() / max(len(loss), 1)
